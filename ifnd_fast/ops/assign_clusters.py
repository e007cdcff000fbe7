"""assign_clusters: every row's nearest centroid and how sure that is."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ifnd_fast.ops import backends, checks, reference
from ifnd_fast.ops.batches import one_by_one
from ifnd_fast.ops.direct import is_plain

FAR = 100.0  # from the origin: squared distance in squared spreads
FAR_SAMPLE = 32  # centroids or more tell where all of them are
SHIFTED_ELEMENTS = 1 << 22  # of the rows made relative at a time: 16 MiB;
GPU_SHIFTED_ELEMENTS = 1 << 26  # on a GPU 256 MiB
SIMILARITY_ELEMENTS = 1 << 26  # of the (rows, C) that the reference makes at a time


@overload
def assign_clusters(
    features: Tensor,
    centroids: Tensor,
    *,
    temperature: float = ...,
    return_confidence: Literal[True] = ...,
    metric: str = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def assign_clusters(
    features: Tensor,
    centroids: Tensor,
    *,
    temperature: float = ...,
    return_confidence: Literal[False],
    metric: str = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def assign_clusters(
    features: Tensor,
    centroids: Tensor,
    *,
    temperature: float = ...,
    return_confidence: bool,
    metric: str = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor] | Tensor: ...


def assign_clusters(
    features: Tensor,
    centroids: Tensor,
    *,
    temperature: float = 0.2,
    return_confidence: bool = True,
    metric: str = "inner_product",
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | Tensor:
    """Nearest centroid of every row, and its softmax probability among all centroids.

    label_i = argmax_j s_ij and confidence_i = exp(s_i,label / temperature) / sum_j exp(s_ij / temperature),
    with s_ij = x_i.c_j ("inner_product": nearest for normalised rows, Chen et al., ICLR 2022, section 3.2) or
    s_ij = x_i.c_j - |c_j|^2 / 2 ("l2": nearest by Euclidean distance for any rows). On unit rows and unit
    centroids the two agree. Of equally near centroids the lowest index wins, also among infinite similarities.

    Where centroids lie far from the origin, "l2" takes rows and centroids relative to a point in their midst (float32
    for half precision): that changes every s_ij of a row alike, and digits are not lost to |c_j|^2.

    Products have to be float32's, as in the reference: rows of length 1e-18 to 1e18 are told apart, and others need to
    be scaled first (`KMeans` does that itself).

    A similarity that is NaN is never the largest: a row that has no other gets label -1. The confidence of a row with
    any NaN among its similarities, or with an infinite one as its largest, is NaN.

    Args:
        features: (N, D), N >= 1; float32, float16, bfloat16 (float64: reference only).
        centroids: (C, D), C >= 1, of features' dtype and device.
        temperature: of the softmax, 1e-6 to 1e6; unused without confidence.
        return_confidence: True or False, which is faster, for Lloyd's algorithm.
        metric: "inner_product" or "l2".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Returns:
        (labels (N,) int32, confidence (N,) float32; float64 for float64 inputs), or labels alone. Not differentiable,
        in reverse or forward mode.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, or a backend
            asked for by name that can't run here.

    Example:
        >>> labels, confidence = assign_clusters(torch.eye(3), torch.eye(3))
        >>> labels.tolist()
        [0, 1, 2]
    """
    temperature = checks.temperature(temperature)
    return_confidence = checks.flag("return_confidence", return_confidence)
    checks.matrix("features", features)
    checks.matrix("centroids", centroids, features, "features")
    checks.choice("metric", metric, checks.METRICS)
    if len(features) == 0 or len(centroids) == 0:
        raise ValueError(
            "features and centroids must have at least one row each, "
            f"got shapes {tuple(features.shape)} and {tuple(centroids.shape)}"
        )
    backend = backends.choose(backend, "assign_clusters", features.device, features.dtype, features.shape[1])
    features, centroids = features.detach(), centroids.detach()
    if backend == "reference":
        labels, confidence = _by_definition(features, centroids, temperature, metric, return_confidence)
    else:
        run = _by_kernel if is_plain(features, centroids) else _assign_clusters
        labels, confidence = run(features, centroids, temperature, metric, return_confidence, backend)
    return (labels, confidence) if return_confidence else labels


def _by_kernel(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidence (N,), or (0,) where it is not wanted."""
    features, centroids = features.resolve_neg(), centroids.resolve_neg()
    assign = partial(
        backends.module_of(backend, "assign_clusters").assign_clusters, temperature=temperature, metric=metric,
        return_confidence=return_confidence,
    )  # fmt: skip
    with torch.cuda.device_of(features):
        if metric != "l2" or not is_far(centroids):
            return assign(features, centroids)
        middle = middle_of(centroids)[0]
        centroids = centroids.float() - middle
        at_once = SHIFTED_ELEMENTS if features.device.type == "cpu" else GPU_SHIFTED_ELEMENTS
        parts = features.split(max(1, at_once // features.shape[1]))
        labels, confidence = zip(*(assign(part.float() - middle, centroids) for part in parts), strict=True)
        return torch.cat(labels), torch.cat(confidence)


_assign_clusters = torch.library.custom_op("ifnd_fast::assign_clusters", _by_kernel, mutates_args=())


def middle_of(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """A point (D,) in the midst of the centroids, in float32 or float64, and whether they are far from the origin, as
    a bool tensor (): then differences from the point keep digits that x.c - |c|^2 / 2 loses.

    A median of each column: the same bits for any number of threads, and neither NaN nor an outlier moves it far.
    """
    sample = centroids[:: max(1, len(centroids) // FAR_SAMPLE)]
    sample = sample if sample.dtype == torch.float64 else sample.float()
    half = len(sample) // 2
    middle = sample.sort(dim=0).values[half]
    spread = (sample - middle).square().sum(1).sort().values[half]
    return middle, middle.square().sum() > FAR * spread  # NaN is not


def is_far(centroids: Tensor) -> bool:
    """Whether centroids (C, D) lie far from the origin. Waits for a GPU, but where a CUDA graph is being captured:
    there none does."""
    if centroids.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return bool(middle_of(centroids)[1])


def _by_definition(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """The reference, some rows at a time, as it makes (rows, C) tensors; relative to the centroids' middle where "l2"
    asks for it, by no branch, which would wait for a GPU."""
    middle = None
    if metric == "l2":
        middle, far = middle_of(centroids)
        middle = torch.where(far, middle, 0.0)
        centroids = centroids.to(middle.dtype) - middle
    found = []
    for part in features.split(max(1, SIMILARITY_ELEMENTS // len(centroids))):
        part = part if middle is None else part.to(middle.dtype) - middle
        found.append(reference.assign_clusters(part, centroids, temperature, metric, return_confidence))
    if len(found) == 1:
        return found[0]
    labels, confidence = zip(*found, strict=True)
    return torch.cat(labels), torch.cat(confidence)


@_assign_clusters.register_fake
def _(features, centroids, temperature, metric, return_confidence, backend):
    rows = len(features)
    return (
        features.new_empty(rows, dtype=torch.int32),
        features.new_empty(rows if return_confidence else 0, dtype=torch.float32),
    )


_assign_clusters.register_vmap(one_by_one(_assign_clusters))
