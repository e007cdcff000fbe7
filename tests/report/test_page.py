from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifnd_fast.config import Config, to_yaml
from ifnd_fast.report.curves import _bins, draw_figures
from ifnd_fast.report.detections import choose_anchors, contact_sheets, detected
from ifnd_fast.report.html import flatten
from ifnd_fast.report.page import headline, write_report
from ifnd_fast.report.thumbnails import spread
from ifnd_fast.runtime import checkpoint, run_folder
from ifnd_fast.training.saved_run import duration, read_run
from ifnd_fast.training.trainer import Trainer

FIGURES = [
    "Loss", "kNN accuracy", "Acceptance rate", "False negatives per query",
    "Precision and recall of detection", "Balance and agreement of clusters", "Inertia of the last clustering", "Time",
]  # fmt: skip
CLASSES, PER_CLASS, LEVELS = 3, 20, (3, 6)
N = CLASSES * PER_CLASS


def epoch_line(epoch: int, epochs: int = 6) -> dict:
    rate = epoch / epochs
    return {
        "epoch": epoch, "step": 10 * epoch, "loss": 5 - rate, "lr": 0.1 * (1 - rate),
        "acceptance_rate": rate,
        "false_negatives_per_query": [12 * rate, 5 * rate], "images_per_second": 1234.0, "seconds": 4.0,
        "feature_seconds": 1.0, "cluster_seconds": 0.5,
        "false_negative_precision": [None if epoch == 1 else 0.8, 0.9],
        "false_negative_recall": [0.5, 0.25], **({"knn_top1": 80 + epoch} if epoch % 2 == 0 else {}),
        "cluster_largest": [0.4, 0.2], **({"cluster_agreement": [0.6, min(1.0, 0.1 * epoch)]} if epoch > 1 else {}),
        "cluster_inertia": [[0.5, 0.3, 0.25], [0.4, 0.2]],
    }  # fmt: skip


class MakeRun:
    """A run folder of 6 epochs on 60 images, with any part of it changed or left out."""

    def __init__(self, folder: Path):
        self.folder = folder

    def images(self, classes: bool = True) -> Path:
        data = self.folder / "images"
        rng = np.random.default_rng(0)
        for i in range(N):
            path = data / (f"class {i // PER_CLASS}" if classes else ".") / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
        return data

    def __call__(
        self, *, lines=None, tail="", config=(), result=True, data=None, queue=True, state=()
    ) -> Path:
        out = self.folder / "my run"
        out.mkdir(exist_ok=True)
        settings = {
            "preset": "demo",
            "data": {"data": str(self.images() if data is None else data)},
            "optim": {"epochs": 6},
            "contrast": {"false_negatives": "eliminate"},
            "cluster": {"levels": list(LEVELS)},
        } | dict(config)
        lines = [epoch_line(epoch) for epoch in range(1, 7)] if lines is None else lines
        (out / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        known = {"knn_top1_raw_pixels": 93.1, "knn_top1_untrained": 70.5}
        if result:
            (out / "result.json").write_text(json.dumps(known | {"knn_top1": 95.3, "seconds": 3725.0}))
        rng = np.random.default_rng(1)
        labels = torch.from_numpy(np.stack([rng.integers(-1, c, N) for c in LEVELS], axis=1)).int()
        state = {
            "epoch": 6, "step": 60, "result": known, "accepted": labels,
            "pseudo_labels": {
                "levels": torch.tensor(LEVELS), "labels": labels.clamp_min(0),
                "confidence": torch.from_numpy(rng.random((N, len(LEVELS)))).float(),
            },
            "negatives": {"indices": torch.tensor([-1, *range(0, N, 2), 0])} if queue else None,
        } | dict(state)  # fmt: skip
        checkpoint.save(out, state)
        return out


@pytest.fixture
def make_run(tmp_path):
    return MakeRun(tmp_path)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


def figure_titles(page: str) -> list[str]:
    return re.findall("<figcaption><h3>(.*?)</h3>", page)


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


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
    pictures = [
        attributes for tag, attributes in parsed.elements if tag == "div" and attributes.get("role") == "img"
    ]
    assert len(pictures) == len(FIGURES) and all(re.search(r"\d", p["aria-label"]) for p in pictures)


def test_figures_are_sound_svg_with_ids_of_their_own(make_run):
    found = svgs(write_report(make_run()).read_text())
    assert len(found) == len(FIGURES)
    ids = [element.get("id") for svg in found for element in svg.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for svg in found:
        own = {element.get("id") for element in svg.iter()}
        text = ElementTree.tostring(svg, encoding="unicode")
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
        assert {a or b for a, b in used} <= own
        assert "currentColor" in text and "var(--grid" in text
        assert not svg.get("width")  # it scales with the page


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        (["loss"], ["Loss"]),
        (["lr"], []),
        (["knn_top1"], []),  # the result has one number
        (["acceptance_rate"], ["Acceptance rate"]),
        (["false_negatives_per_query"], ["False negatives per query"]),
        (["false_negative_precision"], []),
        (["false_negative_precision", "false_negative_recall"], ["Precision and recall of detection"]),
        (["seconds", "feature_seconds", "cluster_seconds"], ["Time"]),
        (list(set(epoch_line(2)) - {"epoch"}), [title for title in FIGURES if title != "kNN accuracy"]),
    ],
)
def test_a_series_that_is_missing_is_left_out(make_run, keys, missing):
    lines = [{k: v for k, v in epoch_line(epoch).items() if k not in keys} for epoch in range(1, 7)]
    page = write_report(make_run(lines=lines, data="nowhere")).read_text()
    assert figure_titles(page) == [title for title in FIGURES if title not in missing]


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
    assert figure_titles(page) == ["Loss", "Acceptance rate", "False negatives per query", "Time"]
    assert "kNN" not in page and "% right" not in page
    assert 'class="thumb wrong"' not in page and page.count("<img") > 20


