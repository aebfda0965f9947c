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
from typing import Any, Protocol, runtime_checkable

from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError, UserError
from colonnade.kernels import registry, render
from colonnade.kernels.call import Call
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.plan import Plan, Variants
from colonnade.targets.base import Machine, Target, check_timed
from colonnade.tune import walks
from colonnade.tune.database import Database, Place, Record
from colonnade.tune.job import Problem, Run, Tunable, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.tune.network import decide
from colonnade.tune.search import DUEL, FINAL, Duel, duel, judged, next_batch, valid
from colonnade.tune.variants import alternatives, settle

CHUNK = 16  # candidates a process: the deadline is looked at in between
MODELLED = 2  # likewise on a modelled core, where each takes seconds
SCREEN = (3, 15, 8_000_000)  # least and most repetitions, ns: a first impression
FINALS = (3, 25, 12_000_000)
TURNS = {FINAL: 5, DUEL: 9}
ALONE = 0.7  # share of the time for layers by themselves, where their network is walked through afterwards
MS = 1_000_000


@runtime_checkable
class Steps(Protocol):
    """What is tuned; ``plan.Plan`` is one."""

    @property
    def steps(self) -> Sequence[Tunable]: ...


@dataclass(frozen=True)
class Choices:
    """One candidate a step, in the plan's order. ``untuned``: steps with more than one candidate that took the static
    ranking; ``duels``: by step, the measured contest of its best sparse and best dense candidate, where there was one.
    """

    candidates: tuple[Candidate, ...]
    untuned: int
    tunable: int
    duels: tuple[Duel | None, ...] = ()

    @property
    def dense_instead(self) -> int:
        """Pruned layers that run dense because that is faster here."""
        taken = zip(self.candidates, self.duels, strict=True) if self.duels else ()
        return sum(d is not None and c == d.dense for c, d in taken)

    def __str__(self) -> str:
        return f"{self.untuned} of {self.tunable} layers untuned"

    def manifest(self) -> dict[str, Any]:
        """What a bundle says about its tuning; ns of the duels by step, null where none was fought."""
        fought = [None if d is None else {"sparse_ns": d.sparse_ns, "dense_ns": d.dense_ns} for d in self.duels]
        return {"untuned": self.untuned, "tunable": self.tunable, "duels": fought}


@dataclass
class Summary:
    """``measured``: visits made now; ``known``: workloads that needed none; ``left``: workloads whose search the budget
    cut short; ``walks``: runs of the whole network, ``unsettled``: workloads whose contest in it the budget cut short;
    ``outcomes``: visits by outcome; times in seconds; ``plan`` and ``choices`` by all that is known at the end.
    """

    workloads: int = 0
    known: int = 0
    measured: int = 0
    left: int = 0
    walks: int = 0
    unsettled: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    plan: Steps | None = None
    choices: Choices | None = None


Progress = Callable[[float, str], None]  # share done (0 .. 1), what is being measured


def place(machine: Machine, isa: Isa, threads: int, toolchain: Toolchain) -> Place:
    """Where a measurement counts."""
    return Place(machine.key(), toolchain.version, isa.name, threads)


OPS = "colonnade.kernels.ops"  # where binding is written down


