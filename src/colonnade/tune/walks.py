"""Walks: a whole plan run with one rival a step, the time of every step taken; from walk to walk each changes rivals.

So one walk measures one rival of every step, between the neighbours it will have, and a disturbance meets all rivals
of a step alike, for they take turns. Steps of one key change together, and a walk's figure for it is their mean.

But a disturbance may favour one kind of kernel: a virtual machine's processors that come to lie on cores without a
common cache pass lines on four times as slowly, and then whoever shares out strips beats whoever shares out tiles. What
the machine can do is looked at around every process of walks, and where that fell these do not count.
"""

from __future__ import annotations

import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colonnade.kernels.call import Call, Const
from colonnade.kernels.registry import Candidate, Operands
from colonnade.plan import Plan
from colonnade.targets.peak import fallen, highest
from colonnade.tune.job import Problem, Segment, encode
from colonnade.tune.measure import Harness, Measurement
from colonnade.tune.network import NETWORK, RIVALS, Standing, decide, rivals, siblings, standing

if TYPE_CHECKING:
    from colonnade.tune.tuner import Chooser

CHUNK_S = 4.0  # what a process may take, so that little is lost with it
RETRIES = 8  # processes that may be thrown away beyond as many as counted: a machine that never calms has a say too
WARM = 2  # walks of a process that do not count: pages and branches are met for the first time
# bytes of constants that are sent to a target; with fewer rivals a step it is less
LARGEST = {"local": 1 << 30}
LARGEST_ELSEWHERE = 160 << 20


@dataclass
class Entry:
    """One key: who may be chosen for its steps, and where they stand."""

    candidates: Sequence[Candidate]
    sources: dict[str, str]
    field: tuple[Candidate, ...]
    now: Standing