def test_modes_without_clustering(make_run):
    page = write_report(make_run(config={"contrast": {"false_negatives": "keep"}})).read_text()
    assert (
        figure_titles(page) == ["Loss", "kNN accuracy", "Time"] and "This run keeps false negatives" in page
    )

    truth = torch.arange(N).div(PER_CLASS, rounding_mode="floor").int()[:, None]
    oracle = {"pseudo_labels": {"levels": torch.tensor([CLASSES])}, "accepted": truth}
    page = write_report(
        make_run(config={"contrast": {"false_negatives": "oracle"}}, state=oracle)
    ).read_text()
    assert "true classes" in page and "100% right" in page and 'class="thumb wrong"' not in page


def test_metrics_of_killed_and_resumed_runs(make_run):
    late = epoch_line(2) | {"loss": 1.5}
    glued = json.dumps(epoch_line(3))[:40] + json.dumps(epoch_line(3)) + "\n"
    tail = (
        json.dumps(late)
        + "\n\n"
        + glued
        + '[1]\n{"step": 4}\n'
        + json.dumps(epoch_line(4))
        + '\n{"epoch": 5, "lo'
    )
    out = make_run(lines=[epoch_line(1), epoch_line(2)], tail=tail)
    run = read_run(out)
    assert [line["epoch"] for line in run.epochs] == [1, 2, 4]
    assert run.epochs[1]["loss"] == 1.5
    assert run.notes == ["metrics.jsonl: 4 incomplete lines left out."]
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\x00\xfe")
    assert figure_titles(write_report(out).read_text()) == FIGURES


def test_numbers_that_are_not_finite_are_left_out(make_run):
    lines = [
        epoch_line(1),
        epoch_line(2) | {"loss": float("nan"), "false_negatives_per_query": [float("inf")]},
    ]
    page = write_report(make_run(lines=lines)).read_text()
    assert "Loss: 4.833 at epoch 1." in page and "Infinity" not in page
    assert not [svg for svg in svgs(page) if "nan" in ElementTree.tostring(svg, encoding="unicode").lower()]


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


def test_an_unreadable_image_costs_its_thumbnail_only(make_run):
    out = make_run()
    for path in (make_run.folder / "images" / "class 0").iterdir():
        path.write_bytes(b"no image")
    page = write_report(out).read_text()
    assert page.count(">not readable</span>") > 3 and page.count("<img") > 10
    assert page.count(", not readable: no picture in a format that can be read here") > 3


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


def test_nothing_accepted_yet(make_run):
    state = {"accepted": torch.full((N, 2), -1)}
    assert "no pseudo label was accepted by epoch 6" in write_report(make_run(state=state)).read_text()


def test_confidence_of_other_rows_is_not_used(make_run):
    labels = torch.zeros(N, 2, dtype=torch.int32)
    labels[0] = -1  # as of an image that could not be read, and so was not clustered
    clustered = {"levels": torch.tensor(LEVELS), "confidence": torch.rand(N - 1, 2)}
    page = write_report(make_run(state={"accepted": labels, "pseudo_labels": clustered})).read_text()
    assert "up to 10, at even steps in order" in page and "confidence 0." not in page


