"""CUDA kernels to PTX without nvcc: NVRTC 12.9 knows every card from compute capability 7.0 to 12.0."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def wheel_file(path: str) -> Path:
    """A file of the wheels nvidia-cuda-*-cu12, which share a folder."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / path).exists():
            return file
    raise FileNotFoundError(f"nvidia/{path} is missing: pip install 'ifnd-fast[test]'")


def ptx_of(header: str, kernel: str, card: int) -> str:
    """PTX of one kernel (a C++ expression) of a header in csrc/cuda.

    Raises RuntimeError with the compiler's messages.
    """
    library = ctypes.CDLL(str(wheel_file("cuda_nvrtc/lib/libnvrtc.so.12")))
    program = ctypes.c_void_p()
    source = f'#include "{header}"\n'.encode()

    def call(name: str, *arguments: object) -> None:
        if getattr(library, name)(*arguments) != 0:
            raise RuntimeError(f"{name} failed for {kernel} on sm_{card}:\n{text('ProgramLog')}")

    def text(what: str) -> str:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()

    call("nvrtcCreateProgram", ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    try:
        call("nvrtcAddNameExpression", program, kernel.encode())
        options = [f"--gpu-architecture=compute_{card}", "--std=c++17", f"-I{SOURCES}"]
        pointers = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        call("nvrtcCompileProgram", program, len(options), pointers)
        return text("PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
