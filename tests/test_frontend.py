"""ONNX → Plan: every operator of the table against onnxruntime, fusions, layouts, memory, errors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from colonnade import frontend
from colonnade.errors import UserError
from colonnade.frontend import memory, parts, reference
from colonnade.frontend.feeding import LayoutCosts
from colonnade.kernels.ops.tables import column_offsets
from colonnade.plan import Plan
from colonnade.workload import NONE, RELU, RELU6, Affine, Binary, Conv2d, Convert, GlobalPool, Linear, Pool2d
from tests.models import Builder, export, onnxruntime_outputs, torchvision_model

COPIES = LayoutCosts(gather=1e6, pick=1e6, scaled=1e6)  # panels never pay


def check(model: onnx.ModelProto, seed: int = 1, tolerance: float = 1e-5, **options: Any) -> Plan:
    """Import, interpret on the planned memory, compare with onnxruntime (relative to the largest magnitude)."""
    plan = frontend.load(model, **options)
    rng = np.random.default_rng(seed)
    inputs = {port.name: rng.standard_normal(port.shape).astype(np.float32) for port in plan.inputs}
    ours = reference.run(plan, inputs)
    theirs = onnxruntime_outputs(model, inputs)
    assert list(ours) == [port.name for port in plan.outputs] or set(ours) == {port.name for port in plan.outputs}
    for port in plan.outputs:
        assert ours[port.name].shape == theirs[port.name].shape == port.shape
        largest = np.abs(theirs[port.name]).max()
        np.testing.assert_allclose(ours[port.name], theirs[port.name], rtol=0, atol=tolerance * max(largest, 1e-30))
    lives = [memory.Life(b.size, b.first, b.last) for b in plan.buffers]
    assert max(b.offset + b.size for b in plan.buffers) <= 1.3 * memory.lower_bound(lives)
    assert plan.arena >= max(b.offset + b.size for b in plan.buffers) + 4096
    assert len({step.name for step in plan.steps}) == len(plan.steps)
    return plan


def ops(plan: Plan) -> list[str]:
    """Operators without imports and exports."""
    found = []
    for step in plan.steps:
        kind = step.workload.kind if isinstance(step.workload, Convert) else ""
        if kind not in ("import", "export"):
            found.append(step.workload.op + (f" {kind}" if kind else ""))
    return found


def workloads(plan: Plan, kind: type) -> list[Any]:
    return [step.workload for step in plan.steps if isinstance(step.workload, kind)]


# --- convolution ----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    pads = [draw(st.integers(0, reach[i % 2] + 1)) for i in range(4)]
    sizes = [draw(st.integers(max(1, reach[i] + 1 - pads[i] - pads[i + 2]), 14)) for i in range(2)]
    groups = draw(st.integers(1, 3))
    return {
        "batch": draw(st.integers(1, 3)),
        "ins": groups * draw(st.integers(1, 3)),
        "outs": groups * draw(st.integers(1, 3)),
        "size": sizes,
        "kernel": kernel,
        "groups": groups,
        "attributes": {"strides": stride, "dilations": dilation, "pads": pads},
    }


@settings(max_examples=60, deadline=None)
@given(c=convolutions(), before=st.booleans())
def test_convolution(c: dict[str, Any], before: bool) -> None:
    """Alone on the model's input (imported as it needs it), or behind another one (which it is tied to, or copies)."""
    b = Builder()
    x = b.input("x", (c["batch"], c["ins"], *c["size"]))
    if before and c["size"] != [1, 1]:  # a computed pixel lives in rows, and padding it to a map is refused
        x = b.op("Relu", b.conv(x, c["ins"], c["ins"], 1))
    y = b.conv(x, c["ins"], c["outs"], c["kernel"], c["groups"], **c["attributes"])
    check(b.build(y))


def test_one_pixel_that_is_padded_to_several() -> None:
    b = Builder()
    check(b.build(b.conv(b.input("x", (2, 3, 1, 1)), 3, 4, 2, strides=(1, 2), pads=(1, 1, 1, 2))))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_auto_pad(mode: str, stride: int) -> None:
    b = Builder()
    x = b.input("x", (1, 2, 9, 10))
    check(b.build(b.conv(x, 2, 3, (3, 4), strides=(stride, stride), auto_pad=mode)))


def test_auto_pad_with_dilation() -> None:
    b = Builder()
    x = b.input("x", (1, 2, 9, 10))
    plan = check(b.build(b.conv(x, 2, 3, 3, dilations=(2, 3), auto_pad="VALID")))
    assert workloads(plan, Conv2d)[0].padding == (0, 0, 0, 0)


def test_stem_is_imported_in_phases() -> None:
    b = Builder()
    x = b.input("x", (2, 3, 17, 20))
    y = b.conv(x, 3, 4, 7, strides=(2, 2), pads=(3, 3, 3, 3))
    plan = check(b.build(y))
    assert ops(plan) == ["conv2d"]
    assert plan.steps[0].output is not None and plan.steps[0].output.planes.phases == (2, 2)
    assert len(plan.steps) == 3  # the plain import has no reader and is gone


def test_one_phase_is_kept_for_a_pointwise_stride() -> None:
    b = Builder()
    x = b.op("MaxPool", b.input("x", (1, 3, 9, 9)), kernel_shape=(2, 2))
    plan = check(b.build(b.conv(x, 3, 4, 1, strides=(2, 2))), layout_costs=COPIES)
    (copy,) = [s for s in plan.steps if isinstance(s.workload, Convert) and s.workload.kind == "planes"]
    assert copy.output is not None and copy.output.planes.stored_phases == ((0, 0),)


