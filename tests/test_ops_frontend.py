"""Operators beyond convolution networks, imported and run in kernels, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.errors import UserError
from colonnade.frontend import reference
from colonnade.kernels.isa import isa
from colonnade.plan import Plan
from tests.models import Builder, onnxruntime_outputs


def check(model: onnx.ModelProto, tolerance: float = 1e-5, kernels: bool = True, **given: Any) -> Plan:
    """Import; interpret on the planned memory and run in portable kernels; compare both with onnxruntime."""
    plan = frontend.load(model)
    rng = np.random.default_rng(1)
    feeds = {p.name: given.get(p.name, rng.standard_normal(p.shape).astype(p.dtype)) for p in plan.inputs}
    theirs = onnxruntime_outputs(model, feeds)
    found = [reference.run(plan, feeds)]
    if kernels:
        found.append(Program(plan, isa("portable")).run(feeds))
    for ours in found:
        for name, wanted in theirs.items():
            assert ours[name].shape == wanted.shape
            largest = float(np.abs(wanted).max()) or 1.0
            np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=tolerance * largest)
    return plan


def ops(plan: Plan) -> list[str]:
    """Operators without imports and exports."""
    return [s.workload.op for s in plan.steps if not s.external]


# --- functions and epilogues ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, attributes",
    [
        ("Sigmoid", {}), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}), ("HardSwish", {}), ("Tanh", {}), ("Erf", {}),
        ("Elu", {"alpha": 1.5}), ("LeakyRelu", {"alpha": 0.2}), ("Gelu", {}), ("Gelu", {"approximate": "tanh"}),
        ("Mish", {}), ("Softplus", {}), ("Exp", {}), ("Selu", {}),
    ],
)  # fmt: skip
def test_a_function_ends_the_convolution_before_it(kind: str, attributes: dict[str, Any]) -> None:
    b = Builder()
    y = b.conv(b.input("x", (2, 3, 7, 9)), 3, 5, 3, pads=(1, 1, 1, 1))
    plan = check(b.build(b.op(kind, y, **attributes), opset=20))
    assert ops(plan) == ["conv2d"]


def test_a_function_behind_limits_and_limits_behind_a_function() -> None:
    b = Builder()
    y = b.op("Relu", b.conv(b.input("x", (1, 3, 5, 5)), 3, 4))
    plan = check(b.build(b.op("Relu", b.op("Elu", b.op("Sigmoid", y)))))
    assert ops(plan) == ["conv2d", "unary", "affine"] or ops(plan) == ["conv2d", "unary"]


def silu(b: Builder, x: str) -> str:
    return str(b.op("Mul", x, b.op("Sigmoid", x)))


def hard_swish(b: Builder, x: str) -> str:
    gate = b.op("Clip", b.op("Add", x, b.constant(3.0)), b.constant(0.0), b.constant(6.0))
    return str(b.op("Div", b.op("Mul", x, gate), b.constant(6.0)))


def mish(b: Builder, x: str) -> str:
    return str(b.op("Mul", x, b.op("Tanh", b.op("Softplus", x))))


def gelu_half_first(b: Builder, x: str) -> str:
    gate = b.op("Add", b.op("Erf", b.op("Div", x, b.constant(np.float32(np.sqrt(2))))), b.constant(1.0))
    return str(b.op("Mul", b.op("Mul", x, b.constant(0.5)), gate))


def gelu_half_last(b: Builder, x: str) -> str:
    gate = b.op("Add", b.op("Erf", b.op("Mul", x, b.constant(np.float32(np.sqrt(0.5))))), b.constant(1.0))
    return str(b.op("Mul", b.op("Mul", x, gate), b.constant(0.5)))


@pytest.mark.parametrize("written", [silu, hard_swish, mish, gelu_half_first, gelu_half_last])
def test_functions_written_as_several_nodes(written: Any) -> None:
    b = Builder()
    y = b.conv(b.input("x", (1, 3, 6, 7)), 3, 4, 3)
    plan = check(b.build(written(b, y)))
    assert ops(plan) == ["conv2d"]


def test_what_only_looks_like_a_function_stays_what_it_is() -> None:
    b = Builder()
    x = b.input("x", (1, 3, 6, 7))
    other = b.op("Mul", b.conv(x, 3, 3), b.op("Sigmoid", b.conv(x, 3, 3)))
    erf = b.op("Add", b.op("Erf", b.op("Div", x, b.constant(1.5))), b.constant(1.0))
    check(b.build(other, b.op("Mul", b.op("Mul", x, b.constant(0.5)), erf)))


def test_layer_norm_written_as_several_nodes() -> None:
    b = Builder()
    x = b.input("x", (2, 5, 24))
    less = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    variance = b.op("ReduceMean", b.op("Pow", less, b.constant(2.0)), axes=[-1])
    normal = b.op("Div", less, b.op("Sqrt", b.op("Add", variance, b.constant(1e-5))))
    plan = check(b.build(b.op("Add", b.op("Mul", normal, b.random(24)), b.random(24)), opset=13))
    assert ops(plan) == ["normalise"]


def test_squeeze_and_excite() -> None:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 8, 9)), 3, 8, 3))
    gate = b.conv(b.op("Relu", b.conv(b.op("GlobalAveragePool", x), 8, 2)), 2, 8)
    plan = check(b.build(b.op("Mul", x, b.op("HardSigmoid", gate))))
    assert ops(plan) == ["conv2d", "global_pool", "linear", "linear", "binary"]


def test_prelu_of_planes() -> None:
    b = Builder()
    y = b.conv(b.input("x", (2, 3, 5, 6)), 3, 4)
    check(b.build(b.op("PRelu", y, b.random(4, 1, 1)), b.op("PRelu", "x", b.constant([0.1]))))


# --- pixels ---------------------------------------------------------------------------------------------------------

TRANSFORMS = ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_in_a_network(mode: str, transform: str) -> None:
    """Planes in, planes out, between convolutions."""
    b = Builder()
    y = b.conv(b.input("x", (2, 3, 6, 7)), 3, 4, 3, pads=(1, 1, 1, 1))
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transform}
    if mode == "nearest":
        attributes["nearest_mode"] = "floor"
    up = b.op("Resize", y, "", "", b.constant(np.array([2, 4, 12, 14], np.int64)), **attributes)
    down = b.op("Resize", y, "", "", b.constant(np.array([2, 4, 3, 5], np.int64)), **attributes)
    plan = check(b.build(b.conv(up, 4, 3, 3, pads=(1, 1, 1, 1)), b.conv(down, 4, 3, 1)))
    assert "convert" not in ops(plan)
    # whole factors repeat pixels, where the transform says so
    assert ("repeat" in ops(plan)) == (mode == "nearest" and transform == "asymmetric")


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "floor"])
@pytest.mark.parametrize("scales, repeats", [((3, 2), True), ((1, 2), True), ((2.5, 2), False)])
def test_whole_factors_repeat_pixels(scales: tuple[float, float], repeats: bool, rounding: str) -> None:
    b = Builder()
    y = b.conv(b.input("x", (2, 3, 6, 7)), 3, 4, 3, pads=(1, 1, 1, 1))
    y = b.op("Resize", y, "", b.constant([1.0, 1, *scales]), mode="nearest", nearest_mode=rounding)
    plan = check(b.build(b.conv(y, 4, 3, 3, pads=(1, 1, 1, 1))))
    assert ("repeat" in ops(plan)) == (repeats and rounding == "round_prefer_floor")


def test_fpn() -> None:
    b = Builder()
    fine = b.op("Relu", b.conv(b.input("x", (1, 3, 16, 16)), 3, 4, 3, pads=(1, 1, 1, 1)))
    coarse = b.op("Relu", b.conv(fine, 4, 8, 3, strides=(2, 2), pads=(1, 1, 1, 1)))
    up = b.op("Resize", b.conv(coarse, 8, 4), "", b.constant([1.0, 1, 2, 2]), mode="nearest", nearest_mode="floor",
              coordinate_transformation_mode="asymmetric")  # fmt: skip
    check(b.build(b.conv(b.op("Add", b.conv(fine, 4, 4), up), 4, 4, 3, pads=(1, 1, 1, 1))))


def test_yolo_neck() -> None:
    """Split, SiLU, pools with stride 1, Concat, Resize."""
    b = Builder()
    y = silu(b, b.conv(b.input("x", (1, 3, 12, 10)), 3, 8, 3, pads=(1, 1, 1, 1)))
    left, right = b.op("Split", y, axis=1, outputs=2, num_outputs=2)
    pools = [left]
    for _ in range(3):
        pools.append(b.op("MaxPool", pools[-1], kernel_shape=(5, 5), pads=(2, 2, 2, 2)))
    z = silu(b, b.conv(b.op("Concat", *pools, right, axis=1), 20, 8))
    z = b.op("Resize", z, "", b.constant([1.0, 1, 2, 2]), mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric")  # fmt: skip
    check(b.build(b.conv(z, 8, 5)))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(mode: str) -> None:
    b = Builder()
    y = b.op("Relu", b.conv(b.input("x", (2, 3, 6, 7)), 3, 4))
    pads = b.constant(np.array([0, 0, 1, 2, 0, 0, 3, 1], np.int64))
    plan = check(b.build(b.op("MaxPool", b.op("Pad", y, pads, mode=mode), kernel_shape=(2, 2)), opset=18))
    assert ops(plan) == ["conv2d", "take", "pool2d"]


def test_pad_with_a_number() -> None:
    b = Builder()
    pads = b.constant(np.array([0, 1, 1, 2, 1, 0, 3, 1], np.int64))
    check(b.build(b.op("Pad", b.input("x", (2, 3, 6, 7)), pads, b.constant(-1.5))))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_between_convolutions(mode: str) -> None:
    b = Builder()
    y = b.op("DepthToSpace", b.conv(b.input("x", (2, 3, 5, 6)), 3, 12), blocksize=2, mode=mode)
    y = b.conv(y, 3, 3, 3, pads=(1, 1, 1, 1))
    check(b.build(b.op("SpaceToDepth", y, blocksize=2)))


def test_slices_and_transposes_of_pixels() -> None:
    b = Builder()
    x = b.input("x", (2, 4, 9, 8))
    y = b.op("Slice", b.conv(x, 4, 4), b.constant([1, 2]), b.constant([8, -1]), b.constant([2, 3]), b.constant([2, 1]))
    turned = b.op("Transpose", y, perm=(0, 1, 3, 2))
    check(b.build(b.conv(turned, 4, 3), b.op("Transpose", x, perm=(0, 2, 3, 1)), b.op("Slice", x, b.constant([-1]),
          b.constant([-100]), b.constant([3]), b.constant([-1]))))  # fmt: skip


def test_nhwc_input_is_imported_at_once() -> None:
    """As TensorFlow's converter writes it: transposed once at the beginning and once at the end."""
    b = Builder()
    x = b.op("Transpose", b.input("x", (2, 9, 8, 3)), perm=(0, 3, 1, 2))
    y = b.op("Relu", b.conv(x, 3, 4, 3, pads=(1, 1, 1, 1)))
    plan = check(b.build(b.op("Transpose", y, perm=(0, 2, 3, 1))))
    assert ops(plan).count("reorder") == 2 and "take" not in ops(plan)


