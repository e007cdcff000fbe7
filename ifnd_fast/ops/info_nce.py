"""info_nce: the contrastive loss with false negatives taken out, attracted or kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ifnd_fast.ops import backends, checks, reference
from ifnd_fast.ops.batches import one_by_one
from ifnd_fast.ops.checks import COMBINATIONS, STRATEGIES
from ifnd_fast.ops.pair_labels import PairLabels

REDUCTIONS = ("mean", "sum", "none")
MAX_LEVELS = 16
FORWARD_MODE = "torch.func.jvp, jacfwd or hessian asks for them"


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.2,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    false_negatives: str = "eliminate",
    level_combination: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over a queue of negatives, without its false negatives (Chen et al., ICLR 2022, eqs. 4 and 5).

    With s(a, b) = a.b / temperature and F_l(i) = {k : y_l(k) = y_l(i) >= 0}, query i's loss is

    - "eliminate": mean_l of -log( e^{s(q,p)} / (e^{s(q,p)} + sum_{k not in F_l} e^{s(q,n_k)}) )
    - "attract":   mean_l of -1/(1+|F_l|) sum_{x in {p} u F_l} log( e^{s(q,x)} / (e^{s(q,p)} + sum_k e^{s(q,n_k)}) )
    - "keep":      plain InfoNCE, whatever the labels.

    A negative with the query's own id (another view of the same image) is in no sum at any level. An id below 0 is
    unknown, as in an empty slot of a queue: it is no other's, not even that of another -1.

    Args:
        query: (B, D) anchors; float32, float16, bfloat16 (float64: reference only). Usually L2-normalised.
        positive: (B, D) other view of each anchor.
        negatives: (K, D) queue, K >= 0.
        temperature: softmax temperature, 1e-6 to 1e6.
        query_labels: (B, L) int32 pseudo labels at L levels, 1 <= L <= 16; -1 is no accepted label.
        negative_labels: (K, L) int32. Without labels nothing is detected.
        query_ids: (B,) int64 dataset indices; below 0: unknown. negative_ids: (K,) int64.
        false_negatives: "eliminate", "attract" or "keep".
        level_combination: "mean" over the levels' losses; or one loss, in which a key is a false negative when it has
            the query's label at "any" level, or at "all" levels.
        reduction: "mean", "sum" or "none".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (B,) with reduction "none". It is
        differentiable once in query, positive and negatives, in reverse mode (the reference: any number of times, and
        in forward mode), also by torch.func.grad and under torch.func.vmap. Logits and sums are float32; from
        half-precision inputs a gradient's softmax weights may be rounded to the inputs' dtype before they multiply the
        keys, as tensor cores need, and the loss never is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range (labels are read
            for their range on the CPU only), or a backend asked for by name that can't run here.
        RuntimeError: in a backward pass with create_graph=True, where torch.func asks for a second derivative, and in
            forward mode (torch.func.jvp, jacfwd, hessian), except by the reference.

    Example:
        >>> z, keys = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        >>> queue = torch.nn.functional.normalize(torch.randn(100, 16))
        >>> y, queue_y = torch.randint(-1, 5, (8, 3)).int(), torch.randint(-1, 5, (100, 3)).int()
        >>> info_nce(z, keys, queue, query_labels=y, negative_labels=queue_y).shape
        torch.Size([])
    """
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    temperature = checks.temperature(temperature)
    _check(query, positive, negatives, labels)
    checks.choice("false_negatives", false_negatives, STRATEGIES)
    checks.choice("level_combination", level_combination, COMBINATIONS)
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = backends.choose(backend, "info_nce", query.device, query.dtype)
    if backend == "reference":
        _check_label_range(labels)
        loss = reference.info_nce(query, positive, negatives, temperature, *labels, false_negatives, level_combination)
    else:
        # What is batched inside of torch.func.grad does not say that it requires a gradient.
        wanted = _transformed() or any(t.requires_grad for t in (query, positive, negatives))
        with_grad = torch.is_grad_enabled() and wanted
        loss = _fused(backend)(
            query, positive, negatives, *labels, temperature, false_negatives, level_combination, backend, with_grad
        )[0]
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _check(query: Tensor, positive: Tensor, negatives: Tensor, labels: PairLabels) -> None:
    checks.matrix("query", query)
    checks.matrix("positive", positive, query, "query")
    checks.matrix("negatives", negatives, query, "query")
    if len(query) == 0:
        raise ValueError("query must have at least one row, got shape " + str(tuple(query.shape)))
    if positive.shape != query.shape:
        raise ValueError(f"positive must have query's shape {tuple(query.shape)}, got {tuple(positive.shape)}")
    query_labels, negative_labels, query_ids, negative_ids = labels
    for a, b, what in (
        (query_labels, negative_labels, ("query_labels", "negative_labels")),
        (query_ids, negative_ids, ("query_ids", "negative_ids")),
    ):
        if (a is None) != (b is None):
            raise ValueError(f"{what[0]} and {what[1]} go together: only {what[a is None]} was given")
    if query_labels is not None and negative_labels is not None:
        checks.integers("query_labels", query_labels, torch.int32, (len(query), None), query, "query")
        if not 1 <= labels.levels <= MAX_LEVELS:
            raise ValueError(f"query_labels must have 1 to {MAX_LEVELS} levels (columns), got {labels.levels}")
        shape = (len(negatives), labels.levels)
        checks.integers("negative_labels", negative_labels, torch.int32, shape, query, "query")
    if query_ids is not None and negative_ids is not None:
        checks.integers("query_ids", query_ids, torch.int64, (len(query),), query, "query")
        checks.integers("negative_ids", negative_ids, torch.int64, (len(negatives),), query, "query")


