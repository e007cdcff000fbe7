"""Two ranks under torchrun (gloo): the same queue and labels everywhere, keys of all ranks, one writer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.errors import UsageError
from tests.conftest import TINY
from tests.forked import command, run_ranks

COLLECTIVES = """
import torch, torch.distributed as dist
from ifnd_fast.runtime import distributed as d
from ifnd_fast.contrast.models import MoCo
from ifnd_fast.clustering.shards import Shards
from ifnd_fast.clustering.whitening import whiten
d.start(torch.device("cpu"))
r, w = d.rank(), d.world_size()
x = torch.arange(4.0).view(2, 2) + 10 * r
everyone = torch.cat([torch.arange(4.0).view(2, 2) + 10 * i for i in range(w)])
assert torch.equal(d.all_gather(x), everyone)
assert torch.equal(d.own_share(everyone), x)
half, number = x.half() / 3, torch.arange(2) + 10 * r
halves, numbers = d.all_gather_rows(half, number)
assert torch.equal(halves, everyone.half() / 3) and torch.equal(numbers, d.all_gather(number))
assert d.same_everywhere(halves, numbers) and not d.same_everywhere(half) and d.same_everywhere(numbers[:0])
some = torch.arange(r, 2 * r)[:, None].half()  # the first rank has none
assert torch.equal(d.gather_rows(some), torch.cat([torch.arange(i, 2 * i)[:, None].half() for i in range(w)]))
assert torch.equal(d.gather_rows(some[:0]), some[:0])
assert d.every(True, x.device) and not d.every(r > 0, x.device) and not d.every(False, x.device)
x.requires_grad_()
weights = torch.arange(1.0, 2 * w + 1)[:, None] * (r + 1)
(d.all_gather_with_grad(x) * weights).sum().backward()
own = torch.arange(1.0, 2 * w + 1)[2 * r : 2 * r + 2, None] * sum(range(1, w + 1))
assert torch.equal(x.grad, own.expand(2, 2)), x.grad

class Normalise(torch.nn.Module):
    def forward(self, x):
        return x - x.mean(0)

batch = torch.arange(16.0)[:, None] ** 2
keys = d.all_gather(MoCo(Normalise(), bn_groups=1).keys(d.own_share(batch), shuffle_seed=3))
order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
for group in order.chunk(w):
    torch.testing.assert_close(keys[group], batch[group] - batch[group].mean(0))

rows = torch.randn(10 * w, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 0.2])
own = d.own_share(rows)
mine = whiten(own, 0.5, Shards(len(own), torch.device("cpu")))
alone = d.own_share(whiten(rows, 0.5, Shards.alone(rows)))
torch.testing.assert_close(mine @ mine.T, alone @ alone.T)

from ifnd_fast.config import Config
from ifnd_fast.metrics.feature_quality import alignment, effective_rank
from ifnd_fast.training.feature_watch import FeatureWatch
watch, again = FeatureWatch(Config()), FeatureWatch(Config())
steps = [torch.nn.functional.normalize(rows + i, dim=1) for i in range(3)]
for first, second in zip(steps, steps[1:]):
    watch.note(d.own_share(first), d.own_share(second))
again.load_state(watch.state(), x.device)
found = watch.figures(1)
assert d.all_gather_objects(found) == [found] * w and again.figures(1) == found
assert abs(found["feature_rank"] - effective_rank(torch.cat(steps[:2]))) < 1e-6
assert abs(found["alignment"] - alignment(torch.cat(steps[:2]), torch.cat(steps[1:]))) < 1e-6
d.stop()
"""


def torchrun(ranks: int, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         *map(str, args)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


ALONE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS",
         "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # fmt: skip
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "0"}, "RANK=0 in the environment, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start one torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"),
        ({**WHOLE, "MASTER_ADDR": ""}, "RANK=1 WORLD_SIZE=2 in the environment, but no MASTER_ADDR: "),
        ({**WHOLE, "RANK": "2"}, "RANK=2 must be from 0 to below WORLD_SIZE=2"),
        ({**WHOLE, "RANK": "one"}, "must be numbers: .*'one'"),
        ({**WHOLE, "LOCAL_RANK": "x"}, "must be numbers: .*'x'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, r"srun started 2 processes \(SLURM_PROCID=0\).*srun --ntasks-per"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpirun started 2 processes"),
    ],
)
def test_processes_that_would_not_find_each_other_are_told(environment, words, monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        distributed.start(torch.device("cpu"))


@pytest.mark.parametrize(
    "environment, ranks",
    [
        ({}, 0), (WHOLE, 2), ({**WHOLE, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, 2),  # torchrun within srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 0),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 0),  # srun --ntasks=1 in a larger job
    ],
)  # fmt: skip
def test_how_many_ranks_were_started(environment, ranks, monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.ranks_in_environment() == ranks
    if ranks > 1:
        with pytest.raises(UsageError, match="knn computes in one process, but 2 were started"):
            distributed.refuse_ranks("knn")
    else:
        distributed.refuse_ranks("knn")


def test_tasks_of_srun_do_not_train_alone(digit_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    done = command("train", "--data", digit_folder, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: srun started 4 processes"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


LOSSES = """
import sys
from torch import nn

