"""assign_clusters: every row's nearest centroid and how sure that is."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops import backends, checks, reference

METRICS = ("inner_product", "l2")


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
    centroids the two agree. Of equally near centroids the lowest index wins.

    Args:
        features: (N, D), N >= 1; float32, float16, bfloat16 (float64: reference only).
        centroids: (C, D), C >= 1, of features' dtype and device.
        temperature: of the softmax, 1e-30 or more; unused without confidence.
        return_confidence: False is faster, for Lloyd's algorithm.
        metric: "inner_product" or "l2".
        backend: "auto", or one of "cuda", "triton", "cpu", "reference" by name.

    Returns:
        (labels (N,) int32, confidence (N,) float32), or labels alone. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, or a backend
            asked for by name that can't run here.

    Example:
        >>> labels, confidence = assign_clusters(torch.eye(3), torch.eye(3))
        >>> labels.tolist()
        [0, 1, 2]
    """
    temperature = checks.temperature(temperature)
    checks.matrix("features", features)
    checks.matrix("centroids", centroids, features, "features")
    checks.choice("metric", metric, METRICS)
    if len(features) == 0 or len(centroids) == 0:
        raise ValueError(
            "features and centroids must have at least one row each, "
            f"got shapes {tuple(features.shape)} and {tuple(centroids.shape)}"
        )
    backend = backends.choose(backend, "assign_clusters", features.device, features.dtype)
    arguments = (features.detach(), centroids.detach(), temperature, metric, return_confidence)
    if backend == "reference":
        labels, confidence = reference.assign_clusters(*arguments)
    else:
        labels, confidence = _assign_clusters(*arguments, backend)
    return (labels, confidence) if return_confidence else labels


@torch.library.custom_op("ifnd_fast::assign_clusters", mutates_args=())
def _assign_clusters(
    features: Tensor, centroids: Tensor, temperature: float, metric: str, return_confidence: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int32 and confidence (N,), or (0,) where it is not wanted."""
    module = backends.module_of(backend, "assign_clusters")
    with torch.cuda.device_of(features):
        return module.assign_clusters(features, centroids, temperature, metric, return_confidence)


@_assign_clusters.register_fake
def _(features, centroids, temperature, metric, return_confidence, backend):
    rows = len(features)
    return (
        features.new_empty(rows, dtype=torch.int32),
        features.new_empty(rows if return_confidence else 0, dtype=torch.float32),
    )
