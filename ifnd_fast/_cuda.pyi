"""The GPUs that this process sees (csrc/cuda); built where there was an nvcc."""

from typing import TypedDict

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory: int

architectures: str

def device_count() -> int: ...
def device(index: int) -> Device: ...
