"""A RISC-V machine in emulation: QEMU's user mode runs static riscv64 programs with any vector length.

What runs here is right or wrong as on a chip; how long it takes says nothing about one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from colonnade.errors import UserError
from colonnade.targets.base import Machine, Outcome
from colonnade.targets.local import execute_staged

PROGRAM = "qemu-riscv64"
VLENS = (128, 256, 512, 1024)
DEFAULT_VLEN = 256
FORM = "qemu[:vlen=128|256|512|1024][,poison]"
# rv64gcv, as /proc/cpuinfo of a board would say it
FLAGS = frozenset("imafdcv")


@dataclass(frozen=True)
class Qemu:
    """``vlen``: bits of a vector register. ``poison``: lanes that are agnostic (tails, masked-off lanes) are filled
    with ones, so that a kernel which reads them is found out."""

    vlen: int = DEFAULT_VLEN
    poison: bool = False

    @property
    def untimed(self) -> str:
        """See ``Target.untimed``."""
        return "times under QEMU say nothing about a chip"

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"qemu:vlen={self.vlen}" + (",poison" if self.poison else "")

    @classmethod
    def parse(cls, text: str) -> Qemu:
        """``qemu``, ``qemu:vlen=512``, ``qemu:vlen=128,poison``. Raises ``UserError``."""
        head, _, options = text.partition(":")
        found = re.fullmatch(r"(?:vlen=(\d+))?,?(poison)?", options)
        if head != "qemu" or found is None or text.endswith((":", ",")):
            raise UserError(f"target {text!r}: expected {FORM}")
        vlen = int(found[1] or DEFAULT_VLEN)
        if vlen not in VLENS:
            raise UserError(f"target {text!r}: vlen {vlen} is not one of {', '.join(map(str, VLENS))}")
        return cls(vlen, found[2] is not None)

    def command(self, *more: str) -> tuple[str, ...]:
        """What starts a program of the emulated machine. Raises ``UserError`` when QEMU is not there."""
        program = shutil.which(PROGRAM)
        if program is None:
            raise UserError(f"target {self.name} needs {PROGRAM}: apt-get install qemu-user")
        cpu = f"rv64,v=true,vlen={self.vlen},vext_spec=v1.0"
        if self.poison:
            cpu += ",rvv_ta_all_1s=true,rvv_ma_all_1s=true"
        return (program, "-cpu", cpu, *more)

    def probe(self) -> Machine:
        """See ``Target.probe``: an imagined machine with this host's cores and memory, and no caches to speak of."""
        self.command()
        cores = tuple(range(len(os.sched_getaffinity(0))))
        pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return Machine(
            arch="riscv64",
            cpu=f"emulated by QEMU, VLEN {self.vlen}",
            flags=FLAGS,
            cores=len(cores),
            clusters=(cores,),
            vlenb=self.vlen // 8,
            memory=os.sysconf("SC_PHYS_PAGES") * page,
            memory_free=pages * page,
        )

    def run(
        self,
        program: Path,
        args: Sequence[str] = (),
        inputs: Mapping[str, Path | bytes] | None = None,
        outputs: Sequence[str] = (),
        timeout: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """See ``Target.run``."""
        return execute_staged(self.command(str(program.resolve()), *args), inputs, outputs, timeout, on_line)
