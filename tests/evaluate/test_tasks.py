"""The other tasks of ifnd-fast-eval, from the command line to the figures."""

from __future__ import annotations

import json

import pytest
import torch

from ifnd_fast.evaluate.few_shot import FewShotOptions, few_shot
from ifnd_fast.evaluate.linear import LinearOptions, linear
from ifnd_fast.evaluate.semi import SemiOptions, semi
from ifnd_fast.evaluate.subject import Options
from ifnd_fast.evaluate.svm import SvmOptions, svm
from ifnd_fast.evaluate.tasks import TASKS
from ifnd_fast.evaluate.transfer import ListOptions, transfer
from ifnd_fast.runtime.errors import CommandError, UsageError
from tests.forked import command


@pytest.fixture
def common(untrained_run, class_folders, tmp_path) -> Options:
    return Options(untrained_run, data=str(class_folders), device="cpu", json_file=tmp_path / "figures.json")


def figures(common: Options) -> dict:
    return json.loads(common.json_file.read_text())


def test_linear_by_regression(common):
    linear(common, LinearOptions(fast=True))
    found = figures(common)
    assert found["top1"] > 50 and found["top5"] > 90 and found["held_out_top1"] > 50
    assert (found["train_images"], found["test_images"]) == (240, 120)


def test_linear_sweeps_over_features_computed_once(common, tmp_path, capsys):
    linear(common, LinearOptions(lrs=(0.1, 3.0, 10.0, 1e6), weight_decays=(0.0, 1e-3), out=tmp_path / "out"))
    found = figures(common)
    assert found["top1"] > 50 and found["top5"] > 90 and found["lr"] in (3.0, 10.0)
    assert (found["train_images"], found["test_images"]) == (240, 120)
    tried = {(one["lr"], one["weight_decay"]): one for one in found["sweep"]}
    assert len(tried) == 8 and tried[1e6, 1e-3]["diverged"]
    best = max(one["held_out_top1"] for one in found["sweep"] if not one["diverged"])
    assert tried[found["lr"], found["weight_decay"]]["held_out_top1"] == found["held_out_top1"] == best
    assert json.loads((tmp_path / "out" / "result.json").read_text())["top1"] == found["top1"]
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 8 settings diverged, to a loss above log(classes), which guessing has" in told
    with pytest.raises(CommandError, match="at every one of --lrs the loss rose above"):
        linear(common, LinearOptions(lrs=(1e6,), weight_decays=(1e-3,)))


@pytest.mark.parametrize("options", [LinearOptions(fast=True), LinearOptions(lrs=(1.0, 10.0), epochs=20)])
def test_linear_chooses_on_training_images_alone(options, common, class_folders, monkeypatch):
    """The test images' labels change nothing but the accuracy."""
    linear(common, options)
    before = figures(common)
    from ifnd_fast.evaluate import linear as module

    def shifted(data):
        train, test = opened(data)
        test.labels = (test.labels + 1) % 6
        return train, test

    opened = module.open_labelled
    monkeypatch.setattr(module, "open_labelled", shifted)
    linear(common, options)
    after = figures(common)
    chosen = ("penalty", "lr", "weight_decay", "held_out_top1", "sweep")
    assert [after.get(name) for name in chosen] == [before.get(name) for name in chosen]
    assert after["top1"] < 30


def test_semi_trains_on_the_shares_and_says_which(common, tmp_path):
    out = tmp_path / "semi"
    semi(common, SemiOptions(shares=(0.05, 0.5), epochs=2, out=out))
    found = figures(common)["labels"]
    assert {name: value["train_images"] for name, value in found.items()} == {"0.05": 12, "0.5": 120}
    assert (found["0.05"]["lr"], found["0.05"]["head_lr"]) == (0.02, 5) and found["0.5"]["lr"] == 0.01
    ids = {name: (out / f"labels-{name}" / "ids.txt").read_text().split() for name in found}
    assert len(ids["0.05"]) == 12 and set(ids["0.05"]) < set(ids["0.5"])
    assert sorted(name[:9] for name in ids["0.05"]) == [f"n{label // 2:08d}" for label in range(12)]

    again = SemiOptions(ids=out / "labels-0.05" / "ids.txt", epochs=2, out=tmp_path / "again")
    semi(common, again)  # the list that was written is a list to read, and means the same images
    assert figures(common)["labels"]["ids"] == found["0.05"]


