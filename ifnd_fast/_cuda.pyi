"""The GPUs that this process sees, and kernels for them (csrc/cuda); built where there was an nvcc."""

from typing import TypedDict

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory: int

architectures: str

def device_count() -> int: ...
def device(index: int) -> Device: ...

# Arguments by name, as csrc/cuda/arguments.h says: addresses (0: none) and numbers; and `stream`.
def assign_clusters(**arguments: int | float | str) -> None: ...
def info_nce(**arguments: int | float | str) -> None: ...
def info_nce_normalise(**arguments: int | float | str) -> None: ...
def info_nce_add_splits(**arguments: int | float | str) -> None: ...
