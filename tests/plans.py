"""Small hand-made plans, and what they must compute by the workloads' numpy definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.layout import Layout, Placed, Planes, Rows, place, round_up
from colonnade.plan import Buffer, Plan, Port, Step
from colonnade.workload import RELU, Affine, Conv2d, Convert, Epilogue, GlobalPool, Linear, Softmax

Array = npt.NDArray[np.float32]


class _Arena:
    """Buffers one after the other; nothing is reused."""

    def __init__(self) -> None:
        self.size = 64  # the halo before the first plane
        self.buffers: list[Buffer] = []

    def tensor(self, name: str, shape: tuple[int, ...], layout: Layout) -> Placed:
        size = layout.buffer_bytes(shape[1])
        self.buffers.append(Buffer(name, self.size, size, layout, 0, 99))
        self.size += round_up(size, 64)
        return place(name, shape, layout, self.buffers[-1].offset)


def network(
    batch: int = 2, channels: int = 3, height: int = 9, width: int = 11, classes: int = 5, seed: int = 0
) -> Plan:
    """import → affine + ReLU → conv 3x3 (half of its columns zero) + residual + ReLU → pool → linear → softmax.

    Outputs ``maps`` (of the convolution) and ``scores``.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    shape = (batch, channels, height, width)
    layout = Planes(batch, height, width, pitch=width + 1, image_rows=height + 1, lead=width + 2)
    vector, score = Rows(batch, channels), Rows(batch, classes)
    arena = _Arena()
    x = arena.tensor("x", shape, layout)
    a = arena.tensor("a", shape, layout)
    b = arena.tensor("b", shape, layout)
    p = arena.tensor("p", shape[:2], vector)
    y = arena.tensor("y", (batch, classes), score)
    s = arena.tensor("s", (batch, classes), score)
    weight = normal(channels, channels, 3, 3)
    weight[:, ::2] = 0
    conv = Conv2d(batch, channels, channels, height, width, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, RELU))
    steps = (
        Step("input", Convert("import", shape), (), x, external="image"),
        Step("/stem/affine", Affine(shape, RELU), (x,), a, {"scale": normal(channels), "shift": normal(channels)}),
        Step("/body/conv*/", conv, (a, a), b, {"weight": weight, "bias": normal(channels)}),
        Step("pool", GlobalPool("avg", batch, channels, height, width), (b,), p),
        Step(
            "7",
            Linear(batch, channels, classes),
            (p,),
            y,
            {"weight": normal(classes, channels), "bias": normal(classes)},
        ),
        Step("softmax", Softmax((batch, classes)), (y,), s),
        Step("maps out", Convert("export", shape), (b,), None, external="maps"),
        Step("scores out", Convert("export", (batch, classes)), (s,), None, external="scores"),
    )
    ports = (Port("maps", shape), Port("scores", (batch, classes)))
    return Plan("tiny", (Port("image", shape),), ports, steps, tuple(arena.buffers), arena.size + 4096)


def affine_only(channels: int = 4, size: int = 6) -> Plan:
    """import → affine → export: the smallest model there is."""
    shape = (1, channels, size, size)
    layout = Planes(1, size, size, pitch=size + 1, image_rows=size + 1, lead=size + 2)
    arena = _Arena()
    x, y = arena.tensor("x", shape, layout), arena.tensor("y", shape, layout)
    constants = {"scale": np.arange(1, channels + 1, dtype=np.float32), "shift": np.full(channels, 0.5, np.float32)}
    steps = (
        Step("in", Convert("import", shape), (), x, external="x"),
        Step("scale", Affine(shape), (x,), y, constants),
        Step("out", Convert("export", shape), (y,), None, external="y"),
    )
    return Plan("affine", (Port("x", shape),), (Port("y", shape),), steps, tuple(arena.buffers), arena.size + 4096)


def first_choices(plan: Plan, isa: Isa, threads: int = 1) -> list[Candidate]:
    """The best candidate of the static ranking for every step."""
    return [registry.candidates(step, isa, threads)[0] for step in plan.steps]


def reference(plan: Plan, feeds: dict[str, Array]) -> dict[str, Array]:
    """Every output, by the workloads' own definitions."""
    values: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    roles: Sequence[str] = ("weight", "scale", "shift", "bias")
    for step in plan.steps:
        if step.workload.op == "conv2d":
            addend = [values[t.name] for t in step.inputs[1:]]
            result = step.workload.reference(
                values[step.inputs[0].name], step.constants["weight"], step.constants["bias"], *addend
            )
        else:
            data = [values[t.name] for t in step.inputs] or [feeds[step.external]]
            result = step.workload.reference(*data, *(step.constants[r] for r in roles if r in step.constants))
        if step.output is None:
            outputs[step.external] = result
        else:
            values[step.output.name] = result
    return outputs