def test_svm_of_one_class_an_image(common):
    svm(common, SvmOptions(costs=(0.1, 1, 10), shots=(4,), samplings=2))
    found = figures(common)
    assert found["top1"] > 50 and found["map_area"] > 55 and len(found["classes"]) == 6
    assert set(found["low_shot"]["4"]) == {"map_area", "map_11-point"} and set(found["costs"]) <= {0.1, 1, 10}


def test_transfer_by_lists_is_linear_on_those_images(untrained_run, class_folders, tmp_path):
    lists = {}
    for split in ("train", "val"):
        files = sorted((class_folders / split).rglob("*.png"))
        lines = [f"{file.relative_to(class_folders)} {int(file.parent.name[1:])}" for file in files]
        lists[split] = tmp_path / f"{split}_places.csv"
        lists[split].write_text("\n".join(lines) + "\n")
    done = command("evaluate", "transfer", untrained_run, "--train-list", lists["train"], "--val-list", lists["val"],
                   "--image-root", class_folders, "--fast", "--json-file", tmp_path / "figures.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    common = Options(untrained_run, data=str(class_folders), device="cpu", json_file=tmp_path / "linear.json")
    linear(common, LinearOptions(fast=True))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["top1"] == figures(common)["top1"] and found["data"] == "train_places" and "top-1" in done.stdout


def test_semi_as_a_process_with_torchvisions_weights(class_folders, tmp_path):
    from torchvision.models import resnet18

    torch.save({"state_dict": resnet18().state_dict()}, tmp_path / "resnet18.pth")
    done = command("evaluate", "semi", tmp_path / "resnet18.pth", "--data", class_folders, "--image-size", "32",
                   "--epochs", "1", "--shares", "0.1", "--workers", "0", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "evaluate" / "semi-classes0" / "labels-0.1" / "result.json").read_text())
    assert result["train_images"] == 24 and f"{result['top1']:.2f} %" in done.stdout


@pytest.mark.parametrize(
    "task, words",
    [
        (lambda common: linear(common, LinearOptions(lr=0)), "--lr must be a finite number above 0, got 0"),
        (lambda common: linear(common, LinearOptions(resume=True)), r"--resume goes with --lr \(MoCo's: 30\)"),
        (lambda common: linear(common, LinearOptions(weight_decay=0.1)), "--weight-decay goes with --lr"),
        (lambda common: linear(common, LinearOptions(fast=True, lr=1.0)), "--fast and --lr are two ways"),
        (lambda common: linear(common, LinearOptions(lrs=())), "--lrs must be finite numbers above 0"),
        (lambda common: semi(common, SemiOptions(shares=(10,))), "--shares must be from 0"),
        (lambda common: semi(common, SemiOptions(shares=(0.5,), head_lr=-1)), "--head-lr"),
        (lambda common: few_shot(common, FewShotOptions(shots=())), "--shots must be"),
        (lambda common: few_shot(common, FewShotOptions(draws=0)), "--draws must be 1 or more, got 0"),
        (lambda common: few_shot(common, FewShotOptions(shots=(41, 99))), "--shots 41 99: no class has as many"),
        (lambda common: svm(common, SvmOptions(costs=(0,))), "--costs"),
        (lambda common: svm(common, SvmOptions(folds=1)), "--folds must be 2 or more, got 1"),
        (lambda common: transfer(common, ListOptions(), LinearOptions(epochs=0)), "--epochs"),
        (lambda common: transfer(common, ListOptions(train_list=common.checkpoint), LinearOptions()), "go together"),
    ],
)
def test_bad_options_are_named(task, words, common):
    with pytest.raises(UsageError, match=words):
        task(common)


def test_few_shot_needs_labels(untrained_run, flat_folder):
    with pytest.raises(UsageError, match="an evaluation needs labels, that is images in one folder per class"):
        few_shot(Options(untrained_run, data=str(flat_folder), device="cpu"), FewShotOptions())


def test_transfer_needs_data(untrained_run):
    with pytest.raises(UsageError, match="give the data to transfer to"):
        transfer(Options(untrained_run), ListOptions(), LinearOptions())


def test_common_options_out_of_range(common):
    common.image_size = 0
    with pytest.raises(UsageError, match="--image-size must be 1 or more, got 0"):
        TASKS["knn"](common)