def clustered(confidence=None, labels=None):
    """Parts of a checkpoint after a clustering of all images but the first."""
    rng = np.random.default_rng(3)
    if labels is None:
        labels = torch.from_numpy(np.stack([rng.integers(0, c, N - 1) for c in LEVELS], axis=1)).int()
    confidence = torch.from_numpy(rng.random((N - 1, 2))).float() if confidence is None else confidence
    usable = torch.arange(N) > 0
    accepted = torch.full((N, 2), -1, dtype=torch.int32)
    accepted[usable] = labels
    return {
        "pseudo_labels": {"levels": torch.tensor(LEVELS), "labels": labels, "confidence": confidence},
        "cluster_waiting": {"usable": usable}, "acceptance_rate": 1.0, "accepted": accepted,
    }  # fmt: skip


def test_clusters_and_detection_at_every_rate(make_run):
    page = write_report(make_run(state=clustered())).read_text()
    assert figure_titles(page) == [*FIGURES, "Precision and recall at every acceptance rate"]
    assert "confidence 0." in page and "Dotted: the rate in use, 100%" in page
    assert "its true class is not the cluster" in page and page.count(", mean confidence") == sum(LEVELS)
    assert len(ids := [e["id"] for _, e in Page(page).elements if "id" in e]) == len(set(ids))

    waiting = clustered() | {"accepted": torch.zeros(N, 2, dtype=torch.int32)}  # an older clustering's are in use
    page = write_report(make_run(state=waiting)).read_text()
    assert "up to 10, at even steps in order" in page and page.count(", mean confidence") == sum(LEVELS)


def test_clusters_without_true_classes(make_run):
    out = make_run(state=clustered(), data=make_run.images(classes=False))
    page = write_report(out).read_text()
    assert page.count(", mean confidence") == sum(LEVELS) and 'class="thumb wrong"' not in page
    assert "Precision and recall at every acceptance rate" not in figure_titles(page)


def test_features_in_the_plane(make_run):
    queue = {
        "features": torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0))),
        "indices": torch.arange(40), "_extra_state": torch.tensor([0, 40]),
    }  # fmt: skip
    page = write_report(make_run(state={"negatives": queue})).read_text()
    assert figure_titles(page)[-1] == "Features in the plane (PCA)" and "Coloured by true class." in page

    keep = {"contrast": {"false_negatives": "keep"}}
    page = write_report(make_run(config=keep, state={"negatives": queue})).read_text()
    assert figure_titles(page)[-1] == "Features in the plane (PCA)" and "This run clusters nothing." in page

    out = make_run(state=clustered() | {"negatives": queue}, data=make_run.images(classes=False) / "gone")
    assert "Coloured by cluster of 3 clusters." in write_report(out).read_text()


def test_names_are_escaped(make_run):
    data = make_run.images()
    (data / "class 0").rename(data / "<script>alert(1)")
    page = write_report(make_run(data=data)).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_in_batch_mode_says_what_is_shown(make_run, monkeypatch):
    out = make_run(queue=False)
    assert "images among all 60 (in-batch negatives" in write_report(out).read_text()
    monkeypatch.setattr("ifnd_fast.report.detections.IN_BATCH_SAMPLE", 40)
    page = write_report(out).read_text()
    assert "images in a fixed random sample of 40 (in-batch" in page
    assert write_report(out).read_text() == page


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


def test_figures_tell_the_numbers():
    pictures = draw_figures(
        [epoch_line(1), epoch_line(2)], {"knn_top1_raw_pixels": 93.1}, ["3 clusters", "6 clusters"]
    )
    told = {picture.title: picture.alt for picture in pictures}
    assert told["Loss"] == "Loss: 4.833 at epoch 1, 4.667 at epoch 2."
    assert told["kNN accuracy"] == "KNN top-1 accuracy: 82.0% at epoch 2. Raw pixels: 93.1%."
    assert (
        "recall at 6 clusters: 25% at epoch 1, 25% at epoch 2."
        in told["Precision and recall of detection"].lower()
    )
    assert told["Precision and recall of detection"].startswith("Precision at 3 clusters: 80% at epoch 2.")
    assert told["Balance and agreement of clusters"].endswith("Agreement with the last at 6 clusters: 20% at epoch 2.")
    assert told["Inertia of the last clustering"] == (
        "Inertia at 3 clusters: 0.500 at iteration 1, 0.250 at iteration 3. "
        "Inertia at 6 clusters: 0.400 at iteration 1, 0.200 at iteration 2."
    )
    assert told["Time"].endswith("training 73%, features 18%, clustering 9%.")


def test_the_result_is_the_last_point_of_the_knn_curve():
    (picture,) = [
        p
        for p in draw_figures([epoch_line(e) for e in (1, 2, 3)], {"knn_top1": 90.0}, [])
        if "kNN" in p.title
    ]
    assert picture.alt == "KNN top-1 accuracy: 82.0% at epoch 2, 90.0% at epoch 3."


