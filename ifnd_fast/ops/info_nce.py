"""info_nce: the contrastive loss with false negatives taken out, attracted or kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops import backends, checks, fused_loss, reference
from ifnd_fast.ops.checks import COMBINATIONS, STRATEGIES
from ifnd_fast.ops.pair_labels import PairLabels

REDUCTIONS = ("mean", "sum", "none")
MAX_LEVELS = 16


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    false_negatives: str = "eliminate",
    margin: float = 0.1,
    level_combination: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over a queue of negatives, without its false negatives (Chen et al., ICLR 2022, eqs. 4 and 5).

    With s(a, b) = a.b / temperature and F_l(i) = {k : y_l(k) = y_l(i) >= 0}, query i's loss is

    - "eliminate": mean_l of -log( e^{s(q,p)} / (e^{s(q,p)} + sum_{k not in F_l} e^{s(q,n_k)}) )
    - "attract":   mean_l of -1/(1+|F_l|) sum_{x in {p} u F_l} log( e^{s(q,x)} / (e^{s(q,p)} + sum_k e^{s(q,n_k)}) )
    - "keep":      plain InfoNCE, whatever the labels.
    - "margin":    eliminates, whatever the labels, every negative with q.n > q.p + margin (as text encoders do, e.g.
                   Zhang et al., Qwen3 Embedding, 2025, eq. 1). The mask has no gradient.

    A negative with the query's own id (another view of the same image) is in no sum at any level. An id below 0 is
    unknown, as in an empty slot of a queue: it is no other's, not even that of another -1.

    Args:
        query: (B, D) anchors; float32, float16, bfloat16 (float64: reference only). Usually L2-normalised.
        positive: (B, D) other view of each anchor.
        negatives: (K, D) queue, K >= 0. Beside a float32 queue half-precision query and positive are taken in float32.
        temperature: softmax temperature, 1e-6 to 1e6. A learned one is a tensor of one number; it gets a gradient. On
            a GPU its value is waited for; keep it on the CPU to save that.
        query_labels: (B, L) int32 pseudo labels at L levels, 1 <= L <= 16; -1 is no accepted label.
        negative_labels: (K, L) int32. Without labels nothing is detected.
        query_ids: (B,) int64 dataset indices; below 0: unknown. negative_ids: (K,) int64.
        hard_negatives: (B, H, D) negatives of each query alone, beside the queue; never false ones.
        false_negatives: "eliminate", "attract", "keep" or "margin".
        margin: of "margin", in units of q.n: any finite number.
        level_combination: "mean" over the levels' losses; or one loss, in which a key is a false negative when it has
            the query's label at "any" level, or at "all" levels.
        reduction: "mean", "sum" or "none".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (B,) with reduction "none". It is differentiable
        once, in reverse mode, in query, positive, negatives, hard_negatives and a learned temperature (the reference:
        any number of times, and in forward mode), also by torch.func.grad and under torch.func.vmap. Logits and sums
        are float32; from half-precision inputs a gradient's softmax weights may be rounded to the inputs' dtype before
        they multiply the keys, as tensor cores need, and the loss never is.

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
    query, positive = _beside(negatives, query), _beside(negatives, positive)
    if hard_negatives is not None:
        hard_negatives = _beside(negatives, hard_negatives)
    labels = PairLabels(query_labels, negative_labels, query_ids, negative_ids)
    _check(query, positive, negatives, labels, hard_negatives)
    number, learned = _temperature(temperature, query)
    margin = checks.finite("margin", margin)
    checks.choice("false_negatives", false_negatives, STRATEGIES)
    checks.choice("level_combination", level_combination, COMBINATIONS)
    checks.choice("reduction", reduction, REDUCTIONS)
    has_margin = false_negatives == "margin"
    unusual = ("hard_negatives",) * (hard_negatives is not None) + ("margin",) * has_margin
    backend = backends.choose(backend, "info_nce", query.device, query.dtype, query.shape[1], unusual)
    if backend == "reference":
        checks.label_range(labels)
        loss = reference.info_nce(
            query, positive, negatives, number if learned is None else learned, *labels, false_negatives,
            level_combination, hard_negatives, margin,
        )  # fmt: skip
    else:
        extras = fused_loss.Extras(learned)
        if hard_negatives is not None:
            s = reference.product(hard_negatives.float(), query.float()[:, :, None])[:, :, 0]
            extras = extras._replace(log_hard=torch.logsumexp(s / (number if learned is None else learned.float()), 1))
        if has_margin:
            with torch.no_grad():
                extras = extras._replace(ceiling=(query.float() * positive.float()).sum(1) + margin)
            labels, false_negatives = labels._replace(query_labels=None, negative_labels=None), "keep"
        settings = fused_loss.Settings(number, false_negatives, level_combination, backend)
        loss = fused_loss.losses(query, positive, negatives, labels, settings, extras)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _beside(negatives: Tensor, rows: Tensor) -> Tensor:
    """Rows that autocast made, in float32 beside a float32 queue: exact, and few, where the queue's would be many."""
    half = isinstance(rows, Tensor) and rows.dtype in (torch.float16, torch.bfloat16)
    return rows.float() if half and isinstance(negatives, Tensor) and negatives.dtype == torch.float32 else rows


def _temperature(value: float | Tensor, query: Tensor) -> tuple[float, Tensor | None]:
    """As a number, or 1 and the tensor, (), that is learned; its range is checked where its value is read."""
    if not isinstance(value, Tensor):
        return checks.temperature(value), None
    checks.learned_temperature(value, query)
    return 1.0, value.reshape(())


def _check(query: Tensor, positive: Tensor, negatives: Tensor, labels: PairLabels, hard: Tensor | None) -> None:
    checks.matrix("query", query)
    checks.matrix("positive", positive, query, "query")
    checks.matrix("negatives", negatives, query, "query")
    if len(query) == 0:
        raise ValueError("query must have at least one row, got shape " + str(tuple(query.shape)))
    if positive.shape != query.shape:
        raise ValueError(f"positive must have query's shape {tuple(query.shape)}, got {tuple(positive.shape)}")
    if hard is not None:
        checks.tensor("hard_negatives", hard, ("B", "H", "D"), query, "query")
        if hard.shape[::2] != query.shape:
            B, D = query.shape
            raise ValueError(f"hard_negatives must have shape ({B}, H, {D}), got {tuple(hard.shape)}")
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
