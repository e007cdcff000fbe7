"""Both operators in plain torch: the definition that every backend is tested against.

They materialise the (B, K) logits and the (N, C) similarities, run on any device in any float dtype, and
differentiate by autograd. Half precision is computed in float32, float64 stays float64; autocast, which would
round a matrix product to half precision, is off inside, in derivatives too. Products are torch's all the same:
torch.set_float32_matmul_precision below "highest" makes them coarser, here and in no other backend.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    query_labels: Tensor | None,
    negative_labels: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    false_negatives: str,
    level_combination: str = "mean",
    hard_negatives: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Loss of each query, (B,); the arguments are those of `ifnd_fast.info_nce`, already checked.

    s_ik = q_i.n_k / tau, s+ = q_i.p_i / tau; keys of the query's own image are in no sum. Labels and ids below 0 are
    unknown, and equal to no other.

    eliminate: mean_l  log(e^{s+} + sum_{k not in F_l} e^{s_ik}) - s+
    attract:   mean_l  log(e^{s+} + sum_k e^{s_ik}) - (s+ + sum_{k in F_l} s_ik) / (1 + |F_l|)
    keep:      eliminate with every F_l empty
    margin:    eliminate with F = {k : q_i.n_k > q_i.p_i + margin}

    hard_negatives (B, H, D): e^{q_i.h_ij / tau} joins each sum over k, and is in no F_l.
    level_combination "any" and "all": one level, whose F is the union or the intersection of these.
    """
    q, p, n = (_computed(t) for t in (query, positive, negatives))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(q.dtype)
    q_p, q_n = (q * p).sum(1, keepdim=True), product(q, n.t())
    s_positive, s = q_p / temperature, q_n / temperature  # (B, 1), (B, K)
    s_hard = s[:, :0]  # (B, H)
    if hard_negatives is not None:
        s_hard = product(_computed(hard_negatives), q[:, :, None])[:, :, 0] / temperature
    if query_ids is not None and negative_ids is not None:
        same_image = (query_ids[:, None] == negative_ids[None, :]) & (query_ids >= 0)[:, None]
    else:
        same_image = torch.zeros_like(s, dtype=torch.bool)
    s = s.masked_fill(same_image, -torch.inf)
    if false_negatives == "margin":
        s = s.masked_fill(q_n > q_p + margin, -torch.inf)
    if query_labels is None or negative_labels is None or false_negatives in ("keep", "margin"):
        return _log_normalizer(s_positive, s, s_hard) - s_positive[:, 0]

    y = query_labels.T[:, :, None]
    every_level = (y == negative_labels.T[:, None, :]) & (y >= 0) & ~same_image  # F_l, (L, B, K)
    if level_combination != "mean":
        every_level = (every_level.any(0) if level_combination == "any" else every_level.all(0))[None]
    losses = []
    for detected in every_level:
        if false_negatives == "eliminate":
            kept = s.masked_fill(detected, -torch.inf)
            losses.append(_log_normalizer(s_positive, kept, s_hard) - s_positive[:, 0])
        else:
            attracted = s_positive[:, 0] + s.masked_fill(~detected, 0.0).sum(1)
            losses.append(_log_normalizer(s_positive, s, s_hard) - attracted / (1 + detected.sum(1)))
    return torch.stack(losses).mean(0)


def _log_normalizer(*logits: Tensor) -> Tensor:
    """log of the sum of all exponentials of a row, (B,)."""
    return torch.logsumexp(torch.cat(logits, dim=1), dim=1)


def _computed(rows: Tensor) -> Tensor:
    """In the dtype to compute in; row by row, as products of transposes are rounded in another order."""
    return (rows if rows.dtype == torch.float64 else rows.float()).contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, by no autocast."""
    if torch.compiler.is_compiling():  # which reads contexts
        with no_autocast(a.device):
            return a @ b
    return _Product.apply(a, b)


class _Product(torch.autograd.Function):
    """a @ b, whose derivatives know no autocast either: they may be taken where it is on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with no_autocast(a.device):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = saved_tensors(ctx)
        return (
            _Product.apply(grad, b.mT) if ctx.needs_input_grad[0] else None,
            _Product.apply(a.mT, grad) if ctx.needs_input_grad[1] else None,
        )

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent):
        a, b = ctx.saved_tensors
        return _Product.apply(a_tangent, b) + _Product.apply(a, b_tangent)


def saved_tensors(ctx) -> tuple[Tensor, ...]:
    """What a backward pass of the loss kept."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "what the loss's backward pass needs was written over before it: call queue.enqueue, or whatever else "
            "changes the loss's inputs in place, after backward(), or hand the loss negatives.clone()"
        ) from error


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidences (N,), or an empty tensor in their place.

    label_i = argmax_j s_ij, confidence_i = max_j softmax_j(s_ij / tau), with s_ij = x_i.c_j, or for "l2"
    x_i.c_j - |c_j|^2 / 2, which orders centroids as -|x_i - c_j|^2 does. A similarity that is NaN is never the
    largest; where all are, the label is -1.
    """
    x, c = _computed(features), _computed(centroids)
    similarity = product(x, c.t())  # (N, C)
    if metric == "l2":
        similarity = similarity - c.square().sum(1) / 2
    best = similarity.masked_fill(similarity.isnan(), -torch.inf).max(1, keepdim=True).values
    # Not argmax: which of several equal maxima that gives is not promised.
    indices = torch.arange(len(c), device=c.device, dtype=torch.int64)
    labels = torch.where(similarity == best, indices, len(c)).min(1).values
    labels = torch.where(labels == len(c), -1, labels).int()
    if not return_confidence:
        return labels, x.new_empty(0)
    return labels, 1 / ((similarity - best) / temperature).exp().sum(1)
