"""Calls of the C++ kernels, and their float64 definitions in plain torch.

Rule: a result's error is at most that of the same definition computed by torch in float32, plus 4 units of
float32 rounding in a logit and one in log Z (a relative change of that size in every exponential). Where bfloat16
inputs are multiplied by dot instructions, the weights of a gradient's terms are rounded to bfloat16 too.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

_cpu = pytest.importorskip("ifnd_fast._cpu", reason="the extension is not built")

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELIMINATE, ATTRACT, KEEP = 0, 1, 2
ROUNDING = 4 * 2.0**-24
BFLOAT16_ROUNDING = 2.0**-8  # the unit roundoff of 8 significant bits


def address(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


class Case:
    """Inputs of one call; labels from -1 to clusters - 1."""

    def __init__(
        self,
        B,
        K,
        D,
        L=1,
        *,
        dtype=torch.float32,
        strategy=ELIMINATE,
        clusters=5,
        labels=True,
        ids=True,
        tau=0.2,
        scale=1.0,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def rows(n: int) -> Tensor:
            return (scale * torch.nn.functional.normalize(torch.randn(n, D, generator=generator))).to(dtype)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        self.query, self.positive, self.negatives = rows(B), rows(B), rows(K)
        self.query_labels = integers(-1, clusters, B, L).int() if labels else None
        self.negative_labels = integers(-1, clusters, K, L).int() if labels else None
        self.query_ids = integers(0, K + 1, B) + 2**33 if ids else None
        # The low halves of these ids all agree with some query's; only some whole ids do.
        self.negative_ids = (integers(0, K + 1, K) + 2**32 * integers(1, 3, K)) if ids else None
        self.loss_grad = torch.rand(B, generator=generator) + 0.5
        self.L, self.tau, self.strategy, self.combination = L, tau, strategy, 0

    def native(self, threads: int = 2, with_grad: bool = True) -> dict[str, Tensor]:
        (B, D), K = self.query.shape, len(self.negatives)
        keys = [self.query_labels, self.negative_labels, self.query_ids, self.negative_ids]
        sizes = (B, K, D, self.L, DTYPES[self.query.dtype], self.tau, self.strategy, self.combination)
        losses = self.L if self.combination == 0 else 1
        # NaN: what a kernel forgets to write shows.
        loss, weight, query_grad = (torch.full(s, torch.nan) for s in ((B,), (B,), (B, D)))
        normalizer, negatives_grad = torch.full((B, losses), torch.nan), torch.full((K, D), torch.nan)
        counts = torch.full((B, losses), -7, dtype=torch.int32)
        _cpu.info_nce_forward(
            *map(address, (self.query, self.positive, self.negatives, *keys)),
            *sizes,
            address(loss),
            address(query_grad) if with_grad else 0,
            address(weight),
            address(normalizer),
            address(counts),
            threads,
        )
        _cpu.info_nce_negatives_grad(
            *map(address, (self.query, self.negatives, *keys)),
            *sizes,
            *map(address, (self.loss_grad, normalizer, counts, negatives_grad)),
            threads,
        )
        return {
            "loss": loss,
            "query_grad": query_grad,
            "positive_weight": weight,
            "log_normalizer": normalizer,
            "counts": counts,
            "negatives_grad": negatives_grad,
        }

    def logits(self, float_type: torch.dtype) -> tuple[Tensor, Tensor]:
        q, p, n = (t.to(float_type) for t in (self.query, self.positive, self.negatives))
        return (q * p).sum(1) / self.tau, q @ n.T / self.tau

    def definition(self, float_type: torch.dtype) -> dict[str, Tensor]:
        """By the formulas, with autograd for the derivatives."""
        query, negatives = (t.to(float_type, copy=True).requires_grad_() for t in (self.query, self.negatives))
        s_positive = ((query.detach() * self.positive.to(float_type)).sum(1) / self.tau).requires_grad_()
        # d loss / d q goes through s+ too: s+ is a leaf, and the chain rule adds its part below.
        s = query @ negatives.T / self.tau
        same = torch.zeros_like(s, dtype=torch.bool)
        if self.query_ids is not None:
            same = (self.query_ids[:, None] == self.negative_ids) & (self.negative_ids >= 0)
        losses, normalizers, counts, pulls = [], [], [], torch.zeros_like(s)
        for level in range(self.L):
            false = torch.zeros_like(same)
            if self.query_labels is not None and self.strategy != KEEP:
                y = self.query_labels[:, level, None]
                false = (y == self.negative_labels[:, level]) & (y >= 0) & ~same
            out = same | false if self.strategy != ATTRACT else same
            kept = torch.cat([s_positive[:, None], s.masked_fill(out, -torch.inf)], dim=1)
            normalizers.append(torch.logsumexp(kept, 1))
            counts.append(false.sum(1).int())
            if self.strategy == ATTRACT:
                pulled = (s_positive + s.masked_fill(~false, 0).sum(1)) / (1 + counts[-1])
                pulls = pulls + false / (1 + counts[-1][:, None]) / self.L
            else:
                pulled = s_positive
            losses.append(normalizers[-1] - pulled)
        loss = torch.stack(losses).mean(0)
        query_grad, weight, ds = torch.autograd.grad(loss.sum(), (query, s_positive, s), retain_graph=True)
        (negatives_grad,) = torch.autograd.grad((loss * self.loss_grad).sum(), negatives)
        # What the gradients are sums of, without signs: rounding is relative to that.
        terms, positive_terms = ds.abs() + 2 * pulls, weight.abs() + (self.strategy == ATTRACT)
        positive = self.positive.to(float_type)
        return {
            "loss": loss.detach(),
            "positive_weight": weight,
            "query_grad": query_grad + weight[:, None] * positive / self.tau,
            "log_normalizer": torch.stack(normalizers, 1).detach(),
            "counts": torch.stack(counts, 1),
            "negatives_grad": negatives_grad,
            "query_terms": (terms @ negatives.abs() + positive_terms[:, None] * positive.abs()) / self.tau,
            "negatives_terms": (terms * self.loss_grad[:, None]).T @ query.abs() / self.tau,
        }

    def check(self, **how) -> None:
        native, right, plain = (
            self.native(**how),
            self.definition(torch.float64),
            self.definition(torch.float32),
        )
        assert torch.equal(native["counts"], right["counts"])
        s_positive, s = self.logits(torch.float64)
        logit = 1 + max(float(t.abs().max()) for t in (s_positive, s) if t.numel())
        dots = self.query.dtype == torch.bfloat16 and _cpu.isa() in ("avx512bf16", "amx")
        for name in ("loss", "query_grad", "positive_weight", "log_normalizer", "negatives_grad"):
            if right[name].numel() == 0:
                continue
            terms = right[name.replace("grad", "terms")].detach() if "grad" in name else torch.ones(1)
            error, allowed = ((x[name] - right[name]).abs() for x in (native, plain))
            if dots and "grad" in name:
                error = error - BFLOAT16_ROUNDING * terms
            limit = allowed.max() + (ROUNDING * logit + 2.0**-24 * math.log1p(len(self.negatives))) * terms.max()
            assert error.max() <= limit, f"{name}: error {error.max()}, torch's {allowed.max()}"


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which can import this checkout."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
