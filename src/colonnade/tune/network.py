"""The last word of a search: the leaders of every step compared inside the whole network.

By itself a layer meets caches that somebody emptied or filled on purpose; in a network it meets what its neighbours
left there, and its rank may be another. Here is who meets whom, and who wins, as pure functions of candidates and
records; ``walks`` does the measuring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from colonnade.kernels.registry import Candidate
from colonnade.tune import search
from colonnade.tune.database import Record
from colonnade.tune.search import FINAL, screened, times

NETWORK = 4  # the stage of records taken in walks
NEAR = 1.35  # of the best time by itself, to be a rival at all: loop orders change places by as much
RIVALS = 12
# (walks that a rival has to its name, factor of the best within which it stays): shorter and shorter lists
HEATS = ((8, 1.12), (24, 1.05), (60, 1.02), (150, 1.01))


def rivals(candidates: Sequence[Candidate], records: Sequence[Record], most: int = RIVALS) -> tuple[Candidate, ...]:
    """Who may meet in the network: near the best by itself, the best prefetch distance of each kernel and loop order.

    The best of each kernel comes first, then the others, each in the order of their times by themselves: what disturbs
    the machine for a second slows some kernels by a fifth and others not at all, and ten loop orders of one of the
    latter would leave no place to the former. Empty where fewer than two were measured.
    """
    ways = _ways(candidates, records)
    first: dict[str, Candidate] = {}
    for c in ways:
        first.setdefault(c.kernel, c)
    leaders = set(map(Candidate.key, first.values()))
    picked = (*first.values(), *(c for c in ways if c.key() not in leaders))[:most]
    return picked if len(picked) > 1 else ()


def siblings(
    candidates: Sequence[Candidate], records: Sequence[Record], best: Candidate, most: int = RIVALS
) -> tuple[Candidate, ...]:
    """Who may meet after that: ``best`` of the network, and what is left of its kernel's ways, in the order of their
    times by themselves. Of one kernel the first list holds few, and which lines are asked for, or who shares out what,
    matters where lines come from another core. Empty where there are none, or ``best`` was not in the network."""
    walked = _walked(records)
    left = [c for c in _ways(candidates, records) if c.kernel == best.kernel and c.key() not in walked]
    return (best, *left[: most - 1]) if left and best.key() in walked else ()


def _walked(records: Sequence[Record]) -> set[str]:
    """Keys of those with as many walks as the first heat has: an interrupted contest says nothing yet."""
    count: Counter[str] = Counter()
    for record in records:
        if record.stage == NETWORK:
            count[record.candidate] += len(record.measurement.reps)
    return {key for key, walks in count.items() if walks >= HEATS[0][0]}


def _ways(candidates: Sequence[Candidate], records: Sequence[Record]) -> list[Candidate]:
    """Those near the best by itself, with the best prefetch distance of each kernel and loop order, the best first."""
    found = screened(records)
    found.update(times(records, (FINAL,)))
    ordered = sorted((c for c in candidates if c.key() in found), key=lambda c: found[c.key()])
    ways: dict[tuple[object, ...], Candidate] = {}
    for c in ordered:
        if found[c.key()] <= NEAR * found[ordered[0].key()]:
            ways.setdefault((c.kernel, *sorted((k, v) for k, v in c.params.items() if k != "prefetch")), c)
    return list(ways.values())


@dataclass(frozen=True)
class Standing:
    """``running``: rivals that still need walks, ``walks`` at most; ``best``: the leader of those still in when the
    last heat ended that all of them finished, None before the first. Running is empty when the contest is over."""

    running: tuple[Candidate, ...]
    walks: int
    best: Candidate | None


def standing(field: Sequence[Candidate], records: Sequence[Record]) -> Standing:
    """Where the contest of ``field`` is by the records of its walks; a pure function, so it resumes anywhere.

    By lower quartiles: what disturbs a walk makes it longer, by a half and for seconds where a core has a neighbour on
    its other half, and of so few walks the median may be one of those. The best quarter of eight is no lucky shot.
    """
    reps: dict[str, list[int]] = {c.key(): [] for c in field}
    for record in records:
        if record.stage == NETWORK and record.candidate in reps:
            reps[record.candidate] += record.measurement.reps
    best: Candidate | None = None
    left = tuple(field)
    for walks, near in HEATS:
        if len(left) < 2:
            break
        fewest = min(len(reps[c.key()]) for c in left)
        if fewest < walks:
            return Standing(left, walks - fewest, best)
        at = {c.key(): quantiles(reps[c.key()], n=4)[0] for c in left}
        best = min(left, key=lambda c: at[c.key()])
        left = tuple(c for c in left if at[c.key()] <= near * at[best.key()])
    return Standing((), 0, best)


def decide(candidates: Sequence[Candidate], records: Sequence[Record]) -> Candidate | None:
    """The best by all that is known: in the network where that was measured, by itself where it was not."""
    walked = _walked(records)
    field = [c for c in rivals(candidates, records, len(candidates)) if c.key() in walked]
    return standing(field, records).best or search.decide(candidates, records)
