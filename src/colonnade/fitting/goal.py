"""What a user wants of a network, the points of its frontier, and which one to make next. No model, no measuring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colonnade.errors import UserError

# A point within this share of the wanted latency, and below it, is what was asked for.
CLOSE = 0.05
# Budgets nearer to each other than this give nearly the same plan.
APART = 0.03


@dataclass(frozen=True)
class Goal:
    """latency: seconds at most; max_drop: share of the images at most (0.01 is a point of top-1). At most one of both;
    neither: only the frontier."""

    latency: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.latency is not None and self.max_drop is not None:
            raise UserError("give one of --latency, --speedup and --max-drop")
        if self.latency is not None and not self.latency > 0:
            raise UserError(f"latency is {1e3 * self.latency:g} ms: expected more than 0")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise UserError(f"max drop is {100 * self.max_drop:g} points: expected 0 to less than 100")

    def __str__(self) -> str:
        if self.latency is not None:
            return f"at most {1e3 * self.latency:.3g} ms"
        return f"at most {100 * self.max_drop:g} points lost" if self.max_drop is not None else "the frontier"

    def beside(self, dense: Point, speedup: float | None) -> Goal:
        """The same goal, or the latency of so many times the dense network's speed."""
        return self if speedup is None else Goal(latency=dense.latency / speedup)

    def met(self, point: Point) -> bool:
        """Whether a point is good enough, by its measured latency or its loss on the images."""
        if self.latency is not None:
            return point.latency <= self.latency
        return self.max_drop is None or point.loss <= self.max_drop + 1e-12

    def best(self, points: Sequence[Point]) -> Point | None:
        """Of the points that meet the goal the most accurate one (or, under a max drop, the quickest); None: no point
        does, or nothing was asked."""
        good = [point for point in points if self.met(point)]
        if not good or (self.latency is None and self.max_drop is None):
            return None
        if self.latency is not None:
            return min(good, key=lambda p: (p.loss, p.latency))
        return min(good, key=lambda p: (p.latency, p.loss))

    def closest(self, points: Sequence[Point]) -> Point:
        """The point that misses the goal by least."""
        if self.latency is not None:
            return min(points, key=lambda p: (p.latency, p.loss))
        return min(points, key=lambda p: (p.loss, p.latency))


@dataclass(frozen=True)
class Point:
    """One network of the frontier. budget: seconds that its plan was made for, in the planner's own sum of layer times;
    latency: seconds as measured or modelled; loss: top-1 lost on the images against the dense network (share), or,
    without labels, the share of answers that changed; record: all else, as JSON values."""

    name: str
    budget: float
    latency: float
    loss: float
    record: dict[str, Any]


def next_budget(goal: Goal, points: Sequence[Point], fastest: float) -> float | None:
    """The sum of layer times to plan the next point for; None when the frontier is finished.

    points:  made so far, the dense network first.
    fastest: the smallest sum that any plan has.
    """
    if fastest >= points[0].budget * (1 - APART):
        return None
    if goal.latency is not None:
        wanted = _for_latency(goal.latency, points, fastest)
    elif goal.max_drop is not None:
        wanted = _for_drop(goal.max_drop, points, fastest)
    else:
        wanted = None
    if wanted is not None:
        return wanted
    return _widest_gap(points, fastest)


def _for_latency(latency: float, points: Sequence[Point], fastest: float) -> float | None:
    """Nearer to the wanted latency: what a plan's layers add up to and what the whole then takes differ a little."""
    if points[0].latency <= latency:
        return None
    below = [p for p in points if p.latency <= latency]
    above = [p for p in points if p.latency > latency]
    if below and max(p.latency for p in below) >= latency * (1 - CLOSE):
        return None
    near = min(points, key=lambda p: abs(math.log(p.latency / latency)))
    # A little less than the rule of three gives, as a point above the wish is of no use.
    guess = max(near.budget * latency / near.latency * 0.985, fastest)
    # Between the points on both sides, where there are such.
    if below:
        guess = max(guess, max(p.budget for p in below) * 1.001)
    guess = max(min(guess, min(p.budget for p in above) * 0.999), fastest)
    return guess if all(abs(guess / p.budget - 1) > 1e-4 for p in points) else None


def _for_drop(drop: float, points: Sequence[Point], fastest: float) -> float | None:
    """Halve, on a logarithmic scale, between the quickest point that loses little enough and the next quicker one."""
    good = min((p for p in points if p.loss <= drop), key=lambda p: p.budget)
    bad = max((p.budget for p in points if p.loss > drop and p.budget < good.budget), default=fastest)
    if bad >= good.budget * (1 - APART):
        return None
    return math.sqrt(good.budget * bad)


def _widest_gap(points: Sequence[Point], fastest: float) -> float | None:
    """The middle of the widest gap between budgets; the quickest plan itself is of no interest before its middle."""
    marks = sorted({fastest, *(p.budget for p in points)})
    gap, low, high = max((b / a, a, b) for a, b in itertools.pairwise(marks))
    return math.sqrt(low * high) if gap > 1 + 2 * APART else None
