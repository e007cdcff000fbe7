"""How many false negatives the pseudo labels detect, and how many of those are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ifnd_fast.clustering.acceptance import accepted_count
from ifnd_fast.clustering.image_clusters import ImageClusters
from ifnd_fast.ops import checks


def detection_statistics(
    labels: Tensor,
    queue_labels: Tensor,
    queue_indices: Tensor,
    true_labels: Tensor | np.ndarray | None = None,
    *,
    counted: Tensor | None = None,
) -> dict[str, list[float | None]]:
    """Statistics of false negative detection, with all N images as queries against one queue of K keys.

    At level l the pair (image i, key k) is flagged when y_l(i) = y_l(k) >= 0, and truly a false negative when
    the true labels agree; a key of the query's own image is no pair. Exact, and O(N + K) in memory: pairs are
    counted by label, not formed.

    Args:
        labels: (N, L) int32 accepted pseudo labels, -1 for none.
        queue_labels: (K, L) int32, -1 for none.
        queue_indices: (K,) int64 dataset indices of the keys, below N; -1 where unknown.
        true_labels: (N,) integers; below 0 where unknown. Pairs without both true labels count neither for
            precision nor for recall.
        counted: (N,) bool, images that are queries and keys; default: all. The others (unreadable ones) are no data.

    Returns:
        Lists with one entry for each level:
        "false_negatives_per_query": mean over images of the number of flagged keys;
        and only with true_labels
        "false_negative_precision": truly false negatives among the flagged pairs (0..1; None: none flagged),
        "false_negative_recall": flagged pairs among the truly false negatives (0..1; None: there are none).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    truth = _check(labels, queue_labels, queue_indices, true_labels)
    n_queries = len(labels)
    if counted is not None:
        if counted.shape != (len(labels),) or counted.dtype != torch.bool or not counted.any():
            raise ValueError(f"counted must be ({len(labels)},) bool, True somewhere, got {tuple(counted.shape)}")
        n_queries = int(counted.sum())
        counted_keys = (queue_indices < 0) | counted[queue_indices.clamp_min(0)]
        labels = torch.where(counted[:, None], labels, -1)
        queue_labels = torch.where(counted_keys[:, None], queue_labels, -1)
        truth = None if truth is None else torch.where(counted, truth, -1)
    statistics: dict[str, list[float | None]] = {"false_negatives_per_query": []}
    for y, key_y in zip(labels.unbind(1), queue_labels.unbind(1), strict=True):
        pairs = _count_pairs(y, key_y, queue_indices)
        statistics["false_negatives_per_query"].append(pairs / n_queries)
    if truth is None:
        return statistics

    key_truth = torch.where(queue_indices >= 0, truth[queue_indices.clamp_min(0)], -1)
    true_pairs = _count_pairs(truth, key_truth, queue_indices)
    statistics |= {"false_negative_precision": [], "false_negative_recall": []}
    for y, key_y in zip(labels.unbind(1), queue_labels.unbind(1), strict=True):
        known_y = torch.where(truth >= 0, y, -1)
        known_key_y = torch.where(key_truth >= 0, key_y, -1)
        flagged = _count_pairs(known_y, known_key_y, queue_indices)
        hits = _count_pairs(_joint(known_y, truth), _joint(known_key_y, key_truth), queue_indices)
        statistics["false_negative_precision"].append(hits / flagged if flagged else None)
        statistics["false_negative_recall"].append(hits / true_pairs if true_pairs else None)
    return statistics


@dataclass(frozen=True)
class DetectionByRate:
    """What the detection finds at each of R acceptance rates, at each of L levels."""

    rates: list[float]  # R, 0..1
    per_query: list[list[float]]  # L x R, flagged images for each image
    precision: list[list[float | None]]  # L x R, 0..1; None: none flagged
    recall: list[list[float | None]]  # L x R, 0..1; None: there is no true pair


