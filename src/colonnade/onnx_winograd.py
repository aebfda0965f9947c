"""3x3 convolutions with transformed weights in ONNX: a function of this project's own domain, which any runtime runs.

The function's body says what it computes by ONNX's own operators: the transforms are multiplied into the weights (a
runtime does that once, when it loads the file), which gives a convolution of m + 2 by m' + 2 taps and strides m and m'
with m m' times the outputs, and its outputs are put side by side. That is slower than the 3x3 convolution; it is there
for answers, not for speed. The importer takes the node itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from colonnade.errors import UserError
from colonnade.workload.winograd import SIZES, Size, matrices, seen, transform

if TYPE_CHECKING:
    import onnx

DOMAIN = "colonnade"
OPERATORS = {f"WinogradConv{name}": name for name in SIZES}  # (x, transformed weights, bias [OC])
OPSET = 13  # the first that knows all that the function needs


def size_of(domain: str, operator: str) -> str:
    """The name in SIZES of such a node's tiles; "" for any other."""
    return OPERATORS.get(operator, "") if domain == DOMAIN else ""


def opset(model: onnx.ModelProto) -> int:
    """Of ONNX's own operators."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def operator(size: str) -> str:
    """The operator for tiles of this name in SIZES."""
    return next(name for name, known in OPERATORS.items() if known == size)


def fits(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    """Is it a 3x3 convolution at stride 1, padded by one pixel on all sides, in one group?"""
    import onnx

    known = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = (known.get("strides", [1, 1]), known.get("dilations", [1, 1]), known.get("pads"), known.get("group", 1))
    explicit = known.get("auto_pad", b"NOTSET") in (b"NOTSET", b"")
    return (
        node.op_type == "Conv"
        and plain == ([1, 1], [1, 1], [1] * 4, 1)
        and explicit
        and list(weight.dims[2:]) == [3, 3]
    )


def rewrite(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], size: str) -> None:
    """Make these convolutions, which ``fits`` and whose float32 weights are initializers of their own, nodes with
    transformed weights. Changes ``model``.

    Raises UserError for a model of an opset before 13.
    """
    import onnx

    define(model, size)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = {*stored, *(value for other in model.graph.node for value in (*other.input, *other.output))}
    for node in nodes:
        weight = stored[node.input[1]]
        changed = transform(onnx.numpy_helper.to_array(weight), SIZES[size])
        weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        if len(node.input) < 3 or not node.input[2]:
            free = (f"{weight.name}.bias{end}" for end in itertools.chain([""], itertools.count(1)))
            name = next(name for name in free if name not in taken)
            taken.add(name)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(len(changed), np.float32), name))
            del node.input[2:]
            node.input.append(name)
        node.op_type, node.domain = operator(size), DOMAIN
        del node.attribute[:]


def define(model: onnx.ModelProto, size: str) -> None:
    """Say in the model what the operator means.

    Raises UserError for a model of an opset before 13.
    """
    import onnx

    name = operator(size)
    version = opset(model)
    if version < OPSET:
        raise UserError(f"the model is of opset {version}: transformed weights need {OPSET}; export it again")
    if not any((function.domain, function.name) == (DOMAIN, name) for function in model.functions):
        model.functions.append(_function(name, SIZES[size], version))
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _function(name: str, m: Size, version: int) -> onnx.FunctionProto:
    """y = the convolution of x [N, IC, H, W] with transformed weights, bias included."""
    import onnx

    helper, (my, mx), (ty, tx) = onnx.helper, m, seen(m)
    down, across = matrices(my), matrices(mx)

    def constant(output: str, values: object, kind: type = np.int64) -> onnx.NodeProto:
        tensor = onnx.numpy_helper.from_array(np.asarray(values, kind), output)
        return helper.make_node("Constant", [], [output], value=tensor)

    nodes = [
        constant("into", np.kron(down[0], across[0]), np.float32),
        constant("back", np.kron(down[2], across[2]), np.float32),
        constant("flat", [0, 0, ty * tx]), constant("every", [-1]), constant("taps", [ty, tx]),
        constant("channel", [1]), constant("inside", [0, -1, my, mx]), constant("tile", [my, mx]),
        constant("zeros", [0, 0]), constant("spatial", [2, 3]), constant("along", [1, -1, 1, 1]),
        helper.make_node("Reshape", ["weight", "flat"], ["u"]),
        helper.make_node("Einsum", ["back", "u", "into"], ["taken"], equation="rp,ocp,pq->orcq"),
        helper.make_node("Shape", ["weight"], ["shape"]),
        helper.make_node("Gather", ["shape", "channel"], ["inputs"]),
        helper.make_node("Concat", ["every", "inputs", "taps"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["taken", "wanted"], ["kernel"]),
        helper.make_node(
            "Conv", ["x", "kernel"], ["apart"], strides=[my, mx], pads=[1, 1, my, mx], kernel_shape=[ty, tx]
        ),
        helper.make_node("Shape", ["apart"], ["made"]),
        helper.make_node("Gather", ["made", "spatial"], ["grid"]),
        helper.make_node("Concat", ["inside", "grid"], ["split"], axis=0),
        helper.make_node("Reshape", ["apart", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["woven"], perm=[0, 1, 4, 2, 5, 3]),
        helper.make_node("Mul", ["grid", "tile"], ["wide"]),
        helper.make_node("Concat", ["zeros", "wide"], ["whole"], axis=0),
        helper.make_node("Reshape", ["woven", "whole"], ["tiles"]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Gather", ["size", "spatial"], ["ends"]),
        helper.make_node("Slice", ["tiles", "zeros", "ends", "spatial"], ["pixels"]),
        helper.make_node("Reshape", ["bias", "along"], ["added"]),
        helper.make_node("Add", ["pixels", "added"], ["y"]),
    ]  # fmt: skip
    return helper.make_function(DOMAIN, name, ["x", "weight", "bias"], ["y"], nodes, [helper.make_opsetid("", version)])
