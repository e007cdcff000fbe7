from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ifnd_fast.clustering.acceptance import acceptance_rate, accepted_count
from ifnd_fast.clustering.pseudo_labels import PseudoLabels


def features(n: int = 120, d: int = 8, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def with_confidence(confidence: torch.Tensor) -> PseudoLabels:
    """Pseudo labels that were loaded rather than fitted: label i is i at every level."""
    n, levels = confidence.shape
    pseudo_labels = PseudoLabels([1] * levels)
    state = {f"centroids.{level}": torch.ones(1, 1) for level in range(levels)}
    labels = torch.arange(n, dtype=torch.int32)[:, None].repeat(1, levels)
    pseudo_labels.load_state_dict(
        state | {"levels": torch.ones(levels, dtype=torch.int64), "labels": labels, "confidence": confidence}
    )
    return pseudo_labels


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_labels_and_confidence_follow_the_definition(spherical, temperature):
    z = features()
    fitted = PseudoLabels((3, 10), temperature=temperature, spherical=spherical).fit(z)
    assert fitted.labels.shape == fitted.confidence.shape == (120, 2)
    assert fitted.labels.dtype == torch.int32 and fitted.confidence.dtype == torch.float32
    for level, centroids in enumerate(fitted.centroids):
        assert centroids.shape == ((3, 10)[level], 8)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(len(centroids)))
        probabilities = (z.double() @ centroids.double().T / temperature).softmax(1)
        best = probabilities.max(1)
        assert (fitted.labels[:, level] == best.indices).all()
        torch.testing.assert_close(fitted.confidence[:, level], best.values.float(), atol=1e-5, rtol=1e-5)


def test_levels_use_different_seeds_and_the_same_seed_gives_the_same_labels():
    a, b = PseudoLabels((10, 10), seed=1).fit(features()), PseudoLabels((10, 10), seed=1).fit(features())
    assert torch.equal(a.labels, b.labels) and torch.equal(a.confidence, b.confidence)
    assert not torch.equal(a.centroids[0], a.centroids[1])


def test_half_precision_features():
    z = features().bfloat16()
    fitted = PseudoLabels((5,)).fit(z)
    rounded = fitted.centroids[0].bfloat16().double()
    assert (fitted.labels[:, 0] == (z.double() @ rounded.T).argmax(1)).float().mean() > 0.98
    assert fitted.confidence.dtype == torch.float32


def test_progress_reports_every_level():
    seen: list[tuple[int, int, float]] = []
    PseudoLabels((3, 6), max_iter=4).fit(features(), progress=lambda *args: seen.append(args))
    assert {level for level, _, _ in seen} == {0, 1}
    assert [iteration for level, iteration, _ in seen if level == 1][:2] == [1, 2]
    assert all(inertia > 0 for _, _, inertia in seen)


# --- acceptance -------------------------------------------------------------------------------------------

# Few values, so that ties are common; levels in columns.
rows = st.tuples(*2 * [st.sampled_from([0.1, 0.25, 0.5, 1.0])])
confidences = st.lists(rows, min_size=1, max_size=40).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(confidences, st.integers(0, 60), st.integers(1, 60))
def test_accepts_the_most_confident_lower_index_first(confidence, numerator, denominator):
    rate = min(1.0, numerator / denominator)
    n = len(confidence)
    count = ceil(min(Fraction(1), Fraction(numerator, denominator)) * n)
    accepted = with_confidence(confidence).accept(rate)
    assert accepted.dtype == torch.int32
    for level in range(2):
        order = sorted(range(n), key=lambda i: (-float(confidence[i, level]), i))
        expected = torch.full((n,), -1)
        expected[order[:count]] = torch.tensor(order[:count], dtype=torch.int64)
        assert accepted[:, level].tolist() == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(confidences, st.floats(0, 1), st.floats(0, 1))
def test_accepted_sets_nest(confidence, a, b):
    pseudo_labels = with_confidence(confidence)
    fewer, more = pseudo_labels.accept(min(a, b)) >= 0, pseudo_labels.accept(max(a, b)) >= 0
    assert (~fewer | more).all()


def test_accept_leaves_the_labels_alone():
    fitted = PseudoLabels((4,)).fit(features())
    before = fitted.labels.clone()
    assert (fitted.accept(0) == -1).all()
    assert torch.equal(fitted.accept(1), before)
    assert torch.equal(fitted.labels, before)


@settings(max_examples=300)
@given(st.integers(1, 2_000_000), st.integers(0, 2_000_000), st.integers(1, 9))
def test_accepted_count_is_not_fooled_by_rounding(total, done, factor):
    done = min(done, total)
    assert accepted_count(done / total, total) == done
    assert accepted_count(done / total, total * factor) == done * factor


@pytest.mark.parametrize(
    ("rate", "n", "count"),
    [(0.7, 10, 7), (0.07, 100, 7), (0.1 + 0.2, 10, 3), (0.701, 10, 8), (0, 5, 0), (1, 5, 5), (1e-9, 5, 1)],
)
def test_accepted_count(rate, n, count):
    assert accepted_count(rate, n) == count


