"""What ends a run from within a step: numbers that are not finite, and a rank that was asked to stop."""

from __future__ import annotations

import torch
from torch import Tensor

from ifnd_fast.runtime import checkpoint, distributed
from ifnd_fast.runtime.errors import NonFiniteError
from ifnd_fast.runtime.session import Session

# In order of computation: of what turns bad in one step, the first is named.
WATCHED = ("the queries (the encoder's features) are", "the keys are", "the loss is")


class Watch:
    """Notes each step on the device, without waiting for it; `act` waits, and acts on what came since.

    Args:
        session: of the run; `act` sets its `stopping`.
        device: where the steps are computed.
    """

    def __init__(self, session: Session, device: torch.device):
        self.session, self.device = session, device
        never = torch.iinfo(torch.int64).max
        self.first = torch.full((len(WATCHED) + 1,), never, device=device)  # step of each, and of a request to stop

    def note(self, step: int, query: Tensor, key: Tensor, loss: Tensor) -> Tensor:
        """The loss () float32, mean over the ranks, in the step's one exchange; all ranks have to call it."""
        # a sum is not finite where one of its terms is not
        watched = torch.stack([part.detach().sum(dtype=torch.float32) for part in (query, key, loss)])
        asked = torch.full((1,), self.session.asked(), device=self.device)
        sums = distributed.sum_over_ranks(torch.cat([watched[-1:], ~watched.isfinite(), asked]))
        self.first = torch.where(sums[1:] > 0, self.first.clamp(max=step), self.first)
        return sums[0] / distributed.world_size()

    def act(self, step: int) -> None:
        """Raises NonFiniteError: something was not finite in this step or one before."""
        *bad, stop = self.first.tolist()
        self.session.stopping = stop <= step
        if min(bad) <= step:
            raise NonFiniteError(
                f"{WATCHED[bad.index(min(bad))]} not finite at step {min(bad)}; {checkpoint.where(self.session.out)}; "
                "a lower --lr, --warmup-epochs or --amp off may help"
            )
