"""Measure the candidates of every distinct workload of a plan on its target, and choose by what was measured."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from colonnade.build.toolchain import Toolchain
from colonnade.errors import UserError
from colonnade.kernels import registry, render
from colonnade.kernels.call import Call
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.targets.base import Machine, Target
from colonnade.tune.database import Database, Place, Record
from colonnade.tune.job import Problem, Run, Tunable, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.tune.search import FINAL, decide, next_batch, valid

CHUNK = 12  # candidates a process: the deadline is looked at in between
SCREEN = (3, 15, 8_000_000)  # least and most repetitions, ns: a first impression
FINALS = (3, 25, 12_000_000)
TURNS = 5  # of the finalists
MS = 1_000_000


class Steps(Protocol):
    """What is tuned; ``plan.Plan`` is one."""

    @property
    def steps(self) -> Sequence[Tunable]: ...


@dataclass
class Summary:
    """``measured``: visits made now; ``known``: workloads that needed none; ``left``: workloads whose search the budget
    cut short; ``outcomes``: visits by outcome; times in seconds."""

    workloads: int = 0
    known: int = 0
    measured: int = 0
    left: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choices:
    """One candidate a step, in the plan's order. ``untuned``: steps with more than one candidate that took the static
    ranking; ``times``: median ns of a step where it was measured."""

    candidates: tuple[Candidate, ...]
    untuned: int
    tunable: int

    def __str__(self) -> str:
        return f"{self.untuned} of {self.tunable} layers untuned"


Progress = Callable[[float, str], None]  # share done (0 .. 1), what is being measured


def place(machine: Machine, isa: Isa, threads: int, toolchain: Toolchain) -> Place:
    """Where a measurement counts."""
    return Place(machine.key(), toolchain.version, isa.name, threads)


@cache
def source_digest(op: str, symbol: str, isa: Isa) -> str:
    """Digest of all that makes ``symbol``: its C, the primitives it includes, its structs, and how it is bound."""
    row = registry.operator(op)
    variants = {v.symbol: v for v in row.variants(isa)}
    # a candidate without a kernel of its own name stands for all of its operator's
    own = [variants[symbol]] if symbol in variants else list(variants.values())
    module = inspect.getmodule(row.bind)
    parts = [
        *(render.kernel(v, isa) for v in own),
        (render.SOURCES / isa.header).read_text(),
        *(s.declaration() for s in row.structs),
        inspect.getsource(module) if module is not None else "",
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


class Chooser:
    """Candidates of steps beside what the database knows of them at one place."""

    def __init__(
        self,
        database: Database,
        place: Place,
        isa: Isa,
        candidates: Callable[[registry.Operands, Isa, int], list[Candidate]] = registry.candidates,
        source: Callable[[str, str, Isa], str] = source_digest,
    ) -> None:
        self.database, self.place, self.isa = database, place, isa
        self._candidates, self._source = candidates, source

    def listed(self, step: Tunable) -> tuple[list[Candidate], dict[str, str]]:
        """The step's candidates in static order, and the digest of each kernel."""
        found = self._candidates(step, self.isa, self.place.threads)
        return found, {c.kernel: self._source(step.workload.op, c.kernel, self.isa) for c in found}

    def records(self, step: Tunable, candidates: Sequence[Candidate], sources: Mapping[str, str]) -> list[Record]:
        """What is known of them and still true."""
        return valid(self.database.records(step.key(), self.place), candidates, sources)

    def choose(self, plan: Steps) -> Choices:
        """The measured best of every step, the static ranking where nothing was measured."""
        chosen: dict[str, tuple[Candidate, bool, bool]] = {}
        picks, untuned, tunable = [], 0, 0
        for step in plan.steps:
            key = step.key()
            if key not in chosen:
                candidates, sources = self.listed(step)
                records = self.records(step, candidates, sources)
                best = decide(candidates, records)
                failed = {r.candidate for r in records if r.measurement.outcome != "ok"}
                open_ = len(candidates) > 1 and best is None
                chosen[key] = (best or _static(candidates, failed), open_, len(candidates) > 1)
            pick, is_untuned, has_choice = chosen[key]
            picks.append(pick)
            untuned += is_untuned
            tunable += has_choice
        return Choices(tuple(picks), untuned, tunable)


