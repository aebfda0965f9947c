"""Runs a riscv64 program under QEMU with the instrument: counts, and modelled cycles on one core's model."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from colonnade.build.toolchain import Toolchain, host
from colonnade.errors import TargetError, UserError
from colonnade.machine.model import Model
from colonnade.targets import qemu
from colonnade.targets.base import Outcome
from colonnade.targets.local import execute

BASE = "0x10000000000"  # where the guest's memory is put, so that the instrument can answer its clock_gettime


@dataclass(frozen=True)
class Report:
    """What one run was: **modelled**, never measured. ``threads`` as the instrument wrote them (see ``c/plugin.c``)."""

    model: str
    ghz: float
    threads: tuple[Mapping[str, Any], ...] = field(repr=False)
    outcome: Outcome = field(repr=False)

    @property
    def regions(self) -> tuple[float, ...]:
        """Modelled cycles of each marked region (the whole program without marks); the slowest thread of each."""
        longest = max((len(t["regions"]) for t in self.threads), default=0)
        return tuple(
            max(t["regions"][i] for t in self.threads if i < len(t["regions"])) for i in range(longest)
        )  # fmt: skip

    @property
    def cycles(self) -> float:
        """Modelled cycles of all regions together."""
        return sum(self.regions)

    @property
    def milliseconds(self) -> float:
        """Modelled time of all regions together."""
        return self.cycles / self.ghz / 1e6

    @property
    def instructions(self) -> int:
        """Counted instructions of all threads, in regions."""
        return sum(int(t["instructions"]) for t in self.threads)

    def executed(self, *classes: str) -> dict[str, int]:
        """Counts by ``e32m4`` and the like, summed over ``classes`` (all vector and scalar classes without one)."""
        total: dict[str, int] = {}
        for thread in self.threads:
            for name, counts in thread["executed"].items():
                if not classes or name in classes:
                    for shape, count in counts.items():
                        total[shape] = total.get(shape, 0) + int(count)
        return total

    def waited(self) -> dict[str, float]:
        """Cycles lost by reason, in-order cores only: operands, busy units (``vector_unit``), misses, branches."""
        return self._summed("waited")

    def memory(self) -> dict[str, int]:
        """Cache and TLB misses, bytes read from and written to memory, summed over threads."""
        return {name: int(value) for name, value in self._summed("memory").items()}

    def _summed(self, field: str) -> dict[str, float]:
        keys = self.threads[0][field] if self.threads else ()
        return {k: sum(t[field][k] for t in self.threads) for k in keys}

    def bound(self, model: Model) -> float:
        """Cycles that the vector arithmetic units alone would need for the counted instructions."""
        total = 0.0
        for thread in self.threads:
            for name, counts in thread["executed"].items():
                cost = model.classes[name]
                if cost.unit in ("vec", "vec1"):
                    for shape, count in counts.items():
                        size = ("1", "2", "4", "8", "f").index(shape.split("m")[1])
                        total += cost.cycles[size] * count
        return total


@cache
def interface(program: str) -> int:
    """The version of the plugin interface that the emulator ``program`` wants (see ``c/qemu_plugin.h``). Raises
    ``TargetError`` for one that takes no plugins."""

    def answer(option: str) -> str:
        try:
            done = subprocess.run([program, option], stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace")

    number = re.search(r"version (\d+)\.(\d+)", answer("--version"))
    if number is None or not re.search(r"^-plugin\s", answer("--help"), re.M):
        raise TargetError(f"{program} takes no plugins, by which cores are modelled: {qemu.VARIABLE} may name another")
    release = int(number[1]), int(number[2])
    return 1 if release < (9, 0) else 2 if release < (9, 1) else 3


class Instrument:
    """The instrument for one model. ``root``: where a dynamic program's libraries lie (QEMU's ``-L``); ``cores``: how
    many share the memory's bandwidth. Its methods raise ``UserError`` when QEMU is missing."""

    def __init__(
        self, model: Model, toolchain: Toolchain | None = None, root: Path | None = None, cores: int = 1
    ) -> None:
        self.model, self.root, self.cores = model, root, cores
        self.toolchain = toolchain or Toolchain()

    def plugin(self, program: str) -> Path:
        """The plugin compiled for the emulator ``program``, from the cache when it was made before."""
        folder = resources.files("colonnade.machine") / "c"
        sources = {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith((".c", ".h"))}
        return self.toolchain.compile(sources, "shared", host(), [f"-DPLUGIN_API={interface(program)}"])

    def command(self, model_file: Path, out: Path, skip: bool, extra: Sequence[str] = ()) -> list[str]:
        """What starts QEMU with the instrument; the program and its arguments follow."""
        program = qemu.program(f"model:{self.model.key}")
        plugin = self.plugin(program)
        words = f"file={plugin},model={model_file},out={out},base={BASE}" + (",outside=skip" if skip else "")
        library = ["-L", str(self.root)] if self.root else []
        return [program, "-B", BASE, "-plugin", words, "-cpu", qemu.cpu(program, self.model.vlen), *library, *extra]

    def run(
        self,
        program: Path,
        args: Sequence[str] = (),
        timeout: float = 600.0,
        skip: bool = True,
        folder: Path | None = None,
    ) -> Report:
        """Run ``program`` (in ``folder``). ``skip``: only marked regions are modelled; without marks it must be False.

        The program's own failure is in the report's outcome; raises ``TargetError`` when the instrument itself fails.
        """
        with tempfile.TemporaryDirectory(prefix="colonnade-") as name:
            work = Path(name)
            (work / "model").write_text(self.model.text(self.cores))
            command = [*self.command(work / "model", work / "out.json", skip), str(program.resolve()), *args]
            outcome = execute(command, folder or work, timeout, None)
            try:
                written = json.loads((work / "out.json").read_text())
            except (OSError, ValueError) as error:
                if not outcome.ok:
                    written = {"threads": []}
                else:
                    reason = outcome.stderr.strip().splitlines()[-1:] or ["it wrote no report"]
                    raise TargetError(f"model:{self.model.key}: the instrument failed: {reason[0]}") from error
        return Report(self.model.key, self.model.ghz, tuple(written["threads"]), outcome)

    def profile(
        self, program: Path, args: Sequence[str] = (), timeout: float = 600.0, skip: bool = True
    ) -> dict[int, tuple[int, float]]:
        """Where the modelled cycles go: by address, (executions, cycles that the clock moved on at it); one thread.

        Raises ``TargetError`` when the program fails.
        """
        with tempfile.TemporaryDirectory(prefix="colonnade-") as name:
            work = Path(name)
            (work / "model").write_text(self.model.text(self.cores))
            command = self.command(work / "model", work / "out.json", skip)
            words = command.index("-plugin") + 1
            command[words] += f",profile={work / 'profile'}"
            outcome = execute([*command, str(program.resolve()), *args], work, timeout, None)
            if not outcome.ok:
                raise TargetError(f"model:{self.model.key}: {program.name} failed: {outcome.describe()}")
            found: dict[int, tuple[int, float]] = {}
            for line in (work / "profile").read_text().splitlines():
                address, times, cycles = line.split()
                before = found.get(int(address, 16), (0, 0.0))
                found[int(address, 16)] = before[0] + int(times), before[1] + float(cycles)
        return found

    def sensitivity(
        self, program: Path, args: Sequence[str] = (), least: float = 0.005, skip: bool = True
    ) -> list[tuple[str, float, float, float]]:
        """How the modelled cycles move when each assumed number takes the ends of its span, largest first.

        Rows: (number, cycles at the low end, at the high end, both relative to the model's own; the larger change).
        Changes below ``least`` are left out. One run of the program a number and end.
        """
        own = self.run(program, args, skip=skip).cycles
        if own <= 0:
            raise UserError(f"{program.name} has no marked region")
        rows = []
        for name, span in self.model.assumed():
            ends = []
            for value in span:
                other = Instrument(self.model.vary(name, value), self.toolchain, self.root, self.cores)
                ends.append(other.run(program, args, skip=skip).cycles / own)
            change = max(abs(e - 1) for e in ends)
            if change >= least:
                rows.append((name, ends[0], ends[1], change))
        return sorted(rows, key=lambda r: -r[3])
