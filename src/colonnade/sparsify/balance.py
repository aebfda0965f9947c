"""The work of one sparsity, spread over the layers of a torch model by what pruning each of them does to the answers.

Every layer is pruned alone, at a few sparsities, and the rest of the network runs on: the loss is the divergence of the
answers from the dense ones (the squared error relative to its variance where the output is no vector of classes).
Between the measured sparsities the logarithm of the loss is taken as straight, below the first the loss as cubic. Then
a knapsack picks one sparsity a layer: the smallest sum of losses among those that leave as many multiply-adds as the
uniform sparsity would (allocate.py). Times, where they are known, belong to `colonnade fit`; this needs none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.allocate import Choice, allocate
from colonnade.sparsify.joint import distance, half_precision
from colonnade.sparsify.masks import prunable, remove_masks
from colonnade.sparsify.samples import Layer
from colonnade.sparsify.select import as_matrix, from_matrix, select_by_score
from colonnade.sparsify.torch_obs import Norms, Runner, TorchChain, batches

MEASURED = (0.5, 0.75, 0.875)
STEP = 1 / 16  # between the sparsities that a layer may get, with whole rows as groups
MOST = MEASURED[-1]
IMAGES = 32
LEAST_LOSS = 1e-4  # nats: what half precision makes of nothing


def balance(
    model: nn.Module,
    pattern: ColumnPattern,
    calibration: Any,
    *,
    exclude: Iterable[str] = (),
    images: int = IMAGES,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, ColumnPattern | None]:
    """Patterns by layer, for `sparsify_`, that together leave the multiply-adds which `pattern` for all layers leaves.

    Stem, classifier, depthwise convolutions and what is excluded stay out of it (None: dense), as in `sparsify_`.
    Layers that run more than once stay dense too. `model` is not changed.

    calibration: as `sparsify_` takes it; the first `images` inputs are looked at.
    progress:    hears (share done, layer).

    Raises UserError for a model that cannot be traced or has nothing to prune.
    """
    inputs = torch.cat([batch[0] for batch in batches(calibration)])[:images]
    if not len(inputs):
        raise UserError("calibration holds no input")
    work_model = remove_masks(copy.deepcopy(model)).eval()
    layers = prunable(work_model, inputs[:1], exclude)
    losses, work = sensitivities(work_model, [name for name, free in layers.items() if free], inputs, pattern, progress)
    chosen = spread(losses, work, pattern)
    return {name: chosen.get(name) for name in layers}


def spread(
    losses: Mapping[str, Mapping[float, float]], work: Mapping[str, float], pattern: ColumnPattern
) -> dict[str, ColumnPattern | None]:
    """One pattern a layer, from the loss of each at some sparsities and its multiply-adds when it is dense."""
    steps = 1 / STEP if pattern.group is None else pattern.group
    sparsities = [at / steps for at in range(1, int(steps)) if at / steps <= MOST] + [pattern.sparsity]
    choices = {
        name: [Choice(None, work[name], 0.0)]
        + [
            Choice(ColumnPattern(s, pattern.tile, pattern.group), work[name] * (1 - s), loss_between(row, s))
            for s in sorted(set(sparsities))
        ]
        for name, row in losses.items()
    }
    chosen = allocate(choices, sum(work[name] for name in losses) * (1 - pattern.sparsity))
    return {name: choice.pattern for name, choice in chosen.items()}


def loss_between(measured: Mapping[float, float], sparsity: float) -> float:
    """The loss at a sparsity from those at others."""
    known = sorted(measured)
    values = [max(measured[at], LEAST_LOSS) for at in known]
    if sparsity <= known[0]:
        return float(values[0] * (sparsity / known[0]) ** 3)
    return float(np.exp(np.interp(sparsity, known, np.log(values))))


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
    runner, bounds = chain.runner, chain.bounds
    # Without its cache: weights change here, and the cache would go on with the old ones.
    with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device), cache_enabled=False):
        held = runner.run(0, bounds[1], {runner.needed[0].name: x})
        dense = _answers(runner, bounds[1], held)
        for at, layer in enumerate(chain.layers):
            if progress:
                progress(at / len(chain.layers), layer.name)
            module = cast(nn.Conv2d | nn.Linear, model.get_submodule(layer.name))
            given = held[layer.input].float()
            work[layer.name] = float(module(given[:1]).numel() * layer.columns)
            losses[layer.name] = {
                s: distance([_pruned(chain, at, held, given, ColumnPattern(s, pattern.tile, pattern.group))], [dense])
                for s in MEASURED
            }
            held = runner.run(bounds[at + 1], bounds[at + 2], held)
    return losses, work


def _pruned(chain: TorchChain, at: int, held: Mapping[str, Any], given: Tensor, pattern: ColumnPattern) -> Tensor:
    """The answers with one layer pruned; the model is as it was afterwards."""
    layer, node = chain.layers[at], chain.starts[at]
    module = cast(nn.Conv2d | nn.Linear, chain.model.get_submodule(layer.name))
    power, mean = _of_columns(layer, given)
    matrix = as_matrix(layer.weight)
    scale = 1.0 if layer.scale is None else layer.scale[:, None]
    score = np.asarray((matrix * scale) ** 2 * power, np.float32)
    score /= max(float(score.max(initial=0)), 1e-30)
    kept = np.where(select_by_score(score, pattern, groups=layer.groups).mask, matrix, 0)
    lost = torch.from_numpy(((matrix - kept) * mean).sum(1).astype(np.float32)).to(given.device)
    stored = module.weight.detach().clone()
    norm = chain.norm(node)
    moved = module.bias if module.bias is not None else norm.running_mean if isinstance(norm, Norms) else None
    before = None if moved is None else moved.detach().clone()
    try:
        module.weight.copy_(torch.from_numpy(from_matrix(kept, layer.weight.shape).copy()).to(stored))
        if moved is not None:
            moved.add_(lost if module.bias is not None else -lost)
        return _answers(chain.runner, chain.bounds[at + 1], held)
    finally:
        module.weight.copy_(stored)
        if moved is not None and before is not None:
            moved.copy_(before)


def _of_columns(layer: Layer, given: Tensor) -> tuple[Floats, Floats]:
    """Variance and mean of the input of every weight, [OC, K] each; what falls into padding is not told apart."""
    maps = given.movedim(1 if layer.weight.ndim > 2 else -1, 0).flatten(1)
    rows, taps = len(layer.weight) // layer.groups, int(np.prod(layer.weight.shape[2:], dtype=np.int64))

    def each(values: Tensor) -> Floats:
        parts = np.split(values.cpu().numpy(), layer.groups)
        return np.concatenate([np.tile(part, (rows, taps)) for part in parts])

    return each(maps.var(1, correction=0)), each(maps.mean(1))


def _answers(runner: Runner, first: int, held: Mapping[str, Any]) -> Tensor:
    """What the network gives from nodes[first] on."""
    last = runner.output.args[0]
    if not isinstance(last, fx.Node):
        raise UserError(f"{type(runner.model).__name__} returns more than one value: expected one tensor")
    runner.last_use[last] = len(runner.nodes)
    return cast(Tensor, runner.run(first, len(runner.nodes), held)[last.name]).float()