@given(rows=st.integers(1, 300), most=st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_bins_keep_the_total_time(rows, most):
    values = np.random.default_rng(rows).random((rows, 3))
    edges, means = _bins(values.tolist(), most)
    assert len(means) <= most and edges[0] == 0 and edges[-1] == rows
    assert np.allclose((means * np.diff(edges)[:, None]).sum(axis=0), values.sum(axis=0))


# ---- contact sheets ----


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), levels=st.integers(1, 3), known=st.booleans())
@settings(max_examples=60, deadline=None)
def test_anchors(seed, n, levels, known):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 6, (n, levels))
    truth = rng.integers(0, 4, n) if known else None
    candidates = np.flatnonzero(rng.random(n) < 0.5)
    count = int(rng.integers(1, 15))
    chosen = choose_anchors(labels, candidates, truth, count)
    assert np.array_equal(chosen, choose_anchors(labels, candidates, truth, count))
    assert len(chosen) == len(set(chosen.tolist())) == min(count, n)

    has = np.array(
        [any(len(detected(labels[:, level], candidates, i)) for level in range(levels)) for i in range(n)]
    )
    assert has[chosen].sum() == min(count, has.sum())  # those with detections first
    group = truth if known else labels[:, 0]
    picked, all_of = group[chosen[has[chosen]]], group[has]
    if len(picked) >= len(set(all_of)):  # then every group that has detections is there
        assert set(picked) == set(all_of)
    assert np.array_equal(group[chosen], np.sort(group[chosen]))


def test_detected_by_definition():
    rng = np.random.default_rng(0)
    labels, candidates = rng.integers(-1, 4, 50), np.flatnonzero(rng.random(50) < 0.6)
    for anchor in range(50):
        expected = [k for k in candidates if labels[k] == labels[anchor] and labels[k] >= 0 and k != anchor]
        assert detected(labels, candidates, anchor).tolist() == expected


def test_spread_takes_the_middle_of_equal_parts():
    confidence = np.linspace(1, 0, 101)
    found = np.random.default_rng(0).permutation(100)
    assert spread(found, confidence, 10).tolist() == list(range(5, 100, 10))
    assert spread(found, None, 10).tolist() == list(range(5, 100, 10))
    assert spread(np.array([7, 3]), confidence, 10).tolist() == [3, 7]
    assert spread(np.array([], dtype=np.int64), confidence, 10).tolist() == []


class Grey:
    """100 grey images of 4 classes, without names."""

    labels = np.arange(100) % 4
    class_names = None

    def __len__(self):
        return 100

    def image(self, index):
        return Image.new("L", (9, 5), index)


def test_sheets_count_and_mark_by_the_true_class():
    rng = np.random.default_rng(2)
    labels, confidence = rng.integers(-1, 5, (100, 2)), rng.random((100, 2))
    candidates = np.arange(0, 100, 3)
    sheets = contact_sheets(Grey(), labels, confidence, candidates, ["a", "b"], anchors=8, columns=4)
    assert [sheet.title for sheet in sheets] == ["a", "b"]
    anchors = [
        [re.search(r"image (\d+)", row.anchor.text).group(1) for row in sheet.rows] for sheet in sheets
    ]
    assert anchors[0] == anchors[1] and len(anchors[0]) == 8
    for level, sheet in enumerate(sheets):
        assert sheet.note.startswith(f"{(labels[:, level] >= 0).sum()} of 100 labels accepted")
        for row, anchor in zip(sheet.rows, map(int, anchors[0]), strict=True):
            assert row.name == f"class {anchor % 4}"
            found = detected(labels[:, level], candidates, anchor)
            if labels[anchor, level] < 0:
                assert row.note == "label not accepted" and not row.shown
                continue
            right = f", {np.mean(found % 4 == anchor % 4):.0%} right" if len(found) else ""
            assert row.note == f"{len(found)} detected{right}" and len(row.shown) == min(4, len(found))
            for thumbnail in row.shown:
                index = int(re.search(r"image (\d+)", thumbnail.text).group(1))
                assert index in found and thumbnail.wrong == (index % 4 != anchor % 4)
                assert thumbnail.text.endswith("wrong") == thumbnail.wrong


def test_words_for_time_and_settings():
    assert [duration(s) for s in (4.4, 59.6, 125, 3600, 90000)] == [
        "4 s", "1 min 0 s", "2 min 5 s", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip
    nested = {"a": 1, "b": {"c": [1, 2], "d": None, "e": {"f": []}}}
    assert flatten(nested) == [("a", "1"), ("b.c", "1, 2"), ("b.d", "none"), ("b.e.f", "none")]


def test_headline_of_a_run_without_any_accuracy(make_run):
    out = make_run(lines=[{"epoch": 1, "loss": 2.0}], result=False, state={"result": {}})
    assert headline(read_run(out)) == [("Loss", "2.000", "epoch 1")]
