"""Where each way of feeding a convolution wins: planes read in place (behind a copy where one is needed), panels that
are gathered, or panels that the step in front wrote.

    python bench/feeding.py [--target local] [--isa avx512] [--threads 1] [--rounds 7] [--only NAME] [--json FILE]

Every row is one layer of a known network. Both ways run in turns in one process tree through the tuner's own harness,
their results checked first; the best of each way's candidates counts, by the minimum over the rounds (others use this
machine), and what an extra copy costs is measured as a step of its own. ``whole`` are the candidates that read in place
and compute the last lanes as one more vector, where others do so with the rows of a tile in the lanes. The constants of
``frontend.feeding.LayoutCosts`` follow from it: ms of a copy over its bytes, and what panels add over panel bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from colonnade import targets
from colonnade.errors import run_script
from colonnade.frontend.panels import VECTORS
from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.layout import Panels, Placed, Planes, place, round_up
from colonnade.pattern import ColumnPattern
from colonnade.plan import Step
from colonnade.tune.job import Run, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.workload import RELU, Affine, Conv2d, Convert, Epilogue, Reach, unmatrix


@dataclass(frozen=True)
class Layer:
    """One row: a convolution, how much of it is pruned, and what its input needs to be read in place."""

    name: str
    conv: Conv2d
    sparsity: float = 0.0


def square(
    ic: int, oc: int, size: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1, **more: object
) -> Conv2d:
    """A square convolution that keeps its size but for the stride."""
    pad = dilation * (kernel // 2)
    conv = Conv2d(
        1, ic, oc, size, size, (kernel,) * 2, (stride,) * 2, (pad,) * 4, (dilation,) * 2, groups, Epilogue(False, RELU)
    )
    return replace(conv, **more)  # type: ignore[arg-type]


LAYERS = [
    *(
        Layer(f"resnet50 {name} {percent}%", square(ic, oc, size, kernel), percent / 100)
        for percent in (0, 75)
        for name, ic, oc, size, kernel in (
            ("3x3 64 56", 64, 64, 56, 3),
            ("3x3 256 14", 256, 256, 14, 3),
            ("3x3 512 7", 512, 512, 7, 3),
            ("1x1 64-256 56", 64, 256, 56, 1),
            ("1x1 1024-256 14", 1024, 256, 14, 1),
            ("1x1 512-2048 7", 512, 2048, 7, 1),
            ("1x1 2048-512 7", 2048, 512, 7, 1),
        )
    ),
    Layer("resnet50 3x3/2 128 56 0%", square(128, 128, 56, 3, 2)),
    Layer("resnet50 3x3/2 128 56 75%", square(128, 128, 56, 3, 2), 0.75),
    Layer("resnet50 1x1/2 256-512 56 0%", square(256, 512, 56, 1, 2)),
    Layer("resnet50 1x1/2 256-512 56 75%", square(256, 512, 56, 1, 2), 0.75),
    Layer("deeplab 3x3 d12 256 28 0%", square(256, 256, 28, 3, 1, 12)),
    Layer("densenet bn+relu 1x1 256-128 28", square(256, 128, 28, 1, prologue=RELU)),
    Layer("densenet bn+relu 1x1 512-128 14", square(512, 128, 14, 1, prologue=RELU)),
    Layer("resnext 3x3 g32 128 56", square(128, 128, 56, 3, groups=32)),
    *(
        Layer(
            f"mobilenetv2 dw 3x3/{stride} {channels} {size}",
            square(channels, channels, size, 3, stride, groups=channels),
        )
        for channels, size, stride in (
            (32, 112, 1),
            (96, 112, 2),
            (144, 56, 1),
            (192, 28, 1),
            (384, 14, 1),
            (960, 7, 1),
        )
    ),
]


def placed(conv: Conv2d, in_place: bool) -> tuple[Placed, Placed, Placed]:
    """(plain input, what the convolution reads, output). Plain planes have no halo."""
    shape = (1, conv.in_channels, conv.height, conv.width)
    plain = Planes(1, conv.height, conv.width, conv.width, conv.height)
    down, right = Reach.of(conv, 0), Reach.of(conv, 1)
    oh, ow = conv.out_height, conv.out_width
    target = Planes(1, oh, ow, ow, oh)
    read = plain
    if in_place:
        columns, rows = -(-conv.width // conv.stride[1]), -(-conv.height // conv.stride[0])
        pitch = max(columns + right.before, ow + right.after)
        image_rows = max(rows + down.before, oh + down.after)
        kept = None if conv.stride == (1, 1) else tuple(product(down.phases, right.phases))
        lead = down.before * pitch + right.before
        read = Planes(1, conv.height, conv.width, pitch, image_rows, lead, conv.stride, kept)
        target = Planes(1, oh, ow, pitch, image_rows)
    x = place("x", shape, plain, 0)
    at = round_up(plain.buffer_bytes(shape[1]), 64)
    mine = place("read", shape, read, at)
    at += round_up(read.buffer_bytes(shape[1]), 64)
    return x, mine, place("y", (1, conv.out_channels, oh, ow), target, at)


def weights(conv: Conv2d, sparsity: float, tile: int = 8, seed: int = 0) -> np.ndarray:
    """Random [OC, IC/groups, KH, KW]; every ``tile`` rows keep the same columns, a share of ``sparsity`` is gone."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((conv.out_channels, conv.k), dtype=np.float32) / np.sqrt(conv.k, dtype=np.float32)
    if sparsity:
        pattern = ColumnPattern(sparsity, tile)
        for start in range(0, conv.out_channels, tile):
            rows[start : start + tile, rng.permutation(conv.k)[pattern.kept(conv.k) :]] = 0
    return unmatrix(rows, conv.weight_shape)


