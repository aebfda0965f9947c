"""An interpreter of Plans for tests: numpy operators on the planned memory itself.

Every tensor is written to and read from one arena that starts full of NaN, at the places that the Plan gives: a wrong
lifetime, overlap, pitch or phase gives a wrong result. What a convolution reads in place is compared, lane by lane,
with what it should read, zero halos included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from colonnade.layout import Panels, Placed, Planes, elements, read_planes, write_planes
from colonnade.plan import Plan, Step
from colonnade.workload import Array, Cast, Conv2d, ConvPool, Reach, evaluate, im2col

VECTOR = 8  # lanes of the registers that panels are read and written with here


def run(plan: Plan, inputs: Mapping[str, Array], check_feeding: bool = True) -> dict[str, Array]:
    """The model's outputs by name. ``check_feeding`` also verifies the in-place reads of every convolution.

    Raises:
        AssertionError: a convolution would not find its operands in the arena.
    """
    arena = np.zeros(plan.arena, np.uint8)
    arena.view(np.float32)[:] = np.nan
    given = {name: np.asarray(array) for name, array in inputs.items()}
    parts: dict[str, list[Array]] = {}
    for image in range(plan.images):
        here = {n: np.split(a, plan.images)[image] for n, a in given.items()} if plan.images > 1 else given
        _run(plan.steps[: plan.once], arena, here, parts, check_feeding)
    if plan.seam is not None:
        seam = {plan.seam.name: np.concatenate([p.reshape(-1) for p in parts[plan.seam.name]])}
        _run(plan.steps[plan.once :], arena, seam, parts, check_feeding)
    nothing = [np.zeros(0, np.float32)]  # of an output without elements, which no step makes
    return {
        p.name: np.concatenate([a.reshape(-1) for a in parts.get(p.name, nothing)]).reshape(p.shape)
        for p in plan.outputs
    }


def _run(
    steps: Sequence[Step],
    arena: npt.NDArray[np.uint8],
    inputs: Mapping[str, Array],
    outputs: dict[str, list[Array]],
    check_feeding: bool,
) -> None:
    """These steps once; what they export is appended to ``outputs``."""
    for step in steps:
        if step.external and not step.inputs:
            assert step.output is not None
            given = inputs[step.external]
            if not isinstance(step.workload, Cast):
                shape = step.workload.shape if isinstance(step.workload, ConvPool) else step.output.shape
                given = given.astype(np.float32).reshape(shape)
            write_planes(arena, step.output, evaluate(step.workload, [given], step.constants), VECTOR)
            continue
        values = [read_planes(arena, tensor, VECTOR) for tensor in step.inputs]
        if type(step.workload) is Conv2d and check_feeding and _in_place(step):
            _check_feeding(arena, step, values[0])
        result = evaluate(step.workload, values, step.constants)
        if step.output is None:
            outputs.setdefault(step.external, []).append(np.array(result))
        else:
            write_planes(arena, step.output, result.reshape(step.output.shape), VECTOR)


def _in_place(step: Step) -> bool:
    """Does this convolution read in place? Not where a stride meets plain planes, a prologue, or another pitch."""
    conv, source, target = step.workload, step.inputs[0].grid, step.output
    assert isinstance(conv, Conv2d) and target is not None
    if isinstance(step.inputs[0].layout, Panels):
        return False
    same = (source.pitch, source.image_rows) == (target.grid.pitch, target.grid.image_rows)
    down, right = Reach.of(conv, 0), Reach.of(conv, 1, source.shifted)
    same &= source.pitch >= source.columns + right.before and source.image_rows >= source.rows + down.before
    return conv.prologue is None and source.phases == conv.stride and (same or conv.dilation == (1, 1))


def _check_feeding(arena: npt.NDArray[np.uint8], step: Step, x: Array) -> None:
    """Every element of the im2col matrix must stand where the layout rule says it does."""
    conv, source, target = step.workload, step.inputs[0], step.output
    assert isinstance(conv, Conv2d) and target is not None
    lanes = np.flatnonzero(target.grid.valid())
    expected = im2col(x, conv)  # [N, groups, K, P]
    expected = expected.transpose(1, 2, 0, 3).reshape(conv.groups, conv.k, -1)
    size = source.planes.itemsize
    floats = elements(arena, source.planes)
    assert (source.planes.pitch, source.planes.image_rows) == (target.grid.pitch, target.grid.image_rows), step.name
    for group in range(conv.groups):
        for k, offset in enumerate(offsets(conv, source, group)):
            where = offset // size + lanes
            assert where.min() >= 0, f"{step.name}: reads below the arena"
            found = floats[where]
            assert np.array_equal(found, expected[group, k]), f"{step.name}: group {group}, column {k} is not in place"
        # vectors run on past the last pixel, to the end of the plane and beyond it
        assert offset + size * (target.grid.plane + 256) <= arena.size, f"{step.name}: reads past the arena"


def offsets(conv: Conv2d, source: Placed, group: int) -> list[int]:
    """Byte offset from the arena's base of every column (kh, kw, ic) of ``group`` at lane 0 of the output."""
    layout: Planes = source.planes
    stored, (sy, sx) = layout.stored_phases, layout.phases
    ic = conv.in_channels // conv.groups
    result = []
    for kh in range(conv.kernel[0]):
        for kw in range(conv.kernel[1]):
            qy, qx = kh * conv.dilation[0] - conv.padding[0], kw * conv.dilation[1] - conv.padding[1]
            phase = stored.index((qy % sy, qx if layout.shifted else qx % sx))
            shift = (qy // sy) * layout.pitch + (0 if layout.shifted else qx // sx)
            for channel in range(group * ic, (group + 1) * ic):
                result.append(int(source.offsets[channel * len(stored) + phase]) + layout.itemsize * shift)
    return result