def detection_by_rate(
    labels: Tensor, confidence: Tensor, true_labels: Tensor | np.ndarray, rates: Sequence[float]
) -> DetectionByRate:
    """Precision and recall of the detection if the ceil(r N) most confident labels were accepted, for each rate r:
    the diagnostic of Chen et al., ICLR 2022.

    Counted as `detection_statistics` does, over all ordered pairs of two different images. Every image in order of
    falling confidence adds as many pairs as there are images of its label before it, so that one sort of the N
    images gives all rates.

    Args:
        labels: (N, L) int32 labels of every image, accepted or not; -1 for none.
        confidence: (N, L) floating point; equal ones are accepted in order of their index, as training does.
        true_labels: (N,) integers; below 0 where unknown.
        rates: R acceptance rates, 0..1, of the images.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    everyone = torch.arange(len(labels), dtype=torch.int64, device=labels.device)
    truth = cast(Tensor, _check(labels, labels, everyone, true_labels))
    if confidence.shape != labels.shape:
        raise ValueError(f"confidence must have shape {tuple(labels.shape)} as labels, got {tuple(confidence.shape)}")
    accepted = [accepted_count(rate, len(labels)) for rate in rates]
    first = torch.tensor(accepted, dtype=torch.int64, device=labels.device)
    true_pairs = int(_pairs_among_first(truth)[-1])
    found = DetectionByRate(list(rates), [], [], [])
    for level in range(labels.shape[1]):
        order = confidence[:, level].argsort(descending=True, stable=True)
        y, t = labels[order, level], truth[order]
        known_y = torch.where(t >= 0, y, -1)
        flagged, known_flagged, hits = (
            _pairs_among_first(codes)[first].tolist() for codes in (y, known_y, _joint(known_y, t))
        )
        found.per_query.append([pairs / len(labels) for pairs in flagged])
        found.precision.append([hit / pairs if pairs else None for hit, pairs in zip(hits, known_flagged, strict=True)])
        found.recall.append([hit / true_pairs if true_pairs else None for hit in hits])
    return found


def _pairs_among_first(codes: Tensor) -> Tensor:
    """(N + 1,) int64: entry m is the number of ordered pairs of two of the first m codes that are equal and >= 0."""
    ordered, position = codes.sort(stable=True)
    _, group, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    rank = torch.arange(len(codes), dtype=torch.int64, device=codes.device) - (sizes.cumsum(0) - sizes)[group]
    earlier = torch.zeros(len(codes) + 1, dtype=torch.int64, device=codes.device)
    earlier[position + 1] = torch.where(ordered >= 0, rank, 0)
    return 2 * earlier.cumsum(0)


def _count_pairs(codes: Tensor, key_codes: Tensor, key_indices: Tensor) -> int:
    """Number of (image i, key k) with codes_i = key_codes_k >= 0 that are not of the same image.

    sum over code c of |{i: codes_i = c}| |{k: key_codes_k = c}|, less the keys that match their own image.
    """
    image_codes, images = torch.unique(codes[codes >= 0], return_counts=True)
    own_codes, keys = torch.unique(key_codes[key_codes >= 0], return_counts=True)
    both = torch.cat([image_codes.long(), own_codes.long()])
    _, inverse = torch.unique(both, return_inverse=True)
    image_counts, key_counts = torch.zeros(2, len(both), dtype=torch.int64, device=codes.device)
    image_counts[inverse[: len(images)]] = images
    key_counts[inverse[len(images) :]] = keys

    own = codes[key_indices.clamp_min(0)]
    same_image = (key_indices >= 0) & (key_codes >= 0) & (own == key_codes)
    return int((image_counts * key_counts).sum() - same_image.sum())


def _joint(labels: Tensor, truth: Tensor) -> Tensor:
    """One code for each (label, truth), -1 where either is unknown."""
    code = labels.long() * (1 << 31) + truth
    return torch.where((labels >= 0) & (truth >= 0), code, -1)


def _check(
    labels: Tensor, queue_labels: Tensor, queue_indices: Tensor, true_labels: Tensor | np.ndarray | None
) -> Tensor | None:
    """The true labels (N,) int64 on the labels' device, after checks of all arguments."""
    checks.integers("labels", labels, torch.int32, (None, None), labels, "labels")
    if labels.numel() == 0:
        raise ValueError(f"labels must have at least one row and one level, got {tuple(labels.shape)}")
    n, levels = labels.shape
    checks.integers("queue_labels", queue_labels, torch.int32, (None, levels), labels, "labels")
    checks.integers("queue_indices", queue_indices, torch.int64, (len(queue_labels),), labels, "labels")
    largest = int(queue_indices.max()) if len(queue_indices) else -1
    if largest >= n:
        raise ValueError(f"queue_indices must be below the {n} rows of labels, got {largest}")
    if true_labels is None:
        return None
    truth = true_labels if isinstance(true_labels, Tensor) else torch.from_numpy(np.asarray(true_labels))
    if truth.is_floating_point() or truth.is_complex() or truth.dtype == torch.bool:
        raise TypeError(f"true_labels must be integers, got {truth.dtype}")
    if truth.shape != (n,):
        raise ValueError(f"true_labels must have shape ({n},) as labels has rows, got {tuple(truth.shape)}")
    truth = truth.to(device=labels.device, dtype=torch.int64)
    if int(truth.max()) >= 1 << 31:
        raise ValueError(f"true_labels must be below 2^31, got {int(truth.max())}")
    return truth


RATES = [rate / 100 for rate in range(101)]


def detection_of(clustering: ImageClusters, true_labels: np.ndarray) -> DetectionByRate:
    """At RATES, of the images that were clustered; those that had no features are neither queries nor keys."""
    clustered = (clustering.labels >= 0).all(dim=1)
    truth = torch.from_numpy(true_labels)[clustered]
    return detection_by_rate(clustering.labels[clustered], clustering.confidence[clustered], truth, RATES)
