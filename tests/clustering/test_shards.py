"""k-means of ranks that share the rows (gloo, torchrun): as on one rank, up to rounding, and no rank left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.forked import run_ranks

START = """
import sys, torch
from torch.nn.functional import normalize
from ifnd_fast import KMeans, PseudoLabels
from ifnd_fast.runtime import distributed as d
d.start(torch.device("cpu"))
g = torch.Generator().manual_seed(1)
def clustered(n, k, dim=16):
    return normalize(torch.randn(k, dim, generator=g)[torch.arange(n) % k] + 0.2 * torch.randn(n, dim, generator=g))
def own(x):
    s = d.share(len(x)); return x[s.start:s.stop]
"""

SAME = """
x = clustered(2_003, 40)
for settings in ({}, {"spherical": True}, {"tol": 1e-3}, {"n_init": 3}, {"engine": "faiss"}, {"max_iter": 1}):
    alone = KMeans(60, **settings).fit(x)
    seen = []
    shared = KMeans(60, distributed=True, **settings).fit(own(x), callback=lambda *step: seen.append(step))
    assert shared.labels_.shape == (len(own(x)),) and (seen or d.rank() > 0)
    assert torch.equal(shared.labels_, own(alone.labels_)), settings
    torch.testing.assert_close(shared.cluster_centers_, alone.cluster_centers_)
    assert abs(shared.inertia_ / alone.inertia_ - 1) < 1e-6 and shared.n_iter_ == alone.n_iter_

few = torch.randn(30, 4, generator=g).repeat(40, 1)  # 30 distinct rows, many times: empty clusters to refill
for start in (few[:1].repeat(25, 1), few[:25] * 0 + 1e3):
    alone = KMeans(25, max_iter=3, init=start).fit(few)
    shared = KMeans(25, max_iter=3, distributed=True, init=start).fit(own(few))
    assert torch.equal(shared.labels_, own(alone.labels_))
    assert len(shared.labels_.unique()) > 1

for far in (x + 1e4, x.double() - 1e8, 1e-20 * x, 1e-20 * (x.double() + 1e6)):  # the same frame on every rank
    alone = KMeans(60).fit(far)
    shared = KMeans(60, distributed=True).fit(own(far))
    assert torch.equal(shared.labels_, own(alone.labels_))
    assert torch.equal(shared.predict(own(far)), shared.labels_)
    torch.testing.assert_close(shared.cluster_centers_, alone.cluster_centers_, rtol=1e-6, atol=1e-30)
    assert abs(shared.inertia_ / alone.inertia_ - 1) < 1e-5

weights = torch.rand(len(x), generator=g)
weights[::5] = 0
for given in (weights, None if d.rank() else torch.ones(len(own(x)))):  # of one rank alone
    alone = KMeans(60).fit(x, sample_weight=weights if given is weights else None)
    shared = KMeans(60, distributed=True).fit(own(x), sample_weight=own(weights) if given is weights else given)
    assert torch.equal(shared.labels_, own(alone.labels_))
    assert abs(shared.inertia_ / alone.inertia_ - 1) < 1e-6

alone = PseudoLabels((5, 40)).fit(x)
shared = PseudoLabels((5, 40), distributed=True).fit(own(x))
assert torch.equal(shared.labels, alone.labels) and torch.equal(shared.accept(0.3), alone.accept(0.3))
"""

ERRORS = """
def refused(rows, clusters, message, **settings):
    try:
        KMeans(clusters, distributed=True, **settings).fit(rows)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
x = own(clustered(400, 10)).clone()
refused(x, 401, "400 rows, fewer than n_clusters=401")
refused(own(torch.randn(7, 3, generator=g).repeat(50, 1)), 8, "only 7 distinct rows")
if d.rank() == d.world_size() - 1:
    x[3, 2] = float("nan")
refused(x, 5, "NaN" if d.rank() == d.world_size() - 1 else f"on rank {d.world_size() - 1}: x has NaN")
"""

DEATH = """
import os
x = own(clustered(4_000, 40))
def die(iteration, inertia):
    if d.rank() == 1 and iteration == 2:
        os._exit(9)
try:
    KMeans(60, distributed=True).fit(x, callback=die)
except RuntimeError as error:
    print(f"rank {d.rank()} stopped: {error}", flush=True)
    raise
"""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("what", [SAME, ERRORS], ids=["same", "errors"])
def test_as_on_one_rank(what, ranks, tmp_path):
    script = tmp_path / "kmeans.py"
    script.write_text(START + what + "\nd.stop()\n")
    done = run_ranks(ranks, script)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rank_that_dies_ends_the_others(tmp_path):
    script = tmp_path / "kmeans.py"
    script.write_text(START + DEATH)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2"}
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, script], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = [rank.communicate(timeout=120) for rank in ranks]
    assert ranks[1].returncode == 9
    assert ranks[0].returncode not in (0, None) and "rank 0 stopped" in output[0][0], output[0]
    assert time.monotonic() - started < 60