# --- dense arrays ---------------------------------------------------------------------------------------------------


def attention(b: Builder, x: str, tokens: int, width: int, heads: int) -> str:
    part = width // heads
    split = b.constant(np.array([0, tokens, heads, part], np.int64))

    def projected() -> str:
        product = b.op("MatMul", x, b.random(width, width, scale=width**-0.5))
        return str(b.op("Reshape", b.op("Add", product, b.random(width)), split))

    q, k, v = projected(), projected(), projected()
    q, v = (b.op("Transpose", t, perm=(0, 2, 1, 3)) for t in (q, v))
    scores = b.op("Div", b.op("MatMul", q, b.op("Transpose", k, perm=(0, 2, 3, 1))), b.constant(float(part) ** 0.5))
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=(0, 2, 1, 3))
    joined = b.op("Reshape", mixed, b.constant(np.array([0, tokens, width], np.int64)))
    return str(b.op("MatMul", joined, b.random(width, width, scale=width**-0.5)))


def test_transformer_block() -> None:
    b = Builder()
    x = b.input("x", (2, 7, 24))
    y = b.op("LayerNormalization", x, b.random(24), b.random(24))
    x2 = b.op("Add", x, attention(b, y, 7, 24, 3))
    y = b.op("LayerNormalization", x2, b.random(24), b.random(24))
    y = b.op("Gelu", b.op("Add", b.op("MatMul", y, b.random(24, 48, scale=0.2)), b.random(48)))
    y = b.op("Add", b.op("MatMul", y, b.random(48, 24, scale=0.2)), b.random(24))
    plan = check(b.build(b.op("Add", x2, y), opset=20))
    assert ops(plan).count("linear") == 6 and ops(plan).count("matmul") == 2


