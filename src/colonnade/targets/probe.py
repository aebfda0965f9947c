"""Reading a Linux machine: /proc and /sys as text → Machine. The texts may come from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping

from colonnade.targets.base import Cache, Machine

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cpu_list(text: str) -> tuple[int, ...]:
    """``0-3,8`` → (0, 1, 2, 3, 8)."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def size_bytes(text: str) -> int:
    """``32K`` → 32768."""
    text = text.strip()
    return int(text[:-1]) * UNITS[text[-1]] if text and text[-1] in UNITS else int(text or 0)


def riscv_flags(isa: str) -> frozenset[str]:
    """``rv64imafdcv_zicbom_zvfh`` → single letters and the extensions after underscores."""
    head, *rest = isa.strip().lower().split("_")
    return frozenset([*head.removeprefix("rv64").removeprefix("rv32"), *rest])


def parse(files: Mapping[str, str], arch: str, usable: tuple[int, ...], vlenb: int = 0) -> Machine:
    """A machine from the texts of its files by path; missing files leave their fields at the defaults.

    ``usable``: numbers of the cores this program may run on.
    """
    info: dict[str, str] = {}
    for line in files.get("/proc/cpuinfo", "").splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    if arch == "riscv64":
        flags = riscv_flags(info.get("isa", ""))
        cpu = " ".join(v for v in (info.get("uarch", ""), info.get("marchid", "")) if v)
    else:
        flags = frozenset(info.get("flags", info.get("Features", "")).split())
        # virtual machines shorten the name, so family and model stand beside it
        cpu = f"{info.get('model name', 'unknown')} {info.get('cpu family', '')}.{info.get('model', '')}"
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", files.get("/proc/meminfo", ""), re.M))
    caches, clusters = _caches(files, usable)
    first = usable[0] if usable else 0
    return Machine(
        arch=arch,
        cpu=cpu,
        flags=flags,
        cores=len(usable),
        clusters=clusters or (usable,),
        caches=caches,
        vlenb=vlenb,
        memory=int(memory.get("MemTotal", 0)) * 1024,
        memory_free=int(memory.get("MemAvailable", 0)) * 1024,
        governor=files.get(f"/sys/devices/system/cpu/cpu{first}/cpufreq/scaling_governor", "").strip(),
        kernel=files.get("/proc/sys/kernel/osrelease", "").strip(),
    )


def paths(cpu: int) -> list[str]:
    """Files worth reading about core ``cpu``; core 0's caches stand for all of them."""
    base = f"/sys/devices/system/cpu/cpu{cpu}"
    cache = [f"{base}/cache/index{i}/{name}" for i in range(5) for name in CACHE_FILES]
    return [*cache, f"{base}/cpufreq/scaling_governor"]


COMMON = ("/proc/cpuinfo", "/proc/meminfo", "/proc/sys/kernel/osrelease")
CACHE_FILES = ("level", "type", "size", "coherency_line_size", "shared_cpu_list")


def _caches(files: Mapping[str, str], usable: tuple[int, ...]) -> tuple[tuple[Cache, ...], tuple[tuple[int, ...], ...]]:
    caches: list[Cache] = []
    clusters: list[tuple[int, ...]] = []
    for cpu in usable:
        for index in range(5):
            at = {n: files.get(f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{n}", "") for n in CACHE_FILES}
            if not at["level"] or not at["size"]:
                continue
            shared = cpu_list(at["shared_cpu_list"])
            if cpu == usable[0]:
                level, line = int(at["level"]), int(at["coherency_line_size"] or 64)
                kind = at["type"].strip().lower() or "unified"
                caches.append(Cache(level, kind, size_bytes(at["size"]), line, max(len(shared), 1)))
            # a cluster is what shares an L2; where each core has its own, the last level says who belongs together
            if int(at["level"]) == _cluster_level(files, usable):
                cluster = tuple(c for c in shared if c in usable)
                if cluster and cluster not in clusters:
                    clusters.append(cluster)
    return tuple(caches), tuple(clusters)


def _cluster_level(files: Mapping[str, str], usable: tuple[int, ...]) -> int:
    levels = {}
    for index in range(5):
        base = f"/sys/devices/system/cpu/cpu{usable[0]}/cache/index{index}"
        if level := files.get(f"{base}/level", "").strip():
            levels[int(level)] = len(cpu_list(files.get(f"{base}/shared_cpu_list", "")))
    return next((level for level in sorted(levels) if levels[level] > 1), max(levels, default=0))
