"""Inputs of info_nce, and the rule that its fused backends are held to.

The error rule (docs/operators.md): against the float64 reference on the same inputs, a backend's error is at most that
of plain torch on the same inputs plus what ROUNDING, 4 units of float32 rounding, of the largest logit changes: that
relative change in every exponential, so in every term of the sums that a gradient is. One unit more is for log Z, which
is kept in float32 and with many keys is larger than any logit. In half precision these terms' weights may also be
rounded to the inputs' dtype (dot instructions and tensor cores take them so): half a unit in the last place of each
term. The loss may not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ifnd_fast

ROUNDING = 4 * 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRATEGIES = ("eliminate", "attract", "keep")
COMBINATIONS = ("mean", "any", "all")
REDUCTIONS = ("none", "mean", "sum")
INPUTS = ("query", "positive", "negatives")


@dataclass
class Case:
    query: Tensor
    positive: Tensor
    negatives: Tensor
    query_labels: Tensor | None
    negative_labels: Tensor | None
    query_ids: Tensor | None
    negative_ids: Tensor | None
    upstream: Tensor  # (B,) gradients of the losses: of both signs, some of them 0
    temperature: float = 0.2
    false_negatives: str = "eliminate"
    level_combination: str = "mean"
    hard_negatives: Tensor | None = None  # (B, H, D)
    margin: float = 0.1
    learned: bool = False  # the temperature: a tensor, with a gradient

    def inputs(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        inputs = {name: getattr(self, name) for name in INPUTS}
        if self.hard_negatives is not None:
            inputs["hard_negatives"] = self.hard_negatives
        if self.learned:
            inputs["temperature"] = torch.tensor(self.temperature, dtype=torch.float64)
        return inputs

    def loss(self, *inputs: Tensor, backend: str = "auto", reduction: str = "none") -> Tensor:
        """info_nce of these inputs, or of others in their place."""
        given = {"temperature": self.temperature, **self.inputs()}
        given |= dict(zip(self.inputs(), inputs, strict=True)) if inputs else {}
        return ifnd_fast.info_nce(
            **given, margin=self.margin, query_labels=self.query_labels,
            negative_labels=self.negative_labels, query_ids=self.query_ids, negative_ids=self.negative_ids,
            false_negatives=self.false_negatives, level_combination=self.level_combination, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    def results(self, backend: str, reduction: str = "none", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The loss and, by the upstream gradient, the gradients of query, positive and negatives."""
        inputs = {name: t.detach().to(dtype or self.query.dtype).requires_grad_() for name, t in self.inputs().items()}
        if self.learned:  # the same number in every dtype
            inputs["temperature"] = self.inputs()["temperature"].requires_grad_()
        loss = self.loss(*inputs.values(), backend=backend, reduction=reduction)
        gradients = torch.autograd.grad((loss * self.upstream_of(reduction)).sum(), inputs.values())
        return {"loss": loss.detach(), **dict(zip(inputs, gradients, strict=True))}

    def upstream_of(self, reduction: str) -> Tensor:
        return self.upstream if reduction == "none" else torch.tensor(-1.7).to(self.upstream)

    def sizes(self, right: dict[str, Tensor], reduction: str) -> dict[str, Tensor]:
        """Sizes of what is added up in each result; more than the result itself where terms cancel."""
        rows = len(self.query)
        upstream = self.upstream_of(reduction).abs().expand(rows) / (rows if reduction == "mean" else 1)
        query, positive, negatives = (getattr(self, name).double().abs() for name in INPUTS)
        upstream = upstream.double()[:, None] / self.temperature
        weights = upstream * self.negatives_weights()
        by_query = upstream * positive + weights @ negatives  # the positive's weight is at most 1
        sizes = {}
        if self.hard_negatives is not None:
            sizes["hard_negatives"] = right["hard_negatives"].abs()  # each is one term
            largest = torch.nn.functional.pad(self.hard_negatives.double().abs(), (0, 0, 0, 1)).amax(1)
            by_query = by_query + upstream * largest  # their weights are at most 1 in all
        if self.learned:
            sizes["temperature"] = (query * by_query).sum() / self.temperature
        return {
            "loss": right["loss"].abs().clamp_min(rows if reduction == "sum" else 1),
            "query": by_query,
            "positive": upstream * query,
            "negatives": weights.T @ query,
            **sizes,
        }

    def negatives_weights(self) -> Tensor:
        """Sizes of the terms of every d loss_i / d s(q_i, n_k), (B, K)."""

        def weights(case: Case) -> Tensor:
            # A column for each query, 1 in its row alone and 0 in every key: the logits stay as they are, and a
            # key's gradient in column i is what comes through query i.
            query, positive, negatives = (getattr(self, name).detach().double() for name in INPUTS)
            mark = torch.eye(len(query)).to(query)
            marks = torch.zeros(len(negatives), len(query)).to(query).requires_grad_()
            others = (
                [] if case.hard_negatives is None else [torch.nn.functional.pad(case.hard_negatives, (0, len(mark)))]
            )
            loss = replace(case, learned=False).loss(
                torch.cat([query, mark], 1), torch.cat([positive, 0 * mark], 1), torch.cat([negatives, marks], 1),
                *(t.double() for t in others), backend="reference", reduction="sum",
            )  # fmt: skip
            return torch.autograd.grad(loss, marks)[0].T * self.temperature

        if self.false_negatives != "attract":
            return weights(self).abs()
        pushed = weights(replace(self, false_negatives="keep"))
        return pushed.abs() + (weights(self) - pushed).abs()  # and pulled

    def check(self, backend: str = "cpu", reduction: str = "none") -> None:
        """The rule for this backend, on the loss and the three gradients."""
        self.judge(self.results(backend, reduction), reduction)

    def judge(self, fused: dict[str, Tensor], reduction: str = "none") -> None:
        plain = self.results("reference", reduction)
        right = self.results("reference", reduction, torch.float64)
        sizes = self.sizes(right, reduction)
        for name, value in right.items():
            assert fused[name].dtype == plain[name].dtype and fused[name].shape == value.shape
            assert fused[name].isfinite().all()
            if value.numel() == 0:
                continue
            error, allowed = ((x[name].double() - value).abs() for x in (fused, plain))
            plain_error = allowed.max()
            if name in ("query", "negatives", "temperature") and self.query.dtype in (torch.bfloat16, torch.float16):
                half_unit = torch.finfo(self.query.dtype).eps / 2
                error -= half_unit * sizes[name]
                # Of the rounding of a few results plain torch may escape the worst; of these, by other weights, not.
                plain_error = torch.maximum(plain_error, half_unit * value.abs().max())
            limit = float(plain_error + self.rounding() * sizes[name].max())
            assert error.max() <= limit, f"{name}: error {error.max():.3g}, {limit:.3g} is allowed"

    def rounding(self) -> float:
        """The relative change that is allowed in every exponential. log Z is at most the largest logit + log(1 + K), of
        which the first is in ROUNDING."""
        return ROUNDING * (1 + self.largest_logit()) + 2.0**-24 * math.log1p(len(self.negatives))

    def largest_logit(self) -> float:
        q, p, n = (getattr(self, name).double() for name in INPUTS)
        logits = torch.cat([(q * p).sum(1), (q @ n.T).flatten()])
        if self.hard_negatives is not None:
            logits = torch.cat([logits, (self.hard_negatives.double() @ q[:, :, None]).flatten()])
        return float(logits.abs().max()) / self.temperature

    def with_all_labels(self, label: int) -> Case:
        assert self.query_labels is not None and self.negative_labels is not None
        alike = [torch.full_like(labels, label) for labels in (self.query_labels, self.negative_labels)]
        return replace(self, query_labels=alike[0], negative_labels=alike[1])


def make_case(
    B: int, K: int, D: int, L: int = 1, *, dtype: torch.dtype = torch.float32, clusters: int = 5, labels: bool = True,
    ids: bool = True, scale: float = 1.0, seed: int = 0, device: str = "cpu", **settings,
) -> Case:  # fmt: skip
    """Rows of length `scale`; labels from -1 to clusters - 1; about one key in K of a query's own image."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        unit = torch.nn.functional.normalize(torch.randn(n, D, generator=generator))
        return (scale * unit).to(device, dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    upstream = torch.randn(B, generator=generator).to(device)
    upstream[1::5] = 0
    return Case(
        rows(B), rows(B), rows(K),
        integers(-1, clusters, B, L).int() if labels else None,
        integers(-1, clusters, K, L).int() if labels else None,
        integers(0, K + 1, B) if ids else None,
        integers(0, K + 1, K) if ids else None,
        upstream, **settings,
    )  # fmt: skip
