"""Prune an ONNX file: zeros go into the weights, the graph stays as it is, and any runtime gives the same result."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.onnx_io import check_writable, load_onnx, module_of, save_onnx
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.calibrate_onnx import OnnxChain, Target, unfit
from colonnade.sparsify.select import SCORES, as_matrix, from_matrix, select
from colonnade.sparsify.sequential import Options, prune_chain

if TYPE_CHECKING:
    import onnx

METHODS = ("magnitude", "obs")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "ReduceMean")
# A convolution on so few channels is a stem wherever it stands; the first one on an input is one up to the second
# number (space-to-depth inputs have 12 channels).
STEM_CHANNELS = 4
FIRST_STEM_CHANNELS = 16


@dataclass(frozen=True)
class LayerReport:
    """One weighted layer.

    shape:    of the weight in the file.        reason: why it stays dense; None if it was pruned.
    columns:  K, and `kept` of them in every tile.
    tiles:    number of tiles.                  retained: share of the score that is kept, 1 for a dense layer; with
              method "obs" the share of the wanted outputs' variance that is reproduced.
    """

    name: str
    op: str
    weight: str
    shape: tuple[int, ...]
    reason: str | None
    columns: int
    kept: int
    tiles: int
    retained: float

    @property
    def parameters(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class PruneReport:
    """What became of every layer, in the order of the graph. pattern: of layers without one of their own."""

    source: Path
    destination: Path
    pattern: ColumnPattern | None
    layers: tuple[LayerReport, ...]

    @property
    def pruned(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.reason is None)


@dataclass
class _Weight:
    """A constant that layers take their weights from."""

    name: str
    tensor: "onnx.TensorProto"
    layers: list["_Layer"] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass
class _Layer:
    name: str
    op: str
    groups: int
    transposed: bool  # rows are the last axis of the stored weight, as in x @ W
    position: int  # in graph.node
    weight: _Weight | None
    reason: str | None = None
    module: str = ""  # of torch, where the file says it


def prune_file(
    source: Path | str,
    destination: Path | str,
    pattern: ColumnPattern | None,
    *,
    score: str = "l1",
    group_rows: bool = True,
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    method: str = "magnitude",
    calibration: Mapping[str, npt.NDArray[Any]] | None = None,
    options: Options | None = None,
    patterns: Mapping[str, ColumnPattern | None] | None = None,
) -> PruneReport:
    """Prune the convolutions and matrix products of an ONNX file and write the result to `destination`.

    Dense stay: the stem, depthwise convolutions, the classifier, and layers whose node, weight or torch module matches
    one of the `exclude` patterns (re.search). progress(done, total, layer) is called before every layer.

    method:      "magnitude", or "obs": columns by second order, the kept weights and the biases fitted to give the
                 dense layers' outputs on `calibration`, layer after layer on already pruned inputs (second_order.py).
                 Needs float32 weights and onnxruntime. Layers whose statistics cannot be gathered go by magnitude.
    calibration: samples of the model's inputs by name, axis 0 the samples; a few hundred. Labels are not needed.
    options:     settings of "obs".
    patterns:    the pattern of single layers by name, in the place of `pattern`; None leaves one dense. Without a
                 `pattern` (None) all others stay dense.

    Raises UserError for a bad file, a pattern in `exclude` that is invalid or matches nothing, a weight that is not
    finite, and an output that exists without `force` or cannot be written; nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if score not in SCORES:
        raise UserError(f"score is {score!r}: expected one of {', '.join(SCORES)}")
    if method not in METHODS:
        raise UserError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
    if (method == "obs") != (calibration is not None):
        raise UserError("method 'obs' needs calibration inputs, and no other method takes them")
    check_writable(destination, force=force)
    model = load_onnx(source)
    layers, weights = _read(model.graph)
    if not layers:
        raise UserError(f"{source}: no Conv, Gemm or MatMul with weights in it: nothing to prune")
    _keep_dense(model.graph, layers)
    _exclude(layers, exclude)
    for weight in weights:
        _settle(weight)
    chosen = _patterns(layers, pattern, patterns or {})

    reports: dict[int, tuple[int, int, int, float]] = {}
    todo = [layer for layer in layers if layer.reason is None]
    fitted = _fitted(source, model.graph, todo) if calibration is not None else []
    rest = [layer for layer in todo if layer not in fitted]
    # First, so that what the others lose is not taken for the dense model's outputs.
    if calibration is not None and fitted:
        settings = replace(options or Options(), similar_rows=group_rows)
        heard = (lambda done, _, name: progress(done, len(todo), name)) if progress else None
        reports |= _fit(model, fitted, calibration, chosen, settings, heard)
    for done, layer in enumerate(rest):
        if progress:
            progress(len(fitted) + done, len(todo), layer.name)
        assert layer.weight is not None
        reports[id(layer)] = _prune(source, layer, layer.weight, chosen[layer.name], score, group_rows)
    save_onnx(model, destination, force=force)
    return PruneReport(source, destination, pattern, tuple(_report(layer, reports.get(id(layer))) for layer in layers))


