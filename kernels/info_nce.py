"""info_nce in Triton: logits, false negatives, log-sum-exps and the query's gradient in one pass over the queue.

Let s_k = q.n_k / tau. Every level l needs  Z_l = e^{s+} + sum_{k not in F_l} e^{s_k}  and, for the gradient,
sum_k w_k n_k  with the weights  w_k = mean_l [k not in F_l] e^{s_k} / Z_l,  and Z_l is known only at the end. Keys in
no F_l count alike at every level; keys in some F_l are few. So, with the queue split over programs,

1. `pass_kernel`: one online softmax over the keys in no F_l, whose weighted key sum G is accumulated as flash attention
   accumulates its output. Tiles that hold a false negative are flagged.
2. `marked_sums_kernel`: in the flagged tiles alone, |F_l| and each level's own online softmax over the keys that are in
   another level's F, not in its own. Nothing is ever subtracted: a level's largest logit may be masked in another.
3. `normalise_kernel`: joins the splits, in order: loss, log Z_l, |F_l|, and what each split's G is to be scaled by.
4. `marked_grad_kernel`: in the flagged tiles alone, now that Z_l is known, those keys' part of the gradient.
5. `add_splits_kernel`: the splits' gradients, in order, and the positive's.

Levels that are combined make one loss, whose F holds the keys that `marked_pairs` finds at any level or at all: L
columns of labels then, and one of LOSSES. Where one loss eliminates there is no key left for 2 and 4.

Attraction: every key but the own image's is in the dense softmax; level l sums T_l = sum_{F_l} s_k in 2, and
-mean_l [k in F_l] / (1 + |F_l|) are the weights of 4. No atomics: the same bits every time.
Logits carry a factor log2(e), so that exponentials are powers of 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ifnd_fast.kernels.dense import pass_kernel
from ifnd_fast.kernels.marked import marked_grad_kernel, marked_sums_kernel
from ifnd_fast.kernels.negatives import negatives_grad_kernel
from ifnd_fast.kernels.normalise import NUMBERS_BY_SPLITS, ROWS_BY_SPLITS, add_splits_kernel, normalise_kernel
from ifnd_fast.kernels.products import LOG2E
from ifnd_fast.kernels.tiles import Tile, capability_of, chunk_of, multiprocessors, tile_of

PROGRAMS_PER_MULTIPROCESSOR = 2
# Weights in (0, 1] are rounded to the inputs' dtype to be multiplied. In float16 those below 2^-14 would lose digits,
# so all are scaled by this power of 2: relative to the largest, digits last to 2^-29.
FLOAT16_SHIFT = 15


class Plan(NamedTuple):
    """How one call is cut up."""

    splits: int
    split_keys: int  # a multiple of the tile's keys
    tiles: int  # of keys


def plan_of(B: int, K: int, tile: Tile, chunks: int, multiprocessors: int) -> Plan:
    """Splits of the queue so that even one block of queries fills the card."""
    tiles = max(1, triton.cdiv(K, tile.columns))
    programs = triton.cdiv(B, tile.rows) * chunks
    splits = min(tiles, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs))
    split_tiles = triton.cdiv(tiles, splits)
    return Plan(triton.cdiv(tiles, split_tiles), split_tiles * tile.columns, tiles)


def info_nce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    labels_and_ids: tuple[Tensor | None, ...],
    temperature: float,
    false_negatives: str,
    level_combination: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and counts (B, losses); counts
    are 0 where they aren't needed: one loss that eliminates."""
    query, positive, negatives = query.contiguous(), positive.contiguous(), negatives.contiguous()
    extra = [None if t is None else t.contiguous() for t in labels_and_ids]
    (B, D), K, L = query.shape, len(negatives), 1 if extra[0] is None else extra[0].shape[1]
    losses = L if level_combination == "mean" else 1
    has_labels, has_ids = extra[0] is not None and false_negatives != "keep", extra[2] is not None
    attract = false_negatives == "attract"
    flagged = has_labels and (attract or losses > 1)  # are visited again
    chunk, chunks = chunk_of(D)
    tile = tile_of("info_nce", query.dtype, capability_of(query.device), L)
    splits, split_keys, tiles = plan_of(B, K, tile, chunks, multiprocessors(query.device))

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    split_max, split_sum, split_factor = floats(splits, B), floats(splits, B), floats(splits, B)
    split_grad = floats(splits if with_grad else 0, B, D)
    level_splits = splits if flagged else 0
    level_max, level_sum = floats(level_splits, B, losses), floats(level_splits, B, losses)
    level_count = query.new_empty((level_splits, B, losses), dtype=torch.int32)
    blocks = triton.cdiv(B, tile.rows)
    flags = query.new_empty((blocks, tiles if flagged else 0), dtype=torch.int8)
    loss, positive_weight, log_normalizer = floats(B), floats(B), floats(B, losses)
    query_grad = floats(B if with_grad else 0, D)
    counts = query.new_empty((B, losses), dtype=torch.int32)

    scale = LOG2E.value / temperature
    inputs = (query, negatives, *[loss if t is None else t for t in extra])  # the loss is never read
    cut = (B, K, split_keys, tiles, scale)
    shape = {"D": D, "CHUNK": chunk, "CHUNKS": chunks, "ATTRACT": attract}
    of_losses = {"LOSSES": losses, "PADDED": triton.next_power_of_2(losses)}
    products = {
        "ROWS": tile.rows, "KEYS": tile.columns, "L": L, "ALL": level_combination == "all", "HAS_IDS": has_ids,
        "PRECISION": "ieee", "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
    }  # fmt: skip
    of_marked = {**products, "KEYS": tile.marked, "FLAG_KEYS": tile.columns}
    shift = shift_of(query.dtype)
    pass_kernel[blocks, splits, chunks if with_grad else 1](
        *inputs, split_max, split_sum, split_grad, flags, *cut,
        SHIFT=shift, WITH_GRAD=with_grad, HAS_LABELS=has_labels, FLAGS=flagged, **shape,
        **{**products, "maxnreg": tile.of_pass.registers},
    )  # fmt: skip
    if flagged:
        marked_sums_kernel[blocks, splits](
            *inputs, level_max, level_sum, level_count, flags, *cut, **of_losses, **shape, **of_marked
        )
    joined = ROWS_BY_SPLITS
    normalise_kernel[(triton.cdiv(B, joined.rows),)](
        query, positive, split_max, split_sum, level_max, level_sum, level_count,
        loss, log_normalizer, counts, positive_weight, split_factor, B, splits, scale,
        LOSSES=losses, ROWS=joined.rows, SPLITS=joined.columns, FLAGS=flagged, num_warps=joined.warps,
        maxnreg=joined.registers, **shape,
    )  # fmt: skip
    if with_grad:
        if flagged:
            marked_grad_kernel[blocks, splits, chunks](
                *inputs, split_grad, split_factor, log_normalizer, counts, flags, *cut,
                SHIFT=shift, LOSSES=losses, **shape, **of_marked,
            )  # fmt: skip
        joined = NUMBERS_BY_SPLITS
        add_splits_kernel[(triton.cdiv(B * D, joined.rows),)](
            positive, positive_weight, split_grad, split_factor, query_grad, B, splits, 1.0 / temperature,
            D=D, NUMBERS=joined.rows, SPLITS=joined.columns, SCALED=flagged, num_warps=joined.warps,
        )  # fmt: skip
    return loss, query_grad, positive_weight, log_normalizer, counts


