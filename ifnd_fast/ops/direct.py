"""Whether a call may go to its kernel directly.

The first call of an operator of torch.library's imports the compiler, about a second, and each costs some 0.1 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.ops.checks import transformed


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no compiler, mode, transform or subclass of these tensors is to see the operator."""
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
        and not torch.jit.is_tracing()
    )
