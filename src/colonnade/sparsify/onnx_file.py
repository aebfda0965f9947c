"""Prune an ONNX file: zeros go into the weights, the graph stays as it is, and any runtime gives the same result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.onnx_io import check_writable, load_written_out, save_onnx
from colonnade.onnx_winograd import OPSET, opset, rewrite
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.balance_onnx import balanced
from colonnade.sparsify.calibrate_onnx import OnnxChain, Target, unfit
from colonnade.sparsify.onnx_layers import Constant, WeightedLayer, names_of, weighted_layers
from colonnade.sparsify.select import SCORES, as_matrix, from_matrix, select
from colonnade.sparsify.sequential import Options, prune_chain
from colonnade.sparsify.transformed import transformable

if TYPE_CHECKING:
    import onnx

METHODS = ("magnitude", "obs")


@dataclass(frozen=True)
class LayerReport:
    """One weighted layer.

    node:     of the graph, which may have another name.
    shape:    of the weight in the file.        reason: why it stays dense; None if it was pruned.
    columns:  K, and `kept` of them in every tile.
    tiles:    number of tiles.                  retained: share of the score that is kept, 1 for a dense layer; with
              method "obs" the share of the wanted outputs' variance that is reproduced.
    """

    name: str
    node: str
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
    """What became of every layer, in the order of the graph. pattern: of layers without one of their own; balanced: was
    its work spread over the layers?"""

    source: Path
    destination: Path
    pattern: ColumnPattern | None
    layers: tuple[LayerReport, ...]
    balanced: bool = False

    @property
    def pruned(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.reason is None)


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
    balance: bool = False,
) -> PruneReport:
    """Prune the convolutions and matrix products of an ONNX file and write the result to `destination`.

    Dense stay: the stem, depthwise convolutions, the classifier, and layers whose node, weight or torch module matches
    one of the `exclude` patterns (re.search). progress(done, total, layer) is called before every layer.

    method:      "magnitude", or "obs": columns by second order, the kept weights and the biases fitted to give the
                 dense layers' outputs on `calibration`, layer after layer on already pruned inputs (second_order.py).
                 Needs float32 weights and onnxruntime. Layers whose statistics cannot be gathered go by magnitude.
    calibration: samples of the model's inputs by name, axis 0 the samples; a few hundred. Labels are not needed.
    options:     settings of "obs".
    patterns:    the pattern of single layers by name or node, in the place of `pattern`; None leaves one dense. Without
                 a `pattern` (None) all others stay dense.
    balance:     spread the multiply-adds that `pattern` leaves over the layers, by what pruning each of them alone does
                 to the answers on `calibration` (balance_onnx.py). Where statistics cannot be gathered `pattern` stays.

    With ``pattern.winograd`` 3x3 convolutions at stride 1 are pruned behind the transform, by "obs" alone; the file has
    operators of our own then, with a definition that any runtime follows (onnx_winograd.py). Layers that have no such
    transform take the pattern without it; one that a pattern of its own asks for it is an error.

    Raises UserError for a bad file, a pattern in `exclude` that is invalid or matches nothing, a weight that is not
    finite, and an output that exists without `force` or cannot be written; nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if score not in SCORES:
        raise UserError(f"score is {score!r}: expected one of {', '.join(SCORES)}")
    if method not in METHODS:
        raise UserError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
    if calibration is None and (method == "obs" or balance):
        raise UserError(f"{'balance' if balance else 'method obs'} needs calibration inputs")
    if calibration is not None and method != "obs" and not balance:
        raise UserError(f"method {method} takes calibration inputs with balance only")
    if balance and (pattern is None or patterns):
        raise UserError("balance spreads one pattern over the layers: give that alone")
    wanted = pattern
    if any(one is not None and one.winograd for one in (pattern, *(patterns or {}).values())) and method != "obs":
        raise UserError("transformed weights are pruned by method obs only: give that, and calibration inputs")
    check_writable(destination, force=force)
    if calibration is not None:
        import onnxruntime  # noqa: F401  # which runs the model: missing, it is missed before anything is done
    model = load_written_out(source)
    layers = _layers(source, model, exclude)
    patterns = _by_layer(layers, patterns or {})
    _transform(source, model, layers, pattern, patterns)
    pattern = _as_stored(pattern)
    patterns = {name: _as_stored(own) for name, own in patterns.items()}
    if balance:
        assert calibration is not None and pattern is not None
        free = _fitted(source, model.graph, [layer for layer in layers if layer.reason is None])
        count = len(free)
        told = (lambda share, name: progress(round(share * count), count, f"{name} alone")) if progress else None
        patterns = balanced(model, _targets(model, free), calibration, pattern, method, told) if free else {}
    chosen = _patterns(layers, pattern, patterns)

    reports: dict[int, tuple[int, int, int, float]] = {}
    todo = [layer for layer in layers if layer.reason is None]
    fitted = _fitted(source, model.graph, todo) if method == "obs" else []
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
    made = tuple(_report(layer, reports.get(id(layer))) for layer in layers)
    return PruneReport(source, destination, wanted, made, balance)


def read_layers(
    model: "onnx.ModelProto", exclude: Sequence[str] = ()
) -> list[tuple[LayerReport, npt.NDArray[Any] | None]]:
    """All weighted layers of a model with why they would stay dense, and their weights with rows first.

    Nothing is changed; the weights are None where they are no readable constant.
    """
    import onnx

    found: list[tuple[LayerReport, npt.NDArray[Any] | None]] = []
    for layer in weighted_layers(model.graph, exclude):
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
    layers = _layers(source, model, exclude)
    return _targets(model, _fitted(Path(source), model.graph, [layer for layer in layers if layer.reason is None]))


