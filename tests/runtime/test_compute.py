"""Which device, precision and threads a run takes."""

from __future__ import annotations

import pytest
import torch

from ifnd_fast.runtime.compute import Compute, leave_cores_to_workers, pick_amp, pick_compute, pick_device
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


def test_what_computes_in_which_precision():
    """float16 alone needs a scaler; only a GPU with mixed precision contrasts in float16."""
    half, cuda = pick_compute("cpu", "fp16"), torch.device("cuda")
    assert half == Compute(torch.device("cpu"), torch.float16) and pick_compute("cpu", "off").amp is None
    assert half.scaler().is_enabled() and not half.scaler(enabled=False).is_enabled()
    assert not pick_compute("cpu", "bf16").scaler().is_enabled()
    a = torch.ones(2, 2)
    for amp, dtype in (("bf16", torch.bfloat16), ("off", torch.float32)):
        with pick_compute("cpu", amp).autocast():
            assert (a @ a).dtype == dtype
    dtypes = [Compute(*pair).contrast_dtype for pair in ((cuda, torch.bfloat16), (cuda, None), (half.device, half.amp))]
    assert dtypes == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "hpu:0", "cpu:3", "cuda:-1", "toaster", ""])
def test_a_device_that_nothing_computes_on_is_refused_with_those_there_are(name):
    with pytest.raises(UsageError, match=f"--device {name}: .*possible here: auto, cpu"):
        pick_device(name)


def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu") == pick_device("cpu:0")
    if not torch.cuda.device_count():
        for name in ("cuda", "cuda:9"):
            with pytest.raises(UsageError, match=f"--device {name}: .*can use no CUDA GPU here"):
                pick_device(name)


def test_cuda_without_a_number_is_the_ranks_own(monkeypatch):
    """Not GPU 0 for all ranks of a machine."""
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("ifnd_fast.runtime.compute.torch.empty", lambda _, device: asked.append(device))
    assert pick_device("cuda") == pick_device("auto") == torch.device("cuda:2") and pick_device("cuda:1").index == 1
    assert asked == [torch.device("cuda:2"), torch.device("cuda:2"), torch.device("cuda:1")]
