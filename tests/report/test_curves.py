from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifnd_fast.report.curves import _bins, draw_figures
from ifnd_fast.report.page import write_report
from tests.report.runs import FIGURES, epoch_line, figure_titles, svgs


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
        (["feature_rank"], []),
        (["feature_rank", "feature_std"], ["Spread of the features"]),
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


def test_numbers_that_are_not_finite_are_left_out(make_run):
    lines = [
        epoch_line(1),
        epoch_line(2) | {"loss": float("nan"), "false_negatives_per_query": [float("inf")]},
    ]
    page = write_report(make_run(lines=lines)).read_text()
    assert "Loss: 4.833 at epoch 1." in page and "Infinity" not in page
    assert not [svg for svg in svgs(page) if "nan" in ElementTree.tostring(svg, encoding="unicode").lower()]


def test_figures_tell_the_numbers():
    pictures = draw_figures([epoch_line(1), epoch_line(2)], {"knn_top1_raw_pixels": 93.1}, ["3 clusters", "6 clusters"])
    told = {picture.title: picture.alt for picture in pictures}
    assert told["Loss"] == "Loss: 4.833 at epoch 1, 4.667 at epoch 2."
    assert told["kNN accuracy"] == "KNN top-1 accuracy: 82.0% at epoch 2. Raw pixels: 93.1%."
    assert told["Spread of the features"].startswith("Effective rank: 31.0 at epoch 1, 32.0 at epoch 2. Standard")
    assert told["Alignment and uniformity"].startswith("Alignment: 1.00 at epoch 1, 0.50 at epoch 2. Uniformity: -3.17")
    assert "recall at 6 clusters: 25% at epoch 1, 25% at epoch 2." in told["Precision and recall of detection"].lower()
    assert told["Precision and recall of detection"].startswith("Precision at 3 clusters: 80% at epoch 2.")
    assert told["Balance and agreement of clusters"].endswith("Agreement with the last at 6 clusters: 20% at epoch 2.")
    assert told["Inertia of the last clustering"] == (
        "Inertia at 3 clusters: 0.500 at iteration 1, 0.250 at iteration 3. "
        "Inertia at 6 clusters: 0.400 at iteration 1, 0.200 at iteration 2."
    )
    assert told["Time"].endswith("training 73%, features 18%, clustering 9%.")


def test_the_result_is_the_last_point_of_the_knn_curve():
    (picture,) = [
        p for p in draw_figures([epoch_line(e) for e in (1, 2, 3)], {"knn_top1": 90.0}, []) if "kNN" in p.title
    ]
    assert picture.alt == "KNN top-1 accuracy: 82.0% at epoch 2, 90.0% at epoch 3."


@given(rows=st.integers(1, 300), most=st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_bins_keep_the_total_time(rows, most):
    values = np.random.default_rng(rows).random((rows, 3))
    edges, means = _bins(values.tolist(), most)
    assert len(means) <= most and edges[0] == 0 and edges[-1] == rows
    assert np.allclose((means * np.diff(edges)[:, None]).sum(axis=0), values.sum(axis=0))