def test_strided_convolutions_share_a_copy() -> None:
    """The two of a residual block: their outputs are added, so they are tied."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 10, 10)), 3, 4, 3, pads=(1, 1, 1, 1)))
    main = b.op("Relu", b.conv(x, 4, 6, 3, strides=(2, 2), pads=(1, 1, 1, 1)))
    main = b.conv(main, 6, 6, 3, pads=(1, 1, 1, 1))
    plan = check(b.build(b.op("Relu", b.op("Add", main, b.conv(x, 4, 6, 1, strides=(2, 2))))))
    assert ops(plan) == ["conv2d", "convert planes", "conv2d", "conv2d", "conv2d"]


def test_strong_dilation_does_not_widen_its_neighbours() -> None:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (1, 3, 12, 12)), 3, 4, 3, pads=(1, 1, 1, 1)))
    wide = b.conv(x, 4, 4, 3, dilations=(9, 9), pads=(9, 9, 9, 9))
    y = b.conv(b.op("Concat", x, wide, b.op("Relu", wide), axis=1), 12, 4, 3, pads=(1, 1, 1, 1))
    plan = check(b.build(b.op("Relu", b.op("Add", x, b.conv(y, 4, 4)))), layout_costs=COPIES)
    pitches = {s.output.planes.pitch for s in plan.steps if s.output is not None}
    assert pitches == {13, 21}
    assert ops(plan).count("convert planes") == 2


def test_large_kernel_and_one_pixel_become_linear() -> None:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (3, 4, 5, 6)), 4, 8, (5, 6)))
    x = b.conv(x, 8, 6, 3, groups=2, pads=(1, 1, 1, 1))
    plan = check(b.build(b.op("Relu", x)))
    assert ops(plan) == ["linear", "linear"]  # the input is imported as rows


def test_sparsity_is_read_off_the_weights() -> None:
    b = Builder()
    weight = b.rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    weight[:4, :, 0] = 0
    weight[4:, 1:] = 0
    y = b.op("Conv", b.input("x", (1, 4, 6, 6)), b.constant(weight, "pruned.weight"), name="c")
    plan = check(b.build(y))
    (step,) = [s for s in plan.steps if isinstance(s.workload, Conv2d)]
    assert step.name == "pruned" and step.workload.tile == 4
    assert step.workload.columns == 4 * 24 + 4 * 9


# --- fusion ---------------------------------------------------------------------------------------------------------


def residual_block(relu_before: bool = False, extra_reader: bool = False) -> Plan:
    b = Builder()
    x = b.input("x", (2, 4, 7, 9))
    y = b.conv(x, 4, 4, 3, pads=(1, 1, 1, 1))
    y = b.op("Relu", y) if relu_before else y
    z = b.op("Relu", b.op("Add", x, y))
    return check(b.build(z, *([b.op("Relu", y)] if extra_reader else [])))


def test_residual_and_relu_are_fused() -> None:
    (conv,) = workloads(residual_block(), Conv2d)
    assert conv.epilogue.residual and conv.epilogue.activation == RELU


def test_relu_before_the_add_stays_before_it() -> None:
    plan = residual_block(relu_before=True)
    (conv,), (add,) = workloads(plan, Conv2d), workloads(plan, Binary)
    assert not conv.epilogue.residual and conv.epilogue.activation == RELU
    assert add.activation == RELU


def test_a_second_reader_prevents_fusion() -> None:
    plan = residual_block(extra_reader=True)
    (conv,) = workloads(plan, Conv2d)
    assert not conv.epilogue.residual and conv.epilogue.activation == NONE


def test_a_model_output_prevents_fusion() -> None:
    b = Builder()
    y = b.conv(b.input("x", (1, 2, 5, 5)), 2, 3, 3)
    plan = check(b.build(y, b.op("Relu", y)))
    assert ops(plan) == ["conv2d", "affine"]


@pytest.mark.parametrize("kind", ["Identity", "Dropout", "Concat", "Cast", "Transpose", "Identity of the input"])
def test_outputs_that_are_the_same_value_keep_their_names(kind: str) -> None:
    """Each of them, in the model's order."""
    for first in (True, False):
        b = Builder(1)
        x = b.input("x", (1, 3, 5, 5))
        y = x if kind == "Identity of the input" else b.conv(x, 3, 8, 1)
        attributes = {"Concat": {"axis": 1}, "Cast": {"to": 1}, "Transpose": {"perm": (0, 2, 3, 1)}}.get(kind, {})
        copies = [b.op(kind.split()[0], y, **attributes) for _ in range(2)]
        if kind == "Transpose":
            copies = [b.op("Transpose", copy, perm=(0, 3, 1, 2)) for copy in copies]
        more = [] if y == x else [y]
        names = [*(more if first else []), *copies, *([] if first else more)]
        assert [port.name for port in check(b.build(*names)).outputs] == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch 0"), ({"batch": 1.5}, r"batch 1\.5"), ({"batch": "a"}, "batch 'a'"),
        ({"input_shapes": {"x": ["a", 3]}}, "input x: shape"), ({"input_shapes": {"x": 5}}, "input x: shape 5"),
    ],
)  # fmt: skip
def test_sizes_that_are_none(options: dict[str, Any], said: str) -> None:
    b = Builder()
    model = b.build(b.op("Relu", b.input("x", ("n", 3))))
    with pytest.raises(UserError, match=f"{said}.*: expected"):
        frontend.load(model, **options)


def test_batch_norm_goes_into_the_convolution() -> None:
    b = Builder()
    y = b.batch_norm(b.conv(b.input("x", (2, 3, 6, 6)), 3, 5, 3), 5)
    plan = check(b.build(b.op("Clip", y, b.constant(0.0), b.constant(6.0))))
    assert ops(plan) == ["conv2d"]
    assert workloads(plan, Conv2d)[0].epilogue.activation == RELU6


def test_batch_norm_of_shared_weights_goes_into_each_convolution() -> None:
    b = Builder()
    x, weight = b.input("x", (1, 3, 6, 6)), b.random(4, 3, 3, 3, name="w")
    parts = [b.batch_norm(b.op("Conv", v, weight), 4) for v in (x, b.input("y", (1, 3, 6, 6)))]
    assert ops(check(b.build(b.op("Concat", *parts, axis=1)))) == ["conv2d", "conv2d"]