def test_embeddings_and_a_mask() -> None:
    """Whole numbers in: looked up, compared, cast."""
    b = Builder()
    ids = b.input("ids", (2, 6), TensorProto.INT64)
    mask = b.input("mask", (2, 6), TensorProto.INT64)
    x = b.op("Add", b.op("Gather", b.random(11, 8), ids), b.random(1, 6, 8))
    hidden = b.op("Sub", b.constant(1.0), b.op("Cast", mask, to=TensorProto.FLOAT))
    scores = b.op("MatMul", x, b.op("Transpose", x, perm=(0, 2, 1)))
    far = b.op("Mul", b.op("Unsqueeze", hidden, b.constant(np.array([1], np.int64))), b.constant(-1e4))
    y = b.op("MatMul", b.op("Softmax", b.op("Add", scores, far), axis=-1), x)
    chosen = np.array([[0, 10, 3, 3, -1, 7], [1, 2, 3, 4, 5, 6]])
    check(b.build(y), ids=chosen, mask=np.array([[1] * 6, [1, 1, 1, 0, 0, 0]]))


def test_no_convolution_several_inputs_and_outputs() -> None:
    b = Builder()
    x, y = b.input("x", (3, 5)), b.input("y", (1, 5))
    z = b.op("Mul", x, y)
    check(b.build(z, b.op("ReduceSum", z, b.constant([1]), keepdims=0), b.op("Where", b.op("Greater", x, y), x, y)))


