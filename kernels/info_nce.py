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
columns of labels then, and one of N_LOSSES. Where one loss eliminates there is no key left for 2 and 4.

Attraction: every key but the own image's is in the dense softmax; level l sums T_l = sum_{F_l} s_k in 2, and
-mean_l [k in F_l] / (1 + |F_l|) are the weights of 4. No atomics: the same bits every time.
Logits carry a factor log2(e), so that exponentials are powers of 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from ifnd_fast.kernels import dense, marked, normalise
from ifnd_fast.kernels.negatives import negatives_grad_kernel
from ifnd_fast.kernels.products import LOG2E
from ifnd_fast.kernels.tiles import Tile, capability_of, chunk_of, multiprocessors, tile_of

if TYPE_CHECKING:
    from ifnd_fast.ops.pair_labels import PairLabels

PROGRAMS_PER_MULTIPROCESSOR = 2
# Weights in (0, 1] are rounded to the inputs' dtype to be multiplied. In float16 those below 2^-14 would lose digits,
# so all are scaled by this power of 2: relative to the largest, digits last to 2^-29.
FLOAT16_SHIFT = 15


class Plan(NamedTuple):
    """How one call is cut up."""

    splits: int
    split_keys: int  # a multiple of the tile's; for the keys' gradient, which splits the queries, of these
    tiles: int


