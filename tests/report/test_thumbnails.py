from __future__ import annotations

import numpy as np

from ifnd_fast.report.page import write_report
from ifnd_fast.report.thumbnails import spread


def test_an_unreadable_image_costs_its_thumbnail_only(make_run):
    out = make_run()
    for path in (make_run.folder / "images" / "class 0").iterdir():
        path.write_bytes(b"no image")
    page = write_report(out).read_text()
    assert page.count(">not readable</span>") > 3 and page.count("<img") > 10
    assert page.count(", not readable: no picture in a format that can be read here") > 3


def test_spread_takes_the_middle_of_equal_parts():
    confidence = np.linspace(1, 0, 101)
    found = np.random.default_rng(0).permutation(100)
    assert spread(found, confidence, 10).tolist() == list(range(5, 100, 10))
    assert spread(found, None, 10).tolist() == list(range(5, 100, 10))
    assert spread(np.array([7, 3]), confidence, 10).tolist() == [3, 7]
    assert spread(np.array([], dtype=np.int64), confidence, 10).tolist() == []
