"""The soak script, shortened: a run killed at random moments ends with the bits of one left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parent.parent / "bench" / "soak.py"


def test_two_kills():
    command = [sys.executable, SOAK, "--kills", "2", "--epochs", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kill ") == 2 and "the same bits as the run left alone" in done.stdout
