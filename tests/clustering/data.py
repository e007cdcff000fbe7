"""Rows to cluster, and what clusters of them cost."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def blobs(n: int, d: int, k: int, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator) * 3
    which = torch.randint(k, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, d, generator=generator)


def inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).min(1).values.square().sum())


def moving(kind: str, n: int, k: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and centroids among which ties, duplicates and extremes abound."""
    x, c = (torch.randn(rows, dim, generator=generator) for rows in (n, k))
    if kind == "grid":
        return (2 * x).round(), (2 * c).round()
    if kind == "duplicates":
        return x, x[:1].repeat(k, 1) + c * (torch.arange(k) % 7 == 0)[:, None]
    if kind == "lengths":
        return x * 10.0 ** torch.linspace(-15, 8, n)[:, None], c * 10.0 ** torch.linspace(-9, 6, k)[:, None]
    if kind == "far":  # from the origin, but not so far that `assign` centres them
        return x + 5, c + 5
    return normalize(c[torch.arange(n) % k] + 0.5 * x), normalize(c)
