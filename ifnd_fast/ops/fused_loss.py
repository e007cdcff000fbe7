"""The fused loss in torch: the operator ifnd_fast::info_nce, its gradients, and a direct way around it.

The operator is for what traces or transforms calls: torch.compile, torch.export, torch.func. A call of plain tensors
goes to the kernels directly, which saves torch's machinery, half of a small call's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ifnd_fast.ops import backends, checks
from ifnd_fast.ops.batches import one_by_one
from ifnd_fast.ops.checks import transformed
from ifnd_fast.ops.direct import is_plain
from ifnd_fast.ops.pair_labels import PairLabels
from ifnd_fast.ops.reference import saved_tensors

FORWARD_MODE = "torch.func.jvp, jacfwd or hessian asks for them"


class Settings(NamedTuple):
    """What of a call is no tensor."""

    temperature: float  # where it isn't learned
    false_negatives: str
    level_combination: str
    backend: str


class Extras(NamedTuple):
    """What few calls have."""

    learned_temperature: Tensor | None = None  # (), in the place of the number
    log_hard: Tensor | None = None  # (B,) float32, log of the sum of the hard negatives' exponentials: joins every Z
    ceiling: Tensor | None = None  # (B,) float32: a key with q.n above it is a false negative


def losses(
    query: Tensor, positive: Tensor, negatives: Tensor, labels: PairLabels, settings: Settings, extras: Extras
) -> Tensor:
    """The loss of each query, (B,), of checked arguments, by a fused backend."""
    # What is batched inside of torch.func.grad does not say that it requires a gradient.
    differentiable = (query, positive, negatives, extras.learned_temperature, extras.log_hard)
    wanted = transformed() or any(t is not None and t.requires_grad for t in differentiable)
    with_grad = torch.is_grad_enabled() and wanted
    arguments = (query, positive, negatives, *labels, *settings, with_grad, *extras)
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise _only_once("forward-mode derivatives", FORWARD_MODE, settings.backend)
        return _info_nce(*arguments)[0]
    if forward_ad._current_level >= 0 or not is_plain(query, positive, negatives, *labels, *extras):
        return (_Transformed if transformed() else _Fused).apply(*arguments)[0]
    return _Direct.apply(*arguments) if with_grad else _forward(*arguments)[0]


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    query_labels: Tensor | None,
    negative_labels: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    backend: str,
    with_grad: bool,
    learned_temperature: Tensor | None,
    log_hard: Tensor | None,
    ceiling: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), its gradients by row: query_grad (B, D) and positive_weight (B,) = d loss / d s(q, p), and
    what the negatives' gradient needs: log_normalizer and, to attract, false_negative_counts (B, n_losses), a loss for
    each level or one where they are combined."""
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    checks.label_range(labels)
    query, positive, negatives = query.resolve_neg(), positive.resolve_neg(), negatives.resolve_neg()
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_forward(
            query, positive, negatives, labels, _number(temperature, learned_temperature), false_negatives,
            level_combination, with_grad, ** _given(log_hard=log_hard, ceiling=ceiling),
        )  # fmt: skip


def _number(temperature: float, learned: Tensor | None) -> float:
    """For the kernels. A learned one on a GPU is waited for."""
    return temperature if learned is None else checks.temperature(learned.detach().item())


def _given(**extras: Tensor | None) -> dict[str, Tensor]:
    """Those that there are: a backend without them was refused, and need not know them."""
    return {name: tensor for name, tensor in extras.items() if tensor is not None}


_info_nce = torch.library.custom_op("ifnd_fast::info_nce", _forward, mutates_args=())


