"""Which device, precision and threads a run takes."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.runtime.compute import leave_cores_to_workers, pick_amp, pick_device
from ifnd_fast.runtime.errors import UsageError


@pytest.mark.parametrize("threads, workers, left", [(8, 2, 6), (2, 2, 1), (4, 0, 4)])
def test_loading_processes_get_cores_of_their_own(threads, workers, left, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        leave_cores_to_workers(torch.device("cuda"), workers)
        assert torch.get_num_threads() == threads
        leave_cores_to_workers(torch.device("cpu"), workers)
        assert torch.get_num_threads() == left
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        leave_cores_to_workers(torch.device("cpu"), workers)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_devices_and_precisions_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_amp("off", torch.device("cpu")) is None
    assert pick_amp("fp16", torch.device("cpu")) == torch.float16
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UsageError, match=name):
            pick_device(name)
