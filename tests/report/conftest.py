from __future__ import annotations

import pytest

from tests.report.runs import MakeRun


@pytest.fixture
def make_run(tmp_path):
    return MakeRun(tmp_path)
