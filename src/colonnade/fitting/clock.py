"""Short looks at how long the networks of a frontier take, on a machine whose pace changes between them.

A pruned network is measured in turns with the dense one and counts as a share of it. Were each measured by itself, what
other programs took from the dense one would pass for the speed of a pruned one, and the search would plan for it.
"""

from __future__ import annotations

from statistics import median

from colonnade.bench.protocol import Runner

TURNS = 3
TURN_S = 0.17  # of one network
LEAST, MOST = 3, 200  # inferences of a turn


class Clock:
    """Seconds of an inference, by name. dense: the network that all others are measured beside."""

    def __init__(self, dense: Runner) -> None:
        self.dense = dense
        self.repeats = repeats(dense)
        self.shares: dict[str, float] = {}
        self.quietest = _turn(dense, self.repeats)

    def look(self, name: str, runner: Runner) -> None:
        """Measure a network."""
        found, count = [], repeats(runner)
        for _ in range(TURNS):
            base = _turn(self.dense, self.repeats)
            self.quietest = min(self.quietest, base)
            found.append(_turn(runner, count) / base)
        self.shares[name] = median(found)

    def seconds(self, name: str) -> float:
        """Of a network that was measured, where the dense one takes the least that it was seen to; the dense one's for
        any other name."""
        return self.shares.get(name, 1.0) * self.quietest


def repeats(runner: Runner) -> int:
    """Inferences of each turn, by a first look."""
    one = median(runner.block(1, 3)) / 1e9
    return max(LEAST, min(MOST, int(TURN_S / max(one, 1e-6))))


def _turn(runner: Runner, repeats: int) -> float:
    """Seconds of an inference."""
    return median(runner.block(1, repeats)) / 1e9