def _check_label_range(labels: PairLabels) -> None:
    """On the CPU only: on a GPU it would stall the stream, and there any negative label counts as -1."""
    if torch.compiler.is_compiling() or _transformed():
        return
    for name, given in (("query_labels", labels.query_labels), ("negative_labels", labels.negative_labels)):
        if given is not None and given.device.type == "cpu" and given.numel() and int(given.min()) < -1:
            raise ValueError(f"{name} must be -1 (no label) or a cluster number, got {int(given.min())}")


def _fused(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The fused operator as what calls here can differentiate it: the compiler by the gradient that is registered for
    it, others by functions that also refuse what there is no gradient for."""
    if not torch.compiler.is_compiling():
        return (_Transformed if _transformed() else _Fused).apply
    if forward_ad._current_level >= 0:
        raise _only_once("forward-mode derivatives", FORWARD_MODE, backend)
    return _info_nce


def _transformed() -> bool:
    """Whether torch.func differentiates or batches this call: its tensors have no values of their own to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.library.custom_op("ifnd_fast::info_nce", mutates_args=())
def _info_nce(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), its gradients by row: query_grad (B, D) and positive_weight (B,) = d loss / d s(q, p), and
    what the negatives' gradient needs: log_normalizer and, to attract, false_negative_counts (B, n_losses), a loss for
    each level or one where they are combined."""
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    _check_label_range(labels)
    query, positive, negatives = query.resolve_neg(), positive.resolve_neg(), negatives.resolve_neg()
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_forward(
            query, positive, negatives, labels, temperature, false_negatives, level_combination, with_grad
        )


@_info_nce.register_fake
def _(
    query, positive, negatives, query_labels, negative_labels, query_ids, negative_ids,
    temperature, false_negatives, level_combination, backend, with_grad,
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


@torch.library.custom_op("ifnd_fast::info_nce_negatives_grad", mutates_args=())
def _negatives_grad(
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
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32: a second pass, only where it is asked for."""
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    loss_grad, query, negatives = loss_grad.resolve_neg(), query.resolve_neg(), negatives.resolve_neg()
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_negatives_grad(
            loss_grad, query, negatives, labels, log_normalizer, false_negative_counts,
            temperature, false_negatives, level_combination,
        )  # fmt: skip


@_negatives_grad.register_fake
def _(
    loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    log_normalizer, false_negative_counts, temperature, false_negatives, level_combination, backend,
):  # fmt: skip
    return negatives.new_empty(negatives.shape, dtype=torch.float32)


_info_nce.register_vmap(one_by_one(_info_nce))
_negatives_grad.register_vmap(one_by_one(_negatives_grad))


def _save(ctx, inputs, output) -> None:
    query, positive, negatives, *labels, temperature, false_negatives, level_combination, backend, _ = inputs
    _, query_grad, positive_weight, log_normalizer, false_negative_counts = output
    ctx.save_for_backward(query, negatives, *labels, query_grad, positive_weight, log_normalizer, false_negative_counts)
    ctx.scalars = (temperature, false_negatives, level_combination, backend)


def _backward(ctx, loss_grad: Tensor, *_):
    if torch.is_grad_enabled() and not _transformed():  # create_graph
        raise _only_once("second derivatives", "create_graph=True asks for them", ctx.scalars[-1])
    gradients: Callable[..., tuple[Tensor | None, ...]] = _Gradients.apply if _transformed() else _gradients
    wanted = tuple(ctx.needs_input_grad[:3])
    return (*gradients(loss_grad, *ctx.saved_tensors, ctx.scalars, wanted), *(None,) * 9)


def _gradients(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    query_labels: Tensor | None,
    negative_labels: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    query_grad: Tensor,
    positive_weight: Tensor,
    log_normalizer: Tensor,
    false_negative_counts: Tensor,
    scalars: tuple[float, str, str, str],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """d/dq = g query_grad;  d/dp = g positive_weight q / tau;  d/dn by its own pass. (g: upstream, (B,))"""
    loss_grad = loss_grad.float()
    grads: list[Tensor | None] = [None, None, None]
    if wanted[0]:
        grads[0] = (loss_grad[:, None] * query_grad).to(query.dtype)
    if wanted[1]:
        weight = loss_grad * positive_weight / scalars[0]
        grads[1] = (weight[:, None] * query).to(query.dtype)
    if wanted[2]:
        grads[2] = _negatives_grad(
            loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids, log_normalizer,
            false_negative_counts, *scalars,
        ).to(negatives.dtype)  # fmt: skip
    return tuple(grads)


_info_nce.register_autograd(_backward, setup_context=_save)


def _only_once(what: str, why: str, backend: str) -> RuntimeError:
    return RuntimeError(f'info_nce has no {what} on backend={backend!r}, and {why}: use backend="reference"')


class _Fused(torch.autograd.Function):
    """The operator with forward mode refused: to the operator alone it would be a tangent of 0. (Its forward takes the
    context: for a setup_context torch binds arguments to names at each call, a tenth of the host's time.)"""

    @staticmethod
    def forward(ctx, *arguments):
        output = _info_nce(*arguments)
        _save(ctx, arguments, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx, *_) -> None:
        raise _only_once("forward-mode derivatives", FORWARD_MODE, ctx.scalars[-1])


class _Transformed(torch.autograd.Function):
    """The same inside of torch.func, which always records gradients: only what differentiates them is refused."""

    generate_vmap_rule = True
    jvp = staticmethod(_Fused.jvp)

    @staticmethod
    def forward(*arguments):
        return _info_nce(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        wanted = tuple(ctx.needs_input_grad[:3])
        return (*_Gradients.apply(loss_grad, *ctx.saved_tensors, ctx.scalars, wanted), *(None,) * 9)


class _Gradients(torch.autograd.Function):
    """`_gradients`, which differentiated are refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend = inputs[-2][-1]

    @staticmethod
    def backward(ctx, *_):
        raise _only_once("second derivatives", "torch.func asks for them", ctx.backend)

    jvp = backward
