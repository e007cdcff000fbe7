from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from ifnd_fast.report.comparison import differing_settings, group_by_settings, mean_curve, write_comparison
from ifnd_fast.runtime import checkpoint
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.saved_run import read_run
from tests.conftest import TINY
from tests.forked import command


def make(folder: Path, seed: int = 0, strategy: str = "eliminate", last: int = 4, result: bool = True, lr=0.06, **data):
    """A run of 4 epochs, of which `last` are done; its kNN ends at 90 + seed."""
    folder.mkdir(parents=True)
    config = {
        "preset": "demo", "run": {"out": str(folder), "seed": seed, "device": "cpu"}, "data": {"data": "demo"} | data,
        "optim": {"epochs": 4, "lr": lr}, "contrast": {"false_negatives": strategy}, "cluster": {"levels": [3, 6]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "epoch": epoch, "loss": 5.0 - epoch + seed, "knn_top1": 86.0 + epoch + seed, "seconds": 60.0,
            "acceptance_rate": epoch / 4, "false_negative_precision": [0.5 + 0.1 * seed, None],
            "false_negative_recall": [0.25, 0.125],
        }
        for epoch in range(1, last + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint.save(folder, {"step": 1, "epoch": last, "result": {"knn_top1_untrained": 70.0 + seed}})
    if result:
        (folder / "result.json").write_text(json.dumps({"knn_top1": 90.0 + seed, "seconds": 120.0}))
    return folder


class Rows(HTMLParser):
    """The cells of every table row."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def compare(path: Path, *outs: Path) -> tuple[str, dict[str, list[str]]]:
    page = write_comparison(outs, path / "comparison.html").read_text()
    return page, {row[0]: row[1:] for row in Rows(page).rows}


def test_seeds_become_mean_and_deviation(tmp_path):
    outs = [make(tmp_path / f"e{seed}", seed) for seed in (0, 1, 3)] + [make(tmp_path / "k", 0, "keep")]
    page, rows = compare(tmp_path, *outs)
    columns = rows["runs"]
    mean = dict(zip(columns, rows["false negatives eliminate (mean of 3)"], strict=True))
    spread = statistics.stdev([0, 1, 3])
    assert mean["kNN top-1, %"] == f"{90 + 4 / 3:.2f} ({spread:.2f})"
    assert mean["untrained, %"] == f"{70 + 4 / 3:.2f} ({spread:.2f})"
    assert mean["precision, %"] == f"{50 + 40 / 3:.0f} ({10 * spread:.0f}) / –"
    assert mean["recall, %"] == "25 / 12" and mean["epochs"] == "4" and mean["minutes"] == "2.0"
    assert rows["e3, seed 3"][0] == "93.00"
    keep = dict(zip(columns, rows["false negatives keep (k)"], strict=True))
    assert keep["kNN top-1, %"] == "90.00" and keep["precision, %"] == keep["10 labels a class, %"] == "–"
    assert rows["contrast.false_negatives"] == ["eliminate", "keep"] and rows["run.seed"] == ["0, 1, 3", "0"]
    assert not {"run.out", "run.device"} & set(rows)
    assert re.findall("<figcaption><h3>(.*?)</h3>", page) == [
        "Loss", "kNN accuracy", "Acceptance rate", "Detection with 3 clusters", "Detection with 6 clusters",
    ]  # fmt: skip
    assert not re.search(r"<script|<link|url\((?!#)|@import|https?://(?!www.w3.org)", page)


def test_curves_are_means_where_all_seeds_are():
    class Seed:
        def __init__(self, values):
            self.epochs = [{"epoch": epoch, "x": value} for epoch, value in values.items()]

    runs = [Seed({1: 1.0, 2: 2.0, 3: None, 4: 4.0}), Seed({1: 3.0, 2: 2.0, 3: 3.0})]
    assert mean_curve(runs, lambda line: line["x"]) == ([1, 2], [2.0, 2.0], [pytest.approx(2**0.5), 0.0])


def test_a_run_in_progress_is_told_and_not_averaged(tmp_path):
    outs = [make(tmp_path / "a", 0), make(tmp_path / "b", 1, last=2, result=False)]
    page, rows = compare(tmp_path, *outs)
    assert "Without a result yet, so as of the last epoch: b (epoch 2 of 4)." in page
    assert rows["a and 1 more (mean of 1 finished)"][0] == "90.00" and rows["b, seed 1"][0] == "89.00"
    assert "None but the seed: 0, 1." in page


def test_many_differences_leave_the_runs_their_names(tmp_path):
    one, other = make(tmp_path / "x" / "same"), make(tmp_path / "y" / "same", 0, "attract", lr=0.1, flip=True)
    page, rows = compare(tmp_path, one, other)
    assert str(one) in rows and str(other) in rows
    assert rows["data.flip"] == ["–", "True"] and rows["optim.lr"] == ["0.06", "0.1"]
    assert "each stands for one seed" in page


def test_different_data_is_told(tmp_path):
    page, _ = compare(tmp_path, make(tmp_path / "a"), make(tmp_path / "b", data="cifar10"))
    assert "The runs are of different data (demo, cifar10)" in page


def test_runs_without_settings_are_not_taken_for_the_same(tmp_path):
    outs = [make(tmp_path / name) for name in "ab"]
    for out in outs:
        (out / "config.yaml").unlink()
    groups = group_by_settings([read_run(out) for out in outs])
    assert [group.name for group in groups] == ["a", "b"] and differing_settings(groups) == []
    assert "a: There is no readable config.yaml" in compare(tmp_path, *outs)[0]


def test_a_run_given_twice(tmp_path):
    out = make(tmp_path / "a")
    with pytest.raises(UsageError, match="given more than once"):
        write_comparison([out, tmp_path / "b" / ".." / "a"], tmp_path / "comparison.html")


def test_the_command_compares_real_runs(digit_folder, tmp_path):
    for name, *args in (("a",), ("b", "--seed", 1), ("c", "--false-negatives", "keep")):
        done = command("train", "--data", digit_folder, "--out", tmp_path / name, *TINY, *args)
        assert done.returncode == 0, done.stderr
    page = tmp_path / "page.html"
    done = command("report", *(tmp_path / name for name in "abc"), "--out", page)
    assert done.returncode == 0 and str(page) in done.stdout, done.stderr
    rows = {row[0]: row[1:] for row in Rows(page.read_text()).rows}
    results = [json.loads((tmp_path / name / "result.json").read_text())["knn_top1"] for name in "abc"]
    assert rows["false negatives eliminate (mean of 2)"][0].startswith(f"{statistics.mean(results[:2]):.2f}")
    assert rows["false negatives keep (c)"][0] == f"{results[2]:.2f}"

    done = command("report", tmp_path / "a", tmp_path / "nothing", "--out", page)
    assert done.returncode == 1 and "nothing is not a folder" in done.stderr and "Traceback" not in done.stderr
