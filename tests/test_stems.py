"""Convolutions joined with the pool behind them: the same numbers, and only where nobody else reads the map between."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from colonnade.codegen.in_process import Program
from colonnade.frontend import load, reference
from colonnade.kernels.isa import isa
from colonnade.workload import Conv2d, ConvPool, Pool2d
from tests.models import Builder, onnxruntime_outputs
from tests.test_parts import pruned

PORTABLE = isa("portable")


def stem(
    batch: int = 1, shared: bool = False, sparse: bool = False, kernel: int = 7, channels: int = 3
) -> onnx.ModelProto:
    b, rng = Builder(7), np.random.default_rng(7)
    x = b.input("x", (batch, channels, 41, 53))
    w = pruned(rng, 16, channels, kernel, 8) if sparse else rng.standard_normal((16, channels, kernel, kernel))
    y = b.op("Conv", x, b.constant(w.astype(np.float32)), b.random(16), pads=[kernel // 2] * 4, strides=[2, 2])
    y = wide = b.op("Relu", y)
    y = b.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    z = b.conv(y, 16, 8, 3, pads=(1, 1, 1, 1))
    return b.build(z, wide) if shared else b.build(z)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernel", [5, 7])
def test_a_stem_is_one_step(batch: int, kernel: int) -> None:
    model = stem(batch, kernel=kernel)
    plan = load(model)
    kinds = [type(step.workload) for step in plan.steps]
    assert ConvPool in kinds and Pool2d not in kinds
    x = np.random.default_rng(0).standard_normal((batch, 3, 41, 53)).astype(np.float32)
    (wanted,) = onnxruntime_outputs(model, {"x": x}).values()
    for found in (reference.run(plan, {"x": x}), Program(plan, PORTABLE).run({"x": x})):
        (array,) = found.values()
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("options", [{"shared": True}, {"sparse": True}, {"kernel": 3}, {"channels": 8}])
def test_others_stay_two(options: dict[str, int]) -> None:
    kinds = [type(step.workload) for step in load(stem(**options)).steps]
    assert ConvPool not in kinds and Pool2d in kinds and Conv2d in kinds
