"""A RISC-V machine in emulation: QEMU's user mode runs static riscv64 programs with any vector length.

What runs here is right or wrong as on a chip; how long it takes says nothing about one.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from colonnade.errors import UserError
from colonnade.targets.base import Machine, Outcome
from colonnade.targets.local import execute_staged

PROGRAM = "qemu-riscv64"
VARIABLE = "COLONNADE_QEMU"  # names another one, by path or by a name on PATH
VLENS = (128, 256, 512, 1024)
DEFAULT_VLEN = 256
FORM = "qemu[:vlen=128|256|512|1024][,poison]"
# rv64gcv, as /proc/cpuinfo of a board would say it
FLAGS = frozenset("imafdcv")
HALF = ("zfh", "zvfh")  # what a newer emulator has besides
NO_HALF = f" (no emulator here knows it: {VARIABLE} may name a newer one)"
ENDS = 57  # the exit code by which a program shows that it ran


def program(needed_by: str) -> str:
    """The emulator's path. Raises ``UserError`` when it is not there; its message begins with who needs it."""
    named = os.environ.get(VARIABLE)
    path = shutil.which(named or PROGRAM)
    if path is None:
        remedy = f"{VARIABLE}={named} is no program that can be executed" if named else "apt-get install qemu-user"
        raise UserError(f"{needed_by} needs {PROGRAM}: {remedy}")
    return str(Path(path).absolute())


@cache
def half(path: str) -> bool:
    """Does the emulator at ``path`` know half precision (Zvfh)? It must run a program with it."""
    code = struct.pack("<3I", 0x00000513 | ENDS << 20, 0x05D00893, 0x00000073)  # exit(ENDS)
    base, headers = 0x10000, 64 + 56
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf = ident + struct.pack("<2HI3QI6H", 2, 243, 1, base + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = headers + len(code)
    elf += struct.pack("<2I6Q", 1, 5, 0, base, base, size, size, 0x1000) + code
    with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
        (Path(folder) / "exit").write_bytes(elf)
        (Path(folder) / "exit").chmod(0o755)
        command = [path, "-cpu", _cpu(DEFAULT_VLEN, True), str(Path(folder) / "exit")]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == ENDS


def knows_half() -> bool:
    """Is there an emulator, and does it know half precision?"""
    try:
        return half(program("half precision"))
    except UserError:
        return False


def cpu(path: str, vlen: int) -> str:
    """The machine with all that the emulator at ``path`` knows, as its ``-cpu`` takes it."""
    return _cpu(vlen, half(path))


def _cpu(vlen: int, whole: bool) -> str:
    return f"rv64,v=true,vlen={vlen},vext_spec=v1.0" + "".join(f",{name}=true" for name in HALF if whole)


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
    def modelled(self) -> str:
        """See ``Target.modelled``."""
        return ""

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
        path = program(f"target {self.name}")
        poison = ",rvv_ta_all_1s=true,rvv_ma_all_1s=true" if self.poison else ""
        return (path, "-cpu", cpu(path, self.vlen) + poison, *more)

    def probe(self) -> Machine:
        """See ``Target.probe``: an imagined machine with this host's cores and memory, and no caches to speak of."""
        more = HALF if half(program(f"target {self.name}")) else ()
        cores = tuple(range(len(os.sched_getaffinity(0))))
        pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return Machine(
            arch="riscv64",
            cpu=f"emulated by QEMU, VLEN {self.vlen}" + (", half precision" if more else ""),
            flags=FLAGS.union(more),
            cores=len(cores),
            clusters=(cores,),
            vlenb=self.vlen // 8,
            memory=os.sysconf("SC_PHYS_PAGES") * page,
            memory_free=pages * page,
            no_half="" if more else NO_HALF,
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
