"""The memory plan: where in the arena each buffer stands while it is alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colonnade.layout import LINE

ROUNDS = 20  # an order repeats itself soon; 200 buffers take a few milliseconds a round


@dataclass(frozen=True)
class Life:
    """A buffer of ``size`` bytes (whole cache lines), needed from step ``first`` to step ``last`` inclusive."""

    size: int
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        """Are both alive at some step?"""
        return self.first <= other.last and other.first <= self.last


def lower_bound(lives: Sequence[Life]) -> int:
    """Bytes alive at the busiest step: no plan can do with less."""
    steps = range(max((life.last for life in lives), default=-1) + 1)
    return max((sum(life.size for life in lives if life.first <= step <= life.last) for step in steps), default=0)


def plan(lives: Sequence[Life]) -> tuple[list[int], int]:
    """Byte offsets on cache lines and the total size: greedy best fit, in the best of several orders.

    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), compare such orders: by size
    is good for most networks, by time for chains. From the best of them on, the buffer that stands highest is placed
    first, again and again, for as long as that may help.
    """
    orders = [
        sorted(range(len(lives)), key=lambda i: (-lives[i].size, lives[i].first)),
        sorted(range(len(lives)), key=lambda i: (lives[i].first, -lives[i].size)),
        sorted(range(len(lives)), key=lambda i: (lives[i].first - lives[i].last, -lives[i].size)),
        sorted(range(len(lives)), key=lambda i: -lives[i].size * (lives[i].last - lives[i].first + 1)),
    ]
    bound = lower_bound(lives)
    results = [(*_greedy(lives, order), order) for order in orders]
    best = min(results, key=lambda result: result[1])
    for offsets, total, order in results:
        for _ in range(ROUNDS):
            if best[1] == bound:
                break
            highest = max(order, key=lambda i: offsets[i] + lives[i].size)
            order = [highest, *(i for i in order if i != highest)]
            offsets, total = _greedy(lives, order)
            best = min(best, (offsets, total, order), key=lambda result: result[1])
    return best[0], best[1]


def _greedy(lives: Sequence[Life], order: list[int]) -> tuple[list[int], int]:
    offsets = [0] * len(lives)
    placed: list[int] = []
    total = 0
    for i in order:
        taken = sorted((offsets[j], offsets[j] + lives[j].size) for j in placed if lives[i].meets(lives[j]))
        best, best_gap, end = -1, -1, 0
        for start, stop in taken:
            gap = start - end
            if gap >= lives[i].size and (best < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, stop)
        offsets[i] = end if best < 0 else best
        assert offsets[i] % LINE == 0
        total = max(total, offsets[i] + lives[i].size)
        placed.append(i)
    return offsets, total
