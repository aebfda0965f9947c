"""Every convolution of ResNet-50 on a RISC-V core nobody has at hand: XNNPACK dense beside ours dense and pruned.

    python bench/riscv.py [--model x60] [--sparsity 0,0.5,0.75,0.875] [--tile 8] [--layers 3x3,1x1] [--candidates 3]
                           [--dtype f16] [--cores 4] [--jobs 2] [--json FILE] [--stalls] [--sensitivity]

All figures are **modelled** (docs/machine-models.md): the programs run under an instrumented QEMU. XNNPACK is Debian
trixie's riscv64 package, fetched by scripts/trixie.sh into the cache and run from there; nothing of it is kept in this
repository. Ours are the best of a few candidates of the static ranking, each checked against numpy first.
`bound` is what the vector units alone need for the arithmetic that was executed; the rest are stalls. Results stay in
the cache, so that after a change only what it touches is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path

import numpy as np
import platformdirs
from feeding import weights

from colonnade.build.toolchain import Toolchain
from colonnade.errors import run_script
from colonnade.frontend import panels
from colonnade.kernels import registry, render
from colonnade.kernels.call import Call, Const
from colonnade.kernels.isa import isa
from colonnade.layout import Layout, Panels, Planes, place, round_up
from colonnade.machine import Instrument, Model, read
from colonnade.pattern import ColumnPattern
from colonnade.plan import Step
from colonnade.targets.model import Modelled as Target
from colonnade.tune.job import Problem, Run, encode, problem
from colonnade.tune.measure import Harness
from colonnade.workload import RELU, Conv2d, Convert, ConvPool, Epilogue, Pool2d, WinogradConv2d
from colonnade.workload.winograd import SIZES

TRIXIE = Path(__file__).resolve().parent.parent / "scripts" / "trixie.sh"  # fetches packages
PACKAGES = ("libxnnpack0.20241108", "libxnnpack-dev", "libpthreadpool0", "libpthreadpool-dev", "libc6", "libgcc-s1")


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
    """Its 53 convolutions by shape (stride 2 in the 3x3, as torchvision has it). What a 1x1 reads stands in panels, at
    stride 2 as well; what a 3x3 reads, in planes, in phases at stride 2 (the step that copies it there: ``copies``)."""
    yield Layer(1, 3, 64, 224, 7, 2)
    width, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        mid, out = 64 << stage, 256 << stage
        before = size if stage == 0 else size * 2
        stride = 1 if stage == 0 else 2
        first = "panels" if stage else "planes"  # the stem's pool writes planes
        yield Layer(1, width, mid, before, source=first)
        yield Layer(1, mid, mid, before, 3, stride, target="panels")
        yield Layer(1, width, out, before, 1, stride, source=first, target="panels")
        yield Layer(blocks if stage < 3 else blocks - 1, mid, out, size, source="panels", target="panels")
        if stage == 3:
            yield Layer(1, mid, out, size, source="panels", target="planes")  # for the pool behind
        yield Layer(blocks - 1, out, mid, size, source="panels")
        yield Layer(blocks - 1, mid, mid, size, 3, target="panels")
        width, size = out, size // 2


def stem(conv: Conv2d, rng: np.random.Generator, itemsize: int) -> Step:
    """The first layer, which our kernel computes together with the max pool behind it: that is counted with ours. What
    it reads is float32 whatever ``itemsize`` is."""
    pool = Pool2d("max", 1, conv.out_channels, conv.out_height, conv.out_width, (3, 3), (2, 2), (1, 1, 1, 1))
    pitch = pool.out_width + 1
    source = Planes(1, conv.height, conv.width, conv.width, conv.height)
    target = Planes(1, pool.out_height, pool.out_width, pitch, pitch, lead=pitch + 1, itemsize=itemsize)
    x = place("x", (1, conv.in_channels, conv.height, conv.width), source, 0)
    at = round_up(source.buffer_bytes(conv.in_channels), 64)
    y = place("y", (1, conv.out_channels, pool.out_height, pool.out_width), target, at)
    weight = rng.standard_normal((conv.out_channels, conv.in_channels, *conv.kernel), np.float32) / np.sqrt(conv.k)
    constants = {"weight": weight.astype(np.float32), "bias": np.zeros(conv.out_channels, np.float32)}
    return Step("stem", ConvPool(conv, pool), (x,), y, constants)


def step(layer: Layer, sparsity: float, tile: int = 8, seed: int = 0, winograd: str = "", itemsize: int = 4) -> Step:
    """The layer on placed planes, its halo beside them, or panels as wide as the frontend has them for such tiles;
    ``sparsity`` of whole columns in tiles of ``tile`` rows gone, behind a transform if one is named."""
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
    if winograd:
        conv = WinogradConv2d(**{part.name: getattr(conv, part.name) for part in fields(conv)}, m=SIZES[winograd])
    if layer.kernel == 7:
        return stem(conv, np.random.default_rng(seed), itemsize)
    out = conv.out_height
    edge = -(-pad // s)
    pitch = -(-layer.size // s) + max(edge, 1)  # one pitch for all maps of a resolution: where 1x1 and 3x3 meet
    used = {((i - pad) % s, (j - pad) % s) for i in range(k) for j in range(k)}
    kept = None if s == 1 else tuple(sorted(used))
    source = Planes(1, layer.size, layer.size, pitch, pitch, edge * pitch + edge, (s, s), kept, itemsize)
    target = Planes(1, out, out, pitch, pitch, lead=pitch + 1, itemsize=itemsize)
    stored = Planes(1, layer.size, layer.size, layer.size + 1, layer.size + 1, itemsize=itemsize)
    strip = panels.WIDE if tile <= panels.FEW else panels.VECTORS
    read: Layout = Panels(stored, strip) if layer.source == "panels" else source
    written: Layout = Panels(replace(target, lead=0), strip) if layer.target == "panels" else target
    x = place("x", (1, layer.ic, layer.size, layer.size), read, 0)
    y = place("y", (1, layer.oc, out, out), written, round_up(read.buffer_bytes(layer.ic), 64))
    constants = {"weight": weights(conv, sparsity, tile, seed), "bias": np.zeros(layer.oc, np.float32)}
    return Step(layer.name, conv, (x,), y, constants)


@dataclass(frozen=True)
class Modelled:
    """What a model says of one layer, of all cores: ``cycles`` of the slowest, ``bound``: what the vector units alone
    need; bytes from and to memory. ``chosen``: the candidate; ``waited``: cycles lost of all cores, by reason."""

    cycles: float
    bound: float
    read_bytes: int
    written_bytes: int
    chosen: str = ""
    waited: dict[str, float] = field(default_factory=dict)


def kept(key: str, parts: Iterable[str], make: Callable[[], Modelled]) -> Modelled:
    """The result of ``make`` for these inputs, from the cache where they were met before."""
    digest = hashlib.sha256("\0".join([key, *parts]).encode()).hexdigest()
    path = Path(platformdirs.user_cache_dir("colonnade")) / "riscv" / f"{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        aside.write_text(json.dumps(asdict(make())))
        aside.rename(path)
    return Modelled(**json.loads(path.read_text()))


def instrument() -> list[str]:
    """What all modelled figures depend on besides the model's numbers."""
    folder = resources.files("colonnade.machine") / "c"
    return [f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith((".c", ".h"))]


