"""The layers of an ONNX graph that have weights: where these are stored, and why some layers would stay dense."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colonnade.errors import UserError
from colonnade.onnx_io import layer_of, module_of, node_name
from colonnade.onnx_winograd import OPERATORS, size_of

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "ReduceMean")
# A convolution on so few channels is a stem wherever it stands; the first one on an input is one up to the second
# number (space-to-depth inputs have 12 channels).
STEM_CHANNELS = 4
FIRST_STEM_CHANNELS = 16


@dataclass
class Constant:
    """A constant that layers take their weights from."""

    name: str
    tensor: onnx.TensorProto
    layers: list[WeightedLayer] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass
class WeightedLayer:
    """A node that multiplies by weights.

    name:   as its author knows it: that of its weight without the ending or of its torch module, if no other layer has
            it; else the node's.
    node:   the node's own, or of its output where it has none.
    reason: why it would stay dense; None: it can be pruned.
    """

    name: str
    node: str
    op: str
    groups: int
    transposed: bool  # rows are the last axis of the stored weight, as in x @ W
    position: int  # in graph.node
    weight: Constant | None
    reason: str | None = None
    module: str = ""  # of torch, where the file says it

    @property
    def convolution(self) -> bool:
        return self.op == "Conv" or self.op in OPERATORS


def weighted_layers(graph: onnx.GraphProto, exclude: Sequence[str]) -> list[WeightedLayer]:
    """The layers in the graph's order, each with the reason why it would stay dense, or None.

    exclude: patterns (re.search) of nodes, weights or torch modules.

    Raises UserError for a pattern that is invalid or matches nothing.
    """
    layers, weights = _read(graph)
    _call_by_weights(layers)
    if layers:
        _keep_dense(graph, layers)
        _exclude(layers, exclude)
    for weight in weights:
        _settle(weight)
    return layers


def _read(graph: onnx.GraphProto) -> tuple[list[WeightedLayer], list[Constant]]:
    """The weighted layers of a graph in its order, and the constants they use."""
    constants = {tensor.name: Constant(tensor.name, tensor) for tensor in graph.initializer}
    for node in graph.node:
        tensor = next((attribute for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and tensor is not None and tensor.HasField("t"):
            constants[node.output[0]] = Constant(node.output[0], tensor.t)
    # A weight may pass through an Identity or a 2-D Transpose on its way to the layer.
    flipped: dict[str, bool] = dict.fromkeys(constants, False)
    passed: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("Identity", "Transpose") or node.input[0] not in constants:
            continue
        weight = constants[node.input[0]]
        turn = node.op_type == "Transpose"
        if turn and (len(weight.tensor.dims) != 2 or list(_attribute(node, "perm", [1, 0])) != [1, 0]):
            continue
        constants[node.output[0]] = weight
        flipped[node.output[0]] = flipped[node.input[0]] != turn
        passed.add(node.output[0])

    layers = []
    for at, node in enumerate(graph.node):
        name = node_name(node)
        position = _weight_position(node, constants)
        for index, value in enumerate(node.input):
            if value in constants and index != position and node.output[0] not in passed:
                constants[value].others.append(f"{node.op_type} {name}")
        if position is None:
            continue
        source = constants.get(node.input[position])
        layer = WeightedLayer(
            name, name, node.op_type, int(_attribute(node, "group", 1)), False, at, source, None, module_of(node)
        )
        if node.op_type == "ConvTranspose":
            layer.reason = "transposed convolution: every phase of its output has columns of its own"
        elif source is None:
            kind = next((other.op_type for other in graph.node if node.input[position] in other.output), "")
            layer.reason = f"weights behind another operator ({kind})" if kind else "weights are not constant"
        else:
            if node.op_type == "Gemm":
                layer.transposed = not _attribute(node, "transB", 0)
            elif node.op_type == "MatMul":
                layer.transposed = position == 1
            layer.transposed ^= flipped[node.input[position]]
            layer.reason = _unfit(layer, source.tensor)
            source.layers.append(layer)
        layers.append(layer)
    for output in graph.output:
        if output.name in constants:
            constants[output.name].others.append("graph output")
    distinct = {id(weight): weight for weight in constants.values() if weight.layers}
    return layers, list(distinct.values())


def _call_by_weights(layers: Sequence[WeightedLayer]) -> None:
    """Name layers as their author does. Exporters number nodes, but keep what weights are called."""
    better = [layer_of(layer.weight.name if layer.weight else "") or layer.module for layer in layers]
    taken = Counter(better) + Counter(layer.node for layer in layers)
    for layer, name in zip(layers, better, strict=True):
        if name and (taken[name] == 1 or (taken[name] == 2 and name == layer.node)):
            layer.name = name


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _weight_position(node: onnx.NodeProto, constants: dict[str, Constant]) -> int | None:
    """Which input holds the weights; None for other operators and products of two activations."""
    if size_of(node.domain, node.op_type):
        return 1
    if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHTED:
        return None
    if node.op_type != "MatMul":
        return 1
    return next((index for index in (1, 0) if node.input[index] in constants), None)


def _unfit(layer: WeightedLayer, tensor: onnx.TensorProto) -> str | None:
    """Why a constant cannot be pruned, whatever the layer's place in the graph."""
    import onnx

    kinds = onnx.TensorProto
    if tensor.data_type not in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE):
        return f"weights are {kinds.DataType.Name(tensor.data_type).lower()}"
    if len(tensor.dims) < (3 if layer.convolution else 2) or (not layer.convolution and len(tensor.dims) != 2):
        return f"weights have {len(tensor.dims)} axes"
    if 0 in tensor.dims or (layer.convolution and tensor.dims[0] % layer.groups):
        return "weights have an odd shape"
    return None


