"""Which candidates to measure next, and which one is best, given all records. Pure functions of candidates and records.

Successive halving in three stages. Stage 0 visits the head of every group: a group is one kernel, dense or sparse, with
its run-time dimensions at their statically best values. Stage 1 visits the other members of the groups whose heads
were near the best. Stage 2 re-measures the few leaders in turns, so that a disturbance meets all of them alike; for
pruned weights the dense self is among them. A record once taken is never taken again, so the search
resumes wherever it was stopped and ends in the same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from colonnade.kernels.registry import Candidate
from colonnade.tune.database import Record

GROUPS = 3  # groups opened in stage 1 ...
NEAR_GROUP = 1.25  # ... when their head is within this factor of the best head
FINALISTS = 4
NEAR_FINAL = 1.15
NEAR_DENSE = 1.5  # a dense self this much slower than the best needs no second look
FINAL = 2


@dataclass(frozen=True)
class Batch:
    """Candidates to visit, all of one stage."""

    stage: int
    candidates: tuple[Candidate, ...]


def group(candidate: Candidate) -> tuple[str, int]:
    """Kernel, and whether the pattern is ignored."""
    return candidate.kernel, candidate.params.get("dense", 0)


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


def valid(records: Iterable[Record], candidates: Sequence[Candidate], sources: Mapping[str, str]) -> list[Record]:
    """The records of ``candidates`` whose kernel has not changed since; ``sources``: digest by kernel symbol."""
    wanted = {c.key(): sources[c.kernel] for c in candidates}
    return [r for r in records if wanted.get(r.candidate) == r.source]


def next_batch(candidates: Sequence[Candidate], records: Sequence[Record]) -> Batch | None:
    """What to measure next; None when the search is over. ``candidates`` in static order, ``records`` valid ones."""
    seen = {r.candidate for r in records}
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(group(candidate), []).append(candidate)
    heads = [members[0] for members in groups.values()]
    if unseen := [c for c in heads if c.key() not in seen]:
        return Batch(0, tuple(unseen))
    by_head = times((r for r in records if r.candidate in {c.key() for c in heads}), (0,))
    alive = sorted((c for c in heads if c.key() in by_head), key=lambda c: by_head[c.key()])
    near = [c for c in alive[:GROUPS] if by_head[c.key()] <= NEAR_GROUP * by_head[alive[0].key()]]
    # the best dense self is opened as well: it is what a pruned layer must beat, and what a dense build takes
    near += [c for c in alive if c.params.get("dense")][:1]
    opened = [c for head in dict.fromkeys(map(group, near)) for c in groups[head]] if near else list(candidates)
    if unseen := [c for c in opened if c.key() not in seen]:
        return Batch(1, tuple(unseen))
    finalists = _finalists(candidates, times(records, (0, 1)))
    judged = {r.candidate for r in records if r.stage == FINAL}
    if len(finalists) > 1 and any(c.key() not in judged for c in finalists):
        return Batch(FINAL, tuple(finalists))
    return None


def _finalists(candidates: Sequence[Candidate], found: Mapping[str, float]) -> list[Candidate]:
    ordered = sorted((c for c in candidates if c.key() in found), key=lambda c: found[c.key()])
    if not ordered:
        return []
    best = found[ordered[0].key()]
    finalists = [c for c in ordered[:FINALISTS] if found[c.key()] <= NEAR_FINAL * best]
    dense = next((c for c in ordered if c.params.get("dense")), None)
    if dense is not None and dense not in finalists and found[dense.key()] <= NEAR_DENSE * best:
        finalists.append(dense)
    return finalists


def decide(candidates: Sequence[Candidate], records: Sequence[Record]) -> Candidate | None:
    """The measured best by median (of the last stage where there was one); None when nothing right was measured."""
    found = times(records, (FINAL,)) or times(records, (0, 1))
    measured = [c for c in candidates if c.key() in found]
    return min(measured, key=lambda c: found[c.key()]) if measured else None
