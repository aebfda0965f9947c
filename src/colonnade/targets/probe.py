"""Reading a Linux machine: /proc and /sys as text → Machine. The texts may come from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from colonnade.layout import VECTOR_LANES
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
    isa = info.get("isa", "") if arch == "riscv64" else ""
    if arch == "riscv64":
        flags = riscv_flags(isa)
        cpu = " ".join(v for v in (info.get("uarch", ""), info.get("marchid", "")) if v)
        if not isa:  # user-mode emulators show their host's file
            cpu = "emulated: times are not a chip's"
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
        clusters=clusters or _by_topology(files, usable) or (usable,),
        caches=caches,
        vlenb=vlenb,
        memory=int(memory.get("MemTotal", 0)) * 1024,
        memory_free=int(memory.get("MemAvailable", 0)) * 1024,
        governor=files.get(f"/sys/devices/system/cpu/cpu{first}/cpufreq/scaling_governor", "").strip(),
        kernel=files.get("/proc/sys/kernel/osrelease", "").strip(),
        model=files.get("/proc/device-tree/model", "").strip("\0\n "),
        isa_text=isa,
        temperature=max(_temperatures(files), default=0.0),
    )


def _temperatures(files: Mapping[str, str]) -> list[float]:
    found = (text.strip() for path, text in files.items() if re.fullmatch(r"/sys/class/thermal/[^/]+/temp", path))
    # sensors that are switched off read as zero or below
    return [int(text) / 1000 for text in found if re.fullmatch(r"\d+", text) and int(text) > 0]


# ---- what agent.c tells ----

HWPROBE_V = 1 << 2  # of the extensions' value
# extensions that kernels may want, by their bit there
HWPROBE_BITS = {
    0: "fd",
    1: "c",
    2: "v",
    3: "zba",
    4: "zbb",
    5: "zbs",
    27: "zfh",
    28: "zfhmin",
    30: "zvfh",
    31: "zvfhmin",
}
LONGEST = 32 * VECTOR_LANES  # bits
E32_M1_TA_MA = 0xD0
THEAD = 0x5B7


@dataclass(frozen=True)
class Facts:
    """What the agent found. ``files``: texts by path. ``hwprobe``: values by key, empty where the kernel has no such
    call. ``vlenb``: 0 when the register cannot be read. ``vsetvli``: (vl, vtype) that the machine answers to e32, m1,
    ta, ma; None for an illegal instruction."""

    cpus: tuple[int, ...] = ()
    hwcap: int = 0
    vlenb: int = 0
    vsetvli: tuple[int, int] | None = None
    hwprobe: Mapping[int, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def facts(output: bytes) -> Facts:
    """Read what ``agent probe`` printed; lines that are not understood are passed over."""
    found = Facts()
    files: dict[str, str] = {}
    hwprobe: dict[int, int] = {}
    at = 0
    while (end := output.find(b"\n", at)) >= 0:
        name, *values = output[at:end].decode(errors="replace").split(" ")
        at = end + 1
        if name == "file" and len(values) > 1 and values[0].isdigit():
            size = int(values[0])
            files[" ".join(values[1:])] = output[at : at + size].decode(errors="replace")
            at += size
        elif name == "cpus":
            found = replace(found, cpus=tuple(map(int, values)))
        elif name == "hwcap":
            found = replace(found, hwcap=int(values[0], 16))
        elif name == "vlenb" and values[0].isdigit():
            found = replace(found, vlenb=int(values[0]))
        elif name == "vsetvli" and len(values) == 2:
            found = replace(found, vsetvli=(int(values[0]), int(values[1], 16)))
        elif name.startswith("hwprobe"):
            hwprobe[int(name.removeprefix("hwprobe"))] = int(values[0], 16)
    return replace(found, files=files, hwprobe=hwprobe)


def vector_refusal(found: Facts) -> str:
    """Why this RISC-V machine cannot run RVV 1.0, in one line; empty when it can.

    The answer to ``vsetvli`` decides: a machine of version 1.0 grants e32, m1, ta, ma and sets vl to vlenb / 4; the
    older vectors (0.7.1, XTheadVector) take the same bits for elements of 256 bits and set vill, though their kernels
    may say ``v`` in the ISA string. The kernel's hwprobe, which means version 1.0 by V, may veto.
    """
    extensions = found.hwprobe.get(4)
    said = "v" in riscv_flags(_isa(found.files)) or bool(found.hwcap >> 21 & 1)
    chip = ""
    if found.hwprobe.get(0) == THEAD:
        chip = " (a T-Head core)"
    if found.vsetvli is None:
        if said or (extensions is not None and extensions & HWPROBE_V):
            return f"the chip{chip} has vectors but the kernel does not let programs use them; enable RVV in the kernel"
        return f"no vector unit{chip}: Colonnade needs RVV 1.0, as in SpacemiT K1/K3, Canaan K230 or SiFive X280"
    vl, vtype = found.vsetvli
    if vtype != E32_M1_TA_MA or vl == 0 or vl * 4 != found.vlenb:
        return f"old vectors (version 0.7.1, XTheadVector){chip}: Colonnade needs RVV 1.0; nothing was run"
    if extensions is not None and not extensions & HWPROBE_V:
        return f"the kernel says that the vectors{chip} are not RVV 1.0; nothing was run"
    if 8 * found.vlenb > LONGEST:
        return f"vectors of {8 * found.vlenb} bits{chip}: memory is laid out for up to {LONGEST}; nothing was run"
    return ""


def machine(found: Facts, arch: str) -> Machine:
    """The machine that ``agent probe`` saw."""
    made = parse(found.files, arch, found.cpus, found.vlenb)
    if arch != "riscv64":
        return made
    extra = {chr(ord("a") + bit) for bit in range(26) if found.hwcap >> bit & 1}
    extra |= {name for bit, name in HWPROBE_BITS.items() if found.hwprobe.get(4, 0) >> bit & 1 and name != "fd"}
    flags = made.flags | extra | ({"v"} if found.vsetvli else set())
    identity = ".".join(f"{found.hwprobe[key]:x}" for key in (0, 1, 2) if key in found.hwprobe)
    cpu = " ".join(
        word for word in (made.cpu, identity if "marchid" not in found.files.get("/proc/cpuinfo", "") else "") if word
    )
    return replace(made, flags=flags, cpu=cpu or "riscv64")


def _isa(files: Mapping[str, str]) -> str:
    match = re.search(r"^isa\s*:\s*(\S+)", files.get("/proc/cpuinfo", ""), re.M)
    return match[1] if match else ""


def paths(cpu: int) -> list[str]:
    """Files worth reading about core ``cpu``; core 0's caches stand for all of them."""
    base = f"/sys/devices/system/cpu/cpu{cpu}"
    cache = [f"{base}/cache/index{i}/{name}" for i in range(5) for name in CACHE_FILES]
    return [*cache, f"{base}/topology/cluster_cpus_list", f"{base}/cpufreq/scaling_governor"]


COMMON = ("/proc/cpuinfo", "/proc/meminfo", "/proc/sys/kernel/osrelease", "/proc/device-tree/model")
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


def _by_topology(files: Mapping[str, str], usable: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Clusters as the device tree names them, for kernels that do not tell about caches."""
    clusters: list[tuple[int, ...]] = []
    for cpu in usable:
        shared = cpu_list(files.get(f"/sys/devices/system/cpu/cpu{cpu}/topology/cluster_cpus_list", ""))
        cluster = tuple(c for c in shared if c in usable)
        if cluster and cluster not in clusters:
            clusters.append(cluster)
    return tuple(clusters)


def _cluster_level(files: Mapping[str, str], usable: tuple[int, ...]) -> int:
    levels = {}
    for index in range(5):
        base = f"/sys/devices/system/cpu/cpu{usable[0]}/cache/index{index}"
        if level := files.get(f"{base}/level", "").strip():
            levels[int(level)] = len(cpu_list(files.get(f"{base}/shared_cpu_list", "")))
    return next((level for level in sorted(levels) if levels[level] > 1), max(levels, default=0))
