"""info_nce: the contrastive loss with false negatives taken out, attracted or kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops import backends, checks, reference

STRATEGIES = ("eliminate", "attract", "keep")
REDUCTIONS = ("mean", "sum", "none")
COMBINATIONS = ("mean", "any", "all")
MAX_LEVELS = 16


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

    A negative with the query's own id (another view of the same image) is in no sum at any level.

    Args:
        query: (B, D) anchors; float32, float16, bfloat16 (float64: reference only). Usually L2-normalised.
        positive: (B, D) other view of each anchor.
        negatives: (K, D) queue, K >= 0.
        temperature: softmax temperature, 1e-30 or more.
        query_labels: (B, L) int32 pseudo labels at L levels, 1 <= L <= 16; -1 is no accepted label.
        negative_labels: (K, L) int32. Without labels nothing is detected.
        query_ids: (B,) int64 dataset indices. negative_ids: (K,) int64.
        false_negatives: "eliminate", "attract" or "keep".
        level_combination: "mean" over the levels' losses; or one loss, in which a key is a false negative when it has
            the query's label at "any" level, or at "all" levels.
        reduction: "mean", "sum" or "none".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (B,) with reduction "none". It is
        differentiable once in query, positive and negatives (the reference: any number of times). Logits and
        sums are float32; from half-precision inputs a gradient's softmax weights may be rounded to the inputs'
        dtype before they multiply the keys, as tensor cores need, and the loss never is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range (labels are read
            for their range on the CPU only), or a backend asked for by name that can't run here.
        RuntimeError: in a backward pass with create_graph=True, except by the reference.

    Example:
        >>> z, keys = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        >>> queue = torch.nn.functional.normalize(torch.randn(100, 16))
        >>> y, queue_y = torch.randint(-1, 5, (8, 3)).int(), torch.randint(-1, 5, (100, 3)).int()
        >>> info_nce(z, keys, queue, query_labels=y, negative_labels=queue_y).shape
        torch.Size([])
    """
    labels_and_ids = (query_labels, negative_labels, query_ids, negative_ids)
    temperature = checks.temperature(temperature)
    _check(query, positive, negatives, *labels_and_ids)
    checks.choice("false_negatives", false_negatives, STRATEGIES)
    checks.choice("level_combination", level_combination, COMBINATIONS)
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = backends.choose(backend, "info_nce", query.device, query.dtype)
    if backend == "reference":
        _check_label_range(query_labels, negative_labels)
        loss = reference.info_nce(query, positive, negatives, temperature, *labels_and_ids, false_negatives,
                                  level_combination)  # fmt: skip
    else:
        with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, positive, negatives))
        loss = _info_nce(
            query, positive, negatives, *labels_and_ids, temperature, false_negatives, level_combination, backend,
            with_grad,
        )[0]  # fmt: skip
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _check(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    query_labels: Tensor | None,
    negative_labels: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
) -> None:
    checks.matrix("query", query)
    checks.matrix("positive", positive, query, "query")
    checks.matrix("negatives", negatives, query, "query")
    if len(query) == 0:
        raise ValueError("query must have at least one row, got shape " + str(tuple(query.shape)))
    if positive.shape != query.shape:
        raise ValueError(f"positive must have query's shape {tuple(query.shape)}, got {tuple(positive.shape)}")
    for a, b, what in (
        (query_labels, negative_labels, ("query_labels", "negative_labels")),
        (query_ids, negative_ids, ("query_ids", "negative_ids")),
    ):
        if (a is None) != (b is None):
            raise ValueError(f"{what[0]} and {what[1]} go together: only {what[a is None]} was given")
    if query_labels is not None and negative_labels is not None:
        checks.integers("query_labels", query_labels, torch.int32, (len(query), None), query, "query")
        levels = query_labels.shape[1]
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"query_labels must have 1 to {MAX_LEVELS} levels (columns), got {levels}")
        shape = (len(negatives), levels)
        checks.integers("negative_labels", negative_labels, torch.int32, shape, query, "query")
    if query_ids is not None and negative_ids is not None:
        checks.integers("query_ids", query_ids, torch.int64, (len(query),), query, "query")
        checks.integers("negative_ids", negative_ids, torch.int64, (len(negatives),), query, "query")