def test_a_constant_output() -> None:
    b = Builder()
    b.input("x", (2, 3))
    shape = b.op("Shape", b.op("Relu", "x"))
    model = b.build(b.op("Relu", "x"), b.op("Cast", shape, to=TensorProto.FLOAT))
    check(model)


def test_half_precision_models_are_computed_in_single() -> None:
    b = Builder()
    x = b.input("x", (1, 3, 6, 6), TensorProto.FLOAT16)
    weight = b.constant(b.rng.standard_normal((4, 3, 3, 3)).astype(np.float16))
    y = b.op("Relu", b.op("Conv", x, weight))
    outs = [onnx.helper.make_tensor_value_info(y, TensorProto.FLOAT16, None)]
    graph = onnx.helper.make_graph(b.nodes, "half", b.inputs, outs, b.constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    plan = check(model, tolerance=2e-3)
    assert plan.inputs[0].dtype == plan.outputs[0].dtype == "float16"


def test_one_dimensional_convolution() -> None:
    b = Builder()
    x = b.input("x", (2, 3, 17))
    weight = b.random(4, 3, 5, name="c.weight")
    y = b.op("Relu", b.op("Conv", x, weight, strides=(2,), pads=(2, 2), dilations=(1,)))
    check(b.build(b.op("MaxPool", y, kernel_shape=(3,), strides=(2,))))


def test_old_opsets() -> None:
    """Limits, axes and pads as attributes, softmax over all axes from one on."""
    b = Builder()
    y = b.op("Clip", b.conv(b.input("x", (1, 3, 6, 7)), 3, 4, 3), min=0.0, max=6.0)
    y = b.op("Unsqueeze", b.op("Squeeze", b.op("ReduceMean", y, axes=[2, 3]), axes=[2, 3]), axes=[2])
    check(b.build(b.op("Softmax", y, axis=1), opset=9))


def typed(b: Builder, *outputs: tuple[str, int]) -> onnx.ModelProto:
    """A model whose outputs have types of their own."""
    outs = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
    graph = onnx.helper.make_graph(b.nodes, "typed", b.inputs, outs, b.constants)
    opsets = [onnx.helper.make_opsetid("", 18)]
    return onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


@pytest.mark.parametrize("perm", [(1, 3, 2, 0), (2, 1, 3, 0), (3, 2, 1, 0), (0, 2, 3, 1)])
def test_large_planes_with_any_axis_last(perm: tuple[int, ...]) -> None:
    """Tables of more than 8,192 rows of one element."""
    b = Builder()
    check(b.build(b.op("Transpose", b.op("Relu", b.input("x", (1, 48, 16, 17))), perm=perm)), kernels=True)


@pytest.mark.parametrize("part", ["split", "slice"])
def test_the_first_part_of_reshaped_planes(part: str) -> None:
    """As a detection head parts boxes from scores."""
    b = Builder()
    y = b.conv(b.input("x", (1, 3, 6, 7)), 3, 9, 1)
    rows = b.op("Reshape", y, b.constant(np.array([0, 0, -1])))
    if part == "split":
        outputs = b.op("Split", rows, b.constant(np.array([4, 5])), axis=1, outputs=2)
    else:
        outputs = [b.op("Slice", rows, *(b.constant(np.array([at])) for at in (0, 4, 1)))]
    check(b.build(*outputs), kernels=True)


@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 9), (2, 2, 4, 5, 9), (2, 8, 1, 5, 9)])
def test_batch_norm_of_planes_with_more_axes(shape: tuple[int, ...]) -> None:
    b = Builder()
    y = b.op("Reshape", b.op("Relu", b.input("x", (2, 8, 5, 9))), b.constant(np.array(shape)))
    check(b.build(b.batch_norm(y, shape[1])), kernels=True)


