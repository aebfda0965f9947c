"""Models whose 3x3 convolutions have transformed weights: as ONNX files that any runtime runs, and imported."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from colonnade.codegen.in_process import Program
from colonnade.errors import UserError
from colonnade.frontend import load, reference
from colonnade.kernels.isa import isa
from colonnade.onnx_winograd import DOMAIN, fits, rewrite, size_of
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.onnx_file import prune_file
from colonnade.workload import WinogradConv2d
from colonnade.workload.winograd import SIZES, seen
from tests.models import Builder, onnxruntime_outputs

SHAPE = (2, 3, 13, 18)


def network(opset: int = 18, limits: tuple[float, float] = (0.0, 6.0)) -> onnx.ModelProto:
    """A convolution and BatchNorm, a ReLU, a residual block with a Clip, and a pool on sizes that no tile divides."""
    b = Builder()
    x = b.op("Relu", b.batch_norm(b.op("Conv", b.input("x", SHAPE), b.random(10, 3, 3, 3), pads=[1] * 4), 10))
    y = b.op("Relu", b.op("Conv", x, b.random(9, 10, 3, 3, scale=0.2), b.random(9), pads=[1] * 4))
    y = b.op("Conv", y, b.random(10, 9, 3, 3, scale=0.2), pads=[1] * 4)
    y = b.op("Clip", b.op("Add", y, x), *(b.constant(np.float32(limit)) for limit in limits))
    return b.build(b.op("GlobalAveragePool", y), opset=opset)


def transformed(model: onnx.ModelProto, size: str) -> onnx.ModelProto:
    """All its convolutions rewritten, and some columns taken out of one of them."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(fits(node, stored[node.input[1]]) for node in convolutions)
    rewrite(model, convolutions, size)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("size", SIZES)
def test_any_runtime_gives_the_same_answers(size):
    feeds = {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}
    before = onnxruntime_outputs(network(), feeds)
    for name, found in onnxruntime_outputs(transformed(network(), size), feeds).items():
        assert np.allclose(found, before[name], atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(0.0, 6.0), (0.5, 2.0)])
def test_imported_with_columns_gone(size, limits):
    """BatchNorm, ReLU, the sum and a Clip through 0 end in the convolution; one that would move the halos does not."""
    model = transformed(network(limits=limits), size)
    rng, m = np.random.default_rng(1), SIZES[size]
    for tensor in model.graph.initializer:
        if tuple(tensor.dims[2:]) == seen(m):
            weight = np.array(onnx.numpy_helper.to_array(tensor))
            weight[:8, :, rng.random(seen(m)) < 0.5] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    feeds = {"x": rng.standard_normal(SHAPE).astype(np.float32)}
    plan = load(model)
    found = [step.workload for step in plan.steps if isinstance(step.workload, WinogradConv2d)]
    assert [conv.m for conv in found] == [m] * 3 and all(
        0 < conv.kept_macs < conv.macs * 8 / math.prod(m) for conv in found[1:]
    )
    assert [conv.epilogue.residual for conv in found] == [False, False, True]
    assert len(plan.steps) == (6 if limits[0] == 0 else 7)
    (expected,) = onnxruntime_outputs(model, feeds).values()
    runs = [reference.run(plan, feeds), *(Program(plan, isa(name)).run(feeds) for name in ("portable", "avx2"))]
    for outputs in runs:
        (found_,) = outputs.values()
        assert np.allclose(found_, expected, atol=2e-4)


def test_which_nodes_fit():
    model = network()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    assert fits(node, stored[node.input[1]])
    for changed in ({"strides": [2, 2]}, {"pads": [1, 1, 0, 1]}, {"dilations": [2, 2]}, {"group": 3}):
        other = onnx.helper.make_node("Conv", list(node.input), ["y"], **{"pads": [1] * 4, **changed})
        assert not fits(other, stored[node.input[1]])
    assert not fits(node, onnx.numpy_helper.from_array(np.zeros((4, 3, 5, 5), np.float32)))
    assert (
        size_of(DOMAIN, "WinogradConv4x4") == "4x4" and size_of("", "WinogradConv4x4") == size_of(DOMAIN, "Conv") == ""
    )


def test_an_old_opset_is_refused(tmp_path):
    model = network(opset=12)
    with pytest.raises(UserError, match="opset 12: transformed weights need 13"):
        rewrite(model, [node for node in model.graph.node if node.op_type == "Conv"], "2x2")
    onnx.save(model, tmp_path / "old.onnx")
    x = {"x": np.zeros((8, *SHAPE[1:]), np.float32)}
    out, pattern = tmp_path / "out.onnx", ColumnPattern(0.5, winograd="2x2")
    with pytest.raises(UserError, match=r"old\.onnx is of opset 12: transformed weights need 13"):
        prune_file(tmp_path / "old.onnx", out, pattern, method="obs", calibration=x)
