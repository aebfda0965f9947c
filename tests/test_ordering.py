"""Channels between layers in the order of the tiles that write them: who takes it, who does not, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from colonnade.codegen.in_process import Program
from colonnade.frontend import load, reference
from colonnade.kernels.isa import isa
from colonnade.onnx_winograd import rewrite
from colonnade.pattern import discover
from colonnade.plan import Plan
from colonnade.workload import Conv2d, matrix
from tests.models import Builder, onnxruntime_outputs
from tests.test_parts import pruned

PORTABLE = isa("portable")
RNG = np.random.default_rng(3)


class Net(Builder):
    """Builder of such convolutions."""

    def grouped(self, x: str, ic: int, oc: int, kernel: int = 1, stride: int = 1, relu: bool = True) -> str:
        w, pad = self.constant(pruned(RNG, oc, ic, kernel, 8)), [kernel // 2] * 4
        y = self.op("Conv", x, w, self.random(oc), pads=pad, strides=[stride, stride])
        return self.op("Relu", y) if relu else y


def ordered(plan: Plan) -> list[bool]:
    """Of every pruned convolution, whether rows of its tiles are neighbours."""
    found = []
    for step in plan.steps:
        if isinstance(step.workload, Conv2d) and step.workload.groups == 1:
            tiled = discover(matrix(step.constants["weight"]))
            if not tiled.is_dense:
                found.append(all(np.ptp(tile.rows) == len(tile.rows) - 1 for tile in tiled.tiles))
    return found


def same(model: onnx.ModelProto) -> Plan:
    """The plan, which gives what onnxruntime does."""
    plan = load(model)
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = onnxruntime_outputs(model, {"x": x})
    for found in (reference.run(plan, {"x": x}), Program(plan, PORTABLE).run({"x": x})):
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=2e-5 * float(np.abs(array).max()))
    return plan


def test_a_bottleneck_with_all_that_follows_channels() -> None:
    """A residual stream has the order of the convolution that begins it; what adds to it cannot have its own."""
    b = Net(3)
    x = b.input("x", (2, 16, 12, 10))
    short = b.grouped(x, 16, 32, stride=2, relu=False)
    y = b.grouped(x, 16, 24)
    y = b.op("MaxPool", y, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    y = b.grouped(y, 24, 24, kernel=3, stride=2)
    y = b.op("Relu", b.op("Add", b.grouped(y, 24, 32, relu=False), short))
    z = b.grouped(y, 32, 16)
    w = b.constant(RNG.standard_normal((16, 1, 3, 3)).astype(np.float32))
    z = b.op("Relu", b.op("Conv", z, w, b.random(16), group=16, pads=[1, 1, 1, 1]))
    y = b.op("Relu", b.op("Add", b.grouped(z, 16, 32, relu=False), y))
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    model = b.build(b.op("Gemm", y, b.constant(RNG.standard_normal((7, 32)).astype(np.float32)), b.random(7), transB=1))
    assert sorted(ordered(same(model))) == [False, False, True, True, True, True]


def after(b: Net, what: str, y: str) -> tuple[str, ...]:
    """What reads a convolution's 16 channels: outputs of the model."""
    last: dict[str, Callable[[], tuple[str, ...]]] = {
        "convolution": lambda: (b.grouped(y, 16, 8),),
        "output": lambda: (y, b.grouped(y, 16, 8)),
        "split": lambda: (b.grouped(b.op("Slice", y, *map(b.constant, np.int64([[4], [12], [1]]))), 8, 8),),
        "concat": lambda: (b.grouped(b.op("Concat", y, y, axis=1), 32, 8),),
        "groups": lambda: (b.op("Conv", y, b.random(8, 8, 1, 1), b.random(8), group=2),),
        "slopes": lambda: (b.op("PRelu", y, b.random(16, 1, 1)),),
        "softmax": lambda: (b.grouped(b.op("Softmax", y, axis=1), 16, 8),),
        "two matrices": lambda: (
            b.op("MatMul", b.op("Reshape", y, b.constant(np.int64([1, -1]))), b.random(16 * 63, 3)),
        ),
    }
    return last[what]()


@pytest.mark.parametrize(
    "what", ["convolution", "output", "split", "concat", "groups", "slopes", "softmax", "two matrices"]
)
def test_an_order_that_others_see_stays(what: str) -> None:
    b = Net(4)
    y = b.grouped(b.input("x", (1, 16, 7, 9)), 16, 16)
    assert ordered(same(b.build(*after(b, what, y))))[0] == (what == "convolution")


@pytest.mark.parametrize("size", ["2x2", "4x1"])
def test_transformed_weights_have_the_order_of_their_tiles(size: str) -> None:
    b = Net(5)
    y = b.op("Conv", b.input("x", (1, 8, 9, 9)), b.random(16, 8, 3, 3), b.random(16), pads=[1, 1, 1, 1])
    model = b.build(b.grouped(b.op("Relu", y), 16, 8))
    rewrite(model, [model.graph.node[0]], size)
    name = model.graph.node[0].input[1]
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    rows = onnx.numpy_helper.to_array(tensor).copy()
    mask = pruned(RNG, 16, 8 * rows[0, 0].size, 1, 8).reshape(16, 8, *rows.shape[2:]) != 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(mask, rows, 0).astype(np.float32), name))
    assert ordered(same(model))[0]


def test_the_model_that_was_given_stays_as_it_was() -> None:
    b = Net(6)
    model = b.build(b.grouped(b.grouped(b.input("x", (1, 16, 5, 5)), 16, 16), 16, 8))
    before = model.SerializeToString()
    first, second = load(model), load(model)
    assert model.SerializeToString() == before
    for one, other in zip(first.steps, second.steps, strict=True):
        assert all(np.array_equal(one.constants[name], other.constants[name]) for name in one.constants)
