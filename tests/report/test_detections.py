from __future__ import annotations

import re

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifnd_fast.report.detections import choose_anchors, contact_sheets, detected
from ifnd_fast.report.page import write_report
from tests.report.runs import LEVELS, N


def test_nothing_accepted_yet(make_run):
    state = {"accepted": torch.full((N, 2), -1)}
    assert "no pseudo label was accepted by epoch 6" in write_report(make_run(state=state)).read_text()


def test_confidence_of_other_rows_is_not_used(make_run):
    labels = torch.zeros(N, 2, dtype=torch.int32)
    labels[0] = -1  # as of an image that could not be read, and so was not clustered
    clustered = {"levels": torch.tensor(LEVELS), "confidence": torch.rand(N - 1, 2)}
    page = write_report(make_run(state={"accepted": labels, "pseudo_labels": clustered})).read_text()
    assert "up to 10, at even steps in order" in page and "confidence 0." not in page


def test_in_batch_mode_says_what_is_shown(make_run, monkeypatch):
    out = make_run(queue=False)
    assert "images among all 60 (in-batch negatives" in write_report(out).read_text()
    monkeypatch.setattr("ifnd_fast.report.detections.IN_BATCH_SAMPLE", 40)
    page = write_report(out).read_text()
    assert "images in a fixed random sample of 40 (in-batch" in page
    assert write_report(out).read_text() == page


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

    has = np.array([any(len(detected(labels[:, level], candidates, i)) for level in range(levels)) for i in range(n)])
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
    anchors = [[re.search(r"image (\d+)", row.anchor.text).group(1) for row in sheet.rows] for sheet in sheets]
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
