"""A riscv64 core nobody has at hand: programs run under QEMU, and their own clock tells the modelled time of one core.

``model:x60`` (or any name or file of ``colonnade.machine``). What a program measures with ``clock_gettime`` is
**modelled**, never measured; the tuner ranks by it as it would by a board's times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from colonnade.machine.instrument import Instrument
from colonnade.machine.model import Model, names, read
from colonnade.targets import qemu
from colonnade.targets.base import Cache, Machine, Outcome
from colonnade.targets.local import execute_staged

SLOWER = 100  # a program under the instrument takes about this much longer; its own alarms wait as much


@dataclass(frozen=True)
class Modelled:
    """``key``: a machine model's name, or the path of its file."""

    key: str

    @cached_property
    def model(self) -> Model:
        """Its numbers. Raises ``UserError`` for an unknown or broken model."""
        return read(self.key)

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"model:{self.key}"

    @property
    def untimed(self) -> str:
        """See ``Target.untimed``: its times may rank candidates."""
        return ""

    @property
    def modelled(self) -> str:
        """See ``Target.modelled``."""
        return f"modelled on {self.model.name}"

    @classmethod
    def parse(cls, text: str) -> Modelled:
        """``model:x60``. Raises ``UserError``."""
        target = cls(text.removeprefix("model:"))
        _ = target.model
        return target

    def probe(self) -> Machine:
        """See ``Target.probe``: the modelled core, alone."""
        m = self.model
        known = m.extensions if qemu.knows_half() else m.extensions.difference(qemu.HALF)
        return Machine(
            arch="riscv64",
            cpu=f"{m.name}, modelled",
            flags=qemu.FLAGS | known,
            cores=1,
            clusters=((0,),),
            caches=tuple(
                Cache(level, "data" if level == 1 else "unified", int(m[f"l{level}.size"]), int(m[f"l{level}.line"]))
                for level in (1, 2)
            ),
            vlenb=m.vlen // 8,
            memory=1 << 32,
            memory_free=1 << 31,
            no_half="" if known == m.extensions else qemu.NO_HALF,
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
        instrument = Instrument(self.model)
        with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
            numbers = Path(folder) / "model"
            numbers.write_text(self.model.text())
            command = instrument.command(numbers, Path(folder) / "report.json", skip=False)
            return execute_staged([*command, str(program.resolve()), *args], inputs, outputs, timeout * SLOWER, on_line)


def known() -> str:
    """The models' names, for messages."""
    return ", ".join(f"model:{name}" for name in names())
