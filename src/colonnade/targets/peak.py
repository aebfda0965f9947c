"""What a machine can do at best, measured by a small program: multiply-adds and memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError
from colonnade.kernels.isa import Isa
from colonnade.targets.base import Target


@dataclass(frozen=True)
class Peak:
    """``gflops``: f32, two operations a multiply-add, all threads together. ``gbps``: 10^9 bytes read from memory a
    second; 0 when it was not measured. ``pace``: 10^9 bytes a second that the slowest thread takes from its second
    cache with arithmetic on them, the median over the whole time: how the machine runs just now, and no limit."""

    gflops: float
    gbps: float = 0.0
    pace: float = 0.0


def measure_peak(
    target: Target,
    isa: Isa,
    threads: int = 1,
    toolchain: Toolchain | None = None,
    memory: bool = True,
    milliseconds: int = 100,
) -> Peak:
    """Measure ``threads`` threads of ``target`` with the vectors of ``isa``. Raises ``TargetError`` when it fails."""
    machine = target.probe()
    program = (toolchain or Toolchain()).compile(_sources(isa), "program", machine.arch)
    # beyond the last cache, but never more than a quarter of what is free
    largest = max((c.size for c in machine.caches), default=1 << 20)
    size = min(4 * largest, (machine.memory_free or 1 << 28) // 4) if memory else 0
    outcome = target.run(program, [str(threads), str(size), str(milliseconds)], timeout=60)
    if not outcome.ok:
        raise TargetError(f"{target.name}: the peak probe failed: {outcome.describe()}")
    found = dict(line.split() for line in outcome.stdout.splitlines())
    return Peak(float(found["gflops"]), float(found.get("gbps", 0.0)), float(found["pace"]))


def _sources(isa: Isa) -> dict[str, str]:
    body = (resources.files("colonnade.targets") / "peak.c").read_text()
    header = (resources.files("colonnade.kernels") / "c" / isa.header).read_text()
    # the file's name gives it the ISA's compiler flags
    return {f"kernels_{isa.name}.c": f'#define VEC_HEADER "{isa.header}"\n{body}', isa.header: header}
