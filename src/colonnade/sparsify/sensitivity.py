"""What pruning one layer alone does to a network's answers, measured on calibration inputs by onnxruntime.

The dense network runs once, stage by stage. From each layer on, the rest of it then runs with that layer's weights fed
as an input: once for every pattern, kept columns by magnitude and the bias moved so that the mean output stays, or as
the second-order method prunes (trials.py). The loss is the Kullback-Leibler divergence of the answers from the dense
ones in nats an input, or, where the output is no vector of classes, the squared error relative to the dense output's
variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.calibrate_onnx import OnnxChain, Target
from colonnade.sparsify.held import Store
from colonnade.sparsify.samples import Layer, Values, refuse_transformed
from colonnade.sparsify.select import as_matrix, from_matrix, select
from colonnade.sparsify.trials import Trial, dense_walk, first_part
from colonnade.sparsify.trials import losses as trials_losses

if TYPE_CHECKING:
    import onnx

WEIGHT, BIAS = "colonnade:weight", "colonnade:bias"
# Runs of the whole network that all measurements may add up to, in multiply-adds; decides how many inputs are used.
WORK = 6e12
LEAST_INPUTS, MOST_INPUTS = 16, 128
MOST_JUDGED = 32  # inputs that are answered where errors tell most already
PARTS = 8  # batches, at least, where layers are fitted to some and judged by the others


def inputs_for(macs: float, layers: int, patterns: int) -> int:
    """How many inputs to measure with: so many that the work stays bounded, from LEAST_INPUTS to MOST_INPUTS.

    macs: of the network for one input. From layer to layer less is left to run, half of it on average.
    """
    runs = max(layers * patterns / 2, 1)
    return int(min(max(WORK / (max(macs, 1.0) * runs), LEAST_INPUTS), MOST_INPUTS))


def sensitivities(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    inputs: Mapping[str, npt.NDArray[Any]],
    patterns: Mapping[str, Sequence[ColumnPattern]],
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, dict[ColumnPattern, float]]:
    """The loss of every layer at every pattern, by the layer's name. `model` is not changed.

    targets:  the layers, as `onnx_file.read_targets` finds them; only those in `patterns` are measured.
    inputs:   samples of the model's inputs by name, axis 0 the samples.
    progress: hears (share done, layer).

    Raises UserError for inputs that do not fit, and for answers that are not finite.
    """
    chain = OnnxChain(model, targets, inputs)
    refuse_transformed(chain.layers)
    held: list[Values] = [chain.run(0, batch) for batch in chain.inputs()]
    # Later layers leave less to run.
    weight = np.arange(len(chain.layers), 0, -1, dtype=float)
    losses: dict[str, dict[ColumnPattern, float]] = {}
    for at, layer in enumerate(chain.layers):
        if progress:
            progress(float(weight[:at].sum() / weight.sum()), layer.name)
        if patterns.get(layer.name):
            losses[layer.name] = _layer(chain, at, held, patterns[layer.name])
        if at + 1 < len(chain.layers):
            held = [chain.run(at + 1, batch) for batch in held]
    return losses


def second_order(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    inputs: Mapping[str, npt.NDArray[Any]],
    patterns: Mapping[str, Sequence[ColumnPattern]],
    answered: int,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, dict[ColumnPattern, float]]:
    """`sensitivities` with layers pruned by the second-order method, fitted to three quarters of the inputs; `answered`
    of the others are answered, MOST_JUDGED at most. Patterns of one layer share tile and M. Inputs that make only one
    batch are too few for that: losses are by magnitude then."""
    chain = OnnxChain(model, targets, inputs)
    given = chain.inputs(parts=PARTS)
    if len(given) < 2:
        return sensitivities(model, targets, inputs, patterns, progress)
    first, size = first_part(len(given)), len(next(iter(given[0].values())))
    judges = slice(first, first + max(1, min(answered, MOST_JUDGED) // size))
    losses: dict[str, dict[ColumnPattern, float]] = {}
    with dense_walk(chain, given, progress) as steps:
        for at, layer, store, held in steps:
            if patterns.get(layer.name):
                losses[layer.name] = _second_order(chain, at, store, held, judges, patterns[layer.name])
    return losses


def _second_order(
    chain: OnnxChain, at: int, store: Store, held: Sequence[Values], judges: slice, patterns: Sequence[ColumnPattern]
) -> dict[ColumnPattern, float]:
    layer, target = chain.layers[at], chain.targets[at]
    rest = _Rest(chain, at)
    seen = [{name: chain.whole(name, store.get(batch[name])) for name in rest.read} for batch in held[judges]]
    dense = [rest.run(batch, layer.weight, rest.bias) for batch in seen]

    def loss(trial: Trial) -> float:
        answers = [rest.run(batch, trial.weight, rest.bias + trial.bias) for batch in seen]
        return divergence(dense, answers, target.name)

    return trials_losses(store, layer, held, patterns, loss)


def _layer(
    chain: OnnxChain, at: int, held: Sequence[Values], patterns: Sequence[ColumnPattern]
) -> dict[ColumnPattern, float]:
    layer, target = chain.layers[at], chain.targets[at]
    rest = _Rest(chain, at)
    bias = rest.bias
    dense = [rest.run(batch, layer.weight, bias) for batch in held]
    mean = _input_mean(layer, held)
    matrix = as_matrix(layer.weight)
    found = {}
    for pattern in patterns:
        mask = select(matrix, pattern, groups=layer.groups, similar_rows=True).mask
        kept = np.where(mask, matrix, 0)
        lost = _bias_of(layer, matrix - kept, mean) if rest.fed_bias else np.zeros(len(matrix), np.float32)
        weight = from_matrix(kept, layer.weight.shape).astype(np.float32)
        answers = [rest.run(batch, weight, bias + lost) for batch in held]
        found[pattern] = divergence(dense, answers, target.name)
    return found


def _input_mean(layer: Layer, held: Sequence[Values]) -> Floats:
    """Mean of every input channel, [C]."""
    axis = 1 if layer.weight.ndim > 2 else -1
    sums = [np.moveaxis(np.asarray(batch[layer.input], np.float32), axis, 0) for batch in held]
    mean = np.mean([part.reshape(len(part), -1).mean(1) for part in sums], axis=0)
    return np.asarray(mean, np.float32)


def _bias_of(layer: Layer, lost: Floats, mean: Floats) -> Floats:
    """What removed weights [OC, K] gave on average, [OC]; taps that fall into padding are not told apart."""
    rows, taps = len(lost), int(np.prod(layer.weight.shape[2:], dtype=np.int64))
    per_group = np.split(lost.reshape(layer.groups, rows // layer.groups, -1), layer.groups)
    means = np.split(mean, layer.groups)
    return np.concatenate(
        [part[0] @ np.tile(channels, taps) for part, channels in zip(per_group, means, strict=True)]
    ).astype(np.float32)


class _Rest:
    """A chain from layer `at` to the outputs as one session; the layer's weight, and bias where it has one, are fed."""

    def __init__(self, chain: OnnxChain, at: int) -> None:
        import onnx
        import onnxruntime

        helper = onnx.helper
        self.chain, self.target = chain, chain.targets[at]
        nodes = chain.nodes[chain.bounds[at + 1] :]
        first = onnx.NodeProto()
        first.CopyFrom(nodes[0])
        old = first.input[2] if len(first.input) > 2 else ""
        self.fed_bias = chain.layers[at].intercept
        first.input[1] = WEIGHT
        if self.fed_bias:
            while len(first.input) < 3:
                first.input.append("")
            first.input[2] = BIAS
        count = len(chain.layers[at].weight)
        self.bias = (
            onnx.numpy_helper.to_array(chain.constants[old]).reshape(-1).astype(np.float32)
            if self.fed_bias and old
            else np.zeros(count, np.float32)
        )
        part = [first, *nodes[1:]]
        inside = {name for node in part for name in node.output}
        read = sorted(
            {name for node in part for name in node.input if name and name not in chain.constants}
            - inside
            - {WEIGHT, BIAS}
        )
        used = sorted({name for node in part for name in node.input if name in chain.constants})
        self.read = read
        kinds = {name: chain.kinds.get(name, np.dtype(np.float32)) for name in read}
        kinds |= {name: array.dtype for name, array in chain.given.items() if name in read}
        fed = {WEIGHT: np.dtype(np.float32), **({BIAS: np.dtype(np.float32)} if self.fed_bias else {}), **kinds}
        self.outputs = [value.name for value in chain.graph.output if value.name in inside]
        graph = helper.make_graph(
            part,
            "rest",
            [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(kind), None) for n, kind in fed.items()],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [chain.constants[name] for name in used],
        )
        made = helper.make_model(graph, opset_imports=list(chain.model.opset_import), ir_version=chain.model.ir_version)
        made.functions.extend(chain.model.functions)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that wait sleep: spinning, they take the cores from others and from each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has its own exception for every kind
            raise UserError(f"onnxruntime cannot run the model: {' '.join(str(error).split())[:300]}") from None

    def run(self, values: Values, weight: Floats, bias: Floats) -> list[npt.NDArray[Any]]:
        """The outputs that depend on the layer, for one batch."""
        feed: dict[str, Any] = {WEIGHT: np.ascontiguousarray(self.target.stored(weight))}
        if self.fed_bias:
            feed[BIAS] = np.asarray(bias, np.float32)
        feed |= {name: np.ascontiguousarray(values[name]) for name in self.read}
        return list(self.session.run(self.outputs, feed))


def divergence(
    dense: Sequence[Sequence[npt.NDArray[Any]]], pruned: Sequence[Sequence[npt.NDArray[Any]]], name: str
) -> float:
    """How far answers are from the dense ones, by batch and output; see the module. 0 for equal ones."""
    total, count = 0.0, 0
    for before, after in zip(dense, pruned, strict=True):
        for wanted, got in zip(before, after, strict=True):
            if not np.isfinite(wanted).all() or not np.isfinite(got).all():
                raise UserError(f"layer {name}: the model answers NaN or infinity on the calibration inputs")
            wide, near = wanted.astype(np.float64), got.astype(np.float64)
            if wanted.ndim == 2 and wanted.shape[1] > 1:
                p, q = _log_softmax(wide), _log_softmax(near)
                total += float((np.exp(p) * (p - q)).sum())
            else:
                spread = float(wide.var()) or 1.0
                total += float(((wide - near) ** 2).mean()) / spread * len(wide)
            count += len(wanted)
    return total / max(count, 1)


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Probabilities (not negative, rows that sum to 1) are answers already.
    if (x >= 0).all() and np.allclose(x.sum(1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(x, 1e-12)))
    shifted = x - x.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
