"""Which candidates to measure next, and which one is best, given all records. Pure functions of candidates and records.

Successive halving in four stages. A group is one kernel with one way to feed it, dense or sparse, at its statically
best run-time dimensions: its head. A family is all groups of one algorithm, whatever the kernel's shape. Stage 0 visits
heads: first a few of each family, for the static ranking compares shapes well but algorithms badly; then those left in
families that were near the best; then, once more, those that were not far from it: whoever met a disturbance the first
time would be out for good. Stage 1 visits the other members of the groups whose heads were near the best. Stage 2
re-measures the few leaders in turns, so that a disturbance meets all of them alike. Stage 3, for pruned weights, is the
duel of the best sparse candidate with the best dense one, in turns again and with fresh repetitions: whoever won by
luck before loses it here, and a pruned layer never runs slower than its dense self. A record once taken is never taken
again, so the search resumes wherever it was stopped and ends in the same state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from colonnade.kernels.registry import Candidate
from colonnade.tune.database import Record

FIRST = 4  # heads of each family that are visited whatever the others do
NEAR_FAMILY = 1.5  # the rest of a family is visited when its best head is within this factor of the best of all
WIDE = 2.5  # heads this much worse than their family's best by static rank are not visited at all
NEAR_HEAD = 1.7  # heads within this factor of the best are visited twice: a neighbour on the same core takes up to half
GROUPS = 3  # groups opened in stage 1 ...
NEAR_GROUP = 1.25  # ... when their head is within this factor of the best head
FINALISTS = 4
NEAR_FINAL = 1.15
FINAL = 2
DUEL = 3
CHECK = "2"  # how results are checked; another word makes whoever was found wrong be looked at once more
MARGIN = 0.03  # a sparse candidate may be this much slower than the dense one, beyond the spread, before it loses


@dataclass(frozen=True)
class Batch:
    """Candidates to visit, all of one stage."""

    stage: int
    candidates: tuple[Candidate, ...]


def group(candidate: Candidate) -> tuple[str, int, int, int]:
    """Kernel and family: the run-time dimensions of one group are all that its members differ in."""
    return candidate.kernel, *family(candidate)


def family(candidate: Candidate) -> tuple[int, int, int]:
    """Whether the pattern is ignored, how the kernel is fed, and the size of Winograd's tile (0: another algorithm)."""
    at = candidate.params
    return at.get("dense", 0), at.get("feed", 0), at.get("winograd", 0)


def times(records: Iterable[Record], stages: tuple[int, ...]) -> dict[str, float]:
    """Median ns by candidate over all repetitions of ``stages``; candidates that ever failed are left out."""
    reps: dict[str, list[int]] = {}
    failed = set()
    for record in records:
        if record.measurement.outcome != "ok":
            failed.add(record.candidate)
        elif record.stage in stages:
            reps.setdefault(record.candidate, []).extend(record.measurement.reps)
    return {key: median(ns) for key, ns in reps.items() if ns and key not in failed}


def screened(records: Iterable[Record], stages: tuple[int, ...] = (0, 1)) -> dict[str, float]:
    """Likewise, of a candidate that was visited more than once its best visit's."""
    found: dict[str, list[float]] = {}
    failed = set()
    for record in records:
        if record.measurement.outcome != "ok":
            failed.add(record.candidate)
        elif record.stage in stages and record.measurement.reps:
            found.setdefault(record.candidate, []).append(median(record.measurement.reps))
    return {key: min(medians) for key, medians in found.items() if key not in failed}


def valid(records: Iterable[Record], candidates: Sequence[Candidate], sources: Mapping[str, str]) -> list[Record]:
    """The records of ``candidates`` whose kernel has not changed since; ``sources``: digest by kernel symbol."""
    wanted = {c.key(): sources[c.kernel] for c in candidates}
    return [
        r for r in records
        if r.candidate in wanted and judged(wanted[r.candidate], r.measurement.outcome) == r.source
    ]  # fmt: skip


def judged(source: str, outcome: str) -> str:
    """The digest that a record of this outcome is kept under: that a kernel is wrong holds for one way of checking."""
    return f"{source} {CHECK}" if outcome == "wrong" else source