def _check_label_range(query_labels: Tensor | None, negative_labels: Tensor | None) -> None:
    """On the CPU only: on a GPU it would stall the stream, and there any negative label counts as -1."""
    if torch.compiler.is_compiling():
        return
    for name, labels in (("query_labels", query_labels), ("negative_labels", negative_labels)):
        if labels is not None and labels.device.type == "cpu" and labels.numel() and int(labels.min()) < -1:
            raise ValueError(f"{name} must be -1 (no label) or a cluster number, got {int(labels.min())}")


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
    what the negatives' gradient needs: log_normalizer and, to attract, false_negative_counts (B, losses), a loss for
    each level or one where they are combined."""
    _check_label_range(query_labels, negative_labels)
    labels_and_ids = (query_labels, negative_labels, query_ids, negative_ids)
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_forward(
            query, positive, negatives, labels_and_ids, temperature, false_negatives, level_combination, with_grad
        )


@_info_nce.register_fake
def _(
    query, positive, negatives, query_labels, negative_labels, query_ids, negative_ids,
    temperature, false_negatives, level_combination, backend, with_grad,
):  # fmt: skip
    rows, dim = query.shape
    losses = 1 if query_labels is None or level_combination != "mean" else query_labels.shape[1]
    return (
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((rows if with_grad else 0, dim), dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((rows, losses), dtype=torch.float32),
        query.new_empty((rows, losses), dtype=torch.int32),
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
    labels_and_ids = (query_labels, negative_labels, query_ids, negative_ids)
    module = backends.module_of(backend, "info_nce")
    with torch.cuda.device_of(query):
        return module.info_nce_negatives_grad(
            loss_grad, query, negatives, labels_and_ids, log_normalizer, false_negative_counts,
            temperature, false_negatives, level_combination,
        )  # fmt: skip


@_negatives_grad.register_fake
def _(
    loss_grad, query, negatives, query_labels, negative_labels, query_ids, negative_ids,
    log_normalizer, false_negative_counts, temperature, false_negatives, level_combination, backend,
):  # fmt: skip
    return negatives.new_empty(negatives.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    query, positive, negatives, *labels_and_ids, temperature, false_negatives, level_combination, backend, _ = inputs
    _, query_grad, positive_weight, log_normalizer, counts = output
    ctx.save_for_backward(
        query, negatives, *labels_and_ids, query_grad, positive_weight, log_normalizer, counts
    )
    ctx.scalars = (temperature, false_negatives, level_combination, backend)


def _backward(ctx, loss_grad: Tensor, *_):
    """d/dq = g query_grad;  d/dp = g positive_weight q / tau;  d/dn by its own pass. (g: upstream, (B,))"""
    temperature, false_negatives, level_combination, backend = ctx.scalars
    if torch.is_grad_enabled():  # create_graph: the gradients below were computed, not recorded
        raise RuntimeError(
            f"info_nce has no second derivatives on backend={backend!r}, and create_graph=True asks for them: "
            'use backend="reference"'
        )
    query, negatives, *labels_and_ids, query_grad, positive_weight, log_normalizer, counts = ctx.saved_tensors
    loss_grad = loss_grad.float()
    grads: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grads[0] = (loss_grad[:, None] * query_grad).to(query.dtype)
    if ctx.needs_input_grad[1]:
        weight = loss_grad * positive_weight / temperature
        grads[1] = (weight[:, None] * query).to(query.dtype)
    if ctx.needs_input_grad[2]:
        grads[2] = _negatives_grad(
            loss_grad, query, negatives, *labels_and_ids, log_normalizer, counts,
            temperature, false_negatives, level_combination, backend,
        ).to(negatives.dtype)  # fmt: skip
    return (*grads, *(None,) * 9)


_info_nce.register_autograd(_backward, setup_context=_save)
