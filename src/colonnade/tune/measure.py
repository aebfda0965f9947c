"""Runs candidates of one problem on a target through the harness; whatever happens to them is a record."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError
from colonnade.kernels import registry, render
from colonnade.kernels.call import Call
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate, Variant
from colonnade.targets.base import Machine, Outcome, Target
from colonnade.targets.peak import Peak, look
from colonnade.tune.job import Problem, Run, encode

SIGALRM = 14
# a child stopped from outside says nothing about its candidate
OUTSIDE = {2: "SIGINT", 9: "SIGKILL", 15: "SIGTERM"}


@dataclass(frozen=True)
class Measurement:
    """What came of one visit to a candidate: ``outcome`` is ok, wrong, crash, hang or error; ``detail`` says more;
    ``reps`` are all repetitions in ns."""

    outcome: str
    detail: str = ""
    reps: tuple[int, ...] = ()


class Harness:
    """The harness program for one target, ISA and number of threads, with all kernels of the ISA (or ``variants``)."""

    def __init__(
        self,
        target: Target,
        isa: Isa,
        threads: int,
        toolchain: Toolchain | None = None,
        variants: Mapping[str, Variant] | None = None,
        library: Mapping[str, str] | None = None,
    ) -> None:
        self.target, self.isa, self.threads = target, isa, threads
        self.toolchain = toolchain or Toolchain()
        self._variants = variants
        self._library = library

    @cached_property
    def machine(self) -> Machine:
        """What the target's probe found."""
        return self.target.probe()

    @property
    def vector(self) -> int:
        """f32 lanes of a vector register."""
        return self.isa.lanes or (self.isa.emulates // 8 or self.machine.vlenb) // 4

    @cached_property
    def program(self) -> Path:
        """The static program, compiled when first asked for."""
        library = self._library
        if library is None:
            library = render.library(self.isa, (self._variants or registry.variants(self.isa)).values())
        body = (resources.files("colonnade.runtime") / "harness.c").read_text()
        source = f"#define CN_KERNELS cn_kernels_{self.isa.name}\n{body}"
        return self.toolchain.compile({**library, "harness.c": source}, "program", self.machine.arch)

    def run(
        self,
        problem: Problem,
        candidates: Sequence[Candidate],
        runs: Sequence[Run],
        record: Callable[[int, Measurement], None],
        bind: Callable[[registry.Operands, Candidate], tuple[Call, ...]] = registry.bind,
    ) -> None:
        """Perform ``runs``; ``record`` gets (index of the candidate, measurement) as soon as each is known.

        A crash or hang ends that candidate alone: the harness is started again behind it. Raises ``TargetError``
        when the target, not a candidate, fails.
        """
        skipped: set[int] = set()
        bound: list[tuple[Call, ...]] = []
        for index, candidate in enumerate(candidates):
            try:
                bound.append(bind(problem.step, candidate))
            except (ValueError, KeyError, IndexError) as error:
                bound.append(())
                skipped.add(index)
                record(index, Measurement("error", f"{type(error).__name__}: {error}"))
        # the share of the near cache that each thread can call its own
        flush = self.machine.cache(2) or 1 << 18
        with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
            job = Path(folder) / "job"
            job.write_bytes(encode(problem, bound, runs, self.threads, flush))
            first = 0
            while first < len(runs):
                first = self._once(job, runs, first, skipped, record)

    def walk(self, job: Path, walks: bytes, timeout: float) -> list[list[int]]:
        """Perform the ``walks`` (a file of the harness) on ``job``: ns of every step, walk by walk.

        Raises ``TargetError`` when they do not come to their end.
        """
        found: list[list[int]] = []

        def line(text: str) -> None:
            word, *rest = text.split()
            if word == "walk":
                found.append([int(n) for n in rest])

        outcome = self.target.run(
            self.program, ["job", "walk", "walks"], {"job": job, "walks": walks}, timeout=timeout, on_line=line
        )
        if not outcome.ok:
            raise TargetError(f"{self.target.name}: a walk through the network failed: {outcome.describe()}")
        return found

    def peak(self) -> Peak:
        """What the machine's threads can do just now."""
        return look(self.target, self.isa, self.threads, self.toolchain)

    def _once(
        self, job: Path, runs: Sequence[Run], first: int, skipped: set[int], record: Callable[[int, Measurement], None]
    ) -> int:
        """One process. Returns the number of the run to go on with."""
        begun, done, checked = -1, False, False

        def line(text: str) -> None:
            nonlocal begun, done, checked
            word, *rest = text.split()
            if word == "begin":
                begun, checked = int(rest[0]), False
            elif word == "check" and rest[1] == "wrong":
                where = "arena" if rest[3] == "0" else f"external {int(rest[3]) - 1}"
                detail = f"differs by {rest[2]} at byte {rest[4]} of the {where}"
                skipped.add(runs[begun].candidate)
                record(runs[begun].candidate, Measurement("wrong", detail))
                checked = True
            elif word == "times":
                record(runs[begun].candidate, Measurement("ok", "", tuple(map(int, rest[1:]))))
                checked = True
            elif word == "done":
                done = True

        timeout = 30.0 + sum(r.limit_s for r in runs[first:])
        arguments = ["job", str(first), *map(str, sorted(skipped))]
        outcome = self.target.run(self.program, arguments, {"job": job}, timeout=timeout, on_line=line)
        if done and outcome.ok:
            return len(runs)
        if begun < 0 or not (outcome.timed_out or _signal(outcome)):
            raise TargetError(f"{self.target.name}: the measuring program failed: {outcome.describe()}")
        if _signal(outcome) in OUTSIDE:
            raise TargetError(f"{self.target.name}: the measuring program was ended by {OUTSIDE[_signal(outcome)]}")
        candidate = runs[begun].candidate
        hung = outcome.timed_out or _signal(outcome) == SIGALRM
        # even when it died behind its last line, between two runs: nothing else ran there
        skipped.add(candidate)
        detail = f"no end within {runs[begun].limit_s} s" if hung else f"signal {_signal(outcome)}"
        record(candidate, Measurement("hang" if hung else "crash", detail))
        return begun + 1


def _signal(outcome: Outcome) -> int:
    """The signal that ended a program, also where a shell or an emulator says it by an exit code."""
    return outcome.signal or (outcome.code - 128 if 128 < outcome.code < 160 else 0)
