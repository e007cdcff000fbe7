"""The images of a run: found, looked at, and known again when it goes on."""

from __future__ import annotations

from ifnd_fast.config import Config
from ifnd_fast.data import identity
from ifnd_fast.data.cache import cached
from ifnd_fast.data.found import listings, tell_found
from ifnd_fast.data.identity import Listing
from ifnd_fast.data.images import Images
from ifnd_fast.data.sources import open_for_run
from ifnd_fast.runtime import distributed
from ifnd_fast.runtime.console import stage
from ifnd_fast.training import precheck


class RunImages:
    """Opens the images that a run trains on and measures with, and says what was found. Their identity becomes the
    config's.

    Args:
        config: of the run.
        given: training and test images, in place of those of --data.

    Attributes:
        train: N images that can be trained on.
        tests: to measure with; None: there are no such.

    Raises:
        UsageError: there are none, they don't go with the options, or the ranks, or the run to go on with and this
            process, have different ones.
        CommandError: none can be read.
    """

    def __init__(self, config: Config, given: tuple[Images, Images | None] | None = None):
        with distributed.raise_on_all_ranks(True):  # one may have no such folder
            with stage("finding images"):
                images, self.tests = open_for_run(config.data, given)
            self.train = precheck.checked(images, config)
        data = f"--data {config.data.data}"
        found = identity.agree(self.listings(), data)
        if config.run.resume:
            with distributed.raise_on_all_ranks(True):
                identity.check(config.run.out, config.identity, self.listings(), data)
        config.identity = found
        tell_found(config.data, self.train, self.tests)
        self.train = cached(self.train, config.data)
        self.tests = None if self.tests is None else cached(self.tests, config.data)

    def listings(self) -> dict[str, Listing]:
        """Which images they are, for `identity`."""
        return listings(self.train, self.tests)