@dataclass
class Contest:
    """The rivals of ``plan``, bound. ``numbers``: of the first candidate of each step in the job."""

    plan: Plan
    keys: list[str]
    entries: dict[str, Entry]
    bound: list[tuple[Call, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def open(self) -> list[str]:
        """Keys whose contest is not over."""
        return [key for key, entry in self.entries.items() if entry.now.running]

    def draw(self, count: int) -> dict[str, list[int]]:
        """For ``count`` walks, by key: whose turn it is (index in the field); the leader's where all is over.

        In rounds of all rivals, each in an order of its own: whom a neighbour meets is left to chance.
        """
        turns = {}
        for key, entry in self.entries.items():
            running = [entry.field.index(c) for c in entry.now.running]
            leader = entry.field.index(entry.now.best) if entry.now.best in entry.field else 0
            order: list[int] = []
            while len(order) < count:
                order += self.chance.permutation(running).tolist() if running else [leader]
            turns[key] = order[:count]
        return turns

    def walks(self, turns: Mapping[str, Sequence[int]]) -> list[list[int]]:
        """The candidates of every walk by their numbers in the job, one a step."""
        columns = [[first + turn for turn in turns[key]] for key, first in zip(self.keys, self.numbers, strict=True)]
        return [list(walk) for walk in zip(*columns, strict=True)]


def hold(
    plan: Plan,
    harness: Harness,
    chooser: Chooser,
    bind: Callable[[Operands, Candidate], tuple[Call, ...]],
    deadline: float,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[int, int]:
    """Let the rivals of every step meet until all is settled or the time (``time.monotonic``) is over.

    Returns the walks made, and how many keys are not settled. Raises ``TargetError`` when the target fails, or a kernel
    does that was right by itself.
    """
    made, most = 0, RIVALS
    while True:  # the rivals first, then the leader's siblings
        contest = _prepare(plan, chooser, bind, most)
        if contest is None or not contest.open or time.monotonic() >= deadline:
            return made, 0 if contest is None else len(contest.open)
        if most > 2 and _size(contest.bound) > LARGEST.get(harness.target.name, LARGEST_ELSEWHERE):
            most -= 1 if most <= 4 else 2
            continue
        made += _meet(contest, harness, chooser, deadline, progress)


def _meet(
    contest: Contest,
    harness: Harness,
    chooser: Chooser,
    deadline: float,
    progress: Callable[[float, str], None] | None,
) -> int:
    """One contest, until it or the time is over; returns the walks that count."""
    plan, made, left = contest.plan, 0, len(contest.open)
    with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
        job = Path(folder) / "job"
        job.write_bytes(encode(_problem(plan), contest.bound, (), harness.threads, 0))
        walk_s = 0.0
        kept = thrown = 0
        before = best = harness.peak()
        while contest.open and time.monotonic() < deadline:
            if progress is not None:
                progress(1 - len(contest.open) / max(left, 1), "the whole network")
            states = [contest.entries[key].now for key in contest.open]
            need = max(s.walks * len(s.running) for s in states)
            longest = max(len(s.running) for s in states)
            # the first process finds out how long a walk takes
            count = min(need, max(int(CHUNK_S / walk_s), longest)) if walk_s else longest
            turns = contest.draw(WARM + count)
            limit_s = 60 if not walk_s else 10 + int(20 * walk_s)
            words = [limit_s, len(plan.steps), *chain.from_iterable(contest.walks(turns))]
            packed = struct.pack(f"<{len(words)}Q", *words)
            times = harness.walk(job, packed, 120.0 + limit_s + 4 * count * walk_s)
            walk_s = max(sum(map(sum, times)) / len(times) / 1e9, 1e-4)
            after = harness.peak()
            best, around, before = highest((best, after)), (before, after), after
            if thrown < kept + RETRIES and fallen(around, best):
                thrown += 1
                continue
            kept += 1
            made += len(times) - WARM
            _record(contest, chooser, turns, times)
    return made


def _prepare(
    plan: Plan, chooser: Chooser, bind: Callable[[Operands, Candidate], tuple[Call, ...]], most: int
) -> Contest | None:
    """Rivals of all keys, or the siblings of who won, bound for every step; None where nobody has any."""
    contest = Contest(plan, [step.key() for step in plan.steps], {})
    for step, key in zip(plan.steps, contest.keys, strict=True):
        if key in contest.entries:
            continue
        candidates, sources = chooser.listed(step)
        records = chooser.records(step, candidates, sources)
        field_ = rivals(candidates, records, most)
        now = standing(field_, records)
        if not now.running:
            best = decide(candidates, records) or candidates[0]
            field_ = siblings(candidates, records, best, most)
            now = standing(field_, records)
            if not now.running:
                field_, now = (best,), Standing((), 0, best)
        contest.entries[key] = Entry(candidates, sources, field_, now)
    if not contest.open:
        return None
    for step, key in zip(plan.steps, contest.keys, strict=True):
        contest.numbers.append(len(contest.bound))
        contest.bound += [bind(step, candidate) for candidate in contest.entries[key].field]
    return contest


def _size(bound: Sequence[tuple[Call, ...]]) -> int:
    """Bytes of all constants; what candidates share is one array."""
    arrays = {
        id(v.data): v.data.nbytes for calls in bound for c in calls for v in c.fields.values() if isinstance(v, Const)
    }
    return sum(arrays.values())


def _record(
    contest: Contest, chooser: Chooser, turns: Mapping[str, Sequence[int]], times: Sequence[Sequence[int]]
) -> None:
    """Put the times of counted walks into the database, and see who stays."""
    steps = dict(zip(contest.keys, contest.plan.steps, strict=True))
    found: dict[tuple[str, int], list[int]] = {}
    for walk, ns in enumerate(times[WARM:], WARM):
        by_key: dict[str, list[int]] = {}
        for key, time_ in zip(contest.keys, ns, strict=True):
            by_key.setdefault(key, []).append(time_)
        for key in contest.open:
            mean = sum(by_key[key]) // len(by_key[key])
            found.setdefault((key, turns[key][walk]), []).append(mean)
    for (key, index), reps in found.items():
        entry = contest.entries[key]
        candidate = entry.field[index]
        result = Measurement("ok", "", tuple(reps))
        chooser.database.add(key, chooser.place, candidate, entry.sources[candidate.kernel], NETWORK, result)
    for key in contest.open:
        entry = contest.entries[key]
        records = chooser.records(steps[key], entry.candidates, entry.sources)
        entry.now = standing(entry.field, records)


def _problem(plan: Plan) -> Problem:
    """The whole plan on an arena of its own: random floats, zeros for whole numbers. Nothing is checked in it."""
    rng = np.random.default_rng(0)
    sizes: dict[str, int] = {}
    seam = [] if plan.seam is None else [plan.seam]
    for port in (*plan.inputs, *plan.outputs, *seam):
        sizes[port.name] = max(port.nbytes, sizes.get(port.name, 0))
    places = {name: 1 + index for index, name in enumerate(sizes)}
    segments = []
    for port in (*plan.inputs, *seam):
        values = np.zeros(port.shape, port.dtype)
        if values.dtype.kind == "f":
            values = rng.standard_normal(port.shape).astype(port.dtype)
        segments.append(Segment(places[port.name], 0, values.tobytes()))
    return Problem(plan.steps[0], plan.arena, tuple(sizes.items()), tuple(segments), ())