def test_batch_norm_without_convolution_is_an_operator() -> None:
    b = Builder()
    x = b.op("MaxPool", b.input("x", (2, 3, 6, 6)), kernel_shape=(2, 2))
    plan = check(b.build(b.op("Relu", b.batch_norm(x, 3))))
    assert ops(plan) == ["pool2d", "affine"]
    assert workloads(plan, Affine)[0].activation == RELU


def test_batch_norm_with_another_reader_of_the_convolution() -> None:
    b = Builder()
    y = b.conv(b.input("x", (1, 3, 6, 6)), 3, 4, 3)
    plan = check(b.build(b.op("Add", b.op("Relu", b.batch_norm(y, 4)), y)))
    assert ops(plan) == ["conv2d", "affine", "binary"]


def test_constants_are_folded_into_weights() -> None:
    b = Builder()
    y = b.conv(b.input("x", (2, 3, 6, 6)), 3, 4, 3)
    y = b.op("Add", b.op("Mul", y, b.random(1, 4, 1, 1)), b.random(4, 1, 1))
    y = b.op("Sub", b.constant(1.0), b.op("Div", y, b.constant([2.0])))
    assert ops(check(b.build(y))) == ["conv2d"]


def test_two_activations_become_one() -> None:
    b = Builder()
    y = b.op("Clip", b.op("Relu", b.conv(b.input("x", (1, 3, 4, 4)), 3, 4)), b.constant(-1.0), b.constant(0.5))
    plan = check(b.build(y))
    assert ops(plan) == ["conv2d"] and workloads(plan, Conv2d)[0].epilogue.activation.low == 0.0


def test_add_of_itself() -> None:
    b = Builder()
    y = b.conv(b.input("x", (1, 3, 4, 4)), 3, 4)
    assert ops(check(b.build(b.op("Add", y, y)))) == ["conv2d", "binary"]


def test_pad_goes_into_the_convolution() -> None:
    b = Builder()
    x = b.op("Pad", b.input("x", (1, 3, 6, 7)), b.constant([0, 0, 1, 0, 0, 0, 2, 1]))
    plan = check(b.build(b.conv(x, 3, 4, 3, strides=(2, 2))))
    assert ops(plan) == ["conv2d"] and workloads(plan, Conv2d)[0].padding == (1, 0, 2, 1)


# --- the other operators --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    ceil=st.integers(0, 1),
    include=st.integers(0, 1),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    data=st.data(),
)
def test_pool(
    kind: str, kernel: Any, stride: Any, dilation: int, ceil: int, include: int, size: Any, data: Any
) -> None:
    b = Builder()
    pads = [data.draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads, "ceil_mode": ceil}
    if kind == "AveragePool":
        attributes["count_include_pad"] = include
    else:
        attributes["dilations"] = (dilation, dilation)
    x = b.op("Relu", b.conv(b.input("x", (2, 2, *size)), 2, 3, 3, pads=(1, 1, 1, 1)))
    check(b.build(b.op(kind, x, **attributes)))


def test_average_over_the_whole_map_is_global() -> None:
    b = Builder()
    plan = check(b.build(b.op("AveragePool", b.input("x", (2, 3, 5, 6)), kernel_shape=(5, 6))))
    assert len(workloads(plan, GlobalPool)) == 1 and not workloads(plan, Pool2d)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum", "ReduceMax"])
def test_reduce(kind: str, keep: int) -> None:
    b = Builder()
    x = b.input("x", (2, 3, 5, 6))
    check(b.build(b.op(kind, x, b.constant([-1, 2]), keepdims=keep)))


@pytest.mark.parametrize("axis", [1, 3])
def test_log_softmax_of_large_numbers(axis: int) -> None:
    """1,000 less a logarithm would have three digits behind the point."""
    b = Builder()
    x = b.input("x", (2, 3, 5, 6))
    check(b.build(b.op("LogSoftmax", b.op("Add", x, b.constant(np.float32(3000))), axis=axis)))


def test_reduce_with_axes_as_attribute() -> None:
    b = Builder()
    check(b.build(b.op("ReduceMean", b.input("x", (2, 3, 5, 6)), axes=(2, 3), keepdims=0), opset=13))


def test_squeeze_and_excite() -> None:
    b = Builder()
    x = b.conv(b.input("x", (3, 3, 6, 7)), 3, 8, 3, pads=(1, 1, 1, 1))
    s = b.op("Relu", b.conv(b.op("GlobalAveragePool", x), 8, 2))
    s = b.op("Clip", b.conv(s, 2, 8), b.constant(0.0), b.constant(1.0))
    plan = check(b.build(b.conv(b.op("Mul", s, x), 8, 4)))
    assert ops(plan) == ["conv2d", "global_pool", "linear", "linear", "binary", "conv2d"]
    assert workloads(plan, Binary)[0].broadcast


def test_one_plane_beside_many() -> None:
    b = Builder()
    x = b.conv(b.input("x", (2, 3, 5, 5)), 3, 4, 3, pads=(1, 1, 1, 1))
    check(b.build(b.op("Mul", b.op("Relu", b.conv(x, 4, 1)), x)))


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
def test_binary(kind: str) -> None:
    b = Builder()
    x, y = b.input("x", (2, 3, 5, 5)), b.input("y", (2, 3, 5, 5))
    y = b.op("Add", b.op("Relu", y), b.constant(1.0))
    assert ops(check(b.build(b.op("Relu", b.op(kind, x, y)))))[-1] == "binary"


def test_classifier() -> None:
    b = Builder()
    x = b.op("Flatten", b.op("MaxPool", b.input("x", (3, 4, 6, 6)), kernel_shape=(2, 2), strides=(2, 2)))
    x = b.op("Relu", b.op("Gemm", x, b.random(16, 36), b.random(16), transB=1, alpha=0.5, beta=2.0))
    x = b.op("Add", b.op("MatMul", x, b.random(16, 16)), b.random(16))
    y = b.op("Add", x, b.op("Gemm", x, b.random(16, 16)))
    plan = check(b.build(b.op("Softmax", b.op("Dropout", y), axis=-1)))
    assert ops(plan) == ["pool2d", "convert flatten", "linear", "linear", "linear", "softmax"]
    assert workloads(plan, Linear)[-1].epilogue.residual


