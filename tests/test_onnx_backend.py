"""The onnx package's own cases: each passes, or stands in the list of what is refused."""

from __future__ import annotations

import re
from zlib import crc32

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from colonnade import onnx_backend
from colonnade.errors import UserError
from colonnade.frontend.registry import HANDLERS
from tests import onnx_cases

SHARE = 12  # one case of so many is quick

# What users of edge boards bring: no case of these may be refused but for types, empty arrays and training.
NAMED = [
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Gemm", "MatMul",
    "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish",
    "Tanh", "Elu", "Gelu", "Erf", "Softmax", "BatchNormalization", "InstanceNormalization", "LayerNormalization",
    "LRN", "Concat", "Split", "Slice", "Pad", "Resize", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "ReduceMean", "ReduceSum", "ReduceMax", "Gather", "DepthToSpace", "SpaceToDepth", "Identity", "Cast", "Sqrt",
    "Pow", "Exp",
]  # fmt: skip


def _check(name: str) -> None:
    if name in onnx_cases.refused():
        with pytest.raises(UserError):
            onnx_cases.run(name)
    else:
        onnx_cases.run(name)


@pytest.mark.parametrize("name", sorted(n for n in onnx_cases.cases() if crc32(n.encode()) % SHARE == 0))
def test_case(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n in onnx_cases.cases() if crc32(n.encode()) % SHARE))
def test_other_case(name: str) -> None:
    _check(name)


def test_the_list_has_no_strangers_and_a_reason_each() -> None:
    refused = onnx_cases.refused()
    assert set(refused) <= set(onnx_cases.cases())
    assert all(len(reason) > 10 for reason in refused.values())
    assert len(refused) < len(onnx_cases.cases()) / 2


def test_operators_named_are_supported() -> None:
    assert set(NAMED) <= set(HANDLERS)


ALLOWED = re.compile(
    "is (B?FLOAT16|float64|U?INT[24]|FLOAT[48]\\w*)|to (BFLOAT16|U?INT[24]|FLOAT[48]\\w*)|training mode|empty"
    "|only arrays of numbers|has no shape|indices of a maximum|wraps around|no plain array"
)


def test_named_operators_are_refused_for_types_alone() -> None:
    """Cases whose every operator is named above."""
    strange = {}
    for name, reason in onnx_cases.refused().items():
        model, _ = onnx_cases.data(onnx_cases.cases()[name])
        if {node.op_type for node in model.graph.node} <= set(NAMED) and not ALLOWED.search(reason):
            strange[name] = reason
    assert not strange


def test_interface() -> None:
    node = helper.make_node("Add", ["a", "b"], ["c"])
    a, b = np.ones((2, 3), np.float32), np.arange(3, dtype=np.float32)
    (c,) = onnx_backend.run_node(node, [a, b])
    np.testing.assert_array_equal(c, a + b)
    assert onnx_backend.supports_device("CPU") and not onnx_backend.supports_device("CUDA:0")
    ins = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    model = helper.make_model(helper.make_graph([helper.make_node("Hardmax", ["x"], ["y"])], "g", ins, outs))
    assert not onnx_backend.is_compatible(model)
    del model.graph.node[:]
    model.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["y"]))
    assert onnx_backend.is_compatible(model)
    prepared = onnx_backend.prepare(model)
    (y,) = prepared.run({"x": np.array([-1, 2], np.float32)})
    np.testing.assert_array_equal(y, [0, 2])
    with pytest.raises(UserError, match="shape"):
        prepared.run([np.zeros(3, np.float32)])
    with pytest.raises(UserError, match="numbers"):
        prepared.run([np.array(["a", "b"])])
