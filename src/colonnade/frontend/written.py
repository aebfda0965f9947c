"""Operators written out as others, as older exporters and ONNX's own definitions do: new nodes in the place of one."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common


class Nodes:
    """Collects what takes the place of ``node``: ``y = nodes.op("Relu", x)``; arrays become constants."""

    def __init__(self, node: ir.Node, graph: ir.Graph) -> None:
        self.node, self.graph = node, graph
        self._name = node.outputs[0].name or node.name or node.op_type
        self._made: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value | npt.NDArray[Any], **attributes: Any) -> ir.Value:
        """The output of a new node."""
        values = [x if isinstance(x, ir.Value) else self._constant(x) for x in inputs]
        node = ir.node(kind, values, attributes)
        node.outputs[0].name = f"{self._name}.{len(self._made)}"
        self._made.append(node)
        return node.outputs[0]

    def reduced(self, kind: str, value: ir.Value, axes: Sequence[int], keep: int) -> ir.Value:
        """A reduction over these axes, which are an attribute in older opsets."""
        if self.graph.opset_imports.get("", 18) < (13 if kind == "ReduceSum" else 18):
            return self.op(kind, value, axes=list(axes), keepdims=keep)
        return self.op(kind, value, np.array(axes), keepdims=keep)

    def done(self, value: ir.Value) -> None:
        """``value`` takes the place of the node's only output."""
        ir.convenience.replace_nodes_and_values(
            self.graph, self.node, [self.node], self._made, list(self.node.outputs[:1]), [value]
        )

    def _constant(self, array: npt.NDArray[Any]) -> ir.Value:
        shown = f"{zlib.crc32(array.tobytes()):08x}.{array.dtype}.{'x'.join(map(str, array.shape))}"
        name = f"{self.node.op_type.lower()}.{shown}"  # the same for all nodes, so that what they share is done once
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]


def computable(node: ir.Node, opset: int) -> bool:
    """Does onnx's own evaluator, which knows one version of each operator, compute what the node means?"""
    if node.op_type in ("Softmax", "LogSoftmax", "Hardmax"):
        return opset >= 13
    return node.op_type != "LRN" and (node.op_type != "BatchNormalization" or opset >= 14)


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """A library says in its log what the importer says better, or what is of no interest to users."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def infer_shapes(model: ir.Model) -> None:
    """Types and shapes by onnx itself, which knows operators by their definitions as well; where sizes contradict each
    other the model stays as it is, and the importer says it."""
    with quiet("onnx_ir.passes.common.shape_inference"):
        common.ShapeInferencePass()(model)


def known_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Empty where it is not known (or of a scalar)."""
    sizes = value.shape if value is not None and value.shape is not None else ()
    known = tuple(d for d in sizes if isinstance(d, int))
    return known if len(known) == len(sizes) else ()


def index_of_extreme(node: ir.Node, graph: ir.Graph) -> bool:
    """ArgMax, ArgMin: the first (or, where asked, the last) index of the largest (smallest) element.

    False where the input's shape is not known.
    """
    x = node.inputs[0]
    shape = known_shape(x)
    if x is None or not shape:
        return False
    axis = node.attributes.get_int("axis", 0) % len(shape)
    last, keep = node.attributes.get_int("select_last_index", 0), node.attributes.get_int("keepdims", 1)
    count = shape[axis]
    nodes = Nodes(node, graph)
    best = nodes.reduced("ReduceMax" if node.op_type == "ArgMax" else "ReduceMin", x, [axis], 1)
    places = np.arange(count, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    none = np.full(1, -1 if last else count, np.float32)
    found = nodes.op("Where", nodes.op("Equal", x, best), places, none)
    index = nodes.reduced("ReduceMax" if last else "ReduceMin", found, [axis], keep)
    nodes.done(nodes.op("Cast", index, to=ir.DataType.INT64.value))
    return True


def gather_elements(node: ir.Node, graph: ir.Graph) -> bool:
    """GatherElements: a Gather of the flattened data, at the places that the indices mean.

    False where a shape is not known, or float32 would not hold the places.
    """
    x, indices = node.inputs
    data, picked = known_shape(x), known_shape(indices)
    if x is None or indices is None or not data or len(data) != len(picked) or prod(data) > 1 << 24:
        return False
    axis = node.attributes.get_int("axis", 0) % len(data)
    steps = [prod(data[i + 1 :]) for i in range(len(data))]
    others = np.zeros(picked, np.int64)
    for i, (count, step) in enumerate(zip(picked, steps, strict=True)):
        if i != axis:
            others += np.arange(count).reshape([-1 if j == i else 1 for j in range(len(picked))]) * step
    nodes = Nodes(node, graph)
    kind = np.int64 if indices.dtype == ir.DataType.INT64 else np.int32
    size = np.full(1, data[axis], kind)
    wrapped = nodes.op("Mod", nodes.op("Add", indices, size), size)  # from the end where below 0
    places = nodes.op("Add", nodes.op("Mul", wrapped, np.full(1, steps[axis], kind)), others.astype(kind))
    nodes.done(nodes.op("Gather", nodes.op("Reshape", x, np.array([-1])), places, axis=0))
    return True


def gather_nd(node: ir.Node, graph: ir.Graph) -> bool:
    """GatherND: a Gather of rows of the data, whose first axes are one, at the places that the indices mean.

    False where a shape is not known, or float32 would not hold the places.
    """
    x, indices = node.inputs
    data, picked = known_shape(x), known_shape(indices)
    if x is None or indices is None or not data or not picked or prod(data) > 1 << 24:
        return False
    batch = node.attributes.get_int("batch_dims", 0)
    last = batch + picked[-1]
    sizes = data[batch:last]
    steps = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    nodes = Nodes(node, graph)
    kind = np.int64 if indices.dtype == ir.DataType.INT64 else np.int32
    size = np.array(sizes, kind)
    wrapped = nodes.op("Mod", nodes.op("Add", indices, size), size)  # from the end where below 0
    scaled, axis = nodes.op("Mul", wrapped, np.array(steps, kind)), len(picked) - 1
    places = nodes.reduced("ReduceSum", scaled, [axis], 0)
    if batch:
        first = np.arange(prod(data[:batch]), dtype=kind).reshape(*data[:batch], *[1] * (axis - batch)) * prod(sizes)
        places = nodes.op("Add", places, first.astype(kind))
    rows = nodes.op("Reshape", x, np.array([prod(data[:last]), *data[last:]]))
    nodes.done(nodes.op("Gather", rows, places, axis=0))
    return True