def splits_of(count: int, width: int, programs: int, multiprocessors: int, least: int = 1) -> Plan:
    """Splits of what each program walks in tiles of this width, `least` tiles or more to each: few programs fill the
    card then, and none waits for another's end, as a few more than run at a time would take as long again."""
    tiles = max(1, triton.cdiv(count, width))
    splits = max(1, min(tiles // least, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs))
    split_tiles = triton.cdiv(tiles, splits)
    return Plan(triton.cdiv(tiles, split_tiles), split_tiles * width, tiles)


def plan_of(B: int, K: int, tile: Tile, chunks: int, multiprocessors: int) -> Plan:
    """Of the queue, by blocks of queries."""
    return splits_of(K, tile.columns, triton.cdiv(B, tile.rows) * chunks, multiprocessors)


def negatives_plan_of(B: int, K: int, tile: Tile, chunks: int, multiprocessors: int) -> Plan:
    """Of the queries, by blocks of keys. To add up two splits takes a launch, as long as some two tiles."""
    return splits_of(B, tile.rows, triton.cdiv(K, tile.negatives) * chunks, multiprocessors, least=2)


class Buffers(NamedTuple):
    """What the passes leave for each other, of every split."""

    split_max: Tensor  # (splits, B): the largest q.n_k of a split's dense softmax
    split_sum: Tensor
    split_factor: Tensor
    split_grad: Tensor  # (splits, B, D)
    level_max: Tensor  # (splits, B, n_losses); without a marked pass no splits
    level_sum: Tensor
    level_count: Tensor
    flags: Tensor  # (blocks of queries, tiles): the tile is to be visited again

    @staticmethod
    def of(query: Tensor, plan: Plan, blocks: int, n_losses: int, has_marked_pass: bool, with_grad: bool) -> Buffers:
        B, D = query.shape
        level_splits = plan.splits if has_marked_pass else 0

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return query.new_empty(shape, dtype=dtype)

        return Buffers(
            new(plan.splits, B), new(plan.splits, B), new(plan.splits, B),
            new(plan.splits if with_grad else 0, B, D),
            new(level_splits, B, n_losses), new(level_splits, B, n_losses),
            new(level_splits, B, n_losses, dtype=torch.int32),
            new(blocks, plan.tiles if has_marked_pass else 0, dtype=torch.int8),
        )  # fmt: skip


def info_nce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    labels: PairLabels,
    temperature: float,
    false_negatives: str,
    level_combination: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (B,), query_grad (B, D) or (0, D), positive_weight (B,), log_normalizer and false_negative_counts
    (B, n_losses); the counts are 0 where they aren't needed: one loss that eliminates."""
    query, positive, negatives = query.contiguous(), positive.contiguous(), negatives.contiguous()
    labels = labels.plain()
    (B, D), K, L = query.shape, len(negatives), max(1, labels.levels)
    n_losses = labels.n_losses(level_combination)
    has_labels, attract = labels.levels > 0 and false_negatives != "keep", false_negatives == "attract"
    has_marked_pass = has_labels and (attract or n_losses > 1)
    chunk, chunks = chunk_of(D)
    tile = tile_of("info_nce", query.dtype, capability_of(query.device), L)
    plan = plan_of(B, K, tile, chunks, multiprocessors(query.device))
    blocks = triton.cdiv(B, tile.rows)
    b = Buffers.of(query, plan, blocks, n_losses, has_marked_pass, with_grad)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    loss, positive_weight, log_normalizer = floats(B), floats(B), floats(B, n_losses)
    query_grad = floats(B if with_grad else 0, D)
    false_negative_counts = query.new_empty((B, n_losses), dtype=torch.int32)

    scale = LOG2E.value / temperature
    inputs = (query, negatives, *[loss if t is None else t for t in labels])  # the loss is never read
    cut = (B, K, plan.split_keys, plan.tiles, scale)
    shape = {"D": D, "CHUNK": chunk, "CHUNKS": chunks, "ATTRACT": attract}
    products = {
        "ROWS": tile.rows, "KEYS": tile.columns, "L": L, "ALL": level_combination == "all",
        "HAS_IDS": labels.has_ids, "PRECISION": "ieee", "num_warps": tile.warps, "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }  # fmt: skip
    of_marked = {**products, "KEYS": tile.marked, "FLAG_KEYS": tile.columns, "N_LOSSES": n_losses}
    shift = shift_of(query.dtype)
    dense.pass_kernel[blocks, plan.splits, chunks if with_grad else 1](
        *inputs, b.split_max, b.split_sum, b.split_grad, b.flags, *cut,
        SHIFT=shift, WITH_GRAD=with_grad, HAS_LABELS=has_labels, HAS_MARKED_PASS=has_marked_pass,
        PARTS=tile.parts_of(chunk, chunks), **shape, **{**products, "maxnreg": tile.of_pass.registers},
    )  # fmt: skip
    if has_marked_pass:
        marked.marked_sums_kernel[blocks, plan.splits](
            *inputs, b.level_max, b.level_sum, b.level_count, b.flags, *cut,
            PADDED=triton.next_power_of_2(n_losses), **shape, **of_marked,
        )  # fmt: skip
    joined = normalise.ROWS_BY_SPLITS
    normalise.normalise_kernel[(triton.cdiv(B, joined.rows),)](
        query, positive, b.split_max, b.split_sum, b.level_max, b.level_sum, b.level_count,
        loss, log_normalizer, false_negative_counts, positive_weight, b.split_factor, B, plan.splits, scale,
        N_LOSSES=n_losses, ROWS=joined.rows, SPLITS=joined.columns, HAS_MARKED_PASS=has_marked_pass,
        num_warps=joined.warps, maxnreg=joined.registers, **shape,
    )  # fmt: skip
    if with_grad:
        if has_marked_pass:
            marked.marked_grad_kernel[blocks, plan.splits, chunks](
                *inputs, b.split_grad, b.split_factor, log_normalizer, false_negative_counts, b.flags, *cut,
                SHIFT=shift, **shape, **of_marked,
            )  # fmt: skip
        joined = normalise.NUMBERS_BY_SPLITS
        normalise.add_splits_kernel[(triton.cdiv(B * D, joined.rows),)](
            positive, positive_weight, b.split_grad, b.split_factor, query_grad, B, plan.splits, 1.0 / temperature,
            D=D, NUMBERS=joined.rows, SPLITS=joined.columns, SCALED=has_marked_pass, num_warps=joined.warps,
        )  # fmt: skip
    return loss, query_grad, positive_weight, log_normalizer, false_negative_counts


def info_nce_negatives_grad(
    loss_grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    labels: PairLabels,
    log_normalizer: Tensor,
    false_negative_counts: Tensor,
    temperature: float,
    false_negatives: str,
    level_combination: str,
) -> Tensor:
    """sum_i loss_grad_i * d loss_i / d n_k, (K, D) float32."""
    loss_grad, query, negatives = loss_grad.contiguous(), query.contiguous(), negatives.contiguous()
    labels = labels.plain()
    (B, D), K, L = query.shape, len(negatives), max(1, labels.levels)
    n_losses = log_normalizer.shape[1]
    if K == 0:
        return query.new_empty((0, D), dtype=torch.float32)
    tile, (chunk, chunks) = tile_of("info_nce", query.dtype, capability_of(query.device), L), chunk_of(D)
    plan = negatives_plan_of(B, K, tile, chunks, multiprocessors(query.device))
    split_grad = query.new_empty((plan.splits, K, D), dtype=torch.float32)
    negatives_grad_kernel[(triton.cdiv(K, tile.negatives), plan.splits, chunks)](
        loss_grad, loss_grad.abs().amax(), query, negatives, *[loss_grad if t is None else t for t in labels],
        log_normalizer, false_negative_counts, split_grad, B, K, plan.split_keys, LOG2E.value / temperature,
        1.0 / temperature,
        D=D, L=L, N_LOSSES=n_losses, PADDED=triton.next_power_of_2(n_losses), ROWS=tile.rows, KEYS=tile.negatives,
        CHUNK=chunk, CHUNKS=chunks, SHIFT=shift_of(query.dtype), ATTRACT=false_negatives == "attract",
        ALL=level_combination == "all",
        HAS_LABELS=labels.levels > 0 and false_negatives != "keep", HAS_IDS=labels.has_ids,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return split_grad.sum(0) if plan.splits > 1 else split_grad[0]


def shift_of(dtype: torch.dtype) -> int:
    return FLOAT16_SHIFT if dtype == torch.float16 else 0
