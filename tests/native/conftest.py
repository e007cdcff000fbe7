from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("tests.native.cases")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The definitions' matrices are too small for more; the kernels are told their number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