def _layers(source: Path | str, model: "onnx.ModelProto", exclude: Sequence[str]) -> list[WeightedLayer]:
    layers = weighted_layers(model.graph, exclude)
    if not layers:
        raise UserError(f"{source}: no Conv, Gemm or MatMul with weights in it: nothing to prune")
    return layers


def _transform(
    source: Path,
    model: "onnx.ModelProto",
    layers: Sequence[WeightedLayer],
    pattern: ColumnPattern | None,
    own: Mapping[str, ColumnPattern | None],
) -> None:
    """Give the layers whose pattern asks for it transformed weights. Raises UserError where none can have them, or not
    one that its own pattern wants to."""
    asked = {layer.name: own.get(layer.name, pattern) for layer in layers}
    sizes = {name: one.winograd for name, one in asked.items() if one is not None and one.winograd}
    if not sizes:
        return
    found = []
    for layer in _fitted(source, model.graph, [layer for layer in layers if layer.reason is None]):
        node, weight = model.graph.node[layer.position], layer.weight
        if layer.name in sizes and weight is not None and len(weight.layers) == 1:
            found += [layer] * transformable(model, node, weight.tensor, sizes[layer.name])
    if opset(model) < OPSET:
        raise UserError(f"{source} is of opset {opset(model)}: transformed weights need {OPSET}; export it again")
    refused = {name for name in sizes if name in own} - {layer.name for layer in found}
    if refused:
        name = min(refused)
        raise UserError(f"layer {name} has no weights of a 3x3 convolution at stride 1 to transform: {asked[name]}")
    if not found:
        raise UserError(f"{source}: no 3x3 convolution at stride 1 will be pruned: leave winograd out")
    for m in sorted(set(sizes.values())):
        mine = [layer for layer in found if sizes[layer.name] == m]
        rewrite(model, [model.graph.node[layer.position] for layer in mine], m)
    for layer in found:
        layer.op = model.graph.node[layer.position].op_type


def _as_stored(pattern: ColumnPattern | None) -> ColumnPattern | None:
    """The pattern for weights that are transformed already."""
    return None if pattern is None else replace(pattern, winograd="")


def _targets(model: "onnx.ModelProto", layers: Sequence[WeightedLayer]) -> list[Target]:
    return [
        Target(layer.name, model.graph.node[layer.position], layer.weight.tensor, layer.transposed, layer.groups)
        for layer in layers
        if layer.weight is not None
    ]


def _report(layer: WeightedLayer, pruned: tuple[int, int, int, float] | None) -> LayerReport:
    shape = tuple(layer.weight.tensor.dims) if layer.weight else ()
    name = layer.weight.name if layer.weight else ""
    if pruned:
        return LayerReport(layer.name, layer.node, layer.op, name, shape, None, *pruned)
    rows = shape[-1] if layer.transposed and shape else shape[0] if shape else 1
    columns = int(np.prod(shape)) // max(rows, 1) if shape else 0
    return LayerReport(layer.name, layer.node, layer.op, name, shape, layer.reason, columns, columns, 0, 1.0)


def _by_layer(
    layers: Sequence[WeightedLayer], own: Mapping[str, ColumnPattern | None]
) -> dict[str, ColumnPattern | None]:
    """Patterns of single layers, each called by its name or its node's, by the former."""
    known = {layer.node: layer.name for layer in layers} | {layer.name: layer.name for layer in layers}
    found: dict[str, ColumnPattern | None] = {}
    for given, wanted in own.items():
        if given not in known:
            raise UserError(f"there is no layer {given!r}; {names_of(layers)}")
        if known[given] in found:
            raise UserError(f"layer {known[given]} is named twice, once by its node: leave one of them out")
        found[known[given]] = wanted
    return found


def _patterns(
    layers: Sequence[WeightedLayer], pattern: ColumnPattern | None, own: Mapping[str, ColumnPattern | None]
) -> dict[str, ColumnPattern]:
    """The pattern of every layer that is pruned; layers with the pattern None are marked dense."""
    known = {layer.name: layer for layer in layers}
    for name, wanted in own.items():
        if wanted is not None and (reason := known[name].reason):
            raise UserError(f"layer {name} stays dense ({reason}): take it out of the plan, or call it dense there")
    chosen = {}
    for layer in layers:
        if layer.reason is None:
            wanted = own.get(layer.name, pattern)
            if wanted is None:
                layer.reason = "by plan"
            else:
                chosen[layer.name] = wanted
    return chosen


def _fitted(source: Path, graph: "onnx.GraphProto", todo: Sequence[WeightedLayer]) -> list[WeightedLayer]:
    """The layers whose statistics can be gathered."""
    import onnx

    found = []
    for layer in todo:
        assert layer.weight is not None
        if unfit(graph.node[layer.position], graph) or len(layer.weight.layers) > 1:
            continue
        if layer.weight.tensor.data_type != onnx.TensorProto.FLOAT:
            raise UserError(f"{source}: weights of {layer.name} are not float32: calibration needs a float32 model")
        if not np.isfinite(onnx.numpy_helper.to_array(layer.weight.tensor)).all():
            raise UserError(
                f"{source}: tensor {layer.weight.name!r} holds NaN or infinite weights: train or export it again"
            )
        found.append(layer)
    return found


def _fit(
    model: "onnx.ModelProto",
    layers: Sequence[WeightedLayer],
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
    source: Path, layer: WeightedLayer, weight: Constant, pattern: ColumnPattern, score: str, similar_rows: bool
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