@_info_nce.register_fake
def _(
    query, positive, negatives, query_labels, negative_labels, query_ids, negative_ids, temperature, false_negatives,
    level_combination, backend, with_grad, learned_temperature, log_hard, ceiling,
):  # fmt: skip
    rows, dim = query.shape
    n_losses = PairLabels(query_labels, negative_labels, query_ids, negative_ids).n_losses(level_combination)
    return (
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((rows if with_grad else 0, dim), dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((rows, n_losses), dtype=torch.float32),
        query.new_empty((rows, n_losses), dtype=torch.int32),
    )


def _grad_of_negatives(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    query_labels: Tensor | None,
    negative_labels: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    log_normalizer: Tensor,
    false_negative_counts: Tensor,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    backend: str,
    learned_temperature: Tensor | None,
    ceiling: Tensor | None,
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32: a second pass, only where it is asked for."""
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    loss_grad, query, negatives = loss_grad.resolve_neg(), query.resolve_neg(), negatives.resolve_neg()
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_negatives_grad(
            loss_grad, query, negatives, labels, log_normalizer, false_negative_counts,
            _number(temperature, learned_temperature), false_negatives, level_combination, ** _given(ceiling=ceiling),
        )  # fmt: skip


_negatives_grad = torch.library.custom_op("ifnd_fast::info_nce_negatives_grad", _grad_of_negatives, mutates_args=())


@_negatives_grad.register_fake
def _(
    loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids, log_normalizer,
    false_negative_counts, temperature, false_negatives, level_combination, backend, learned_temperature,
    ceiling,
):  # fmt: skip
    return negatives.new_empty(negatives.shape, dtype=torch.float32)


_info_nce.register_vmap(one_by_one(_info_nce))
_negatives_grad.register_vmap(one_by_one(_negatives_grad))


class Wanted(NamedTuple):
    """The inputs whose gradients are."""

    query: bool
    positive: bool
    negatives: bool
    temperature: bool
    log_hard: bool

    @staticmethod
    def of(ctx) -> Wanted:
        needed = ctx.needs_input_grad
        return Wanted(*needed[:3], *needed[12:14])


class Saved(NamedTuple):
    """Of the forward pass, for the gradients. What a queue holds is kept for the negatives' own gradient alone: where
    that isn't wanted, it may be written over before the backward pass."""

    query: Tensor
    query_grad: Tensor
    positive_weight: Tensor
    log_normalizer: Tensor
    learned_temperature: Tensor | None
    log_hard: Tensor | None
    false_negative_counts: Tensor  # from here on the negatives'
    ceiling: Tensor | None
    negatives: Tensor | None
    query_labels: Tensor | None
    negative_labels: Tensor | None
    query_ids: Tensor | None
    negative_ids: Tensor | None


def _save(ctx, inputs, output) -> None:
    query, _, negatives, *others = inputs
    labels, ctx.settings, (learned_temperature, log_hard, ceiling) = others[:4], Settings(*others[4:8]), others[9:]
    _, query_grad, positive_weight, log_normalizer, false_negative_counts = output
    keys = (negatives, *labels) if Wanted.of(ctx).negatives else (None,) * 5
    ctx.save_for_backward(
        query, query_grad, positive_weight, log_normalizer, learned_temperature, log_hard, false_negative_counts,
        ceiling, *keys,
    )  # fmt: skip


def _backward(ctx, loss_grad: Tensor, *_):
    if torch.is_grad_enabled() and not transformed():  # create_graph
        raise _only_once("second derivatives", "create_graph=True asks for them", ctx.settings.backend)
    return _as_inputs((_Gradients.apply if transformed() else _gradients), ctx, loss_grad)


def _as_inputs(
    gradients: Callable[..., tuple[Tensor | None, ...]], ctx, loss_grad: Tensor
) -> tuple[Tensor | None, ...]:
    """In the places of the operator's arguments."""
    *of_rows, temperature, log_hard = gradients(loss_grad, *saved_tensors(ctx), ctx.settings, Wanted.of(ctx))
    return (*of_rows, *(None,) * 9, temperature, log_hard, None)


def _gradients(loss_grad: Tensor, *saved_settings_wanted) -> tuple[Tensor | None, ...]:
    """With g the upstream gradient (B,): d/dq = g query_grad; d/dp = g positive_weight q / tau; d/dn by its own pass.

    The loss is a function of q / tau, so tau d/dtau = -q . d/dq: the sums over keys that the query's gradient has give
    d/dtau = -1/tau sum_k (d loss / d s_k) s_k too. And d / d log_hard = mean_l e^{log_hard - log Z_l}.
    """
    *tensors, settings, wanted = saved_settings_wanted
    saved = Saved(*tensors)
    learned = saved.learned_temperature
    temperature = settings.temperature if learned is None else learned.to(torch.float32)
    loss_grad = loss_grad.float()
    grads: list[Tensor | None] = [None] * len(wanted)
    if wanted.query:
        grads[0] = (loss_grad[:, None] * saved.query_grad).to(saved.query.dtype)
    if wanted.positive:
        weight = loss_grad * saved.positive_weight / temperature
        grads[1] = (weight[:, None] * saved.query).to(saved.query.dtype)
    if wanted.negatives:
        grads[2] = _negatives_gradient(loss_grad, saved, settings)
    if wanted.temperature:
        by_row = (saved.query * saved.query_grad).sum(1)
        grads[3] = (-(loss_grad * by_row).sum() / temperature).to(learned)
    if wanted.log_hard and saved.log_hard is not None:
        grads[4] = loss_grad * (saved.log_hard[:, None] - saved.log_normalizer).exp().mean(1)
    return tuple(grads)


def _negatives_gradient(loss_grad: Tensor, saved: Saved, settings: Settings) -> Tensor:
    query, *_, negatives, query_labels, negative_labels, query_ids, negative_ids = saved
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    sums = saved.log_normalizer, saved.false_negative_counts
    operator: Callable[..., Tensor] = _negatives_grad
    if is_plain(loss_grad, query, negatives, *labels, *sums):
        operator = _grad_of_negatives
    extras = saved.learned_temperature, saved.ceiling
    return operator(loss_grad, query, negatives, *labels, *sums, *settings, *extras).to(query.dtype)


_info_nce.register_autograd(_backward, setup_context=_save)


def _only_once(what: str, why: str, backend: str) -> RuntimeError:
    return RuntimeError(f'info_nce has no {what} on backend={backend!r}, and {why}: use backend="reference"')


class _Direct(torch.autograd.Function):
    """The operator's kernels for plain tensors: nothing between them and autograd."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _forward(*arguments)
        _save(ctx, arguments, output)
        return output[0]

    backward = staticmethod(_backward)


class _Fused(torch.autograd.Function):
    """The operator for torch.func too, with forward mode refused: to the operator alone it would be a tangent of 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _info_nce(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx, *_) -> None:
        raise _only_once("forward-mode derivatives", FORWARD_MODE, ctx.settings.backend)


class _Transformed(_Fused):
    """The same inside of torch.func, which always records gradients: only what differentiates them is refused."""

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        return _as_inputs(_Gradients.apply, ctx, loss_grad)


class _Gradients(torch.autograd.Function):
    """`_gradients`, which differentiated are refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend = inputs[-2].backend

    @staticmethod
    def backward(ctx, *_):
        raise _only_once("second derivatives", "torch.func asks for them", ctx.backend)
