"""Work beside the training: a call in a thread of its own, on a GPU in a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist

from ifnd_fast.runtime import distributed


class Background:
    """Starts call() at once. Its tensors have to be ready in the caller's stream, and stay as they are meanwhile.

    Args:
        call: what to do; its collectives go over `group`.
        device: where it computes.
        group: from `distributed.new_group`: a collective of training must not meet one of this call.
    """

    def __init__(self, call: Callable[[], None], device: torch.device, group: dist.ProcessGroup | None = None):
        self.error: BaseException | None = None
        self.call, self.group, self.n_threads = call, group, torch.get_num_threads()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.thread = threading.Thread(target=self._run, daemon=True)  # a failed run doesn't wait for it to end
        self.thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self.n_threads)  # OpenMP keeps that number for each thread
        try:
            with distributed.use_group(self.group), torch.cuda.stream(self.stream) if self.stream else nullcontext():
                self.call()
            if self.stream is not None:
                self.stream.synchronize()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Until the call is done.

        Raises:
            what the call raised.
        """
        self.thread.join()
        if self.error is not None:
            raise self.error