def read_layers(
    model: "onnx.ModelProto", exclude: Sequence[str] = ()
) -> list[tuple[LayerReport, npt.NDArray[Any] | None]]:
    """All weighted layers of a model with why they would stay dense, and their weights with rows first.

    Nothing is changed; the weights are None where they are no readable constant.
    """
    import onnx

    layers, weights = _read(model.graph)
    if layers:
        _keep_dense(model.graph, layers)
        _exclude(layers, exclude)
    for weight in weights:
        _settle(weight)
    found: list[tuple[LayerReport, npt.NDArray[Any] | None]] = []
    for layer in layers:
        matrix = None
        if layer.weight is not None:
            try:
                stored = onnx.numpy_helper.to_array(layer.weight.tensor)
                matrix = stored.T if layer.transposed else stored
            except (ValueError, TypeError):
                layer.reason = "weights cannot be read"
        found.append((_report(layer, None), matrix))
    return found


def read_targets(source: Path | str, model: "onnx.ModelProto", exclude: Sequence[str] = ()) -> list[Target]:
    """The layers that would be pruned and whose statistics can be gathered, for an `OnnxChain`.

    Raises UserError for a model without weights, and for weights that are not finite or not float32.
    """
    layers, weights = _read(model.graph)
    if not layers:
        raise UserError(f"{source}: no Conv, Gemm or MatMul with weights in it: nothing to prune")
    _keep_dense(model.graph, layers)
    _exclude(layers, exclude)
    for weight in weights:
        _settle(weight)
    return _targets(model, _fitted(Path(source), model.graph, [layer for layer in layers if layer.reason is None]))


def _targets(model: "onnx.ModelProto", layers: Sequence[_Layer]) -> list[Target]:
    return [
        Target(layer.name, model.graph.node[layer.position], layer.weight.tensor, layer.transposed, layer.groups)
        for layer in layers
        if layer.weight is not None
    ]


def _report(layer: _Layer, pruned: tuple[int, int, int, float] | None) -> LayerReport:
    shape = tuple(layer.weight.tensor.dims) if layer.weight else ()
    name = layer.weight.name if layer.weight else ""
    if pruned:
        return LayerReport(layer.name, layer.op, name, shape, None, *pruned)
    rows = shape[-1] if layer.transposed and shape else shape[0] if shape else 1
    columns = int(np.prod(shape)) // max(rows, 1) if shape else 0
    return LayerReport(layer.name, layer.op, name, shape, layer.reason, columns, columns, 0, 1.0)


def _patterns(
    layers: Sequence[_Layer], pattern: ColumnPattern | None, own: Mapping[str, ColumnPattern | None]
) -> dict[str, ColumnPattern]:
    """The pattern of every layer that is pruned; layers with the pattern None are marked dense."""
    known = {layer.name: layer for layer in layers}
    for name, wanted in own.items():
        if name not in known:
            raise UserError(f"there is no layer {name!r}; {_names(list(layers))}")
        if wanted is not None and (reason := known[name].reason):
            raise UserError(f"layer {name} stays dense ({reason}): take it out of the plan, or call it dense there")
    chosen = {}
    for layer in layers:
        if layer.reason is None:
            wanted = own.get(layer.name, pattern)
            if wanted is None:
                layer.reason = "dense by plan"
            else:
                chosen[layer.name] = wanted
    return chosen


def _fitted(source: Path, graph: "onnx.GraphProto", todo: Sequence[_Layer]) -> list[_Layer]:
    """The layers whose statistics can be gathered."""
    import onnx

    found = []
    for layer in todo:
        assert layer.weight is not None
        if unfit(graph.node[layer.position], graph) or len(layer.weight.layers) > 1:
            continue
        if layer.weight.tensor.data_type != onnx.TensorProto.FLOAT:
            raise UserError(f"{source}: weights of {layer.name} are not float32: method 'obs' works on float32 models")
        if not np.isfinite(onnx.numpy_helper.to_array(layer.weight.tensor)).all():
            raise UserError(
                f"{source}: tensor {layer.weight.name!r} holds NaN or infinite weights: train or export it again"
            )
        found.append(layer)
    return found


def _fit(
    model: "onnx.ModelProto",
    layers: Sequence[_Layer],
    calibration: Mapping[str, npt.NDArray[Any]],
    patterns: Mapping[str, ColumnPattern],
    options: Options,
    progress: Callable[[int, int, str], None] | None,
) -> dict[int, tuple[int, int, int, float]]:
    """Prune layers by second order, in place; K, kept columns, tiles and explained variance of each."""
    chain = OnnxChain(model, _targets(model, layers), calibration)
    by_name = {layer.name: layer for layer in layers}
    reports = {}
    for result in prune_chain(chain, patterns, options, progress):
        pattern, columns = patterns[result.layer.name], result.layer.columns
        reports[id(by_name[result.layer.name])] = (columns, pattern.kept(columns), result.tiles, result.explained)
    return reports