def copies(itemsize: int) -> list[Step]:
    """What writes the inputs of ResNet-50's 3x3 convolutions at stride 2 once more, in phases."""
    made = []
    for channels, size in ((128, 56), (256, 28), (512, 14)):
        pitch, shape = size // 2 + 1, (1, channels, size, size)
        plain = Planes(1, size, size, size + 1, size + 1, itemsize=itemsize)
        x = place("x", shape, plain, 0)
        target = Planes(1, size, size, pitch, pitch, pitch + 1, (2, 2), itemsize=itemsize)
        y = place("y", shape, target, round_up(plain.buffer_bytes(channels), 64))
        made.append(Step(f"copy {channels} @{size} into phases", Convert("planes", shape), (x,), y, {}))
    return made


def ours(model: Model, made: Step, label: str, tried: int, cores: int) -> Modelled:
    """The best of ``tried`` candidates, each checked against numpy; ``label`` says which case it is."""
    assert made.output is not None
    rvv = isa("rvv" if made.output.layout.itemsize == 4 else "rvv_zvfh")
    prepared: list[Problem] = []

    def run(candidate: registry.Candidate) -> Modelled:
        if not prepared:
            prepared.append(problem(made, model.vlen // 32, whole=False))
        calls = registry.bind(prepared[0].step, candidate)
        variants = {call.kernel: registry.variants(rvv)[call.kernel] for call in calls}
        program = Harness(Target(model.key), rvv, cores, variants=variants).program
        # the limit is in seconds of the emulation, the one repetition in modelled time
        runs = [Run(0, check=True, least=1, most=1, budget_ns=1, limit_s=3000)]
        flush = int(model["l2.size"]) // cores
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "job").write_bytes(encode(prepared[0], [calls], runs, cores, flush))
            report = Instrument(model, cores=cores).run(program, ["job"], timeout=3600, folder=Path(work))
        if not report.outcome.ok or "wrong" in report.outcome.stdout:
            raise SystemExit(f"{made.name}: {candidate.key()}: {report.outcome.describe()} {report.outcome.stdout}")
        last = replace(report, threads=tuple({**t, **t["last"]} for t in report.threads))
        memory = last.memory()
        return Modelled(
            last.regions[-1],
            last.bound(model),
            memory["read_bytes"],
            memory["written_bytes"],
            candidate.key(),
            dict(last.waited()),
        )

    found = []
    harness = (resources.files("colonnade.runtime") / "harness.c").read_text()
    for candidate in registry.candidates(made, rvv, cores)[:tried]:
        calls = registry.bind(made, candidate)
        library = render.library(rvv, [registry.variants(rvv)[name] for name in sorted({c.kernel for c in calls})])
        sources = [*library.values(), harness, *instrument(), model.text(cores), *map(digest, calls)]
        found.append(kept(f"{label} {candidate.key()} {cores}", sources, lambda c=candidate: run(c)))
    return min(found, key=lambda m: m.cycles)


def digest(call: Call) -> str:
    """Of all that a call is given."""
    found = hashlib.sha256(call.kernel.encode())
    for name, value in sorted(call.fields.items()):
        found.update(f"{name}={value.data.tobytes() if isinstance(value, Const) else value}".encode())
    return found.hexdigest()


def lanes_bound(layer: Layer, sparsity: float, vlen: int, itemsize: int) -> float:
    """Registers of multiply-adds on kept weights alone, halos and last vectors counted; the stem's as a plain sum."""
    out = layer.size // layer.stride
    lanes = out * out if layer.kernel == 7 else step(layer, 0.0).output.grid.lanes
    per_group = (
        ColumnPattern(sparsity, tile=8).kept(layer.ic * layer.kernel**2) if sparsity else layer.ic * layer.kernel**2
    )
    return layer.oc * per_group * -(-lanes // (vlen // 8 // itemsize))


def im2col_bytes(layer: Layer) -> int:
    """What the published design moves through memory: the im2col matrix written and read, weights and output once."""
    pixels, k = (layer.size // layer.stride) ** 2, layer.ic * layer.kernel**2
    return 4 * (2 * k * pixels + layer.oc * k + layer.oc * pixels)


def fetch(folder: Path) -> Path:
    """The root with XNNPACK's packages for riscv64, fetched when it is not there yet."""
    root, packages = folder / "root", folder / "packages"
    if (root / "lib").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([TRIXIE, packages, "riscv64", *PACKAGES], check=True, capture_output=True, text=True)
        for package in sorted(packages.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise SystemExit(f"XNNPACK's riscv64 packages cannot be fetched: {said}") from error
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


def peer(model: Model, layer: Layer, root: Path, program: Path, source: str) -> Modelled:
    """XNNPACK's dense convolution on one core, its second inference."""
    words = [layer.ic, layer.oc, layer.size, layer.kernel, layer.stride, layer.kernel // 2, 1]

    def run() -> Modelled:
        report = Instrument(model, root=root).run(program, [str(w) for w in words], timeout=3600)
        if not report.outcome.ok:
            raise SystemExit(f"XNNPACK: {layer.name}: {report.outcome.describe()}")
        memory = report.memory()
        return Modelled(report.cycles, report.bound(model), memory["read_bytes"], memory["written_bytes"])

    return kept(f"xnnpack {words}", [source, *instrument(), model.text()], run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="x60")
    parser.add_argument("--sparsity", default="0,0.5,0.75,0.875")
    parser.add_argument("--tile", type=int, default=8, help="rows of a tile")
    parser.add_argument(
        "--winograd", default=[], type=lambda names: names.split(","), metavar="4x1",
        help="3x3 layers lose their columns behind such a transform, where that is faster at the same sparsity",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f32", help="of ours")
    parser.add_argument("--layers", default="", help="only layers whose name contains one of these, comma-separated")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1, help="that work together, with one L2 and one memory")
    parser.add_argument("--jobs", type=int, default=1, help="layers that are run at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stalls", action="store_true", help="what ours wait for, over all layers")
    parser.add_argument("--sensitivity", action="store_true", help="what the assumed numbers do to XNNPACK's figures")
    options = parser.parse_args()
    model = read(options.model)
    itemsize = 2 if options.dtype == "f16" else 4
    levels = [float(x) for x in options.sparsity.split(",")]
    root = fetch(Path(platformdirs.user_cache_dir("colonnade")) / "xnnpack-riscv64")
    merged: dict[Layer, int] = {}
    for layer in resnet50():
        shape = replace(layer, count=1)
        merged[shape] = merged.get(shape, 0) + layer.count
    chosen = [x for x in merged if not options.layers or any(part in x.name for part in options.layers.split(","))]
    cores = f"{options.cores} cores" if options.cores > 1 else "one core"
    print(f"modelled on {model.name} ({model.chip}, VLEN {model.vlen}, {model.ghz:g} GHz), Mcycles, {cores}")
    print("(XNNPACK dense on one core; its bound: what its vector units alone need, the rest are stalls)")
    head = "".join(f"{f'{100 * s:g} %':>9}" for s in levels)
    print(f"{'layer':22}{'in → out':>16}{'×':>3}{'XNNPACK':>9}{'bound':>9}{head}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        program = xnnpack(root, Path(work))
        source = Path(__file__).with_name("xnnpack_conv.c").read_text()

        def one(layer: Layer) -> tuple[Modelled, list[Modelled]]:
            sparse = [0.0 if layer.kernel == 7 else level for level in levels]  # the stem stays dense
            label = f"{layer} stalls" if options.stalls else f"{layer}"
            transforms = options.winograd if (layer.kernel, layer.stride, itemsize) == (3, 1, 4) else []
            kinds = ["", *transforms]
            mine = [
                min(
                    (
                        ours(
                            model, step(layer, s, options.tile, 0, kind, itemsize),
                            f"{label} {s} {kind}".strip() + " f16" * (itemsize == 2),
                            options.candidates, options.cores,
                        )
                        for kind in kinds[: len(kinds) if s else 1]
                    ),
                    key=lambda made: made.cycles,
                )
                for s in sparse
            ]  # fmt: skip
            return peer(model, layer, root, program, source), mine

        for layer, (theirs, mine) in zip(chosen, pool.map(one, chosen), strict=True):
            cells = "".join(f"{m.cycles / 1e6:9.2f}" for m in mine)
            way = f"{layer.source} → {layer.target}"
            figures = f"{theirs.cycles / 1e6:9.2f}{theirs.bound / 1e6:9.2f}"
            print(f"{layer.name:22}{way:>16}{merged[layer]:3}{figures}{cells}", flush=True)
            rows.append((layer, merged[layer], theirs, mine))
            if options.sensitivity:
                words = [layer.ic, layer.oc, layer.size, layer.kernel, layer.stride, layer.kernel // 2, 1]
                for name, low, high, _ in Instrument(model, root=root).sensitivity(program, [str(w) for w in words]):
                    span = dict(model.assumed())[name]
                    print(f"    {name} (assumed) {span[0]:g}…{span[1]:g}: XNNPACK ×{low:.2f}…{high:.2f}", flush=True)

    def line(label: str, values: Iterable[float], form: str) -> None:
        print(f"{label:59}" + "".join(f"{value:{form}}" for value in values))

    extra, made = 0.0, []
    if not options.layers:
        with ThreadPoolExecutor(options.jobs) as pool:
            made = list(pool.map(lambda s: ours(model, s, s.name, 1, options.cores), copies(itemsize)))
        extra = sum(m.cycles for m in made)
        line("copies into phases for the three 3x3 of stride 2", (extra / 1e6 for _ in levels), "9.2f")
    total = sum(count * theirs.cycles for _, count, theirs, _ in rows)
    bound = sum(count * theirs.bound for _, count, theirs, _ in rows)
    sums = [extra + sum(count * mine[i].cycles for _, count, _, mine in rows) for i in range(len(levels))]
    units = [sum(count * mine[i].bound for _, count, _, mine in rows) for i in range(len(levels))]
    register = model.classes["vfma"].cycles[0]
    least = [
        register
        * sum(n * lanes_bound(x, 0.0 if x.kernel == 7 else level, model.vlen, itemsize) for x, n, _, _ in rows)
        for level in levels
    ]  # fmt: skip
    moved = [
        sum(count * (mine[i].read_bytes + mine[i].written_bytes) for _, count, _, mine in rows)
        + sum(m.read_bytes + m.written_bytes for m in made)
        for i in range(len(levels))
    ]
    published = sum(count * im2col_bytes(x) for x, count, _, _ in rows)
    share = options.cores

    print(f"{'sum':41}{total / 1e6:9.1f}{bound / 1e6:9.1f}" + "".join(f"{x / 1e6:9.1f}" for x in sums))
    line("× XNNPACK at its vector limit", (bound / share / x for x in sums), "9.2f")
    line("  that at best, by lanes", (bound / x for x in least), "9.2f")
    line("  reached of that, %", (100 * x / share / y for x, y in zip(least, sums, strict=True)), "9.0f")
    line(
        "our vector units alone, % of our time", (100 * x / share / y for x, y in zip(units, sums, strict=True)), "9.0f"
    )
    if options.stalls:
        lost = [
            {reason: sum(n * mine[i].waited[reason] for _, n, _, mine in rows) for reason in rows[0][3][i].waited}
            for i in range(len(levels))
        ]
        print("multiply-adds and all else that the vector units do, and what was waited for (may overlap), Mcycles")
        line("  the units", (x / 1e6 for x in units), "9.1f")
        for reason in sorted(lost[0], key=lambda r: -lost[0][r]):
            line(f"  {reason}", (x[reason] / 1e6 for x in lost), "9.1f")
    if share == 1:
        line("× XNNPACK with its stalls", (total / x for x in sums), "9.2f")
    print(f"XNNPACK's stalls: {100 * (1 - bound / total):.0f} % of its modelled time")
    line("MB from and to memory, modelled", (x / 1e6 for x in moved), "9.0f")
    line(f"  im2col in every layer ({published / 1e6:.0f} MB) over that", (published / x for x in moved), "9.1f")
    if options.json:
        content = [
            {"layer": asdict(x), "count": n, "xnnpack": asdict(theirs),
             "ours": {f"{s:g}": asdict(m) for s, m in zip(levels, mine, strict=True)}}
            for x, n, theirs, mine in rows
        ]  # fmt: skip
        options.json.write_text(json.dumps({"model": model.key, "modelled": True, "rows": content}))


if __name__ == "__main__":
    run_script(main)
