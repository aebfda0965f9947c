"""Every convolution of ResNet-50 on a RISC-V core nobody has at hand: XNNPACK dense beside ours dense and pruned.

    python bench/riscv.py [--model x60] [--sparsity 0,0.5,0.75,0.875] [--layers 3x3,1x1] [--candidates 3] [--json FILE]
                           [--sensitivity]

All figures are **modelled** (docs/machine-models.md): the programs run under an instrumented QEMU. XNNPACK is Debian
trixie's riscv64 package, fetched by apt with folders of its own into the cache and run from there; nothing of it is
kept in this repository. Ours are the best of a few candidates of the static ranking, each checked against numpy first.
`bound` is what the vector units alone need for the arithmetic that was executed; the rest are stalls.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs

from colonnade.build.toolchain import Toolchain
from colonnade.kernels import registry
from colonnade.kernels.isa import isa
from colonnade.layout import Layout, Panels, Planes, place, round_up
from colonnade.machine import Instrument, Model, read
from colonnade.pattern import ColumnPattern
from colonnade.plan import Step
from colonnade.targets.model import Modelled
from colonnade.tune.job import Run, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.workload import RELU, Conv2d, Epilogue, unmatrix

SUITE = "trixie"
PACKAGES = ("libxnnpack0.20241108", "libxnnpack-dev", "libpthreadpool0", "libpthreadpool-dev", "libc6", "libgcc-s1")
STRIP = 2  # vector registers of a panel's strip


@dataclass(frozen=True)
class Layer:
    """``count`` convolutions of one shape; square maps and kernels, padding kernel // 2."""

    count: int
    ic: int
    oc: int
    size: int
    kernel: int = 1
    stride: int = 1
    source: str = "planes"  # how its input and its output stand in memory
    target: str = "planes"

    @property
    def name(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.ic}→{self.oc} @{self.size}" + (" /2" if self.stride == 2 else "")

    @property
    def macs(self) -> int:
        return self.oc * self.ic * self.kernel**2 * (self.size // self.stride) ** 2


def resnet50() -> Iterator[Layer]:
    """Its 53 convolutions by shape (stride 2 in the 3x3, as torchvision has it). Between 3x3 and 1x1, and between 1x1,
    stand panels; what a 3x3 or a strided convolution reads, in planes."""
    yield Layer(1, 3, 64, 224, 7, 2)
    width, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        mid, out = 64 << stage, 256 << stage
        before = size if stage == 0 else size * 2
        stride = 1 if stage == 0 else 2
        yield Layer(1, width, mid, before)
        yield Layer(1, mid, mid, before, 3, stride, target="panels")
        yield Layer(1, width, out, before, 1, stride, target="panels")
        yield Layer(blocks - 1, mid, out, size, source="panels", target="panels")
        yield Layer(1, mid, out, size, source="panels", target="planes")  # the next stage strides over it
        yield Layer(blocks - 1, out, mid, size, source="panels")
        yield Layer(blocks - 1, mid, mid, size, 3, target="panels")
        width, size = out, size // 2


def step(layer: Layer, sparsity: float, seed: int = 0) -> Step:
    """The layer on placed planes, its halo beside them; ``sparsity`` of whole columns in tiles of 8 rows gone."""
    pad, s, k = layer.kernel // 2, layer.stride, layer.kernel
    conv = Conv2d(
        1,
        layer.ic,
        layer.oc,
        layer.size,
        layer.size,
        (k, k),
        (s, s),
        (pad, pad, pad, pad),
        epilogue=Epilogue(False, RELU),
    )
    out = conv.out_height
    edge = -(-pad // s)
    pitch = -(-layer.size // s) + max(edge, 1)  # one pitch for all maps of a resolution: where 1x1 and 3x3 meet
    used = {((i - pad) % s, (j - pad) % s) for i in range(k) for j in range(k)}
    kept = None if s == 1 else tuple(sorted(used))
    source = Planes(1, layer.size, layer.size, pitch, pitch, edge * pitch + edge, (s, s), kept)
    target = Planes(1, out, out, pitch, pitch, lead=pitch + 1)
    read: Layout = Panels(replace(source, lead=0), STRIP) if layer.source == "panels" else source
    written: Layout = Panels(replace(target, lead=0), STRIP) if layer.target == "panels" else target
    x = place("x", (1, layer.ic, layer.size, layer.size), read, 0)
    y = place("y", (1, layer.oc, out, out), written, round_up(read.buffer_bytes(layer.ic), 64))
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((layer.oc, conv.k), dtype=np.float32) / np.sqrt(conv.k, dtype=np.float32)
    if sparsity:
        pattern = ColumnPattern(sparsity, tile=8)
        for start in range(0, layer.oc, 8):
            rows[start : start + 8, rng.permutation(conv.k)[pattern.kept(conv.k) :]] = 0
    constants = {"weight": unmatrix(rows, (layer.oc, layer.ic, k, k)), "bias": np.zeros(layer.oc, np.float32)}
    return Step(layer.name, conv, (x,), y, constants)


def ours(model: Model, layer: Layer, sparsity: float, tried: int) -> tuple[float, str]:
    """Modelled cycles of the best of ``tried`` candidates, and its key."""
    target = Modelled(model.key)
    rvv = isa("rvv")
    made = step(layer, sparsity)
    candidates = registry.candidates(made, rvv, 1)[:tried]
    found: list[tuple[float, str]] = []

    def record(index: int, result: Measurement) -> None:
        if result.outcome != "ok":
            print(f"{layer.name}: {candidates[index].key()}: {result.outcome} {result.detail}", file=sys.stderr)
        elif result.reps:
            found.append((min(result.reps) * model.ghz, candidates[index].key()))

    # the limit is in seconds of the emulation, the repetition in modelled time
    runs = [Run(i, check=True, least=1, most=1, budget_ns=1, limit_s=3000) for i in range(len(candidates))]
    Harness(target, rvv, 1).run(problem(made), candidates, runs, record)
    if not found:
        raise SystemExit(f"{layer.name}: no candidate gave a right result")
    return min(found)


def fetch(folder: Path) -> Path:
    """The root with XNNPACK's packages for riscv64, fetched when it is not there yet."""
    root = folder / "root"
    if (root / "lib").exists():
        return root
    sources = "".join(p.read_text() for p in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")))
    sources += Path("/etc/apt/sources.list").read_text() if Path("/etc/apt/sources.list").exists() else ""
    mirror = re.search(r"(?:URIs:\s*|^deb\s+(?:\[[^]]*\]\s+)?)(\S+/debian)/?\s", sources, re.M)
    if mirror is None:
        raise SystemExit("no Debian mirror in apt's sources: XNNPACK cannot be fetched here")
    for name in ("lists/partial", "cache/archives/partial", "root", "packages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [arch=riscv64 signed-by={keys}] {mirror[1]} {SUITE} main\n")
    options = {
        "Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "/dev/null", "Dir::State": folder,
        "Dir::State::Lists": folder / "lists", "Dir::State::status": folder / "status", "Dir::Cache": folder / "cache",
        "APT::Architecture": "riscv64", "APT::Architectures": "riscv64", "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }  # fmt: skip
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    try:
        subprocess.run([*apt, "update"], check=True, capture_output=True)
        subprocess.run([*apt, "download", *PACKAGES], check=True, capture_output=True, cwd=folder / "packages")
        for package in sorted((folder / "packages").glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"XNNPACK's riscv64 packages cannot be fetched: {error}") from error
    (root / "lib").symlink_to("usr/lib")  # last: a fetch that broke off is begun again
    return root


def xnnpack(root: Path, folder: Path) -> Path:
    """The program that runs one convolution by XNNPACK."""
    source = Path(__file__).with_name("xnnpack_conv.c")
    program = folder / "xnnpack_conv"
    subprocess.run(
        [*Toolchain().command, "-target", "riscv64-linux-gnu.2.38", "-O2", str(source), "-I", str(root / "usr/include"),
         "-L", str(root / "usr/lib/riscv64-linux-gnu"), "-lXNNPACK", "-lpthreadpool", "-Wl,--allow-shlib-undefined",
         "-o", str(program)], check=True,
    )  # fmt: skip
    return program


@dataclass
class Row:
    """Modelled cycles of one layer. ``bound``: XNNPACK's vector units alone; ``stalls``: the rest of its time."""

    layer: str
    count: int
    macs: int
    xnnpack: float
    bound: float
    stalls: float
    read_bytes: int
    ours: dict[str, float]
    chosen: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="x60")
    parser.add_argument("--sparsity", default="0,0.5,0.75,0.875")
    parser.add_argument("--layers", default="", help="only layers whose name contains one of these, comma-separated")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="what the assumed numbers do to XNNPACK's figures")
    options = parser.parse_args()
    model = read(options.model)
    levels = [float(x) for x in options.sparsity.split(",")]
    folder = Path(platformdirs.user_cache_dir("colonnade")) / "xnnpack-riscv64"
    root = fetch(folder)
    rows = []
    print(f"modelled on {model.name} ({model.chip}, VLEN {model.vlen}, {model.ghz:g} GHz), Mcycles, one core")
    head = "".join(f"{f'{100 * s:g} %':>9}" for s in levels)
    print(f"{'layer':26}{'×':>3}{'XNNPACK':>9}{'bound':>9}{head}")
    with tempfile.TemporaryDirectory() as work:
        program = xnnpack(root, Path(work))
        merged: dict[Layer, int] = {}
        for layer in resnet50():
            shape = Layer(1, layer.ic, layer.oc, layer.size, layer.kernel, layer.stride)
            merged[shape] = merged.get(shape, 0) + layer.count
        for layer, count in merged.items():
            if options.layers and not any(part in layer.name for part in options.layers.split(",")):
                continue
            words = [layer.ic, layer.oc, layer.size, layer.kernel, layer.stride, layer.kernel // 2, 1]
            report = Instrument(model, root=root).run(program, [str(w) for w in words], timeout=3600)
            if not report.outcome.ok:
                raise SystemExit(f"XNNPACK: {layer.name}: {report.outcome.describe()}")
            row = Row(layer.name, count, layer.macs, report.cycles, report.bound(model), report.cycles
                      - report.bound(model), report.memory()["read_bytes"], {}, {})  # fmt: skip
            for level in levels:
                sparsity = 0.0 if layer.kernel == 7 else level  # the stem stays dense
                row.ours[f"{level:g}"], row.chosen[f"{level:g}"] = ours(model, layer, sparsity, options.candidates)
            rows.append(row)
            if options.sensitivity:
                for name, low, high, _ in Instrument(model, root=root).sensitivity(program, [str(w) for w in words]):
                    span = dict(model.assumed())[name]
                    print(f"    {name} (assumed) {span[0]:g}…{span[1]:g}: XNNPACK ×{low:.2f}…{high:.2f}", flush=True)
            cells = "".join(f"{row.ours[f'{s:g}'] / 1e6:9.2f}" for s in levels)
            print(f"{layer.name:26}{count:3}{row.xnnpack / 1e6:9.2f}{row.bound / 1e6:9.2f}{cells}", flush=True)
    total = sum(r.xnnpack * r.count for r in rows)
    bound = sum(r.bound * r.count for r in rows)
    sums = {f"{s:g}": sum(r.ours[f"{s:g}"] * r.count for r in rows) for s in levels}
    cells = "".join(f"{sums[f'{s:g}'] / 1e6:9.1f}" for s in levels)
    print(f"{'sum':26}{'':3}{total / 1e6:9.1f}{bound / 1e6:9.1f}{cells}")
    for label, peer in (("× XNNPACK, modelled", total), ("× XNNPACK at its vector limit", bound)):
        print(f"{label:38}{'':9}" + "".join(f"{peer / sums[f'{s:g}']:9.2f}" for s in levels))
    print(f"XNNPACK's stalls: {100 * (1 - bound / total):.0f} % of its modelled time")
    if options.json:
        options.json.write_text(json.dumps({"model": model.key, "modelled": True, "rows": [asdict(r) for r in rows]}))


if __name__ == "__main__":
    main()
