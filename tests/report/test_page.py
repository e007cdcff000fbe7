from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ifnd_fast.config import Config, flatten, to_yaml
from ifnd_fast.report.page import headline, write_report
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.training.saved_run import duration, read_run
from ifnd_fast.training.trainer import Trainer
from tests.report.runs import CLASSES, FIGURES, LEVELS, OF_FEATURES, PER_CLASS, N, Page, epoch_line, figure_titles


def test_a_finished_run(make_run):
    out = make_run()
    path = write_report(out)
    page = path.read_text()
    assert path == out / "report.html"
    assert sorted(p.name for p in out.iterdir() if "report" in p.name) == ["report.html"]
    assert figure_titles(page) == FIGURES
    for text in ("my run", "finished", "95.3%", "+24.8 on untrained, +2.2 on raw pixels", "1 h 2 min",
                 "cluster.levels", "eliminate false negatives · 3, 6 clusters · 6 epochs"):  # fmt: skip
        assert text in page
    write_report(out)
    assert path.read_text() == page  # the same run, the same bytes


def test_few_labels_head_the_page_and_runs_of_earlier_versions_do_without(make_run):
    page = write_report(make_run()).read_text()
    assert "a class" not in page and "<td>all, by kNN</td><td>93.10 %</td><td>70.50 %</td><td>95.30 %</td>" in page

    def few(mean: float) -> dict:
        return {"10": {"mean": mean, "sd": 1.25, "values": []}, "50": {"mean": mean + 1}}  # 50: no deviation

    figures = {"few_shot_top1": few(89.2), "few_shot_top1_raw_pixels": few(76.3), "few_shot_top1_untrained": "broken"}
    page = write_report(make_run(figures=figures)).read_text()
    assert "With 10 labels a class" in page and "+12.9 on raw pixels<" in page
    assert "<td>10 a class</td><td>76.3 ± 1.2 %</td><td>–</td><td>89.2 ± 1.2 %</td>" in page
    assert "50 a class" not in page


def test_the_page_needs_nothing_else_and_describes_its_pictures(make_run):
    page = write_report(make_run()).read_text()
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) > 20
    for attributes in images:
        assert attributes["src"].startswith("data:image/") and attributes["alt"]
    assert not [tag for tag, _ in parsed.elements if tag in ("script", "link", "iframe", "object")]
    links = [value for _, attributes in parsed.elements for key, value in attributes.items() if "href" in key]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", page)
    pictures = [attributes for tag, attributes in parsed.elements if tag == "div" and attributes.get("role") == "img"]
    assert len(pictures) == len(FIGURES) and all(re.search(r"\d", p["aria-label"]) for p in pictures)


def test_a_run_in_progress(make_run):
    page = write_report(make_run(lines=[epoch_line(1), epoch_line(2)], result=False)).read_text()
    assert "no result yet" in page and "epoch 2 of 6" in page and "Time so far" in page
    assert "82.0%" in page and "epoch 2, +11.5 on untrained, \N{MINUS SIGN}11.1 on raw pixels" in page
    assert "Raw pixels: 93.1%." in page  # measured before training, so known by now


def test_one_epoch_without_labels(make_run):
    line = {
        k: v for k, v in epoch_line(1).items() if not any(part in k for part in ("knn", "cision", "recall", "cluster_"))
    }
    out = make_run(lines=[line], result=False, data=make_run.images(classes=False), state={"result": {}})
    page = write_report(out).read_text()
    assert figure_titles(page) == ["Loss", *OF_FEATURES, "Acceptance rate", "False negatives per query", "Time"]
    assert "kNN" not in page and "% right" not in page
    assert 'class="thumb wrong"' not in page and page.count("<img") > 20


def test_modes_without_clustering(make_run):
    page = write_report(make_run(config={"contrast": {"false_negatives": "keep"}})).read_text()
    titles = ["Loss", "kNN accuracy", *OF_FEATURES, "Time"]
    assert figure_titles(page) == titles and "This run keeps false negatives" in page

    truth = torch.arange(N).div(PER_CLASS, rounding_mode="floor").int()[:, None]
    oracle = {"pseudo_labels": {"levels": torch.tensor([CLASSES])}, "accepted": truth}
    page = write_report(make_run(config={"contrast": {"false_negatives": "oracle"}}, state=oracle)).read_text()
    assert "true classes" in page and "100% right" in page and 'class="thumb wrong"' not in page


def test_metrics_of_killed_and_resumed_runs(make_run):
    late = epoch_line(2) | {"loss": 1.5}
    glued = json.dumps(epoch_line(3))[:40] + json.dumps(epoch_line(3)) + "\n"
    tail = json.dumps(late) + "\n\n" + glued + '[1]\n{"step": 4}\n' + json.dumps(epoch_line(4)) + '\n{"epoch": 5, "lo'
    out = make_run(lines=[epoch_line(1), epoch_line(2)], tail=tail)
    run = read_run(out)
    assert [line["epoch"] for line in run.epochs] == [1, 2, 4]
    assert run.epochs[1]["loss"] == 1.5
    assert run.notes == ["metrics.jsonl: 4 incomplete lines left out."]
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\x00\xfe")
    assert figure_titles(write_report(out).read_text()) == FIGURES


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1, "lo'])
def test_without_an_epoch_there_is_no_report(tmp_path, content):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "absent")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match="metrics.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(epoch_line(1)) + "\n")
    page = write_report(tmp_path).read_text()
    assert "no readable config.yaml" in page and "no checkpoint" in page and "Loss" in figure_titles(page)


