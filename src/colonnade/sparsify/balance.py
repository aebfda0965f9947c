"""The work of one sparsity, spread over the layers of a torch model by what pruning each of them does to the answers.

Every layer is pruned alone, at a few sparsities, and the rest of the network runs on: the loss is the divergence of the
answers from the dense ones (the squared error relative to its variance where the output is no vector of classes).
Layers are pruned by magnitude, which is quick, or by the second-order method (layer_losses.py), which tells what that
one will lose. Then a knapsack picks one sparsity a layer (spread.py). Times, where they are known, belong to
`colonnade fit`; this needs none. For ONNX files it is `prune_file(balance=True)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.joint import distance, half_precision
from colonnade.sparsify.layer_losses import layer_losses
from colonnade.sparsify.masks import prunable, remove_masks
from colonnade.sparsify.samples import Layer, multiply_adds, refuse_transformed
from colonnade.sparsify.select import as_matrix, from_matrix, select_by_score
from colonnade.sparsify.spread import IMAGES, MEASURED, spread
from colonnade.sparsify.torch_graph import batches
from colonnade.sparsify.torch_obs import TorchChain


def balance(
    model: nn.Module,
    pattern: ColumnPattern,
    calibration: Any,
    *,
    method: str = "magnitude",
    exclude: Iterable[str] = (),
    images: int = IMAGES,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, ColumnPattern | None]:
    """Patterns by layer, for `sparsify_`, that together leave the multiply-adds which `pattern` for all layers leaves.

    Stem, classifier, depthwise convolutions and what is excluded stay out of it (None: dense), as in `sparsify_`.
    Layers that run more than once stay dense too. `model` is not changed.

    method:      what will prune: "magnitude" or "obs" (of ResNet-50 as long as the pruning itself).
    calibration: as `sparsify_` takes it; for magnitudes the first `images` inputs are looked at, for obs all of them,
                 and `images` of the last quarter are answered.
    progress:    hears (share done, layer).

    Raises UserError for a model that cannot be traced or has nothing to prune, and for too few inputs.
    """
    losses, work = measured(
        model, pattern, calibration, method=method, exclude=exclude, images=images, progress=progress
    )
    return spread(losses, work, pattern)


def measured(
    model: nn.Module,
    pattern: ColumnPattern,
    calibration: Any,
    *,
    method: str = "magnitude",
    exclude: Iterable[str] = (),
    images: int = IMAGES,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[dict[str, dict[float, float]], dict[str, float]]:
    """What `balance` decides by, for tile and M of the pattern: the loss of each layer at some sparsities (none for one
    that stays dense), and its multiply-adds. Arguments and errors are those of `balance`."""
    if method not in ("magnitude", "obs"):
        raise UserError(f"method is {method!r}: expected 'magnitude' or 'obs'")
    inputs = torch.cat([batch[0] for batch in batches(calibration, model)])
    work_model = remove_masks(copy.deepcopy(model)).eval()
    layers = prunable(work_model, inputs[:1], exclude)
    names = [name for name, free in layers.items() if free]
    if method == "obs":
        losses, work = layer_losses(work_model, names, inputs, pattern, images, progress)
    else:
        losses, work = sensitivities(work_model, names, inputs[:images], pattern, progress)
    return {name: losses.get(name, {}) for name in layers}, work


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    pattern: ColumnPattern,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[dict[str, dict[float, float]], dict[str, float]]:
    """The loss of every layer alone at the sparsities of MEASURED, and its multiply-adds an input. `model`, a copy as
    `balance` makes it, is as it was afterwards.

    Kept columns are those of the largest Σ w²·var(x); a layer's mean output stays.
    """
    device = next(model.parameters()).device
    x = inputs.to(device)
    losses: dict[str, dict[float, float]] = {}
    work: dict[str, float] = {}
    chain = TorchChain(model, names, [(x,)])
    refuse_transformed(chain.layers)
    runner, bounds = chain.runner, chain.bounds
    # Without its cache: weights change here, and the cache would go on with the old ones.
    with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device), cache_enabled=False):
        held = runner.run(0, bounds[1], {runner.needed[0].name: x})
        dense = runner.answers(bounds[1], held)
        for at, layer in enumerate(chain.layers):
            if progress:
                progress(at / len(chain.layers), layer.name)
            given = held[layer.input].float()
            work[layer.name] = multiply_adds(layer, given.shape)
            losses[layer.name] = {
                s: distance([_pruned(chain, at, held, given, ColumnPattern(s, pattern.tile, pattern.group))], [dense])
                for s in MEASURED
            }
            held = runner.run(bounds[at + 1], bounds[at + 2], held)
    return losses, work


def _pruned(chain: TorchChain, at: int, held: Mapping[str, Any], given: Tensor, pattern: ColumnPattern) -> Tensor:
    """The answers with one layer pruned; the model is as it was afterwards."""
    layer = chain.layers[at]
    power, mean = _of_columns(layer, given)
    matrix = as_matrix(layer.weight)
    scale = 1.0 if layer.scale is None else layer.scale[:, None]
    score = np.asarray((matrix * scale) ** 2 * power, np.float32)
    score /= max(float(score.max(initial=0)), 1e-30)
    kept = np.where(select_by_score(score, pattern, groups=layer.groups).mask, matrix, 0)
    lost = ((matrix - kept) * mean).sum(1).astype(np.float32)
    with chain.changed(layer, from_matrix(kept, layer.weight.shape).copy(), lost):
        return chain.runner.answers(chain.bounds[at + 1], held)


def _of_columns(layer: Layer, given: Tensor) -> tuple[Floats, Floats]:
    """Variance and mean of the input of every weight, [OC, K] each; what falls into padding is not told apart."""
    maps = given.movedim(1 if layer.weight.ndim > 2 else -1, 0).flatten(1)
    rows, taps = len(layer.weight) // layer.groups, int(np.prod(layer.weight.shape[2:], dtype=np.int64))

    def each(values: Tensor) -> Floats:
        parts = np.split(values.cpu().numpy(), layer.groups)
        return np.concatenate([np.tile(part, (rows, taps)) for part in parts])

    return each(maps.var(1, correction=0)), each(maps.mean(1))