def next_batch(candidates: Sequence[Candidate], records: Sequence[Record]) -> Batch | None:
    """What to measure next; None when the search is over. ``candidates`` in static order, ``records`` valid ones."""
    seen = {r.candidate for r in records}
    groups: dict[tuple[str, int, int, int], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(group(candidate), []).append(candidate)
    families: dict[tuple[int, int, int], list[Candidate]] = {}
    for members in groups.values():
        families.setdefault(family(members[0]), []).append(members[0])
    for heads in families.values():
        heads[:] = [c for c in heads if c.rank <= WIDE * heads[0].rank or c is heads[0]]
    if unseen := [c for heads in families.values() for c in heads[:FIRST] if c.key() not in seen]:
        return Batch(0, tuple(unseen))
    everyone = [c for heads in families.values() for c in heads]
    keys = {c.key() for c in everyone}
    by_head = screened((r for r in records if r.candidate in keys), (0,))
    visited = Counter(r.candidate for r in records if r.stage == 0)
    best = min(by_head.values(), default=0.0)
    near_families = [
        heads
        for heads in families.values()
        # a family none of whose first heads was right is not given up for the others it has
        if min((by_head[c.key()] for c in heads if c.key() in by_head), default=0.0) <= NEAR_FAMILY * best
    ]
    if unseen := [c for heads in near_families for c in heads if c.key() not in seen]:
        return Batch(0, tuple(unseen))
    close = [c for c in everyone if c.key() in by_head and by_head[c.key()] <= NEAR_HEAD * best]
    if once := [c for c in close if visited[c.key()] == 1]:
        return Batch(0, tuple(once))
    alive = sorted((c for c in everyone if c.key() in by_head), key=lambda c: by_head[c.key()])
    near = [c for c in alive[:GROUPS] if by_head[c.key()] <= NEAR_GROUP * by_head[alive[0].key()]]
    # the best dense self is opened as well: it is what a pruned layer must beat, and what a dense build takes
    near += [c for c in alive if c.params.get("dense")][:1]
    opened = [c for head in dict.fromkeys(map(group, near)) for c in groups[head]] if near else list(candidates)
    if unseen := [c for c in opened if c.key() not in seen]:
        return Batch(1, tuple(unseen))
    finalists = _finalists(candidates, screened(records))
    judged = {r.candidate for r in records if r.stage == FINAL}
    if len(finalists) > 1 and any(c.key() not in judged for c in finalists):
        return Batch(FINAL, tuple(finalists))
    pair = duellists(candidates, records)
    fought = {r.candidate for r in records if r.stage == DUEL}
    if len(pair) == 2 and any(c.key() not in fought for c in pair):
        return Batch(DUEL, pair)
    return None


def _finalists(candidates: Sequence[Candidate], found: Mapping[str, float]) -> list[Candidate]:
    ordered = sorted((c for c in candidates if c.key() in found), key=lambda c: found[c.key()])
    return [c for c in ordered[:FINALISTS] if found[c.key()] <= NEAR_FINAL * found[ordered[0].key()]]


def duellists(candidates: Sequence[Candidate], records: Sequence[Record]) -> tuple[Candidate, ...]:
    """The best sparse candidate and the best dense one, by the last stage that saw each; fewer where there are none."""
    first, last = screened(records), times(records, (FINAL,))
    pair = []
    for dense in (0, 1):
        # kernels that know no patterns at all say nothing about "dense" and have no part in this
        mine = [c for c in candidates if c.params.get("dense") == dense and c.key() in first]
        # who came to the finals beats who did not
        found = last if any(c.key() in last for c in mine) else first
        pair += sorted((c for c in mine if c.key() in found), key=lambda c: found[c.key()])[:1]
    return tuple(pair)


@dataclass(frozen=True)
class Duel:
    """Median ns of the best sparse and the best dense candidate, measured in turns; ``spread``: half the sum of both
    quartile ranges, in ns."""

    sparse: Candidate
    dense: Candidate
    sparse_ns: float
    dense_ns: float
    spread: float

    @property
    def dense_wins(self) -> bool:
        """Is the sparse one slower by more than the margin and the spread?"""
        return self.sparse_ns > self.dense_ns * (1 + MARGIN) + self.spread


def duel(candidates: Sequence[Candidate], records: Sequence[Record]) -> Duel | None:
    """What came of stage 3; None where it was not fought, or one of the two failed in it."""
    pair = duellists(candidates, records)
    found = times(records, (DUEL,))
    if len(pair) < 2 or any(c.key() not in found for c in pair):
        return None
    widths = []
    for candidate in pair:
        key = candidate.key()
        reps = [n for r in records if r.stage == DUEL and r.candidate == key for n in r.measurement.reps]
        low, _, high = quantiles(reps, n=4, method="inclusive") if len(reps) > 1 else (reps[0],) * 3
        widths.append(high - low)
    sparse, dense = pair
    return Duel(sparse, dense, found[sparse.key()], found[dense.key()], sum(widths) / 2)


def decide(candidates: Sequence[Candidate], records: Sequence[Record]) -> Candidate | None:
    """The measured best by median (of the last stage where there was one); None when nothing right was measured.

    Where sparse met dense, the duel overrules a sparse winner that lost it; and a dense one that is no faster there.
    """
    found = times(records, (FINAL,)) or screened(records)
    measured = [c for c in candidates if c.key() in found]
    best = min(measured, key=lambda c: found[c.key()]) if measured else None
    fought = duel(candidates, records)
    if best is None or fought is None or best not in (fought.sparse, fought.dense):
        return best
    if best.params.get("dense"):
        return fought.sparse if fought.sparse_ns <= fought.dense_ns else best
    return fought.dense if fought.dense_wins else best
