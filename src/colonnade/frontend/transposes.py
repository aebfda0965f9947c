"""Models that think in [N, H, W, C] made to think in [N, C, H, W]: their transposes sink until they meet their inverse.

Converters from TensorFlow wrap every convolution in two transposes and remove those that they see through. What they
leave stands around functions, sums, means and joins that work on any order of the axes: each of these goes above the
transposes in front of it, which become one behind it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

ELEMENTWISE = {
    "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
}  # fmt: skip
Order = tuple[int, ...]


def sink(model: ir.Model) -> bool:
    """Move transposes to [N, ..., C] down as far as they go; two in a row become one or none. Has ``model`` changed?"""
    changed = False
    for node in list(model.graph):
        if node.op_type == "Transpose" and node.domain == "":
            changed |= _joined(node)
            continue
        orders = {order for value in node.inputs if (order := _order(value)) is not None}
        if node.domain == "" and len(orders) == 1 and len(node.outputs) == 1:
            (order,) = orders
            if order == (0, *range(2, len(order)), 1):
                changed |= _below(model.graph, node, order)
    common.RemoveUnusedNodesPass()(model)
    return changed


def _order(value: ir.Value | None) -> Order | None:
    """Of the transpose that makes this value, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if "perm" in node.attributes:
        return tuple(int(i) for i in node.attributes["perm"].as_ints())
    return tuple(reversed(range(len(shape)))) if shape is not None else None


def _source(value: ir.Value) -> ir.Value:
    """What the transpose that makes this value reads."""
    node = value.producer()
    assert node is not None and node.inputs[0] is not None
    return node.inputs[0]


def _joined(node: ir.Node) -> bool:
    """A transpose of a transpose."""
    second, first = _order(node.outputs[0]), _order(node.inputs[0])
    if first is None or second is None or node.inputs[0] is None:
        return False
    x, both = _source(node.inputs[0]), tuple(first[i] for i in second)
    if both != tuple(range(len(both))):
        node.replace_input_with(0, x)
        node.attributes["perm"] = ir.AttrInt64s("perm", both)
    elif not node.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(node.outputs[0], x)
    return True


def _below(graph: ir.Graph, node: ir.Node, order: Order) -> bool:
    """Put ``node`` above the transposes in front of it, if that may be."""
    rank = len(order)
    back = tuple(order.index(i) for i in range(rank))
    attributes = {name: attribute for name, attribute in node.attributes.items()}
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        return False
    added: list[ir.Node] = []
    behind: Order | None = order  # the transpose behind it; None where none is needed
    if node.op_type in ELEMENTWISE:
        inputs = [_operand(graph, node, value, order, back, added) for value in _data(node)]
        inputs += list(node.inputs[len(inputs) :])
    elif node.op_type == "Concat":
        inputs = [_operand(graph, node, value, order, back, added, whole=True) for value in node.inputs]
        attributes["axis"] = ir.AttrInt64("axis", order[attributes["axis"].as_int() % rank])
    elif node.op_type in REDUCTIONS:
        axes = _axes(node)
        if axes is None:
            return False
        moved, keep = sorted(order[a % rank] for a in axes), node.attributes.get_int("keepdims", 1)
        inputs = [_source(node.inputs[0])] if node.inputs[0] is not None else []
        if "axes" in attributes:
            attributes["axes"] = ir.AttrInt64s("axes", moved)
        else:
            inputs.append(_constant(graph, node, np.array(moved, np.int64)))
        if not keep:
            left = [a for a in order if a not in moved]
            behind = tuple(sorted(left).index(a) for a in left)
            behind = None if list(behind) == sorted(behind) else behind
    elif node.op_type == "Pad" and len(node.inputs) > 1 and len(node.inputs) < 4:
        pads = node.inputs[1].const_value if node.inputs[1] is not None else None
        if pads is None or node.inputs[0] is None:
            return False
        old = pads.numpy().reshape(2, rank)
        new = np.zeros_like(old)
        new[:, list(order)] = old
        inputs = [_source(node.inputs[0]), _constant(graph, node, new.reshape(-1)), *node.inputs[2:]]
    else:
        return False
    if any(value is _NO for value in inputs):
        return False
    old_out = node.outputs[0]
    sizes = [int(d) for d in shape if isinstance(d, int)]
    if behind is not None:
        straight = [0] * len(sizes)
        for i, axis in enumerate(behind):
            straight[axis] = sizes[i]
        sizes = straight
    for extra in added:
        graph.insert_before(node, extra)
    result = ir.Value(name=f"{old_out.name}.straight", shape=ir.Shape(sizes), type=old_out.type)
    made = ir.Node("", node.op_type, inputs, list(attributes.values()), outputs=[result], name=node.name)
    graph.insert_before(node, made)
    if behind is None:
        result.name = old_out.name
        ir.convenience.replace_all_uses_with(old_out, result, replace_graph_outputs=True)
    else:
        turned = ir.Value(name=old_out.name, shape=old_out.shape, type=old_out.type)
        perm = ir.AttrInt64s("perm", behind)
        graph.insert_before(node, ir.Node("", "Transpose", [result], [perm], outputs=[turned]))
        ir.convenience.replace_all_uses_with(old_out, turned, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


_NO = ir.Value(name="cannot be turned")


def _data(node: ir.Node) -> list[ir.Value | None]:
    """The inputs that are arrays of one shape or are repeated to it; limits of Clip are none."""
    return list(node.inputs[:1] if node.op_type == "Clip" else node.inputs)


def _operand(
    graph: ir.Graph, node: ir.Node, value: ir.Value | None, order: Order, back: Order, added: list[ir.Node],
    whole: bool = False,
) -> ir.Value | None:  # fmt: skip
    """The operand as it is in front of the transpose, or ``_NO``; ``whole``: it must have all the axes."""
    if value is None:
        return None
    if _order(value) == order:
        return _source(value)
    rank = len(order)
    if value.const_value is not None:
        array = value.const_value.numpy()
        if array.ndim > rank or (whole and array.ndim < rank):
            return _NO
        if array.size == 1 and not whole:
            return value
        full = array.reshape((1,) * (rank - array.ndim) + array.shape)
        return _constant(graph, node, np.ascontiguousarray(full.transpose(back)))
    shape = value.shape
    if shape is None or len(shape) != rank or not all(isinstance(d, int) for d in shape):
        return _NO
    for reader, _ in value.uses():
        if reader.op_type == "Transpose" and _order(reader.outputs[0]) == back and reader is not node:
            return reader.outputs[0]  # somebody has turned it already
    longer = [i for i in back if shape[i] != 1]
    if longer != sorted(longer):  # a move: nothing would be gained
        return _NO
    sizes = ir.Shape([shape[i] for i in back])
    turned = ir.Value(name=f"{value.name}.{node.outputs[0].name}.turned", shape=sizes, type=value.type)
    added.append(ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", back)], outputs=[turned]))
    return turned


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return [int(a) for a in node.attributes["axes"].as_ints()]
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None or given.const_value is None or given.const_value.size == 0:
        return None
    return [int(a) for a in given.const_value.numpy().reshape(-1)]


def _constant(graph: ir.Graph, node: ir.Node, array: np.typing.NDArray[np.generic]) -> ir.Value:
    name, count = f"{node.outputs[0].name}.turned", 0
    while f"{name}.{count}" in graph.initializers:
        count += 1
    value = ir.Value(name=f"{name}.{count}", const_value=ir.tensor(array, name=f"{name}.{count}"))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value
