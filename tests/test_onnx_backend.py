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
from colonnade.frontend.expand import FOLDED, OURS
from colonnade.frontend.registry import HANDLERS
from tests import onnx_cases

SHARE = 12  # one case of so many is quick

# What users of edge boards bring: no case of these may be refused.
NAMED = [
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Gemm", "MatMul",
    "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish",
    "Tanh", "Elu", "Gelu", "Erf", "Softmax", "BatchNormalization", "InstanceNormalization", "LayerNormalization",
    "LRN", "Concat", "Split", "Slice", "Pad", "Resize", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "ReduceMean", "ReduceSum", "ReduceMax", "Gather", "DepthToSpace", "SpaceToDepth", "Identity", "Cast", "Sqrt",
    "Pow", "Exp",
]  # fmt: skip


def _check(name: str) -> None:
    if name in onnx_cases.OTHERWISE:
        with pytest.raises(AssertionError):
            onnx_cases.run(name)
    elif name in onnx_cases.refused():
        with pytest.raises(UserError):
            onnx_cases.run(name)
    else:
        onnx_cases.run(name)


def _real(name: str) -> bool:
    return onnx_cases.cases()[name].kind == "real"


@pytest.mark.parametrize("name", sorted(n for n in onnx_cases.cases() if not (crc32(n.encode()) % SHARE or _real(n))))
def test_case(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n in onnx_cases.cases() if crc32(n.encode()) % SHARE or _real(n)))
def test_other_case(name: str) -> None:
    _check(name)


def test_the_list_has_no_strangers_and_a_reason_each() -> None:
    refused = onnx_cases.refused()
    assert set(refused) <= set(onnx_cases.cases())
    assert all(len(reason) > 10 for reason in refused.values())
    assert len(refused) < len(onnx_cases.cases()) / 2


def test_operators_named_are_supported() -> None:
    assert set(NAMED) <= set(HANDLERS)


def test_no_operator_named_is_refused() -> None:
    """Nor any case of theirs, nor any other of operators in the table but for what float32 and planes have no place
    for: strings, what is drawn at random, and sizes that only the inputs' values tell."""
    strange = {}
    for name, reason in onnx_cases.refused().items():
        model, _ = onnx_cases.data(onnx_cases.cases()[name])
        kinds = {node.op_type for node in model.graph.node}
        blamed = reason.partition(":")[0]
        if blamed in NAMED or kinds <= set(NAMED):
            strange[name] = reason
        computed = {*HANDLERS, *FOLDED, *OURS}
        if kinds <= computed and not re.search("is STRING|drops at random|sizes being fixed", reason):
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