@pytest.mark.filterwarnings("ignore:.*trying the one before")
def test_broken_files_are_named_and_the_rest_is_shown(make_run):
    out = make_run()
    (out / "config.yaml").write_text("a: [")
    (out / "result.json").write_text("[]")
    for path in checkpoint.list_checkpoints(out):
        path.write_bytes(path.read_bytes()[:100])
    page = write_report(out).read_text()
    for text in (
        "config.yaml can",
        "result.json should hold a mapping, but holds list",
        "step-000000060.pt can",
    ):
        assert text in page
    assert "no result yet" in page and "Loss" in figure_titles(page)


def test_data_that_is_gone_or_has_changed(make_run):
    page = write_report(make_run(data="/nowhere/at/all")).read_text()
    assert "/nowhere/at/all: no such folder" in page and figure_titles(page) == FIGURES and "<img" not in page

    out = make_run()
    (make_run.folder / "images" / "class 0" / "000.png").unlink()
    assert "has 59 images now, 60 when the run was made" in write_report(out).read_text()


@pytest.mark.parametrize("noted", ["result", "checkpoint", "older checkpoint", "many", "none"])
def test_images_that_the_run_left_out_are_listed_with_the_reason(noted, make_run):
    out = make_run()
    written = json.loads((out / "result.json").read_text())
    listed = [{"image": f"/data/{n}.png", "reason": f"torn at <{n}>"} for n in range(300 if noted == "many" else 2)]
    if noted in ("result", "many"):
        (out / "result.json").write_text(json.dumps({**written, "unreadable": listed}))
    else:
        (out / "result.json").unlink()
        state = {"checkpoint": {3: "torn at <3>"}, "older checkpoint": [3], "none": {}}[noted]
        out = make_run(state={"unreadable": state})
        (out / "result.json").unlink()
    page = write_report(out).read_text()
    assert ("can't be read</h2>" in page) == (noted != "none")
    if noted in ("result", "many"):
        assert "<dt>/data/1.png</dt><dd>torn at &lt;1&gt;</dd>" in page
    elif noted != "none":
        assert "class 0/003.png</dt><dd>" in page and ("torn at &lt;3&gt;" in page) == (noted == "checkpoint")
    assert ("300 left out" in page and "and 100 more" in page and "200.png" not in page) == (noted == "many")


def test_names_are_escaped(make_run):
    data = make_run.images()
    (data / "class 0").rename(data / "<script>alert(1)")
    page = write_report(make_run(data=data)).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_matplotlib_is_left_as_it_was(make_run):
    # In a process of its own, where nothing else has imported pyplot.
    code = """
import sys, matplotlib
matplotlib.rcParams["font.size"] = 31
before = matplotlib.rcParams.copy()  # dict() would import pyplot, to choose a backend
from ifnd_fast.report.page import write_report
from pathlib import Path
write_report(Path(sys.argv[1]))
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    out = make_run(lines=[epoch_line(1)])
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "31px" not in (out / "report.html").read_text()


def test_a_long_run_with_photographs_stays_small(make_run):
    data = make_run.images()
    rng = np.random.default_rng(0)
    for path in data.rglob("*.png"):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(path)
    out = make_run(lines=[epoch_line(epoch, 1000) for epoch in range(1, 1001)], data=data)
    assert write_report(out).stat().st_size < 1_500_000


def test_what_training_writes(make_run, tmp_path):
    settings = Config()
    settings.run.out, settings.run.device, settings.run.knn_every = tmp_path / "trained", "cpu", 1
    settings.data.data, settings.data.image_size, settings.data.workers = str(make_run.images()), 10, 0
    settings.model.width, settings.model.dim = 4, 8
    settings.optim.epochs, settings.optim.batch_size, settings.contrast.queue_size = 2, 15, 30
    settings.cluster.levels, settings.cluster.recluster_every = LEVELS, 1
    run_folder.create(settings.run.out, to_yaml(settings))
    Trainer(settings).fit()
    page = write_report(settings.run.out).read_text()
    states = ["Precision and recall at every acceptance rate", "Features in the plane (PCA)"]
    assert figure_titles(page) == FIGURES + states and "finished" in page and "among the 30 in the queue" in page
    assert "from the most to the least confident" in page and "At epoch 2" in page and page.count("cluster ") > 9
    assert page.count("30 of 60 labels accepted (50%)") == len(LEVELS)  # at half of the training
    assert page.count("<img") > 24


def test_words_for_time_and_settings():
    assert [duration(s) for s in (4.4, 59.6, 125, 3600, 90000)] == [
        "4 s", "1 min 0 s", "2 min 5 s", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip
    nested = {"a": 1, "b": {"c": [1, 2], "d": None, "e": {"f": []}}}
    assert flatten(nested) == [("a", "1"), ("b.c", "1, 2"), ("b.d", "none"), ("b.e.f", "none")]


def test_headline_of_a_run_without_any_accuracy(make_run):
    out = make_run(lines=[{"epoch": 1, "loss": 2.0}], result=False, state={"result": {}})
    assert headline(read_run(out)) == [("Loss", "2.000", "epoch 1")]
