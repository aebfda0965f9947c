"""What a machine can do at best, measured by a small program: multiply-adds and memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError
from colonnade.kernels.isa import Isa
from colonnade.targets.base import Target

MILLISECONDS = 20  # of a look at the machine between two measurements
LIMITS_MS = 100  # of what stands beside all times
# what a run must not lose of the best that was seen; whatever ran under a larger loss was disturbed
DROP, HANDOVER_DROP = 0.08, 0.2


@dataclass(frozen=True)
class Peak:
    """``gflops``: f32, two operations a multiply-add, all threads together. ``gbps``: 10^9 bytes read from memory a
    second; 0 when it was not measured. ``pace``: 10^9 bytes a second that the slowest thread takes from its second
    cache with arithmetic on them, the median over the whole time: how the machine runs just now, and no limit.
    ``handover``: 10^9 bytes a second that threads pass on to each other; 0 for one thread."""

    gflops: float
    gbps: float = 0.0
    pace: float = 0.0
    handover: float = 0.0


def look(target: Target, isa: Isa, threads: int, toolchain: Toolchain | None = None) -> Peak:
    """What ``threads`` threads can do just now, without memory: a short measurement between two others."""
    return measure_peak(target, isa, threads, toolchain, memory=False, milliseconds=MILLISECONDS)


def highest(peaks: Iterable[Peak]) -> Peak:
    """The best of each, of the handover among those with full multiply-adds and pace alone: threads on the halves of
    one core hand on to each other what both have in their first cache, and may multiply as fast as ever."""
    seen = list(peaks)
    gflops = max(p.gflops for p in seen)
    full = [p for p in seen if p.gflops >= (1 - DROP) * gflops]
    pace = max(p.pace for p in full)
    return Peak(gflops, pace=pace, handover=max(p.handover for p in full if p.pace >= (1 - DROP) * pace))


def fallen(peaks: Iterable[Peak], best: Peak) -> list[str]:
    """What one of ``peaks`` is short of beside the best ones seen, in words."""
    seen, found = list(peaks), []
    for name, unit, drop in (
        ("gflops", "GFLOP/s", DROP),
        ("pace", "GB/s from the second cache", DROP),
        ("handover", "GB/s from thread to thread", HANDOVER_DROP),
    ):
        lowest, most = min(getattr(p, name) for p in seen), getattr(best, name)
        if lowest < (1 - drop) * most:
            found.append(f"{lowest:.{most < 10:d}f} of {most:.{most < 10:d}f} {unit}")
    return found


def measure_peak(
    target: Target,
    isa: Isa,
    threads: int = 1,
    toolchain: Toolchain | None = None,
    memory: bool = True,
    milliseconds: int | None = None,
) -> Peak:
    """Measure ``threads`` threads of ``target`` with the vectors of ``isa``, for so long each, by default as long as a
    limit asks for. Raises ``TargetError`` when it fails."""
    if milliseconds is None:  # a modelled core repeats itself, and a second of it takes minutes
        milliseconds = 1 if target.modelled else LIMITS_MS
    machine = target.probe()
    program = (toolchain or Toolchain()).compile(_sources(isa), "program", machine.arch)
    # beyond the last cache, but never more than a quarter of what is free
    largest = max((c.size for c in machine.caches), default=1 << 20)
    size = min(4 * largest, (machine.memory_free or 1 << 28) // 4) if memory else 0
    outcome = target.run(program, [str(threads), str(size), str(milliseconds)], timeout=60)
    if not outcome.ok:
        raise TargetError(f"{target.name}: the peak probe failed: {outcome.describe()}")
    found = dict(line.split() for line in outcome.stdout.splitlines())
    rates = {name: float(rate) for name, rate in found.items()}
    return Peak(rates["gflops"], rates.get("gbps", 0.0), rates["pace"], rates.get("handover", 0.0))


def _sources(isa: Isa) -> dict[str, str]:
    body = (resources.files("colonnade.targets") / "peak.c").read_text()
    header = (resources.files("colonnade.kernels") / "c" / isa.header).read_text()
    # the file's name gives it the ISA's compiler flags
    return {f"kernels_{isa.name}.c": f'#define VEC_HEADER "{isa.header}"\n{body}', isa.header: header}
