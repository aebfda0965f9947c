"""Half precision in emulation: the emulator that tests of Zvfh use."""

from __future__ import annotations

import functools
from pathlib import Path

from colonnade.errors import UserError
from colonnade.targets import qemu

BESIDE = Path(__file__).resolve().parent.parent / "build-out" / "qemu10" / "usr" / "bin" / "qemu-riscv64"
MISSING = "there is no QEMU that knows Zvfh: scripts/emulator.sh fetches one"


@functools.cache
def emulator() -> str | None:
    """The path of an emulator that knows Zvfh: the one in use if it does, else what scripts/emulator.sh fetched."""
    try:
        used = qemu.program("half precision")
    except UserError:
        used = ""
    return next((path for path in (used, str(BESIDE)) if path and qemu.half(path)), None)
