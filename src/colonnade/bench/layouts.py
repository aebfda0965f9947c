"""What moving data costs on a target: small steps of the kinds that the layout assignment weighs, measured there.

``colonnade probe T --layouts`` measures and keeps the result beside the tuning records; from then on whatever is tuned
or built for that machine and ISA takes it instead of the defaults of ``LayoutCosts.of``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np

from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError, UserError
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.panels import VECTORS
from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.layout import Layout, Panels, Placed, Planes, place, round_up
from colonnade.plan import Step
from colonnade.targets.base import Machine, Target
from colonnade.tune.database import Database
from colonnade.tune.job import Run, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.workload import RELU, Affine, Conv2d, Convert, Workload

RUN = (7, 25, 60_000_000)  # least and most repetitions, ns
TRIED = 3  # candidates of each step
EVEN = 0.03  # of a convolution's time: panels that save less make no difference


def known(machine: Machine, isa: Isa, db: Path | None = None) -> LayoutCosts:
    """The costs measured on ``machine``; those of its ISA where nothing was."""
    database = Database(db)
    try:
        found = database.note(_name(machine, isa))
    finally:
        database.close()
    default = LayoutCosts.of(isa.name, isa.lanes)
    if found is None:
        return default
    # what a later version measures as well keeps its default here
    return replace(default, **{k: v for k, v in json.loads(found).items() if k in asdict(default)})


def measure(target: Target, isa: Isa, db: Path | None = None, toolchain: Toolchain | None = None) -> LayoutCosts:
    """Measure all of them with one thread, and keep them.

    Raises ``TargetError`` when the target fails, ``UserError`` when its times mean nothing.
    """
    if target.untimed:
        raise UserError(f"{target.name}: {target.untimed}; layout costs need a machine of its own")
    harness = Harness(target, isa, 1, toolchain)
    costs = _costs(lambda step, feed: _fastest(harness, step, feed), LayoutCosts.of(isa.name, isa.lanes))
    database = Database(db)
    try:
        database.keep(_name(harness.machine, isa), json.dumps(asdict(costs)))
    finally:
        database.close()
    return costs


def _name(machine: Machine, isa: Isa) -> str:
    family = isa.name.partition("_")[0]  # the same kernels move data, whatever else an ISA has
    return f"layout costs|{family}|{machine.key()}"


def _costs(ns: Callable[[Step, int | None], float], default: LayoutCosts) -> LayoutCosts:
    """``ns(step, feed)``: the time of a step, of a convolution that is fed in this way. What is not measured here stays
    as in ``default``."""
    shape = (1, 128, 56, 56)
    plain = Planes(1, 56, 56, 56, 56)
    size = 4 * 128 * 56 * 56
    halves = replace(plain, pitch=28, image_rows=28, phases=(2, 2), kept_phases=((0, 0),))
    narrow = Planes(1, 28, 28, 28, 28)
    channels = {"scale": np.ones(128, np.float32), "shift": np.zeros(128, np.float32)}
    before = {f"before_{name}": values for name, values in channels.items()}
    copy = ns(_step(Convert("planes", shape), plain, replace(plain, pitch=28, image_rows=28, phases=(2, 2))), None)
    scale = ns(_step(Affine(shape, RELU), plain, plain, channels), None)

    conv = Conv2d(1, 128, 64, 56, 56, (1, 1))
    weight = _weight(conv)
    direct, gathered = (ns(_step(conv, plain, plain, weight), feed) for feed in (0, 1))
    scaled = ns(_step(replace(conv, prologue=RELU), plain, plain, {**weight, **before}), 1)
    strided = replace(conv, stride=(2, 2))
    phased, picked = ns(_step(strided, halves, narrow, weight), 0), ns(_step(strided, plain, narrow, weight), 1)

    wide = Conv2d(1, 1024, 256, 14, 14, (1, 1))
    grid = Planes(1, 14, 14, 15, 15)
    planes = ns(_step(wide, grid, grid, _weight(wide)), 0)
    stored = ns(_step(wide, Panels(grid, VECTORS), grid, _weight(wide)), 2)
    saved = planes - stored
    least = 0.001  # a difference of two times may be lost in their noise; nothing is free
    return replace(
        default,
        copy=max(copy / (2 * size), least),
        scale=max(scale / (2 * size), least),
        gather=max((gathered - direct) / size, least),
        pick=max((picked - phased) / (size / 4), least),
        scaled=max((scaled - direct) / size, least),
        mac=direct / conv.macs,
        plane=saved / wide.macs if saved > EVEN * planes else 0.0,
    )


def _weight(conv: Conv2d) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((conv.out_channels, conv.in_channels, 1, 1), dtype=np.float32)
    return {"weight": weight, "bias": np.zeros(conv.out_channels, np.float32)}


def _step(workload: Workload, source: Layout, target: Layout, constants: dict[str, np.ndarray] | None = None) -> Step:
    """A step between tensors of these layouts, one after the other in an arena."""
    ins = getattr(workload, "shape", None) or (1, workload.in_channels, workload.height, workload.width)  # type: ignore[attr-defined]
    outs = (1, workload.out_channels, workload.out_height, workload.out_width) if isinstance(workload, Conv2d) else ins
    x: Placed = place("x", ins, source, 0)
    y = place("y", outs, target, round_up(source.buffer_bytes(ins[1]), 64) + 4096)
    return Step(workload.op, workload, (x,), y, constants or {})


def _fastest(harness: Harness, step: Step, feed: int | None) -> float:
    """ns of the best of the first few candidates that are fed so, by the median."""
    listed = registry.candidates(step, harness.isa, 1)
    found: Sequence[Candidate] = [c for c in listed if feed is None or c.params.get("feed") == feed][:TRIED]
    reps: dict[int, float] = {}

    def record(index: int, result: Measurement) -> None:
        if result.outcome == "ok" and result.reps:
            reps[index] = median(result.reps)

    runs = [Run(i, True, *RUN, 600) for i in range(len(found))]
    harness.run(problem(step, harness.vector, not harness.isa.scalable), found, runs, record)
    if not reps:
        raise TargetError(f"{harness.target.name}: no kernel for {step.workload.key()} gave a right result")
    return min(reps.values())
