"""A model's layouts for one machine, and how large its activations are where kernels want to know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import then
from colonnade.layout import Rows, read_planes
from colonnade.workload import Conv2d, ConvPool

if TYPE_CHECKING:
    from colonnade.frontend.load import Arranged, Imported
    from colonnade.plan import Plan, Step
    from colonnade.targets.base import Machine


def arranged(steps: Imported, machine: Machine, isa: Isa, db: Path | None = None) -> Arranged:
    """``steps`` with layouts by what moving data costs on ``machine``, convolutions in float16 where ``isa`` is of
    such elements; where its kernels take pairs of columns, with the sizes of the inputs of convolutions too."""
    from colonnade.bench import layouts

    made = steps.arrange(layouts.known(machine, isa, db), then.FUNCTIONS if isa.itemsize == 2 else None)
    if isa.adders:
        made.rms = sizes(made.plan(()))
    return made


def sizes(plan: Plan) -> dict[str, float]:
    """Root mean square of the input of every convolution that reads planes or an input of the model, by step, from
    one run of ``plan`` in this process on the inputs that `bench` measures with."""
    convolutions = [s for s in plan.steps if isinstance(s.workload, Conv2d | ConvPool)]
    wanted = {s.name for s in convolutions if s.inputs and not isinstance(s.inputs[0].layout, Rows)}
    if not convolutions:
        return {}
    from colonnade.bench.run import random_inputs
    from colonnade.codegen.in_process import Program
    from colonnade.targets import Local

    found: dict[str, float] = {}

    def look(step: Step, arena: npt.NDArray[np.uint8]) -> None:
        if step.name in wanted:
            source = step.inputs[0]
            values = read_planes(arena, source)
            # phases that nobody reads are not there, and read as zeros; shifted planes hold pixels several times
            (sy, sx), stored = source.planes.phases, source.planes.stored_phases
            there = len({(py % sy, px % sx) for py, px in stored}) / (sy * sx)
            found[step.name] = float(np.sqrt(np.square(values).mean(dtype=np.float64) / there))

    inputs = [{"name": port.name, "shape": port.shape, "dtype": port.dtype} for port in plan.inputs]
    given = random_inputs({"inputs": inputs})
    Program(plan, Local().probe().pick_isa(), lean=True).run(given, look)
    for step in convolutions:
        if not step.inputs:  # it reads one of the model's inputs
            found[step.name] = float(np.sqrt(np.square(given[step.external], dtype=np.float64).mean()))
    return {name: value for name, value in found.items() if np.isfinite(value)}