@pytest.mark.parametrize(
    ("progress", "end", "rate"),
    [(0, 1, 0), (0.25, 1, 0.25), (1, 1, 1), (0.25, 0.5, 0.5), (0.5, 0.5, 1), (0.9, 0.5, 1)],
)
def test_acceptance_rate(progress, end, rate):
    assert acceptance_rate(progress, end) == rate


# --- state ------------------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path):
    fitted = PseudoLabels((3, 7)).fit(features())
    torch.save(fitted.state_dict(), tmp_path / "labels.pt")
    state = torch.load(tmp_path / "labels.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    loaded = PseudoLabels((3, 7))
    loaded.load_state_dict(state)
    assert torch.equal(loaded.labels, fitted.labels) and torch.equal(loaded.confidence, fitted.confidence)
    assert all(map(torch.equal, loaded.centroids, fitted.centroids))
    assert torch.equal(loaded.accept(0.3), fitted.accept(0.3))
    loaded.load_state_dict(PseudoLabels((3, 7)).state_dict())
    assert loaded.labels is None


def test_foreign_states_are_refused():
    state = PseudoLabels((3, 7)).fit(features()).state_dict()
    with pytest.raises(ValueError, match=r"levels \(3, 7\), wanted \(3, 8\)"):
        PseudoLabels((3, 8)).load_state_dict(state)
    with pytest.raises(ValueError, match="levels None"):
        PseudoLabels((3, 7)).load_state_dict({})
    with pytest.raises(ValueError, match="confidence"):
        PseudoLabels((3, 7)).load_state_dict({k: v for k, v in state.items() if k != "confidence"})
    with pytest.raises(ValueError, match="shape"):
        PseudoLabels((3, 7)).load_state_dict(state | {"confidence": state["confidence"][:5]})


# --- errors -----------------------------------------------------------------------------------------------


def test_unfit_features():
    with pytest.raises(ValueError, match="features has 9 rows.*scale_levels"):
        PseudoLabels((10,)).fit(features(9))
    with pytest.raises(ValueError, match="row 4 has length 2.*normalize"):
        PseudoLabels((2,)).fit(features() * torch.where(torch.arange(120) == 4, 2.0, 1.0)[:, None])
    z = features()
    z[3, 2] = torch.nan
    with pytest.raises(ValueError, match="features has NaN.*row 3"):
        PseudoLabels((2,)).fit(z)
    with pytest.raises(ValueError, match="only 1 distinct rows"):
        PseudoLabels((2,)).fit(features(1).repeat(9, 1))


def test_a_failed_fit_changes_nothing():
    pseudo_labels = PseudoLabels((2, 5)).fit(features())
    before = pseudo_labels.labels.clone()
    with pytest.raises(ValueError, match="only 3 distinct"):
        pseudo_labels.fit(features(3).repeat(4, 1))  # level 0 could be clustered, level 1 can't
    assert torch.equal(pseudo_labels.labels, before) and len(pseudo_labels.centroids[1]) == 5


@pytest.mark.parametrize("levels", [(), (0,), (2.5,), (-1, 3)])
def test_unfit_levels(levels):
    with pytest.raises(ValueError, match="levels must be positive integers"):
        PseudoLabels(levels)


def test_unfit_numbers():
    with pytest.raises(ValueError, match="temperature"):
        PseudoLabels((2,), temperature=0)
    with pytest.raises(RuntimeError, match="call fit first"):
        PseudoLabels((2,)).accept(0.5)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate must be in 0..1"):
            with_confidence(torch.ones(3, 1)).accept(rate)
        with pytest.raises(ValueError, match="progress must be in 0..1"):
            acceptance_rate(rate)
    for name in ("acceptance_end", "acceptance_max"):
        for value in (0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=name):
                acceptance_rate(0.5, **{name: value})


def test_acceptance_up_to_a_share():
    assert [acceptance_rate(t, 0.5, 0.3) for t in (0, 0.25, 0.5, 1)] == [0, 0.15, 0.3, 0.3]


def test_a_warm_start_follows_features_that_moved():
    generator = torch.Generator().manual_seed(0)
    centres, noise = torch.randn(20, 16, generator=generator), torch.randn(600, 16, generator=generator)
    x = normalize(2 * centres[torch.arange(600) % 20] + noise)
    first = PseudoLabels((10, 30)).fit(x)
    moved = normalize(x + 0.05 * torch.randn(600, 16, generator=generator))
    steps = []
    warm = PseudoLabels((10, 30)).fit(moved, lambda *step: steps.append(step), previous=first.labels, max_iter=4)
    assert max(iteration for _, iteration, _ in steps) <= 4
    cold = PseudoLabels((10, 30), max_iter=1, seed=7).fit(moved)
    for level in range(2):
        same = (warm.labels[:, level] == first.labels[:, level]).float().mean()
        assert same > 0.9  # the cluster numbers carry over
        assert (cold.labels[:, level] == first.labels[:, level]).float().mean() < 0.5
    with pytest.raises(ValueError, match="previous must have shape"):
        PseudoLabels((10, 30)).fit(moved, previous=first.labels[:5])