def info_nce_negatives_grad(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    labels_and_ids: tuple[Tensor | None, ...],
    log_normalizer: Tensor,
    counts: Tensor,
    temperature: float,
    false_negatives: str,
    level_combination: str,
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32."""
    loss_grad, query, negatives = loss_grad.contiguous(), query.contiguous(), negatives.contiguous()
    extra = [None if t is None else t.contiguous() for t in labels_and_ids]
    (B, D), K, L = query.shape, len(negatives), 1 if extra[0] is None else extra[0].shape[1]
    losses = log_normalizer.shape[1]
    negatives_grad = query.new_empty((K, D), dtype=torch.float32)
    if K == 0:
        return negatives_grad
    tile, (chunk, chunks) = tile_of("info_nce", query.dtype, capability_of(query.device), L), chunk_of(D)
    negatives_grad_kernel[(triton.cdiv(K, tile.negatives), chunks)](
        loss_grad, loss_grad.abs().amax(), query, negatives, *[loss_grad if t is None else t for t in extra],
        log_normalizer, counts, negatives_grad, B, K, LOG2E.value / temperature, 1.0 / temperature,
        D=D, L=L, LOSSES=losses, PADDED=triton.next_power_of_2(losses), ROWS=tile.rows, KEYS=tile.negatives,
        CHUNK=chunk, CHUNKS=chunks, SHIFT=shift_of(query.dtype), ATTRACT=false_negatives == "attract",
        ALL=level_combination == "all",
        HAS_LABELS=extra[0] is not None and false_negatives != "keep", HAS_IDS=extra[2] is not None,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return negatives_grad


def shift_of(dtype: torch.dtype) -> int:
    return FLOAT16_SHIFT if dtype == torch.float16 else 0