@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (4,), ()])
def test_power_by_one_number_of_more_axes(shape: tuple[int, ...]) -> None:
    b = Builder()
    x = b.op("Abs", b.input("x", shape))
    check(b.build(b.op("Pow", x, b.constant(np.full((1, 1, 1, 1, 1), 1.5)))), kernels=True)


def test_a_constant_is_reshaped_whatever_the_batch() -> None:
    b = Builder()
    y = b.conv(b.input("x", (1, 4, 6, 6)), 4, 4, 1)
    scale = b.op("Reshape", b.random(4), b.constant(np.array([1, 4, 1, 1])))
    rows = b.op("Reshape", b.op("Mul", y, scale), b.constant(np.array([1, -1])))
    assert frontend.load(b.build(rows), batch=3).outputs[0].shape == (3, 144)


@pytest.mark.parametrize("kind", ["SpaceToDepth", "DepthToSpace"])
def test_blocks_that_do_not_divide(kind: str) -> None:
    """Which no shape inference may have seen."""
    node = onnx.helper.make_node(kind, ["x"], ["y"], "blocks", blocksize=2)
    ports = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", (1, 3, 5, 6)), ("y", None))]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]))
    with pytest.raises(UserError, match="blocks"):
        frontend.load(model)


def test_a_model_that_is_none_for_one_image() -> None:
    """Its batch of two is blocks' height: it is run as it is."""
    b = Builder()
    y = b.op("SpaceToDepth", b.op("Transpose", b.input("x", (2, 16, 256, 256)), perm=(1, 2, 0, 3)), blocksize=2)
    model = b.build(b.op("Reshape", y, b.constant(np.array([2, -1]))))
    assert frontend.load(model).images == 1


def exactly(model: onnx.ModelProto, feeds: dict[str, Any]) -> Plan:
    """The interpreter's and the kernels' results are onnxruntime's, bit by bit."""
    plan = frontend.load(model)
    theirs = onnxruntime_outputs(model, feeds)
    for ours in (reference.run(plan, feeds), Program(plan, isa("portable")).run(feeds)):
        for name, wanted in theirs.items():
            assert ours[name].dtype == wanted.dtype
            np.testing.assert_array_equal(ours[name], wanted)
    return plan


def test_whole_numbers_that_single_precision_cannot_hold() -> None:
    """Arithmetic, moves, joins, look-ups and comparisons beyond 2^24, and what wraps around."""
    b = Builder()
    x, i = b.input("x", (2, 3), TensorProto.INT64), b.input("i", (2,), TensorProto.INT64)
    total = b.op("Add", b.op("Mul", x, b.constant(np.int64(3))), b.constant(np.array([(1 << 24) + 1, -1, 5], np.int64)))
    joined = b.op(
        "Concat", b.op("Transpose", total, perm=(1, 0)), b.constant(np.full((3, 1), 1 << 60, np.int64)), axis=1
    )
    pads = b.constant(np.array([0, 1, 0, 0], np.int64))
    padded = b.op("Pad", joined, pads, b.constant(np.array(-(1 << 40), np.int64)))
    picked = b.op("Gather", padded, i, axis=1)
    narrow = b.op("Cast", picked, to=TensorProto.INT8)
    less = b.op("Less", x, b.constant(np.array(1 << 62, np.int64)))
    kept = b.op("Where", less, x, b.op("Neg", x))
    peak = b.op("ReduceMax", kept, b.constant(np.array([1], np.int64)), keepdims=0)
    kinds = [
        (picked, TensorProto.INT64),
        (narrow, TensorProto.INT8),
        (less, TensorProto.BOOL),
        (peak, TensorProto.INT64),
    ]
    feeds = {"x": np.array([[1 << 24, (1 << 62) + 1, -(1 << 63)], [7, -9, 1 << 33]]), "i": np.array([0, -2])}
    exactly(typed(b, *kinds), feeds)


