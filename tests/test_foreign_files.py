"""Models as others write them: what converters from TensorFlow and Keras leave, old opsets, weights in other forms.

Each is built here from the structures that such files have; results are compared with onnxruntime's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.frontend import reference
from colonnade.kernels.isa import isa
from colonnade.plan import Plan
from tests.models import Builder, onnxruntime_outputs

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def check(model: onnx.ModelProto, tolerance: float = 1e-5, **options: Any) -> Plan:
    plan = frontend.load(model, **options)
    rng = np.random.default_rng(0)
    feeds = {p.name: rng.standard_normal(p.shape).astype(p.dtype) for p in plan.inputs}
    theirs = onnxruntime_outputs(model, feeds)
    for ours in (reference.run(plan, feeds), Program(plan, isa("portable")).run(feeds)):
        for name, wanted in theirs.items():
            assert ours[name].shape == wanted.shape and np.abs(wanted).max() > 0
            np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    return plan


def kinds(plan: Plan) -> Counter[str]:
    return Counter(step.workload.op for step in plan.steps)


# --- TensorFlow ------------------------------------------------------------------------------------------------------


def inverted_residual(b: Builder, x: str, ins: int, outs: int, stride: int = 1) -> str:
    """A block of MobileNetV3 as tf2onnx leaves it, from [N, H, W, C] to the same: transposes around the convolutions,
    hard-swish and squeeze-and-excite between them in channels-last order, Pad in front of a VALID convolution."""

    def conv(value: str, *sizes: int, **attributes: Any) -> str:
        turned = b.op("Transpose", value, perm=NCHW)
        return str(b.op("Transpose", b.conv(turned, *sizes, **attributes), perm=NHWC))

    def hard_swish(value: str) -> str:
        shifted = b.op("Add", value, b.constant(3.0))
        gate = b.op("Mul", b.op("Clip", shifted, b.constant(0.0), b.constant(6.0)), b.constant(np.full(1, 1 / 6)))
        return str(b.op("Mul", value, gate))

    wide = hard_swish(conv(x, ins, 2 * ins))
    if stride == 2:
        wide = b.op("Pad", wide, b.constant(np.array([0, 0, 0, 0, 0, 1, 1, 0])), b.constant(0.0))
    deep = conv(wide, 2 * ins, 2 * ins, 3, groups=2 * ins, auto_pad="VALID" if stride == 2 else "SAME_UPPER",
                strides=(stride, stride))  # fmt: skip
    # a BatchNorm that was not folded: a product and a sum with constants [C]
    deep = hard_swish(b.op("Add", b.op("Mul", deep, b.random(2 * ins)), b.random(2 * ins)))
    mean = b.op("ReduceMean", deep, axes=(1, 2), keepdims=1)
    gate = conv(b.op("Relu", conv(mean, 2 * ins, 4)), 4, 2 * ins)
    gate = b.op("Mul", b.op("Clip", b.op("Add", gate, b.constant(3.0)), b.constant(0.0), b.constant(6.0)),
                b.constant(1 / 6))  # fmt: skip
    y = conv(b.op("Mul", deep, gate), 2 * ins, outs)
    return str(b.op("Add", y, x)) if stride == 1 and ins == outs else y


def test_transposes_that_tensorflow_leaves_are_folded_away() -> None:
    b = Builder()
    x = inverted_residual(b, b.input("x", (2, 13, 16, 6)), 6, 6)
    y = inverted_residual(b, x, 6, 10, stride=2)
    y = b.op("Concat", y, b.op("Sigmoid", y), axis=3)
    model = b.build(y, b.op("ReduceMax", y, axes=(1, 2), keepdims=0), opset=13)
    assert sum(node.op_type == "Transpose" for node in model.graph.node) == 20
    plan = check(model)
    # in and out; the layers on single pixels are linear
    assert (
        kinds(plan)["take"] + kinds(plan)["reorder"] == 2 and kinds(plan)["linear"] == 4 and kinds(plan)["conv2d"] == 6
    )
    assert not {"elementwise", "reduce"} & set(kinds(plan))


def test_a_classifier_from_tensorflow() -> None:
    """Mean over rows and columns, Squeeze, MatMul and Add; sizes looked up at run time by Shape, Slice and Concat."""
    b = Builder()
    x = b.op("Transpose", b.input("x", ("unk", 12, 12, 3)), perm=NCHW)
    y = b.op("Relu", b.conv(x, 3, 8, 3, strides=(2, 2), auto_pad="SAME_UPPER"))
    mean = b.op("Squeeze", b.op("GlobalAveragePool", y), b.constant(np.array([2, 3])))
    scores = b.op("Softmax", b.op("Add", b.op("MatMul", mean, b.random(8, 5)), b.random(5)), axis=-1)
    back = b.op("Transpose", y, perm=NHWC)
    size = b.op("Slice", b.op("Shape", back), b.constant(np.array([0])), b.constant(np.array([1])))
    flat = b.op("Reshape", back, b.op("Concat", size, b.constant(np.array([-1])), axis=0))
    plan = check(b.build(scores, b.op("MatMul", flat, b.random(288, 4)), opset=15), batch=2)
    assert kinds(plan)["linear"] == 2 and kinds(plan)["conv2d"] == 1


def test_a_transpose_that_others_read_stays() -> None:
    b = Builder()
    y = b.op("Transpose", b.conv(b.input("x", (1, 3, 5, 6)), 3, 4), perm=NHWC)
    other = b.op("LayerNormalization", y, b.random(4), b.random(4))
    back = b.op("Transpose", b.op("Add", b.op("Tanh", y), other), perm=NCHW)
    check(b.build(back, y, opset=17))


@pytest.mark.parametrize("axes, keep", [((1, 2), 1), ((1, 2), 0), ((3,), 0), ((2,), 0), ((-1,), 1), ((1,), 0)])
def test_reductions_behind_a_transpose(axes: tuple[int, ...], keep: int) -> None:
    b = Builder()
    y = b.op("Transpose", b.conv(b.input("x", (2, 3, 5, 6)), 3, 4), perm=NHWC)
    check(b.build(b.op("Sigmoid", b.op("ReduceMean", y, b.constant(np.array(axes)), keepdims=keep)), opset=18))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (6, 4), (1, 1, 1, 4), (5, 6, 1), (2, 5, 6, 4)])
def test_constants_beside_a_transpose(shape: tuple[int, ...]) -> None:
    b = Builder()
    y = b.op("Transpose", b.conv(b.input("x", (2, 3, 5, 6)), 3, 4), perm=NHWC)
    check(b.build(b.op("Tanh", b.op("Sub", b.random(*shape), y)), opset=18))


# --- other ways to write the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(9, 24))
def test_every_opset(opset: int) -> None:
    """Clip, Squeeze, ReduceMean, Pad, Resize, Slice, Softmax, Split and Dropout have changed over time."""

    def ints(*values: int) -> str:
        return b.constant(np.array(values, np.int64))

    b = Builder()
    y = b.batch_norm(b.conv(b.input("x", (1, 3, 12, 12)), 3, 8, 3, pads=(1, 1, 1, 1)), 8)
    limits: tuple[str, ...] = (b.constant(0.0), b.constant(6.0)) if opset >= 11 else ()
    y = b.op("Clip", y, *limits, **({} if opset >= 11 else {"min": 0.0, "max": 6.0}))
    pads = (0, 0, 1, 1, 0, 0, 1, 1)
    y = b.op("Pad", y, ints(*pads)) if opset >= 11 else b.op("Pad", y, pads=pads, mode="constant", value=0.0)
    y = b.conv(y, 8, 8, 3, groups=8, strides=(2, 2))
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    roi = b.constant(np.zeros(0, np.float32))  # before opset 13 it may not be left out
    if opset >= 11:
        y = b.op(
            "Resize", y, roi, scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )
    else:
        y = b.op("Upsample" if opset < 10 else "Resize", y, scales, mode="nearest")
    if opset >= 10:
        y = b.op("Slice", y, ints(0), ints(6), ints(1))
    else:
        y = b.op("Slice", y, starts=(0,), ends=(6,), axes=(1,))
    if opset >= 18:
        first, second = b.op("Split", y, outputs=2, axis=1, num_outputs=2)
    else:
        first, second = b.op("Split", y, outputs=2, axis=1)
    y = b.op("Dropout", b.op("Mul", first, b.op("Sigmoid", second)))
    y = b.op("ReduceMean", y, ints(2, 3)) if opset >= 18 else b.op("ReduceMean", y, axes=(2, 3))
    y = b.op("Squeeze", y, ints(2, 3)) if opset >= 13 else b.op("Squeeze", y, axes=(2, 3))
    weight, bias = b.random(5, 3), b.random(5)
    y = b.op("Softmax", b.op("Gemm", y, weight, bias, transB=1), axis=1)
    check(b.build(y, opset=opset))


def test_weights_of_half_precision() -> None:
    """Inputs and weights float16 all through; and float16 weights behind a Cast in a model of single precision."""
    b = Builder()
    x = b.input("x", (1, 3, 8, 8))
    weight = b.constant((b.rng.standard_normal((6, 3, 3, 3)) / 5).astype(np.float16))
    y = b.op("Relu", b.op("Conv", x, b.op("Cast", weight, to=TensorProto.FLOAT), b.random(6)))
    plan = check(b.build(y))
    assert kinds(plan) == {"convert": 2, "conv2d": 1}
    half = Builder()
    x = half.input("x", (1, 3, 8, 8), TensorProto.FLOAT16)
    weight = half.constant((half.rng.standard_normal((6, 3, 3, 3)) / 5).astype(np.float16))
    y = half.op("Relu", half.op("Conv", x, weight))
    outs = [helper.make_tensor_value_info(y, TensorProto.FLOAT16, None)]
    graph = helper.make_graph(half.nodes, "half", half.inputs, outs, half.constants)
    check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tolerance=2e-3)


def test_weights_in_constant_nodes_and_external_files(tmp_path: Path) -> None:
    b = Builder()
    weight = (b.rng.standard_normal((6, 3, 3, 3)) / 5).astype(np.float32)
    b.nodes.append(helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)))
    b.nodes.append(helper.make_node("Constant", [], ["limit"], value_float=0.5))
    y = b.op("Max", b.op("Conv", b.input("x", (1, 3, 8, 8)), "w", b.random(6, name="bias")), "limit")
    model = b.build(y, opset=13)
    inline = check(model)
    data = dict(save_as_external_data=True, location="weights.bin", size_threshold=0, convert_attribute=True)
    onnx.save(model, tmp_path / "m.onnx", **data)
    assert (tmp_path / "weights.bin").stat().st_size >= weight.nbytes
    outside = frontend.load(tmp_path / "m.onnx")
    assert [s.workload for s in outside.steps] == [s.workload for s in inline.steps]
    for ours, theirs in zip(outside.steps, inline.steps, strict=True):
        for role, array in theirs.constants.items():
            np.testing.assert_array_equal(ours.constants[role], array)


def test_several_inputs_and_outputs_of_free_sizes() -> None:
    b = Builder()
    image, vector = b.input("image", ("n", 3, "h", "w")), b.input("vector", ("n", 4))
    y = b.op("Relu", b.conv(image, 3, 4, 3, pads=(1, 1, 1, 1)))
    gate = b.op("Unsqueeze", b.op("Sigmoid", vector), b.constant(np.array([2, 3])))
    model = b.build(b.op("Mul", y, gate), b.op("MatMul", vector, b.random(4, 7)))
    plan = check(model, batch=3, input_shapes={"image": (1, 3, 9, 11)})
    assert [p.shape for p in plan.inputs] == [(3, 3, 9, 11), (3, 4)]


def test_both_exporters_of_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8),
                         nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.GELU())  # fmt: skip
    ops = []
    for dynamo in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = exported(torch, body.eval(), dynamo)
        ops.append(kinds(check(model)))
    assert ops[0] == ops[1]


def exported(torch: Any, module: Any, dynamo: bool) -> onnx.ModelProto:
    """By the exporter of torch.export, or by the older one that traces."""
    import io

    x = torch.zeros(1, 3, 16, 16)
    if dynamo:
        return torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17)
    return onnx.load_from_string(file.getvalue())