def _keep_dense(graph: onnx.GraphProto, layers: list[WeightedLayer]) -> None:
    """Stem, depthwise convolutions and classifier stay dense."""
    weighted = {layer.position for layer in layers}
    first, last = _met_first(graph, weighted, forward=True), _met_first(graph, weighted, forward=False)
    for layer in layers:
        if layer.reason or not layer.convolution or layer.weight is None:
            continue
        per_group = layer.weight.tensor.dims[1]
        if layer.groups > 1 and per_group == 1:
            layer.reason = "depthwise"
        elif per_group * layer.groups <= (FIRST_STEM_CHANNELS if layer.position in first else STEM_CHANNELS):
            layer.reason = "stem"
    products = [layer for layer in layers if layer.op in ("Gemm", "MatMul")]
    head = products[-1] if products else None
    if head is None and layers[-1].weight and any(node.op_type in POOLS for node in graph.node):
        # A classifier may be written as a 1×1 convolution.
        head = layers[-1] if set(layers[-1].weight.tensor.dims[2:]) == {1} else None
    if head and head.position in last and not head.reason:
        head.reason = "classifier"


def _met_first(graph: onnx.GraphProto, weighted: set[int], *, forward: bool) -> set[int]:
    """The weighted nodes that one meets first, walking from the inputs (or back from the outputs)."""
    constant = {tensor.name for tensor in graph.initializer}
    values = {value.name for value in (graph.input if forward else graph.output)} - constant
    met = set()
    nodes = list(enumerate(graph.node))
    for position, node in nodes if forward else reversed(nodes):
        near, far = (node.input, node.output) if forward else (node.output, node.input)
        if values.isdisjoint(near):
            continue
        if position in weighted:
            met.add(position)
        else:
            values.update(far)
    return met


def _exclude(layers: list[WeightedLayer], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--exclude {pattern!r} is no regular expression ({error}); {names_of(layers)}") from None
        hits = [layer for layer in layers if any(regex.search(name) for name in _names(layer))]
        if not hits:
            raise UserError(f"--exclude {pattern!r} matches no layer; {names_of(layers)}")
        for layer in hits:
            layer.reason = layer.reason or f"excluded by {pattern!r}"


def _names(layer: WeightedLayer) -> tuple[str, ...]:
    """All that a layer may be called."""
    return layer.name, layer.node, layer.weight.name if layer.weight else "", layer.module


def names_of(layers: Sequence[WeightedLayer]) -> str:
    """All layers in words, for errors."""
    return "the layers are: " + ", ".join(layer.name for layer in layers)


def _settle(weight: Constant) -> None:
    """A constant used more than once is pruned once, and only if all its uses agree."""
    first = weight.layers[0]
    if weight.others:
        for layer in weight.layers:
            layer.reason = layer.reason or f"weights also used by {weight.others[0]}"
        return
    dense = next((layer for layer in weight.layers if layer.reason), None)
    for layer in weight.layers:
        if dense is not None:
            layer.reason = layer.reason or f"shares weights with {dense.name}"
        elif layer is not first:
            same = (layer.transposed, layer.groups) == (first.transposed, first.groups)
            layer.reason = f"pruned with {first.name}" if same else f"pruned with {first.name}, in its rows"