def _prune(
    source: Path, layer: _Layer, weight: _Weight, pattern: ColumnPattern, score: str, similar_rows: bool
) -> tuple[int, int, int, float]:
    """Put the zeros into a weight; K, kept columns, tiles and retained share."""
    import onnx

    try:
        stored = onnx.numpy_helper.to_array(weight.tensor)
    except (ValueError, TypeError):
        raise UserError(f"{source}: tensor {weight.name!r} cannot be read: the file is corrupt") from None
    rows_first = stored.T if layer.transposed else stored
    matrix = as_matrix(rows_first)
    if not np.isfinite(matrix).all():
        raise UserError(f"{source}: tensor {weight.name!r} holds NaN or infinite weights: train or export it again")
    selection = select(matrix, pattern, groups=layer.groups, score=score, similar_rows=similar_rows)
    mask: npt.NDArray[Any] = from_matrix(selection.mask, rows_first.shape)
    pruned = np.where(mask.T if layer.transposed else mask, stored, np.zeros((), stored.dtype))
    name = weight.tensor.name
    weight.tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(pruned), name))
    return matrix.shape[1], pattern.kept(matrix.shape[1]), len(selection.rows), selection.retained


def _attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    import onnx

    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _read(graph: "onnx.GraphProto") -> tuple[list[_Layer], list[_Weight]]:
    """The weighted layers of a graph in its order, and the constants they use."""
    constants = {tensor.name: _Weight(tensor.name, tensor) for tensor in graph.initializer}
    for node in graph.node:
        tensor = next((attribute for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and tensor is not None and tensor.HasField("t"):
            constants[node.output[0]] = _Weight(node.output[0], tensor.t)
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
        name = node.name or node.output[0]
        position = _weight_position(node, constants)
        for index, value in enumerate(node.input):
            if value in constants and index != position and node.output[0] not in passed:
                constants[value].others.append(f"{node.op_type} {name}")
        if position is None:
            continue
        source = constants.get(node.input[position])
        layer = _Layer(name, node.op_type, int(_attribute(node, "group", 1)), False, at, source, None, module_of(node))
        if node.op_type == "ConvTranspose":
            layer.reason = "transposed convolution: every phase of its output has columns of its own"
        elif source is None:
            layer.reason = "weights are not constant"
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


def _weight_position(node: "onnx.NodeProto", constants: dict[str, _Weight]) -> int | None:
    """Which input holds the weights; None for other operators and products of two activations."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in WEIGHTED:
        return None
    if node.op_type != "MatMul":
        return 1
    return next((index for index in (1, 0) if node.input[index] in constants), None)


def _unfit(layer: _Layer, tensor: "onnx.TensorProto") -> str | None:
    """Why a constant cannot be pruned, whatever the layer's place in the graph."""
    import onnx

    kinds = onnx.TensorProto
    if tensor.data_type not in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE):
        return f"weights are {kinds.DataType.Name(tensor.data_type).lower()}"
    if len(tensor.dims) < (3 if layer.op == "Conv" else 2) or (layer.op != "Conv" and len(tensor.dims) != 2):
        return f"weights have {len(tensor.dims)} axes"
    if 0 in tensor.dims or (layer.op == "Conv" and tensor.dims[0] % layer.groups):
        return "weights have an odd shape"
    return None


def _keep_dense(graph: "onnx.GraphProto", layers: list[_Layer]) -> None:
    """Stem, depthwise convolutions and classifier stay dense."""
    weighted = {layer.position for layer in layers}
    first, last = _met_first(graph, weighted, forward=True), _met_first(graph, weighted, forward=False)
    for layer in layers:
        if layer.reason or layer.op != "Conv" or layer.weight is None:
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


def _met_first(graph: "onnx.GraphProto", weighted: set[int], *, forward: bool) -> set[int]:
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


def _exclude(layers: list[_Layer], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--exclude {pattern!r} is no regular expression ({error}); {_names(layers)}") from None
        hits = [
            layer
            for layer in layers
            if any(regex.search(n) for n in (layer.name, layer.weight.name if layer.weight else "", layer.module))
        ]
        if not hits:
            raise UserError(f"--exclude {pattern!r} matches no layer; {_names(layers)}")
        for layer in hits:
            layer.reason = layer.reason or f"excluded by {pattern!r}"


def _names(layers: list[_Layer]) -> str:
    return "the layers are: " + ", ".join(layer.name for layer in layers)


def _settle(weight: _Weight) -> None:
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
