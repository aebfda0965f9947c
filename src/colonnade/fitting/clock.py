"""Short looks at how long the networks of a frontier take, on a machine whose pace changes between them.

A pruned network is measured in turns with the dense one and counts as a share of it. Were each measured by itself, what
other programs took from the dense one would pass for the speed of a pruned one, and the search would plan for it.
"""

from __future__ import annotations

from statistics import median

from colonnade.bench.protocol import Runner

LOOK_S = 0.5  # of one network, in each of its turns
MOST = 200  # inferences of a turn
TURNS = 3


class Clock:
    """Seconds of an inference, by name. dense: the network that all others are measured beside."""

    def __init__(self, dense: Runner) -> None:
        self.dense = dense
        self.shares: dict[str, float] = {}
        self.quietest = self._turn(dense)

    def look(self, name: str, runner: Runner) -> None:
        """Measure a network."""
        found = []
        for _ in range(TURNS):
            base = self._turn(self.dense)
            self.quietest = min(self.quietest, base)
            found.append(self._turn(runner) / base)
        self.shares[name] = median(found)

    def seconds(self, name: str) -> float:
        """Of a network that was measured, where the dense one takes the least that it was seen to; the dense one's for
        any other name."""
        return self.shares.get(name, 1.0) * self.quietest

    def _turn(self, runner: Runner) -> float:
        one = median(runner.block(1, 3)) / 1e9
        return median(runner.block(1, max(5, min(MOST, int(LOOK_S / TURNS / max(one, 1e-6)))))) / 1e9
