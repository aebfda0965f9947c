"""`balance` for the layers of an ONNX graph, without torch: losses and multiply-adds by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from colonnade.pattern import ColumnPattern
from colonnade.sparsify.calibrate_onnx import OnnxChain, Target
from colonnade.sparsify.samples import multiply_adds
from colonnade.sparsify.sensitivity import second_order, sensitivities
from colonnade.sparsify.spread import FITTED, IMAGES, MEASURED, spread

if TYPE_CHECKING:
    import onnx


def balanced(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    calibration: Mapping[str, npt.NDArray[Any]],
    pattern: ColumnPattern,
    method: str,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, ColumnPattern | None]:
    """Patterns by layer that together leave the multiply-adds which `pattern` for all targets leaves; None is dense.

    method:      what will prune: "magnitude" (the first IMAGES inputs are looked at) or "obs" (all of them).
    calibration: samples of the model's inputs by name, axis 0 the samples. `model` is not changed.
    progress:    hears (share done, layer).

    Raises UserError for inputs that do not fit, and for answers that are not finite.
    """

    def every(sparsities: Sequence[float]) -> dict[str, list[ColumnPattern]]:
        return {target.name: [replace(pattern, sparsity=s) for s in sparsities] for target in targets}

    if method == "obs":
        found = second_order(model, targets, calibration, every(FITTED), IMAGES, progress)
    else:
        few = {name: array[:IMAGES] for name, array in calibration.items()}
        found = sensitivities(model, targets, few, every(MEASURED), progress)
    losses = {name: {known.sparsity: loss for known, loss in row.items()} for name, row in found.items()}
    return spread(losses, dense_work(model, targets, calibration), pattern)


def dense_work(
    model: onnx.ModelProto, targets: Sequence[Target], inputs: Mapping[str, npt.NDArray[Any]]
) -> dict[str, float]:
    """Multiply-adds of every target for one input, when it is dense."""
    chain = OnnxChain(model, targets, inputs)
    values = chain.run(0, chain.inputs()[0])
    found = {}
    for at, layer in enumerate(chain.layers):
        found[layer.name] = multiply_adds(layer, chain.whole(layer.input, values[layer.input]).shape)
        if at + 1 < len(chain.layers):
            values = chain.run(at + 1, values)
    return found