class Tuner:
    """Searches on one target with one ISA and number of threads, and records what it finds by ``chooser``.

    ``limit_s``: a visit to a small layer that takes longer is a hang.
    """

    def __init__(
        self,
        harness: Harness,
        chooser: Chooser,
        bind: Callable[[registry.Operands, Candidate], tuple[Call, ...]] = registry.bind,
        limit_s: int = 5,
    ) -> None:
        self.harness, self.chooser, self.bind, self.limit_s = harness, chooser, bind, limit_s

    def tune(self, plan: Steps, budget_s: float = 120.0, progress: Progress | None = None) -> Summary:
        """Measure what the records lack, the layers that take longest first. Ctrl-C keeps what was recorded."""
        started = time.monotonic()
        summary = Summary()
        counts = Counter(step.key() for step in plan.steps)
        distinct = {step.key(): step for step in plan.steps}
        weight = {key: _estimate(step) * counts[key] for key, step in distinct.items()}
        order = sorted(distinct.values(), key=lambda s: -weight[s.key()])
        summary.workloads = len(order)
        floor = 0.2 * sum(weight.values()) / max(len(order), 1)
        open_ = []
        for step in order:
            candidates, sources = self.chooser.listed(step)
            if next_batch(candidates, self.chooser.records(step, candidates, sources)) is None:
                summary.known += 1
            else:
                open_.append(step)
        if open_:
            if progress is not None:
                progress(0.0, "compiling kernels")
            _ = self.harness.program
        deadline = time.monotonic() + budget_s
        left = open_
        # first everyone's share of the time, then whatever is left to those who could not finish
        for fair in (True, False):
            waiting, left = left, []
            for index, step in enumerate(waiting):
                if progress is not None:
                    progress(index / len(waiting) if fair else 1.0, step.name)
                now = time.monotonic()
                ahead = sum(weight[s.key()] + floor for s in waiting[index:])
                share = (deadline - now) * (weight[step.key()] + floor) / ahead if fair else deadline - now
                if not self._search(step, min(now + share, deadline), summary):
                    left.append(step)
            if not left:
                break
        summary.left = len(left)
        summary.seconds = time.monotonic() - started
        if progress is not None:
            progress(1.0, "")
        return summary

    def _search(self, step: Tunable, until: float, summary: Summary) -> bool:
        """Measure ``step`` until its search is over (True) or the time is."""
        candidates, sources = self.chooser.listed(step)
        limit = self.limit_s + int(step.workload.macs / 2e8)
        prepared: Problem | None = None
        while (batch := next_batch(candidates, self.chooser.records(step, candidates, sources))) is not None:
            if time.monotonic() >= until:
                return False
            prepared = prepared or problem(step)
            final = batch.stage == FINAL
            chunk = batch.candidates if final else batch.candidates[:CHUNK]
            least, most, budget = FINALS if final else SCREEN
            runs = [
                Run(index, check=turn == 0, least=least, most=most, budget_ns=budget, limit_s=limit)
                for turn in range(TURNS if final else 1)
                for index in range(len(chunk))
            ]

            def record(
                index: int, result: Measurement, chunk: Sequence[Candidate] = chunk, stage: int = batch.stage
            ) -> None:
                candidate = chunk[index]
                self.chooser.database.add(
                    step.key(), self.chooser.place, candidate, sources[candidate.kernel], stage, result
                )
                summary.measured += 1
                summary.outcomes[result.outcome] += 1
                if result.outcome != "ok":
                    summary.failures.append(f"{step.name}: {candidate.key()}: {result.outcome}: {result.detail}")

            self.harness.run(prepared, chunk, runs, record, self.bind)
        return True


def _static(candidates: Sequence[Candidate], failed: set[str]) -> Candidate:
    """First of the ranking that is not known to fail."""
    return next((c for c in candidates if c.key() not in failed), candidates[0])


def _estimate(step: Tunable) -> float:
    """Seconds that a step may take, roughly: multiply-adds, and bytes of the tensors it touches."""
    macs = getattr(step.workload, "kept_macs", step.workload.macs)
    size = sum(x.layout.buffer_bytes(x.shape[1]) for x in [*step.inputs, *([step.output] if step.output else [])])
    return float(macs) / 5e10 + size / 1e10


def tune(
    plan: Steps,
    target: Target,
    isa: Isa | None = None,
    threads: int = 1,
    budget_s: float = 120.0,
    db_path: Path | None = None,
    progress: Progress | None = None,
    toolchain: Toolchain | None = None,
) -> Summary:
    """Measure ``plan`` on ``target`` for at most ``budget_s`` seconds (compiling not counted) into the database.

    Raises ``TargetError`` when the target fails or lacks ``isa``, ``UserError`` for an unusable database or a target
    whose times mean nothing. A candidate that fails raises nothing: it is recorded and never chosen.
    """
    if target.untimed:
        raise UserError(f"{target.name}: {target.untimed}; build without tuning, the static ranking chooses")
    machine = target.probe()
    database = Database(db_path)
    try:
        harness = Harness(target, isa or machine.isas[0], threads, toolchain)
        chooser = Chooser(database, place(machine, harness.isa, threads, harness.toolchain), harness.isa)
        return Tuner(harness, chooser).tune(plan, budget_s, progress)
    finally:
        database.close()


def choose(
    plan: Steps,
    isa: Isa,
    machine: Machine,
    threads: int = 1,
    db_path: Path | None = None,
    toolchain: Toolchain | None = None,
) -> Choices:
    """The best known candidates of ``plan`` on ``machine``; measures nothing and needs no target."""
    database = Database(db_path)
    try:
        return Chooser(database, place(machine, isa, threads, toolchain or Toolchain()), isa).choose(plan)
    finally:
        database.close()