class OfOneImage(nn.BatchNorm2d):  # normalises an image by itself, whatever the batch
    def forward(self, x):
        return nn.functional.group_norm(x, 1, self.weight, self.bias)

nn.BatchNorm2d = OfOneImage
from ifnd_fast.cli import train
train()
"""


@pytest.mark.parametrize(
    "negatives, ranks, more",
    [("queue", 4, ["--accumulate", 2]), ("in-batch", 2, ["--augment", "device", "--color-jitter", 0.4])],
)
def test_ranks_share_a_batch_without_changing_the_losses(negatives, ranks, more, digit_folder, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LOSSES)
    losses = []
    for number in (1, ranks):
        out = tmp_path / f"run-{number}"
        own = more if negatives == "in-batch" or number > 1 else []  # the queue: whole on one, in parts on several
        done = run_ranks(number, script, "--data", digit_folder, "--out", out, *TINY, "--batch-size", 40,
                        "--negatives", negatives, *own)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert [line["step"] for line in lines] == [3, 6, 9]
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=2e-4)
    assert losses[1][2] == pytest.approx(losses[0][2], rel=1e-2)  # by now rounding may have tipped an image's label


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_and_shuffled_batch_norm(ranks, tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    done = (torchrun if ranks == 2 else run_ranks)(ranks, script)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "negatives, features, more",
    [("queue", "fresh", []), ("in-batch", "bank", []), ("queue", "bank", ["--cluster-async", "--epochs", 5])],
)
def test_two_ranks_train_one_run(negatives, features, more, digit_folder, tmp_path):
    out, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text("from ifnd_fast.cli import train\ntrain()\n")
    done = run_ranks(2, script, "--data", digit_folder, "--out", out, *TINY, "--negatives", negatives,
                    "--features", features, "--warm-iterations", 4, *more)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = 5 if more else 3
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert sum(lines[-1]["false_negatives_per_query"]) > 0
    assert len(lines[-1]["cluster_agreement"]) == 2 and lines[-1]["cluster_empty"] == [0, 0]
    assert all(1 <= len(inertia) <= 4 for inertia in lines[-1]["cluster_inertia"])  # the second clustering is warm
    assert done.stdout.count(f"epoch {epochs}/{epochs}") == 1
    state = torch.load(sorted(out.glob("checkpoints/*.pt"))[-1], weights_only=True)
    if negatives == "queue":
        # the last two steps of 32 images, of both ranks, each image with its own current label
        indices = state["negatives"]["indices"]
        assert len(set(indices.tolist())) == 64
        assert torch.equal(state["negatives"]["labels"], state["accepted"][indices])


def test_a_rank_none_of_whose_images_can_be_read(flat_folder, tmp_path):
    """The first rank's share of the features: clustering goes on with those of the others."""
    data, script = tmp_path / "data", tmp_path / "train.py"
    shutil.copytree(flat_folder, data)
    for file in sorted(data.iterdir())[:60]:
        file.write_bytes(b"broken")
    script.write_text("from ifnd_fast.cli import train\ntrain()\n")
    done = run_ranks(2, script, "--data", data, "--out", tmp_path / "run", *TINY, "--epochs", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(sorted((tmp_path / "run").glob("checkpoints/*.pt"))[-1], weights_only=True)
    assert (state["accepted"][:60] == -1).all() and (state["accepted"][60:] >= 0).all()
    assert sorted(state["unreadable"]) == list(range(60))  # also those that the second rank met
    assert done.stderr.count("unreadable image skipped") == 60