def test_double_precision() -> None:
    b = Builder()
    x = b.input("x", (3, 4), TensorProto.DOUBLE)
    third = b.op("Div", x, b.constant(np.array(3)))
    y = b.op("MatMul", third, b.input("w", (4, 2), TensorProto.DOUBLE))
    b.constants[0].CopyFrom(onnx.numpy_helper.from_array(np.array(3.0), "c0"))
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((3, 4)), "w": rng.standard_normal((4, 2))}
    model = typed(b, (y, TensorProto.DOUBLE))
    plan = frontend.load(model)
    (wanted,) = onnxruntime_outputs(model, feeds).values()
    for ours in (reference.run(plan, feeds), Program(plan, isa("portable")).run(feeds)):
        np.testing.assert_allclose(ours[y], wanted, rtol=1e-14, atol=1e-15)
    conv = Builder()
    z = conv.op("Conv", conv.input("x", (1, 1, 4, 4), TensorProto.DOUBLE), conv.random(1, 1, 3, 3))
    with pytest.raises(UserError, match="not in float64; convert the model to float32"):
        frontend.load(typed(conv, (z, TensorProto.DOUBLE)))


def test_bytes_wrap_around() -> None:
    b = Builder()
    x, y = b.input("x", (64,), TensorProto.UINT8), b.input("y", (64,), TensorProto.UINT8)
    feeds = {"x": np.arange(64, dtype=np.uint8) * 4, "y": np.full(64, 200, np.uint8)}
    feeds["y"][::3] = 3
    model = typed(b, (b.op("Add", x, y), TensorProto.UINT8), (b.op("Div", x, y), TensorProto.UINT8))
    plan = frontend.load(model)
    ours = Program(plan, isa("portable")).run(feeds)
    total, quotient = ours.values()
    np.testing.assert_array_equal(total, feeds["x"] + feeds["y"])
    np.testing.assert_array_equal(quotient, feeds["x"] // feeds["y"])


SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "c": 6, "k": 3, "q": 4, "e": 2, "w": 5}


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize(
    "equation",
    [
        "bhid, bhjd -> bhij", "bhij,bhjd->bhid", "bchw->bhwc", "bij,jk->bik", "bij->b", "ij,ij->", "ij,jk", "ij",
        "bhid,jd->bhij", "bc,bchw->bchw", "i,j->ij", "bhqd,bhde->bqhe", "bii->bi", "iji,j->i", "...ij,...jk->...ik",
        "...ij->...ji", "bij,bjk,bkd->bid", "i,j,k->ijk",
    ],
)  # fmt: skip
def test_einsum(equation: str, opset: int) -> None:
    """Attention as it is often written, and every other form of one and two operands."""
    b = Builder()
    terms = "".join(equation.split()).partition("->")[0].replace("...", "qe").split(",")
    inputs = [b.input(f"x{n}", tuple(SIZES[name] for name in term)) for n, term in enumerate(terms)]
    check(b.build(b.op("Einsum", *inputs, equation=equation), opset=opset), kernels=True)


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize(
    ("shape", "indices", "batch"),
    [
        ((4, 5, 6), [[0, 1], [3, 4], [-1, -2]], 0),
        ((4, 5, 6), [[2], [0]], 0),
        ((2, 5, 6), [[[1], [2]], [[0], [4]]], 1),
        ((2, 3, 4), [[0, 1, 2]], 0),
    ],
)
def test_gather_of_places(shape: tuple[int, ...], indices: Any, batch: int, opset: int) -> None:
    """Rows by several indices, as exporters write interpolation and y[:, [3, 1, 0]]."""
    b = Builder()
    y = b.op("GatherND", b.input("x", shape), b.constant(np.array(indices)), batch_dims=batch)
    check(b.build(b.op("Relu", y), opset=opset), kernels=True)
