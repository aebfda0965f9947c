"""What a target is: a machine that can be probed and that runs static programs on files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from colonnade.errors import UserError
from colonnade.kernels.isa import ISAS, Isa, available

DTYPES = ("f32", "f16")  # of convolutions
HALF = "RISC-V's Zvfh"  # what f16 takes


def check_timed(isa: Isa) -> Isa:
    """The ISA, if its times mean something. Raises ``UserError`` for one that is emulated."""
    if isa.emulates:
        raise UserError(f"ISA {isa.name} gives another machine's answers, not its times; build and run with it alone")
    return isa


def check_dtype(dtype: str) -> None:
    """Raises ``UserError`` for what convolutions cannot compute with."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")


@dataclass(frozen=True)
class Cache:
    """One level: ``kind`` is data, instruction or unified; ``size``, ``line`` in bytes; ``shared``: its cores."""

    level: int
    kind: str
    size: int
    line: int
    shared: int = 1


@dataclass(frozen=True)
class Machine:
    """What a probe found. ``vlenb`` bytes of a scalable vector register, 0 where there is none; memory in bytes.

    ``flags`` are the names by which the kernel shows instruction sets. ``clusters`` are the groups of cores that
    share a last private cache (their numbers), in order; ``governor`` is empty where frequency is not managed;
    ``model`` is the board's name and ``isa_text`` its ISA string, where the kernel tells them; ``temperature`` in
    degrees Celsius, the hottest sensor, 0 when there is none; ``cpus`` are the cores that somebody chose, empty when
    nobody did; ``no_half`` tells what to do where it lacks float16 for want of an emulator that knows it.
    """

    arch: str
    cpu: str
    flags: frozenset[str] = field(repr=False)
    cores: int
    clusters: tuple[tuple[int, ...], ...] = ()
    caches: tuple[Cache, ...] = ()
    vlenb: int = 0
    memory: int = 0
    memory_free: int = 0
    governor: str = ""
    kernel: str = ""
    model: str = ""
    isa_text: str = field(default="", repr=False)
    temperature: float = 0.0
    cpus: tuple[int, ...] = ()
    no_half: str = field(default="", repr=False)

    @property
    def isas(self) -> tuple[Isa, ...]:
        """What it can run, best first."""
        return tuple(available(self.arch, self.flags))

    def cache(self, level: int) -> int:
        """Bytes of the data or unified cache of ``level``; 0 when there is none."""
        return next((c.size for c in self.caches if c.level == level and c.kind != "instruction"), 0)

    def key(self) -> str:
        """Equal for machines whose measurements may be exchanged: nothing that changes while it runs is in it."""
        caches = ",".join(f"L{c.level}{c.kind[0]}{c.size}" for c in self.caches)
        chosen = f"|cpus={','.join(map(str, self.cpus))}" if self.cpus else ""
        return f"{self.arch}|{self.cpu}|vlenb={self.vlenb}|cores={self.cores}|{caches}{chosen}"

    def pick_isa(self, name: str | None = None, dtype: str = DTYPES[0], timed: bool = False) -> Isa:
        """The ISA called ``name``, which the machine must have, or the best one of its own; for convolutions in
        ``dtype``, and ``timed`` where times are taken. Raises ``UserError``."""
        check_dtype(dtype)
        rows = [row for row in self.isas if name is None or row.name == name]
        if not rows:
            known = ", ".join(row.name for row in self.isas)
            asked = next((row for row in ISAS if row.name == name), None)
            more = f"; f16 takes {HALF}{self.no_half}" if asked and asked.half else ""
            if asked and asked.emulates:
                more = f"; {name} takes {asked.arch} with {', '.join(asked.flags)}"
            raise UserError(f"{self.cpu or self.arch} cannot run ISA {name!r}; it has: {known}{more}")
        if timed:
            rows = [check_timed(row) for row in rows if name or not row.emulates]
        if dtype == "f32":
            return rows[0]
        able = [row.of(2) for row in rows if row.half and (name or not row.emulates)]
        if not able:
            who, why = (f"ISA {name}", "") if name else (self.cpu or self.arch, self.no_half)
            emulating = [f", or take --isa {row.name} for its answers" for row in rows if row.half]
            raise UserError(
                f"{who} does not compute with f16, which takes {HALF}{why}; leave out --dtype f16{''.join(emulating)}"
            )
        return able[0]


@dataclass(frozen=True)
class Outcome:
    """How a program ended. ``signal`` is the number that killed it, 0 when none did; a failure is data.

    ``files`` are the output files asked for, by name; missing ones are left out.
    """

    code: int
    signal: int = 0
    timed_out: bool = False
    stdout: str = ""
    stderr: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Did it end by itself with exit code 0?"""
        return self.code == 0 and self.signal == 0 and not self.timed_out

    def describe(self) -> str:
        """One line: how it ended."""
        if self.timed_out:
            return "timed out"
        if self.signal:
            return f"killed by signal {self.signal}"
        last = self.stderr.strip().splitlines()[-1:] or [""]
        return f"exit code {self.code}" + (f": {last[0]}" if last[0] else "")


class Target(Protocol):
    """Where programs run. They are static executables and data files; nothing runs in this process."""

    @property
    def name(self) -> str:
        """As on the command line: ``local``, ``qemu:vlen=256``, ``ssh://…``."""
        ...

    @property
    def untimed(self) -> str:
        """Why times taken here mean nothing, in half a sentence; empty where they are a machine's own. Nothing is
        tuned or compared on such a target."""
        ...

    @property
    def modelled(self) -> str:
        """Of a core that nobody has at hand what its times are, in words that stand beside every figure; else empty.
        It repeats itself, and a second of it takes minutes."""
        ...

    def probe(self) -> Machine:
        """What is there. Raises ``TargetError`` when it cannot be reached."""
        ...

    def run(
        self,
        program: Path,
        args: Sequence[str] = (),
        inputs: Mapping[str, Path | bytes] | None = None,
        outputs: Sequence[str] = (),
        timeout: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Run ``program`` in a fresh directory that holds ``inputs`` by name, and bring back ``outputs``.

        ``on_line`` gets every whole line of standard output as it appears. ``timeout`` in seconds. The program's
        own failures are in the outcome; raises ``TargetError`` only when the target itself fails.
        """
        ...
