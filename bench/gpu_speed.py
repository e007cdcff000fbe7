"""python bench/gpu_speed.py --what queue: milliseconds on a GPU, between CUDA events, fused and by plain torch.

Prints a table; ends with 1 where what "auto" takes is slower than the best of the peers: eager, torch.compile of it,
both with the products in the inputs' dtype, and for assignment a product by cuBLAS and argmax, in chunks of rows.
Step 4 of bench/gpu_day.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from conftest import gpu_seconds
from tables import table
from test_assign import points, torch_in_chunks
from test_info_nce import eager, fused_with, in_batch, queue_batch

from ifnd_fast import assign_clusters
from ifnd_fast.ops import backends

QUEUES = [(B, K) for B in (32, 256) for K in (65_536, 1_048_576)]
ASSIGNMENTS = ((100_000, 3_000, 128), (1_281_167, 25_000, 128))


@dataclass
class Options:
    what: Literal["queue", "in-batch", "assign"] = "queue"
    """loss and the query's gradient against a queue; with all gradients within a batch of 4,096; or assignment"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    device: str = "cuda"
    small: bool = False
    """sizes that a CPU does, to try this out"""


Calls = dict[str, Callable[[], Any]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def backends_of(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """By the row's name: "auto" and each of its own that can run."""
    own = [name for name in ("cuda", "triton") if backends.refusal(name, operator, device, dtype) is None]
    return {"fused": backends.choose("auto", operator, device, dtype), **{name: name for name in own}}


def losses_of(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The fused loss and its peers, by the row's name."""
    losses = {name: fused_with(backend) for name, backend in backends_of("info_nce", device, dtype).items()}
    return losses | {"eager": eager, "compiled": compiled(eager)}


def queue(B: int, K: int, device: torch.device, dtype: torch.dtype) -> Calls:
    batch = queue_batch(B, K, 128, 3, dtype, device)

    def step(loss):
        return torch.autograd.grad(loss(*batch[:3], *batch.labels_and_ids), batch.query)

    return {name: partial(step, loss) for name, loss in losses_of(device, dtype).items()}


def within(rows: int, device: torch.device, dtype: torch.dtype) -> Calls:
    z, batch = in_batch(rows, device)
    features = [tensor.to(dtype) for tensor in batch[:3]]

    def step(loss):
        return torch.autograd.grad(loss(*features, *batch.labels_and_ids), z, retain_graph=True)

    return {name: partial(step, loss) for name, loss in losses_of(device, dtype).items()}


def assignment(size: tuple[int, int, int], small: bool, device: torch.device, dtype: torch.dtype) -> Calls:
    x, c = (tensor.to(dtype) for tensor in points(size, small, device))
    found = backends_of("assign_clusters", device, dtype)
    calls: Calls = {name: partial(assign_clusters, x, c, backend=backend) for name, backend in found.items()}
    fast = compiled(torch_in_chunks)
    return calls | {
        "cuBLAS + argmax": lambda: torch_in_chunks(x, c, "inner_product", True),
        "the same, compiled": lambda: fast(x, c, "inner_product", True),
    }


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    function()  # compiles
    if device.type == "cuda":
        return gpu_seconds(function)
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measured(o: Options) -> dict[str, Calls]:
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if o.what == "queue":
        sizes = [(8, 256)] if o.small else QUEUES
        return {f"B={B:,} K={K:,} D=128 L=3": queue(B, K, device, dtype) for B, K in sizes}
    if o.what == "in-batch":
        rows = 32 if o.small else 4096
        return {f"B=K={rows:,} D=128 L=3, all gradients": within(rows, device, dtype)}
    sizes_of = ASSIGNMENTS[:1] if o.small else ASSIGNMENTS
    return {"N={:,} C={:,} D={}".format(*size): assignment(size, o.small, device, dtype) for size in sizes_of}


def main(o: Options) -> None:
    device, slower = torch.device(o.device), []
    print(f"{o.what}, {o.dtype}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, milliseconds\n")
    rows = []
    for size, calls in measured(o).items():
        torch.compiler.reset()
        times = {name: seconds_of(call, device) for name, call in calls.items()}
        peers = [name for name in times if name not in ("fused", "cuda", "triton")]
        best = min(peers, key=times.__getitem__)
        rows += [(size, name, f"{1e3 * seconds:.3f}") for name, seconds in times.items()]
        rows.append((size, f"fused over {best}", f"{times[best] / times['fused']:.2f} times as fast"))
        if times["fused"] > times[best]:
            slower.append(f"{size}: slower than {best}")
    print("\n".join([*table(("size", "what", "ms"), rows), *slower]))
    sys.exit(bool(slower) and not o.small)


if __name__ == "__main__":
    main(tyro.cli(Options))