@cache
def source_digest(op: str, symbol: str, isa: Isa) -> str:
    """Digest of all that makes ``symbol``: its C and that of kernels it calls, the primitives they include, its
    structs, and how it is bound."""
    row = registry.operator(op)
    variants = {v.symbol: v for v in row.variants(isa.of(4))}
    # a candidate without a kernel of its own name stands for all of its operator's
    own = [variants[symbol]] if symbol in variants else list(variants.values())
    module = inspect.getmodule(row.bind)
    helpers = [m for m in vars(module).values() if inspect.ismodule(m) and m.__name__.startswith(OPS)] if module else []
    parts = [
        *(render.kernel(each, isa) for v in own for each in (v, *v.needs)),
        (render.SOURCES / isa.header).read_text(),
        *(s.declaration() for s in row.structs),
        inspect.getsource(module) if module is not None else "",
        *map(inspect.getsource, helpers),
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
        self._listed: dict[str, tuple[list[Candidate], dict[str, str]]] = {}

    def listed(self, step: Tunable) -> tuple[list[Candidate], dict[str, str]]:
        """The step's candidates in static order, and the digest of each kernel. Made once: ranking takes a while."""
        key = step.key()
        if key not in self._listed:
            found = self._candidates(step, self.isa, self.place.threads)
            sources = {c.kernel: self._source(step.workload.op, c.kernel, self.isa) for c in found}
            self._listed[key] = found, sources
        return self._listed[key]

    def records(self, step: Tunable, candidates: Sequence[Candidate], sources: Mapping[str, str]) -> list[Record]:
        """What is known of them and still true."""
        return valid(self.database.records(step.key(), self.place), candidates, sources)

    def choose(self, plan: Steps) -> Choices:
        """The measured best of every step, the static ranking where nothing was measured."""
        chosen: dict[str, tuple[Candidate, bool, bool, Duel | None]] = {}
        picks, duels, untuned, tunable = [], [], 0, 0
        for step in plan.steps:
            key = step.key()
            if key not in chosen:
                candidates, sources = self.listed(step)
                records = self.records(step, candidates, sources)
                best = decide(candidates, records)
                failed = {r.candidate for r in records if r.measurement.outcome != "ok"}
                open_ = len(candidates) > 1 and best is None
                pick = best or _static(candidates, failed)
                chosen[key] = pick, open_, len(candidates) > 1, duel(candidates, records)
            pick, is_untuned, has_choice, fought = chosen[key]
            picks.append(pick)
            duels.append(fought)
            untuned += is_untuned
            tunable += has_choice
        return Choices(tuple(picks), untuned, tunable, tuple(duels))


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

    def tune(
        self,
        plan: Steps,
        budget_s: float = 120.0,
        progress: Progress | None = None,
        model: Variants | None = None,
    ) -> Summary:
        """Measure what the records lack, the layers that take longest first. Ctrl-C keeps what was recorded.

        ``model``: that of which ``plan`` is one variant. Time that is left after the steps is for those of the other
        variants, and the variant that is best then is the one whose network is walked through.
        """
        started = time.monotonic()
        summary = Summary()
        counts = Counter(step.key() for step in plan.steps)
        distinct = {step.key(): step for step in plan.steps}
        weight = {key: estimate(step) * counts[key] for key, step in distinct.items()}
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
        end = time.monotonic() + budget_s
        # on a modelled core a whole network takes minutes
        networked = isinstance(plan, Plan) and not self.harness.target.modelled
        deadline = end - (1 - ALONE) * budget_s if networked else end
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
        if model is not None and not left:
            others = {step.key(): step for step in alternatives(model)}
            for step in others.values():
                if not self._search(step, deadline, summary):
                    break
            plan = settle(model, self.chooser)
        summary.plan = plan
        if networked:
            assert isinstance(plan, Plan)
            try:
                summary.walks, summary.unsettled = walks.hold(
                    plan, self.harness, self.chooser, self.bind, end, progress
                )
            except TargetError as error:  # what was measured before stands
                summary.failures.append(str(error))
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
            prepared = prepared or problem(step, self.harness.vector, not self.harness.isa.scalable)
            turns = TURNS.get(batch.stage, 0)
            modelled = bool(self.harness.target.modelled)
            chunk = batch.candidates if turns else batch.candidates[: MODELLED if modelled else CHUNK]
            least, most, budget = FINALS if turns else SCREEN
            if modelled:  # the same at every repetition
                turns, least, most, budget, limit = min(turns, 1), 1, 1, 1, 3000
            runs = [
                Run(index, check=turn == 0, least=least, most=most, budget_ns=budget, limit_s=limit)
                for turn in range(turns or 1)
                for index in range(len(chunk))
            ]

            def record(
                index: int, result: Measurement, chunk: Sequence[Candidate] = chunk, stage: int = batch.stage
            ) -> None:
                candidate = chunk[index]
                source = judged(sources[candidate.kernel], result.outcome)
                self.chooser.database.add(step.key(), self.chooser.place, candidate, source, stage, result)
                summary.measured += 1
                summary.outcomes[result.outcome] += 1
                if result.outcome != "ok":
                    summary.failures.append(f"{step.name}: {candidate.key()}: {result.outcome}: {result.detail}")

            self.harness.run(prepared, chunk, runs, record, self.bind)
        return True


def _static(candidates: Sequence[Candidate], failed: set[str]) -> Candidate:
    """First of the ranking that is not known to fail."""
    return next((c for c in candidates if c.key() not in failed), candidates[0])


def estimate(step: Tunable) -> float:
    """Seconds that a step may take, roughly: multiply-adds on kept weights, and bytes of the tensors it touches."""
    size = sum(x.layout.buffer_bytes(x.shape[1]) for x in [*step.inputs, *([step.output] if step.output else [])])
    return step.workload.kept_macs / 5e10 + size / 1e10


def tune(
    model: Steps | Variants,
    target: Target,
    isa: Isa | None = None,
    threads: int = 1,
    budget_s: float = 120.0,
    db_path: Path | None = None,
    progress: Progress | None = None,
    toolchain: Toolchain | None = None,
) -> Summary:
    """Measure a plan, or a model in its variants, on ``target`` for at most ``budget_s`` seconds (compiling not
    counted) into the database.

    Raises ``TargetError`` when the target fails, ``UserError`` for an ISA it lacks, an unusable database or a target
    whose times mean nothing. A candidate that fails raises nothing: it is recorded and never chosen.
    """
    if target.untimed:
        raise UserError(f"{target.name}: {target.untimed}; build without tuning, the static ranking chooses")
    machine = target.probe()
    used = check_timed(isa or machine.isas[0])
    database = Database(db_path)
    try:
        harness = Harness(target, used, threads, toolchain)
        chooser = Chooser(database, place(machine, harness.isa, threads, harness.toolchain), harness.isa)
        varied = None if isinstance(model, Steps) else model
        plan = model if isinstance(model, Steps) else settle(model, chooser)
        summary = Tuner(harness, chooser).tune(plan, budget_s, progress, varied)
        summary.choices = chooser.choose(summary.plan or plan)
        return summary
    finally:
        database.close()


def choose(
    model: Variants,
    isa: Isa,
    machine: Machine,
    threads: int = 1,
    db_path: Path | None = None,
    toolchain: Toolchain | None = None,
) -> tuple[Plan, Choices]:
    """The best known variant of ``model`` on ``machine``, and its best candidates; measures nothing and needs no
    target."""
    database = Database(db_path)
    try:
        chooser = Chooser(database, place(machine, isa, threads, toolchain or Toolchain()), isa)
        plan = settle(model, chooser)
        return plan, chooser.choose(plan)
    finally:
        database.close()