def steps(layer: Layer) -> Iterator[tuple[str, Step]]:
    """The convolution fed in either way, and the copy that the first one needs."""
    conv = layer.conv
    constants = {"weight": weights(conv, layer.sparsity), "bias": np.zeros(conv.out_channels, np.float32)}
    plain = replace(conv, prologue=None)
    x, read, y = placed(plain, True)
    yield "in place", Step("conv", plain, (read,), y, constants)
    if conv.prologue is not None:
        channels = np.ones(conv.in_channels, np.float32)
        before = {"scale": channels, "shift": channels * 0}
        shape = (1, conv.in_channels, conv.height, conv.width)
        lanes = Planes(1, conv.height, conv.width, read.planes.pitch, read.planes.image_rows)
        other = place(
            "other", shape, lanes, round_up(y.lead_offset + y.planes.buffer_bytes(conv.out_channels), 64) + 4096
        )
        yield "copy", Step("affine", Affine(shape, conv.prologue), (read,), other, before)
        constants = {**constants, "before_scale": channels, "before_shift": channels * 0}
    elif conv.stride != (1, 1) or conv.dilation != (1, 1):
        yield "copy", Step("copy", Convert("planes", x.shape), (x,), read)
    x, _, y = placed(plain, False)
    if conv.stride == (1, 1) and conv.dilation == (1, 1):
        x, y = read, placed(plain, True)[2]
    if not 1 < conv.groups == conv.in_channels:
        yield "panels", Step("conv", conv, (x,), y, constants)
    if conv.kernel == conv.stride == (1, 1) and conv.prologue is None and conv.groups == 1:
        _, read, y = placed(conv, True)
        stored = Panels(replace(read.planes, lead=0), VECTORS)
        at = round_up(stored.buffer_bytes(conv.in_channels), 64)
        pair = place("x", read.shape, stored, 0), place("y", y.shape, y.planes, at)
        yield "written", Step("conv", conv, pair[:1], pair[1], constants)


def ways(layer: Layer, isa: Isa, threads: int) -> dict[str, tuple[Step, list[Candidate]]]:
    """By way: the step and its few best candidates of the static ranking."""
    found: dict[str, tuple[Step, list[Candidate]]] = {}
    for way, step in steps(layer):
        listed = registry.candidates(step, isa, threads)
        if way == "copy":
            found[way] = step, listed[:1]
            continue
        feed = {"panels": 1, "written": 2}.get(way, 0)
        own = [c for c in listed if "winograd" not in c.params]
        gathering = [c for c in own if c.params.get("feed") == feed and c.params["dense"] == int(not layer.sparsity)]
        for name, some in ((way, gathering), ("whole", [c for c in gathering if not c.params["tail"]])):
            best = {c.kernel: c for c in reversed(some)}
            if best and (name == way or (len(some) < len(gathering) and not feed)):
                found[name] = step, sorted(best.values(), key=lambda c: c.rank)[:4]
        others = [c for c in listed if "winograd" in c.params]
        if others and way == "in place" and not layer.sparsity:
            found["winograd"] = step, others[:4]
        rows = [c for c in own if "dwconv" in c.kernel]
        if rows and not feed:
            found["depthwise"] = step, rows[:6]
    return found


def fastest(harness: Harness, step: Step, found: Sequence[Candidate], rounds: int) -> tuple[float, str]:
    """(ms, candidate): the minimum over all repetitions of all candidates."""
    best: dict[int, int] = {}

    def record(index: int, measured: Measurement) -> None:
        if measured.outcome != "ok":
            sys.exit(f"{step.name}: {found[index].key()}: {measured.outcome} {measured.detail}")
        best[index] = min([best.get(index, 1 << 62), *measured.reps])

    runs = [Run(i, True, rounds, rounds, 200_000_000, 600) for i in range(len(found))]
    harness.run(problem(step, harness.vector, not harness.isa.scalable), found, runs, record)
    index = min(best, key=lambda i: best[i])
    return best[index] / 1e6, found[index].key()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="local")
    parser.add_argument("--isa", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = targets.parse(options.target)
    machine = target.probe()
    isa = machine.pick_isa(options.isa or None)
    harness = Harness(target, isa, options.threads)
    print(f"{machine.cpu}, {isa.name}, {options.threads} thread(s), minimum of {options.rounds}")
    print(f"{'layer':36} {'way':10} {'ms':>8} {'GFLOP/s':>8} {'GB/s':>6}  kernel")
    records = []
    for layer in LAYERS:
        if options.only not in layer.name:
            continue
        for way, (step, found) in ways(layer, isa, options.threads).items():
            ms, key = fastest(harness, step, found, options.rounds)
            kept = np.count_nonzero(step.constants["weight"]) if "weight" in step.constants else 0
            flops = 2.0 * kept * layer.conv.out_height * layer.conv.out_width
            moved = sum(4.0 * np.prod(t.shape) for t in (*step.inputs, step.output) if t is not None)
            records.append({"layer": layer.name, "way": way, "ms": ms, "candidate": key, "conv": asdict(layer.conv)})
            print(
                f"{layer.name:36} {way:10} {ms:8.3f} {flops / ms / 1e6:8.1f} {moved / ms / 1e6:6.1f}  {key}", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(records, default=str, indent=1))


if __name__ == "__main__":
    run_script(main)