def test_rows_in_and_out() -> None:
    b = Builder()
    x = b.op("Unsqueeze", b.input("x", (2, 5)), b.constant([2, 3]))
    y = b.op("Squeeze", b.conv(x, 5, 3), b.constant([2, 3]))
    assert ops(check(b.build(y))) == ["linear"]


def test_concat_split_and_shuffle_copy_nothing() -> None:
    b = Builder()
    x = b.conv(b.input("x", (2, 3, 6, 6)), 3, 8, 3, pads=(1, 1, 1, 1))
    left, right = b.op("Split", x, b.constant([3, 5]), axis=1, outputs=2)
    y = b.op("Concat", b.conv(right, 5, 5, 3, pads=(1, 1, 1, 1)), left, axis=1)
    y = b.op("Reshape", y, b.constant([2, 2, 4, 6, 6]))
    y = b.op("Reshape", b.op("Transpose", y, perm=(0, 2, 1, 3, 4)), b.constant([0, -1, 6, 6]))
    y = b.op("Slice", y, b.constant([6]), b.constant([0]), b.constant([1]), b.constant([-2]))
    plan = check(b.build(b.conv(y, 3, 4, 3, pads=(1, 1, 1, 1)), b.op("Gather", y, b.constant([2, 0]), axis=1)))
    assert ops(plan) == ["conv2d"] * 3


def test_split_of_parts_that_others_read() -> None:
    """Taking a whole part out of a Concat gives back a tensor that has another reader."""
    b = Builder()
    p = b.conv(b.input("x", (1, 2, 4, 4)), 2, 3)
    q = b.conv("x", 2, 2)
    one, _ = b.op("Split", b.op("Concat", p, q, axis=1), b.constant([3, 2]), axis=1, outputs=2)
    check(b.build(b.op("Relu", one), p))


def test_channel_padding_shortcut() -> None:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 9, 10)), 3, 4, 3, pads=(1, 1, 1, 1)))
    s = b.op("Slice", x, b.constant([0]), b.constant([2**31 - 1]), b.constant([2]), b.constant([2]))
    s = b.op("Slice", s, b.constant([0]), b.constant([2**31 - 1]), b.constant([3]), b.constant([2]))
    s = b.op("Pad", s, b.constant([0, 2, 0, 0, 0, 2, 0, 0]))
    y = b.conv(x, 4, 8, 3, strides=(2, 2), pads=(1, 1, 1, 1))
    plan = check(b.build(b.op("Relu", b.op("Add", y, s))))
    assert ops(plan) == ["conv2d", "convert planes", "zeros", "convert planes", "conv2d"]


def test_pad_before_a_pool() -> None:
    b = Builder()
    x = b.op("Pad", b.input("x", (2, 3, 5, 6)), b.constant([0, 1, 1, 0, 0, 0, 2, 1]))
    check(b.build(b.op("MaxPool", x, kernel_shape=(2, 2))))


def test_index_of_an_extreme_behind_a_function() -> None:
    """Shapes behind operators that ONNX knows by their definitions alone."""
    b = Builder()
    x = b.op("ArgMax", b.op("MeanVarianceNormalization", b.input("x", (1, 4, 6, 6)), axes=(0, 2, 3)), axis=1)
    check(b.build(b.op("Cast", x, to=TensorProto.FLOAT)))


def test_old_opset_forms() -> None:
    b = Builder()
    x = b.op("Clip", b.conv(b.input("x", (1, 4, 6, 6)), 4, 4), min=-0.5, max=0.5)
    x = b.op("Pad", x, pads=(0, 0, 1, 1, 0, 0, 1, 1))
    x, _ = b.op("Split", x, axis=1, split=(3, 1), outputs=2)
    x = b.op("Slice", x, starts=(0, 1), ends=(9, 3), axes=(2, 1))
    check(b.build(b.op("Squeeze", b.op("GlobalMaxPool", x), axes=(2, 3)), opset=9))


def test_older_than_broadcasting() -> None:
    """Before opset 7 an attribute says which axes a second operand has."""

    def answer(add: tuple[int, ...], opset: int, **attributes: int) -> np.ndarray:
        b = Builder()
        x = b.constant(np.arange(4, dtype=np.float32).reshape(add))
        y = b.op("Relu", b.op("Add", b.conv(b.input("x", (1, 4, 4, 4)), 4, 4), x, **attributes))
        plan = frontend.load(b.build(y, opset=opset))
        [output] = reference.run(plan, {"x": np.ones((1, 4, 4, 4), np.float32)}).values()
        return output

    np.testing.assert_array_equal(answer((4,), 6, axis=1, broadcast=1), answer((4, 1, 1), 18))


def test_several_inputs_and_outputs_without_convolution() -> None:
    b = Builder()
    x, y = b.input("first", (1, 3, 4, 5)), b.input("second", (1, 3, 4, 5))
    s = b.op("Add", x, y)
    plan = check(b.build(b.op("Relu", s), s, b.op("GlobalMaxPool", y)))
    assert [p.name for p in plan.inputs] == ["first", "second"] and len(plan.outputs) == 3


def test_input_is_output() -> None:
    b = Builder()
    check(b.build(b.op("Identity", b.input("x", (1, 3, 4, 5)))))


def test_constant_nodes_hold_weights() -> None:
    b = Builder()
    weight = onnx.numpy_helper.from_array(b.rng.standard_normal((4, 3, 3, 3)).astype(np.float32))
    w = b.op("Constant", value=weight)
    check(b.build(b.op("Conv", b.input("x", (1, 3, 5, 5)), b.op("Transpose", w, perm=(0, 1, 3, 2)))))


# --- random graphs --------------------------------------------------------------------------------------------------


