"""Large maps a few channels at a time: the same numbers, whole tiles, less memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.codegen.in_process import Program
from colonnade.frontend import load, parts, reference
from colonnade.frontend.feeding import LayoutCosts
from colonnade.kernels.isa import isa
from colonnade.pattern import discover
from colonnade.plan import Plan
from colonnade.workload import Conv2d, matrix
from tests.models import Builder, onnxruntime_outputs

PORTABLE = isa("portable")


def pruned(rng: np.random.Generator, out: int, inputs: int, kernel: int, tile: int) -> npt.NDArray[np.float32]:
    """Weights whose tiles are rows from anywhere."""
    k = inputs * kernel * kernel
    w = np.zeros((out, k), np.float32)
    for rows in np.array_split(rng.permutation(out), -(-out // tile)):
        columns = rng.choice(k, max(1, k // 3), replace=False)
        w[np.ix_(rows, columns)] = rng.standard_normal((rows.size, columns.size))
    return w.reshape(out, inputs, kernel, kernel)


def network(kind: str, channels: int, size: int, batch: int, tile: int, seed: int) -> onnx.ModelProto:
    b, rng = Builder(seed), np.random.default_rng(seed)
    x = b.input("x", (batch, 3, size, size))
    w = pruned(rng, channels, 3, 3, tile) if tile else rng.standard_normal((channels, 3, 3, 3)).astype(np.float32)
    y = b.op("Conv", x, b.constant(w), b.random(channels), pads=[1, 1, 1, 1], strides=[2, 2])
    y = large = b.op("Relu", y)
    if kind == "pool":
        y = b.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    else:
        stride = 2 if kind == "strided" else 1
        y = b.op(
            "Conv", y, b.random(channels, 1, 3, 3), b.random(channels),
            pads=[1, 1, 1, 1], strides=[stride, stride], group=channels,
        )  # fmt: skip
    # read as a whole, as a residual, and beside another tensor
    z = b.op("Relu", b.op("Add", b.conv(y, channels, channels, 1), y))
    z = b.conv(b.op("Concat", z, y, axis=1), 2 * channels, 4, 3, pads=(1, 1, 1, 1))
    return b.build(z, large) if kind == "shared" else b.build(z)


def cut(model: onnx.ModelProto, large: int = 0, part: int = 1) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LARGE", large)
        patch.setattr(parts, "PART", part)
        return load(model)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["pool", "depthwise", "strided"]),
    channels=st.integers(9, 40),
    size=st.integers(5, 19),
    batch=st.integers(1, 2),
    tile=st.sampled_from([0, 3, 8, 20]),
    part=st.sampled_from([1, 5000]),
    seed=st.integers(0, 99),
)
def test_parts_give_the_same(kind: str, channels: int, size: int, batch: int, tile: int, part: int, seed: int) -> None:
    model = network(kind, channels, size, batch, tile, seed)
    plan = cut(model, part=part)
    x = np.random.default_rng(seed).standard_normal((batch, 3, size, size)).astype(np.float32)
    wanted = onnxruntime_outputs(model, {"x": x})
    for found in (reference.run(plan, {"x": x}), Program(plan, PORTABLE).run({"x": x})):
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4 * float(np.abs(array).max()))


@pytest.mark.parametrize("tile", [0, 8])
def test_a_map_is_read_where_it_was_just_written(tile: int) -> None:
    model = network("pool", 32, 33, 1, tile, 0)
    whole, plan = load(model), cut(model)
    first = [s for s in plan.steps if isinstance(s.workload, Conv2d) and s.workload.in_channels == 3]
    assert [s.workload.out_channels for s in first] == [8] * 4  # type: ignore[attr-defined]
    assert all(discover(matrix(s.constants["weight"])).tiles[0].rows.size == 8 for s in first)
    # each part's map stands where that of the one before did, and its reader comes next
    assert len({int(s.output.offsets[0]) for s in first if s.output is not None}) == 1
    index = {s.name: i for i, s in enumerate(plan.steps)}
    assert all(index[b.name] - index[a.name] == 2 for a, b in pairwise(first))
    assert plan.arena < whole.arena
    assert len(cut(model, large=4 * 32 * 17 * 17).steps) == len(whole.steps)


def test_a_map_that_somebody_else_reads_stays_whole() -> None:
    model = network("shared", 32, 33, 1, 0, 0)
    assert len(cut(model).steps) == len(load(model).steps)


def test_a_part_of_one_channel_writes_no_panels() -> None:
    """It is a convolution of one group and one channel, and its plane is one of many that its reader multiplies."""
    b = Builder()
    y = b.op("Relu", b.conv(b.input("x", (1, 3, 70, 103)), 3, 65, 1))
    y = b.conv(y, 65, 65, 3, groups=65, pads=(1, 1, 1, 1))
    model = b.build(b.conv(y, 65, 8, 1))
    plan = load(model, layout_costs=LayoutCosts(plane=1.0))
    assert [s.workload.out_channels for s in plan.steps if isinstance(s.workload, Conv2d)].count(1) == 2
    x = np.random.default_rng(0).standard_normal((1, 3, 70, 103)).astype(np.float32)
    for name, wanted in onnxruntime_outputs(model, {"x": x}).items():
        found = Program(plan, PORTABLE).run({"x": x})[name]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
