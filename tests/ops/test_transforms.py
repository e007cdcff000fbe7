"""torch.func, forward mode and second derivatives: the right answer, or an error that names the backend that has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import ifnd_fast
from tests.ops.cases import INPUTS, STRATEGIES, make_case

CASE = make_case(5, 40, 12, 2, clusters=3)
Q, P, N = CASE.query, CASE.positive, CASE.negatives
FORWARD = 'no forward-mode derivatives on backend=.cpu.*use backend="reference"'
SECOND = 'no second derivatives on backend=.cpu.*use backend="reference"'
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")  # vmap's rule is ours


def loss(*inputs: Tensor, strategy: str = "eliminate", backend: str = "cpu") -> Tensor:
    return replace(CASE, false_negatives=strategy).loss(*inputs, backend=backend, reduction="mean")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@every_strategy
@pytest.mark.parametrize("argument", range(3), ids=INPUTS)
def test_gradients_by_torch_func(argument, strategy):
    def of(backend):
        return lambda *inputs: loss(*inputs, strategy=strategy, backend=backend)

    right = grad(of("reference"), argument)(Q, P, N)
    assert right.abs().max() > 0
    close(grad(of("cpu"), argument)(Q, P, N), right)
    close(jacrev(of("cpu"), argument)(Q, P, N), right)
    close(vjp(of("cpu"), Q, P, N)[1](torch.tensor(1.0))[argument], right)


@every_strategy
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vmap(backend, strategy):
    """Over every argument, inside and outside of the gradient, and over labels."""
    inputs = [torch.stack([t, t.flip(0), 2 * t]) for t in (Q, P, N)]
    labels = torch.stack([CASE.query_labels, CASE.query_labels.flip(0), CASE.query_labels - CASE.query_labels])

    def of(q, p, n, y):
        return ifnd_fast.info_nce(
            q, p, n, query_labels=y, negative_labels=CASE.negative_labels, query_ids=CASE.query_ids,
            negative_ids=CASE.negative_ids, false_negatives=strategy, backend=backend,
        )  # fmt: skip

    gradient = grad(of, argnums=(0, 1, 2))
    close(vmap(of)(*inputs, labels), torch.stack([of(*given) for given in zip(*inputs, labels, strict=True)]))
    gradients = [gradient(*given) for given in zip(*inputs, labels, strict=True)]
    batched = vmap(gradient)(*inputs, labels)
    outside = grad(lambda *given: vmap(of)(*given, labels).sum(), argnums=(0, 1, 2))(*inputs)
    required = [t.clone().requires_grad_() for t in inputs]
    vmap(of)(*required, labels).sum().backward()
    for argument in range(3):
        right = torch.stack([of_one[argument] for of_one in gradients])
        for found in (batched[argument], outside[argument], required[argument].grad):
            close(found, right)


def test_a_batch_of_upstream_gradients():
    q = Q.clone().requires_grad_()
    rows = CASE.loss(q, P, N, backend="cpu")
    (found,) = torch.autograd.grad(rows, q, torch.eye(5), is_grads_batched=True)
    close(found, jacrev(lambda q: CASE.loss(q, P, N, backend="reference"))(Q))


@pytest.mark.parametrize("argument", range(3), ids=INPUTS)
def test_forward_mode_is_refused_or_right(argument):
    inputs, direction = (Q, P, N), torch.randn((Q, P, N)[argument].shape)

    def of(x, backend):
        return loss(*inputs[:argument], x, *inputs[argument + 1 :], backend=backend)

    x = inputs[argument]
    tangent = jvp(lambda x: of(x, "reference"), (x,), (direction,))[1]
    assert float(tangent) == pytest.approx(float((grad(of)(x, "reference") * direction).sum()), rel=1e-4)
    for refused in (
        lambda: jvp(lambda x: of(x, "cpu"), (x,), (direction,)),
        lambda: jacfwd(lambda x: of(x, "cpu"))(x),
        lambda: linearize(lambda x: of(x, "cpu"), x),
        lambda: jvp(lambda x: of(x, "auto"), (x,), (direction,)),
        lambda: hessian(lambda x: of(x, "cpu"))(x),
    ):
        with pytest.raises(RuntimeError, match=FORWARD):
            refused()
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=FORWARD):
            of(forward_ad.make_dual(x, direction), "cpu")
        close(of(x, "cpu"), of(x, "reference"))  # no tangent, nothing to refuse
        close(forward_ad.unpack_dual(of(forward_ad.make_dual(x, direction), "reference")).tangent, tangent)


def test_second_derivatives_are_refused_or_right():
    def of(q, backend):
        return loss(q, P, N, backend=backend)

    right = hessian(lambda q: of(q, "reference"))(Q)
    close(jacrev(jacrev(lambda q: of(q, "reference")))(Q), right)
    assert right.abs().max() > 0
    for refused in (
        lambda: jacrev(jacrev(lambda q: of(q, "cpu")))(Q),
        lambda: grad(lambda q: grad(of)(q, "cpu").square().sum())(Q),
        lambda: vmap(grad(lambda q: grad(of)(q, "cpu").square().sum()))(torch.stack([Q, Q])),
        lambda: torch.autograd.functional.hessian(lambda q: of(q, "cpu"), Q),
        lambda: torch.autograd.functional.jvp(lambda q: of(q, "cpu"), Q, Q),
    ):
        with pytest.raises(RuntimeError, match=SECOND):
            refused()


def test_functional_call():
    """A module's parameters given from outside, gradients by torch.func: for meta-learning and ensembles."""
    torch.manual_seed(0)
    encoder, criterion = torch.nn.Linear(12, 12), ifnd_fast.IFNDLoss(0.3)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}

    def of(parameters):
        return criterion(functional_call(encoder, parameters, (Q,)), P, N)

    found = grad(of)(parameters)
    of(dict(encoder.named_parameters())).backward()
    for name, parameter in encoder.named_parameters():
        close(found[name], parameter.grad)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_assign_clusters(backend, metric):
    def of(x, c):
        return ifnd_fast.assign_clusters(x, c, metric=metric, backend=backend)

    features, centroids = torch.stack([Q, P]), torch.stack([N, N + 100])
    labels, confidence = vmap(of)(features, centroids)
    for i in range(2):
        one = of(features[i], centroids[i])
        assert torch.equal(labels[i], one[0])
        close(confidence[i], one[1])
    _, tangent = jvp(lambda x: of(x, N)[1], (Q,), (torch.ones_like(Q),))  # documented: not differentiable
    assert not tangent.any()


@pytest.mark.parametrize("transform", [jacfwd, hessian, lambda f: jacrev(jacrev(f))])
def test_compiled(transform):
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="no (forward-mode|second) derivatives .*use backend"):
        torch.compile(transform(lambda q: loss(q, P, N)), backend="aot_eager")(Q)
    found = torch.compile(grad(lambda q: CASE.loss(q, P, N, reduction="mean")), backend="aot_eager")(Q)
    close(found, grad(lambda q: loss(q, P, N, backend="reference"))(Q))
