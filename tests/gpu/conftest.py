"""GPU kernels: on a GPU where there is one; else on the CPU, Triton's in its interpreter, CUDA's on an emulated GPU."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.gpu import emulated
from tests.once import once


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


@pytest.fixture(autouse=True, scope="session")
def _builtins_replaced_once():
    """Triton's interpreter (3.8) puts its own functions in the place of triton.language's at every call of one function
    by another, which takes a quarter of its time. Here it does so once for a kernel."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    done = set()

    @functools.cache
    def modules_of(function):
        return frozenset(
            name for name, value in function.__globals__.items()
            if inspect.ismodule(value) and value.__name__.startswith("triton.language")
        )  # fmt: skip

    def once(function):
        modules = modules_of(function)
        if modules in done:
            return SimpleNamespace(restore=lambda: None)
        of_kernel, scope = not done, replace(function)
        done.add(modules)
        if of_kernel:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    interpreter._patch_lang = once


@pytest.fixture(autouse=True, scope="session")
def _integers_checked_at_once():
    """Triton's interpreter (3.8) looks for overflow of integers by five operations of its own in 64 bits, and for types
    in a table made anew: half its time. Here it finds them at once."""
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    def check(self, a, b, operation):
        bits = a.type.scalar.int_bitwidth
        if bits < 64:
            wide = operations[operation.__name__](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
            low, high = a.type.scalar.get_int_min_value(), a.type.scalar.get_int_max_value()
            assert ((low <= wide) & (wide <= high)).all(), f"int{bits} overflow in {operation.__name__}"

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check
    of_scalars = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: of_scalars(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)


@pytest.fixture(scope="session")
def emulated_modules(tmp_path_factory):
    """ifnd_fast._cuda on an emulated GPU, by kind of tensor core."""
    folder = once(tmp_path_factory, "cuda_on_host", emulated.build)
    sys.path.insert(0, str(folder))
    return {core: importlib.import_module(f"_cuda_on_{core}") for core in emulated.CAPABILITIES}


@pytest.fixture(
    scope="module",
    params=["triton", "cuda"] if torch.cuda.is_available() else ["triton", *emulated.CAPABILITIES],
)
def backend(request):
    """The name of a GPU backend that runs here: as it is, or on the CPU in its interpreter or emulation. A module names
    in LEFT_OUT the emulated cards that would show there what another one does."""
    if request.param in getattr(request.module, "LEFT_OUT", ()):
        pytest.skip("another emulated card shows the same")
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param not in emulated.CAPABILITIES:
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        emulated.use(patch, request.getfixturevalue("emulated_modules")[request.param], request.param)
        yield "cuda"