def random_network(seed: int) -> onnx.ModelProto:
    """A few dozen nodes in random connection: what no hand would write, and every layout meets every other."""
    b = Builder(seed)
    rng = b.rng
    batch = int(rng.integers(1, 4))
    shape = (int(rng.integers(1, 5)), int(rng.integers(5, 16)), int(rng.integers(5, 16)))
    values: list[tuple[str, tuple[int, int, int]]] = [(b.input("x", (batch, *shape)), shape)]

    def pick() -> tuple[str, tuple[int, int, int]]:
        return values[int(rng.integers(max(0, len(values) - 4), len(values)))]

    for _ in range(int(rng.integers(4, 16))):
        x, (c, h, w) = pick()
        kind = rng.choice(
            ["conv", "conv", "conv", "down", "relu", "bn", "add", "cat", "cut", "pool", "se", "mul", "slice", "pad"]
        )
        if kind == "conv":
            k, d = int(rng.choice([1, 3, 3, 5])), int(rng.integers(1, 3))
            p, outs = (k - 1) * d // 2, int(rng.integers(1, 7))
            values.append((b.conv(x, c, outs, k, dilations=(d, d), pads=(p,) * 4), (outs, h, w)))
        elif kind == "down":
            k, s, outs = int(rng.integers(1, 5)), int(rng.integers(2, 4)), int(rng.integers(1, 7))
            p = k // 2
            size = tuple((n + 2 * p - k) // s + 1 for n in (h, w))
            if min(size) > 0:
                values.append((b.conv(x, c, outs, k, strides=(s, s), pads=(p,) * 4), (outs, size[0], size[1])))
        elif kind == "relu":
            values.append((b.op("Relu", x), (c, h, w)))
        elif kind == "bn":
            values.append((b.batch_norm(x, c), (c, h, w)))
        elif kind == "add":
            same = [v for v, s in values if s == (c, h, w) and v != x]
            if not same:
                same = [b.conv(x, c, c, 1)]
            values.append((b.op("Add", x, str(rng.choice(same))), (c, h, w)))
        elif kind == "cat":
            same_size = [(v, s) for v, s in values if s[1:] == (h, w)]
            v, s = same_size[int(rng.integers(len(same_size)))]
            values.append((b.op("Concat", x, v, axis=1), (c + s[0], h, w)))
        elif kind == "cut" and c > 1:
            at = int(rng.integers(1, c))
            one, two = b.op("Split", x, b.constant([at, c - at]), axis=1, outputs=2)
            values += [(one, (at, h, w)), (two, (c - at, h, w))]
        elif kind == "pool" and min(h, w) > 2:
            name = str(rng.choice(["MaxPool", "AveragePool"]))
            y = b.op(name, x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
            values.append((y, (c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)))
        elif kind == "se":
            s = b.op("Clip", b.conv(b.op("GlobalAveragePool", x), c, c), b.constant(0.0), b.constant(1.0))
            values.append((b.op("Mul", x, s), (c, h, w)))
        elif kind == "mul":
            values.append((b.op("Mul", x, b.random(1, c, 1, 1)), (c, h, w)))
        elif kind == "slice":
            y = b.op("Slice", x, b.constant([0, 0]), b.constant([h, w]), b.constant([2, 3]), b.constant([1, 2]))
            values.append((y, (c, h, -(-w // 2))))
        elif kind == "pad":
            values.append((b.op("Pad", x, b.constant([0, 1, 0, 0, 0, 1, 0, 0])), (c + 2, h, w)))
    outputs = [v for v, s in values[1:] if s[1:] != (1, 1)][-3:]
    return b.build(*(outputs or [b.op("Relu", "x")]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_network(seed: int) -> None:
    check(random_network(seed), tolerance=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_kernels_read_where_the_interpreter_looks(seed: int) -> None:
    """The rule is written down twice, here and in the kernels: both must mean the same places."""
    for step in frontend.load(random_network(seed), layout_costs=COPIES).steps:
        if isinstance(step.workload, Conv2d):
            for group in range(step.workload.groups):
                expected = reference.offsets(step.workload, step.inputs[0], group)
                assert column_offsets(step.workload, step.inputs[0], group).tolist() == expected


# --- the interpreter itself -----------------------------------------------------------------------------------------


def small_network() -> onnx.ModelProto:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 8, 8)), 3, 4, 3, pads=(1, 1, 1, 1)))
    y = b.op("Relu", b.conv(x, 4, 4, 3, pads=(1, 1, 1, 1)))
    return b.build(b.op("Add", x, b.conv(y, 4, 4, 3, pads=(1, 1, 1, 1))))


def test_interpreter_sees_overlapping_buffers() -> None:
    """Put the second tensor on the first one's place: the residual is then lost, and that must show."""
    plan = frontend.load(small_network())
    first, second, third = (step for step in plan.steps if isinstance(step.workload, Conv2d))
    assert first.output is not None and second.output is not None
    moved = replace(second.output, offsets=first.output.offsets, lead_offset=first.output.lead_offset)
    changed = {second: replace(second, output=moved), third: replace(third, inputs=(moved, third.inputs[1]))}
    broken = replace(plan, steps=tuple(changed.get(step, step) for step in plan.steps))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    good, bad = reference.run(plan, {"x": x}), reference.run(broken, {"x": x})
    assert any(not np.allclose(good[name], bad[name]) for name in good)


def test_interpreter_sees_a_missing_halo() -> None:
    """Without its halo a row runs into the next one."""
    plan = frontend.load(small_network())
    steps = []
    for step in plan.steps:
        places = [replace(p, layout=replace(p.planes, pitch=8)) for p in (*step.inputs, *filter(None, [step.output]))]
        output = places.pop() if step.output is not None else None
        steps.append(replace(step, inputs=tuple(places), output=output))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with pytest.raises(AssertionError, match="not in place"):
        reference.run(replace(plan, steps=tuple(steps)), {"x": x})


def same_size(b: Builder, x: str, size: int) -> str:
    return str(b.conv(x, 4, 4, size, pads=(size // 2,) * 4))


@pytest.mark.parametrize("kind", ["added last", "read again", "its own input"])
def test_a_residual_nobody_reads_again_is_overwritten(kind: str) -> None:
    b = Builder()
    conv = partial(same_size, b)
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 8, 8)), 3, 4, 3, pads=(1, 1, 1, 1)))
    y = b.op("Relu", conv(x, 3))
    z = b.op("Relu", b.op("Add", x, conv(x if kind == "its own input" else y, 5)))
    plan = check(b.build(b.op("Add", conv(z, 1), conv(x, 3)) if kind == "read again" else z))
    adding = next(s for s in plan.steps if isinstance(s.workload, Conv2d) and s.workload.epilogue.residual)
    assert adding.output is not None
    shared = bool(set(adding.output.offsets.tolist()) & set(adding.inputs[1].offsets.tolist()))
    assert shared == (kind == "added last")
    if shared:
        assert adding.output.offsets.tolist() == adding.inputs[1].offsets.tolist()
        assert adding.output.layout == adding.inputs[1].layout


# --- memory ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30), st.integers(0, 10)), min_size=1, max_size=40))
def test_memory_plan(raw: list[tuple[int, int, int]]) -> None:
    lives = [memory.Life(64 * size, first, first + length) for size, first, length in raw]
    offsets, total = memory.plan(lives)
    assert total >= memory.lower_bound(lives)
    assert all(offset % 64 == 0 and offset + life.size <= total for offset, life in zip(offsets, lives, strict=True))
    for i, a in enumerate(lives):
        for j, b in enumerate(lives[:i]):
            apart = offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
            assert apart or not a.meets(b)


# --- shapes, cuts, errors -------------------------------------------------------------------------------------------


def dynamic_model() -> onnx.ModelProto:
    b = Builder()
    x = b.conv(b.input("x", ("n", 3, "h", "w")), 3, 4, 3, pads=(1, 1, 1, 1))
    return b.build(b.op("Flatten", b.op("GlobalAveragePool", x)))


def test_free_batch_and_sizes() -> None:
    plan = check(dynamic_model(), batch=3, input_shapes={"x": (1, 3, 10, 12)})
    assert plan.inputs[0].shape == (3, 3, 10, 12)
    assert check(dynamic_model(), input_shapes={"x": (2, 3, 5, 5)}).outputs[0].shape == (2, 4)


def test_free_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"input x has free sizes h, w; give them, such as --input-shape x=1x3x224x224"):
        frontend.load(dynamic_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shapes": {"y": (1, 3, 4, 4)}}, "no input named y.*its inputs are x"),
        ({"input_shapes": {"x": (1, 3, 4)}}, "input x has 4 dimensions"),
        ({"input_shapes": {"x": (1, 5, 8, 8)}}, "Conv 'conv0': weight .* does not fit 5 input channels"),
        ({"input_shapes": {"x": (1, 3, 0, 8)}}, "input x: shape .*at least 1"),
        ({"outputs": ["nowhere"]}, "no value named nowhere"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        frontend.load(dynamic_model(), **options)


def test_fixed_batch_is_replaced() -> None:
    """A Reshape that spells out the batch follows the new one."""
    b = Builder()
    x = b.op("GlobalAveragePool", b.conv(b.input("x", (1, 3, 6, 6)), 3, 4, 3))
    model = b.build(b.op("Gemm", b.op("Reshape", x, b.constant([1, 4])), b.random(4, 2)))
    plan = frontend.load(model, batch=3)
    x3 = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    (ours,) = reference.run(plan, {"x": x3}).values()
    for i in range(3):
        (theirs,) = onnxruntime_outputs(model, {"x": x3[i : i + 1]}).values()
        np.testing.assert_allclose(ours[i : i + 1], theirs, atol=1e-5)


def image_by_image(model: onnx.ModelProto, batch: int = 3) -> None:
    """A batch of a model that was exported for one image: what its images give by themselves."""
    plan = frontend.load(model, batch=batch)
    shape = plan.inputs[0].shape
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (ours,) = reference.run(plan, {"x": x}).values()
    theirs = [next(iter(onnxruntime_outputs(model, {"x": x[i : i + 1]}).values())) for i in range(batch)]
    np.testing.assert_allclose(ours, np.concatenate(theirs), atol=1e-4)


def test_sizes_of_a_resize_follow_the_batch() -> None:
    b = Builder()
    x = b.input("x", (1, 4, 8, 8))
    small = b.conv(b.op("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2)), 4, 4)
    large = b.op("Resize", small, "", "", b.constant(np.array([1, 4, 8, 8])), mode="nearest")
    blended = b.op("Resize", small, "", "", b.constant(np.array([1, 4, 8, 8])), mode="linear")
    image_by_image(b.build(b.op("Add", b.op("Add", b.conv(x, 4, 4), large), blended)))


def test_heads_and_channels_in_the_batch() -> None:
    """Targets of Reshape that are the batch, times something, or neither."""
    b = Builder()
    x = b.conv(b.input("x", (1, 4, 8, 8)), 4, 4)
    rows = b.op("Softmax", b.op("Reshape", x, b.constant(np.array([4, -1]))), axis=-1)
    tokens = b.op(
        "Reshape", b.op("Reshape", rows, b.constant(np.array([1, 4, 8, 8]))), b.constant(np.array([1, 2, 2, 64]))
    )
    parts = [
        b.op("Reshape", b.op("Transpose", tokens, perm=(0, 1, 3, 2)), b.constant(np.array([2, -1, 2])))
        for _ in range(2)
    ]
    score = b.op("Softmax", b.op("MatMul", parts[0], b.op("Transpose", parts[1], perm=(0, 2, 1))), axis=-1)
    bias = b.op("Reshape", b.op("Mul", b.random(4096), b.random(1)), b.constant(np.array([64, 64])))
    heads = b.op("MatMul", b.op("Add", score, bias), parts[0])
    image_by_image(b.build(b.op("Reshape", heads, b.constant(np.array([1, 2, -1, 2])))))


def test_another_batch_that_does_not_follow_is_refused() -> None:
    """Tokens first: nothing says where the batch is in what is folded."""
    b = Builder()
    x = b.op("Reshape", b.conv(b.input("x", (1, 4, 8, 8)), 4, 4), b.constant(np.array([1, 4, 64])))
    x = b.op("Reshape", b.op("Transpose", x, perm=(2, 0, 1)), b.constant(np.array([1, 64, 4])))
    model = b.build(b.op("Relu", x))
    assert check(model).outputs[0].shape == (1, 64, 4)
    with pytest.raises(UserError, match="sizes of a batch of 1, for which the model was exported"):
        frontend.load(model, batch=3)
    b = Builder()
    y = b.op("Concat", b.conv(b.input("x", (1, 4, 8, 8)), 4, 4), b.random(1, 2, 8, 8), axis=1)
    with pytest.raises(UserError, match="exported for a batch of 1; for another one export it with a free batch"):
        frontend.load(b.build(b.op("Relu", y)), batch=3)


def test_limits_behind_limits() -> None:
    """Also where they do not overlap, and where they are attributes."""
    befores, afters = [(0.0, np.inf), (-1.5, -0.5), (0.25, 5.5), (-1.5, 1.5)], [(0.0, np.inf), (0.1, 0.6), (-2.5, 4.5)]
    for opset in (9, 13):
        for first, second in itertools.product(befores, afters):
            b = Builder()
            x = b.op("Mul", b.input("x", (1, 3, 4, 4)), b.constant(9.0))
            for low, high in (first, second):
                if (low, high) == (0, np.inf):
                    x = b.op("Relu", x)
                elif opset == 9:
                    x = b.op("Clip", x, min=low, max=high)
                else:
                    x = b.op("Clip", x, b.constant(low), b.constant(high))
            check(b.build(x, opset=opset))


@pytest.mark.parametrize("size", [9, 10])
@pytest.mark.parametrize("scale", [1 / 3, 0.6, 0.7, 1.3, 1.5])
@pytest.mark.parametrize(
    "how",
    [
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ],
)
def test_scales_that_leave_a_fraction_of_a_pixel(size: int, scale: float, how: dict[str, str]) -> None:
    b = Builder()
    x = b.op("Resize", b.input("x", (1, 3, size, size)), "", b.constant([1.0, 1, scale, scale]), **how)
    check(b.build(b.op("Relu", x), opset=13))


def test_a_domain_that_is_spelt_out() -> None:
    """Softmax is another one before opset 13, whatever ONNX's domain is called."""
    b = Builder()
    model = b.build(b.op("Softmax", b.conv(b.input("x", (2, 3, 6, 7)), 3, 4), axis=1), opset=11)
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"
    plan = check(model)
    again = frontend.load(onnx_ir.from_proto(model))
    assert [step.workload for step in again.steps] == [step.workload for step in plan.steps]


@pytest.mark.parametrize("opset", [11, 12, 13])
def test_softmax_of_a_constant(opset: int) -> None:
    """onnx's evaluator knows the newest one alone: what it would compute wrongly is not left to it."""
    b = Builder()
    y = b.op("Mul", b.input("x", (2, 3, 4)), b.op("Softmax", b.random(2, 3, 4), axis=1))
    check(b.build(y, opset=opset))


def test_outputs_of_training_are_training() -> None:
    b = Builder()
    numbers = [b.random(3) for _ in range(3)]
    y = b.op("BatchNormalization", b.input("x", (2, 3, 8, 8)), *numbers, b.constant(np.ones(3)), outputs=5)[0]
    with pytest.raises(UserError, match="training mode"):
        frontend.load(b.build(y, opset=9))


def test_starts_far_below_and_pads_that_cut() -> None:
    whole = partial(np.array, dtype=np.int64)
    b = Builder()
    limits = (b.constant(whole([-100])), b.constant(whole([-(2**63)])), b.constant(whole([2])), b.constant(whole([-1])))
    assert frontend.load(b.build(b.op("Slice", b.input("x", (1, 3, 8, 8)), *limits))).outputs[0].shape == (1, 3, 1, 8)
    b = Builder()
    pads = b.constant(whole([0, 0, -1, 2, 0, 0, 1, -2]))
    check(b.build(b.op("Relu", b.op("Pad", b.input("x", (2, 6, 9, 8)), pads, mode="wrap")), opset=19))
    b = Builder()
    y = b.op("ConvTranspose", b.input("x", (2, 6, 9, 8)), b.random(6, 4, 2, 2), strides=[3, 2], auto_pad="SAME_UPPER")
    check(b.build(y, opset=13))


def test_norms_with_a_scale_of_more_axes() -> None:
    b = Builder()
    x = b.op("LayerNormalization", b.input("x", (2, 5, 8)), b.random(1, 1, 8), b.random(1, 8), axis=-1)
    check(b.build(b.op("Relu", x)))


def test_channels_last_with_a_gate() -> None:
    """An operand that is turned further down in the graph."""
    b = Builder()
    x = b.input("x", (1, 6, 6, 4))
    first, last = {"perm": (0, 3, 1, 2)}, {"perm": (0, 2, 3, 1)}
    gate = b.conv(b.op("Transpose", b.op("ReduceMean", x, axes=(1, 2)), **first), 4, 4)
    gated = b.op("Mul", x, b.op("Sigmoid", b.op("Transpose", gate, **last)))
    y = b.op("Transpose", b.conv(b.op("Transpose", x, **first), 4, 4), **last)
    check(b.build(gated, y, opset=13))


def test_functions_that_cannot_be_written_out() -> None:
    helper = onnx.helper
    old = helper.make_function("loc", "F", ["a"], ["c"], [helper.make_node("Relu", ["a"], ["c"])],
                               [helper.make_opsetid("", 11)])  # fmt: skip
    b = Builder()
    model = b.build(b.conv(b.input("x", (1, 3, 5, 5)), 3, 4))
    model.graph.node.append(helper.make_node("F", [model.graph.output[0].name], ["y"], domain="loc"))
    model.graph.output[0].name = "y"
    model.functions.append(old)
    model.opset_import.append(helper.make_opsetid("loc", 1))
    with pytest.raises(UserError, match="functions cannot be written out: Opset mismatch"):
        frontend.load(model)


def test_cut_at_an_inner_value() -> None:
    b = Builder()
    inner = b.op("Relu", b.conv(b.input("x", (1, 3, 6, 6)), 3, 4, 3))
    model = b.build(b.op("Sin", inner))
    plan = frontend.load(model, outputs=[inner])
    assert [p.name for p in plan.outputs] == [inner] and ops(plan) == ["conv2d"]


def test_what_was_cut_off_is_named() -> None:
    b = Builder()
    boxes = b.op("Relu", b.conv(b.input("x", (1, 3, 6, 6)), 3, 4, 3))
    model = b.build(b.op("NonZero", b.op("Sin", b.op("Sin", boxes))))
    assert frontend.imported(model, outputs=[boxes]).cut == "1 NonZero, 2 Sin"
    assert frontend.imported(b.build(boxes)).cut == ""


def test_everything_unsupported_is_named_at_once() -> None:
    b = Builder()
    x = b.op("Hardmax", b.conv(b.input("x", (1, 3, 6, 6)), 3, 4, 3), name="wave")
    y = b.op("Resize", b.conv(x, 4, 4), "", b.constant([1.0, 1, 2, 2]), mode="linear", name="turned")
    z = b.op("Resize", b.conv("x", 3, 4), "", b.constant([1.0, 2, 2, 2]), mode="linear", name="also")
    with pytest.raises(UserError) as caught:
        frontend.load(b.build(b.op("Det", y, name="last"), z))
    text = str(caught.value)
    assert "3 parts of the model not supported" in text
    assert all(word in text for word in ("Hardmax 'wave'", "Det 'last'", "Resize 'also'", "only over the last two"))


def test_contradictions_are_named() -> None:
    b = Builder()
    x, y = b.input("x", (1, 3, 4, 4)), b.input("y", (1, 3, 4, 5))
    b.op("Concat", x, y, axis=1, name="cat")
    b.op("Gather", x, b.constant([7]), axis=1, name="pick")
    b.op("MaxPool", x, kernel_shape=(2, 2), strides=(0, 1), name="pool")
    nodes = [node.output[0] for node in b.nodes]
    outputs = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in nodes]
    model = onnx.helper.make_model(onnx.helper.make_graph(b.nodes, "test", b.inputs, outputs, b.constants))
    with pytest.raises(UserError) as caught:
        frontend.load(model)
    assert all(name in str(caught.value) for name in ("Concat 'cat'", "Gather 'pick'", "MaxPool 'pool'"))


def test_unsupported_input_type() -> None:
    b = Builder()
    x = b.op("Cast", b.input("x", (1, 3, 6, 6), TensorProto.STRING), to=TensorProto.FLOAT)
    with pytest.raises(UserError, match="input x: is STRING; only numbers"):
        frontend.load(b.build(x))


def test_nan_weights_are_refused() -> None:
    b = Builder()
    weight = b.constant(np.full((4, 3, 1, 1), np.nan, np.float32))
    model = b.build(b.op("Conv", b.input("x", (1, 3, 6, 6)), weight, name="c"))
    with pytest.raises(UserError, match=r"Conv 'c': its weight holds NaN"):
        frontend.load(model)


def test_model_in_memory_stays_unchanged() -> None:
    model = small_network()
    before = model.SerializeToString()
    frontend.load(model, batch=3)
    assert model.SerializeToString() == before
    graph = onnx_ir.from_proto(model)
    frontend.load(graph, batch=3)
    assert (
        onnx_ir.to_proto(graph).SerializeToString() == onnx_ir.to_proto(onnx_ir.from_proto(model)).SerializeToString()
    )


def test_from_a_file(tmp_path: Path) -> None:
    onnx.save(small_network(), tmp_path / "small.onnx")
    assert frontend.load(tmp_path / "small.onnx").name == "small"
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"broken\.onnx"):
        frontend.load(tmp_path / "broken.onnx")


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_cifar_resnet_with_real_weights(batch: int, shared_data: Path) -> None:
    from weights import cifar_resnet  # of the shared data's loaders

    model = export(cifar_resnet(20), 2, 3, 32, 32, dynamic=True)
    plan = check(model, batch=batch)
    assert ops(plan).count("conv2d") == 19 and ops(plan).count("binary") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"conv_pool": 1, "conv2d": 19, "affine": 0, "binary": 0, "convert planes": 3}),
        ("resnet50", {"conv_pool": 1, "conv2d": 52, "affine": 0, "binary": 0}),
        ("resnext50_32x4d", {"conv_pool": 1, "conv2d": 52, "binary": 0}),
        ("mobilenet_v2", {"conv2d": 52, "affine": 0, "binary": 0}),
        ("squeezenet1_1", {"conv2d": 26, "affine": 0}),
        ("densenet121", {"conv_pool": 1, "conv2d": 119, "affine": 62}),
        ("shufflenet_v2_x0_5", {"conv2d": 56, "affine": 0}),
        ("googlenet", {"conv_pool": 1, "conv2d": 56, "affine": 0}),
        ("mnasnet0_5", {"conv2d": 52, "affine": 0, "binary": 0}),
    ],
)
def test_torchvision(
    name: str, expected: dict[str, int], torchvision_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LARGE", 1 << 40)  # or a large map of a batch would be several convolutions
    model = export(torchvision_model(torchvision_models, name), 2, 3, 64, 64, dynamic=True)
    for batch in (1, 3):
        plan = check(model, batch=batch, tolerance=1e-4)
        found = ops(plan)
        assert {op: found.count(op) for op in expected} == expected
