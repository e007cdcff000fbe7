"""Every engine of bench/clustering.py finds clusters as good as the others', and answers from a process of its own."""

from __future__ import annotations

import pytest
from kmeans_peers import ENGINES, OURS, WARM, Data, Engine, Missing, inertia, trail_of

DATA = Data(1_000, 8, dim=32, noise=3.0)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_clusters(name):
    data = DATA._replace(cosine=0.98) if name == WARM else DATA
    x = data.features()
    try:
        fit = ENGINES[name][0](data, x, 10)
    except ImportError:
        pytest.skip(f"not installed: pip install {ENGINES[name][1]}")
    centroids, iterations = fit()
    assert centroids.shape == (8, 32) and 1 <= iterations <= 10
    assert inertia(x, centroids) == pytest.approx(trail_of(data, x, 10)[-1][1], 0.02)


def test_a_process_answers_or_tells_what_to_install():
    with Engine(OURS) as engine:
        fit = engine.fit(DATA, 10, trail=True)
    seconds, inertias = zip(*fit.trail, strict=True)
    assert fit.seconds > 0 and list(seconds) == sorted(seconds) and inertias[-1] == pytest.approx(fit.inertia, 1e-4)
    with Engine("superkmeans") as engine:
        try:
            assert engine.fit(DATA, 10).iterations <= 10
        except Missing as missing:
            assert str(missing) == "not installed: pip install superkmeans"
