"""GPU kernels: on a GPU where there is one; else Triton's kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which only their first call does


@pytest.fixture(autouse=True, scope="session")
def _interpreted_bfloat16():
    """Triton's interpreter (seen in 3.8) keeps bfloat16 as 16-bit integers: dots multiply those, and conversions from
    float32 truncate. Here dots widen them first, and conversions round to nearest, as the compiled kernels do."""
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return handle(bits.reshape(source.data.shape), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounded
    builder.create_fp_trunc = rounded
