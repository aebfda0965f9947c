"""How contenders are timed: short blocks in turns, the machine's peak around each, disturbed blocks thrown away.

On a shared machine a single long measurement says more about the neighbours than about the program. Blocks in turns
meet the same weather; a block during which the peak fell, other programs ran, or the hypervisor took the
processor away is taken again, and the number of those is part of the result.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

from colonnade.targets.peak import Peak, fallen, highest

BLOCKS = 6
RETRIES = 2  # times BLOCKS a contender may take disturbed blocks again
BLOCK_S = 0.6
PAUSE_S = 0.02
FOREIGN = 0.15  # processor time of other programs, as a share of one core
STEAL = 0.03


class Runner(Protocol):
    """What is timed."""

    def block(self, warmup: int, repeat: int) -> list[int]:
        """ns of ``repeat`` inferences after ``warmup`` others."""
        ...


@dataclass(frozen=True)
class Contender:
    """A runner with what there is to say about it. ``pid``: its process, where that outlives a block."""

    name: str
    runner: Runner
    version: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pid: int | None = None


@dataclass(frozen=True)
class Block:
    """``ns`` of every repetition; the machine's peak and pace around it; ``disturbance`` says what disturbed it, or is
    empty."""

    ns: tuple[int, ...]
    before: Peak
    after: Peak
    foreign: float
    steal: float
    disturbance: str = ""


@dataclass
class Result:
    """All blocks of one contender, in the order in which they were taken."""

    contender: Contender
    blocks: list[Block] = field(default_factory=list)

    @property
    def clean(self) -> list[Block]:
        """The blocks that count."""
        return [b for b in self.blocks if not b.disturbance]

    @property
    def counted(self) -> list[Block]:
        """The clean ones, or all when none is clean (``disturbed`` says so)."""
        return self.clean or self.blocks

    @property
    def disturbed(self) -> bool:
        """Was no block clean, so that the figures stand on disturbed ones?"""
        return not self.clean

    @property
    def ns(self) -> list[int]:
        """Repetitions that count."""
        return [n for b in self.counted for n in b.ns]

    def summary(self) -> dict[str, float]:
        """ms: median, min, and quartiles."""
        ms = sorted(n / 1e6 for n in self.ns)
        low, _, high = quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
        return {"median": median(ms), "min": ms[0], "q1": low, "q3": high}


class Load:
    """Processor time of others, from /proc/stat: all that was busy less this process, its ended children, ``pid``."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid, self._tick = pid, os.sysconf("SC_CLK_TCK")
        self._start = self._read()

    def _read(self) -> tuple[float, float, float, float]:
        values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = values
        own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        if self._pid is not None:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            own += (int(fields[11]) + int(fields[12])) / self._tick
        return time.monotonic(), (user + nice + system + irq + softirq) / self._tick, own, steal / self._tick

    def shares(self) -> tuple[float, float]:
        """(foreign, stolen) processor time since the start, in shares of one core."""
        now = self._read()
        wall, busy, own, steal = (after - before for after, before in zip(now, self._start, strict=True))
        return max(busy - own, 0.0) / max(wall, 1e-9), steal / max(wall, 1e-9)


def alternate(
    contenders: Sequence[Contender],
    peak: Callable[[], Peak],
    blocks: int = BLOCKS,
    block_s: float = BLOCK_S,
    local: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> list[Result]:
    """Time ``contenders`` in turns until each has ``blocks`` clean blocks, or has spent its retries.

    ``peak`` measures the machine now. ``local``: are they on this machine, where foreign load shows?
    """
    results = [Result(c) for c in contenders]
    repeats = [max(3, int(block_s * 1e9 / max(median(c.runner.block(1, 3)), 1))) for c in contenders]
    best = peak()
    for _ in range(blocks * (1 + RETRIES)):
        todo = [i for i, r in enumerate(results) if len(r.clean) < blocks]
        if not todo:
            break
        for i in todo:
            contender = contenders[i]
            if progress is not None:
                progress(min(len(r.clean) for r in results) / blocks, contender.name)
            before = peak()
            load = Load(contender.pid) if local else None
            ns = contender.runner.block(max(2, repeats[i] // 10), repeats[i])
            foreign, steal = load.shares() if load is not None else (0.0, 0.0)
            time.sleep(PAUSE_S)
            after = peak()
            best = highest((best, before, after))
            results[i].blocks.append(Block(tuple(ns), before, after, foreign, steal))
        # judged by the best peak of the whole run, so early blocks are looked at again
        for result in results:
            result.blocks = [_judged(b, best) for b in result.blocks]
    return results


def _judged(block: Block, best: Peak) -> Block:
    why = fallen((block.before, block.after), best)
    if block.foreign > FOREIGN:
        why.append(f"other programs took {block.foreign:.0%} of a core")
    if block.steal > STEAL:
        why.append(f"the hypervisor took {block.steal:.0%} of a core")
    return replace(block, disturbance=", ".join(why))
