"""What pruning one layer of a torch model by the second-order method does to its answers (see trials.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.joint import distance, half_precision
from colonnade.sparsify.samples import multiply_adds
from colonnade.sparsify.spread import FITTED
from colonnade.sparsify.torch_obs import TorchChain
from colonnade.sparsify.trials import Trial, dense_walk, first_part, losses

BATCH = 32


@torch.no_grad()
def layer_losses(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    pattern: ColumnPattern,
    images: int,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[dict[str, dict[float, float]], dict[str, float]]:
    """The loss of every layer alone at the sparsities of FITTED, and its multiply-adds an input. `model`, a copy as
    `balance` makes it, is as it was afterwards.

    pattern: of tile and M; its sparsity does not matter.
    inputs:  of calibration; images: how many of the last quarter are answered.

    Raises UserError for inputs that do not make two parts.
    """
    size = max(1, min(BATCH, len(inputs) // 8))
    parts = [(part,) for part in torch.split(inputs, size)]
    if len(parts) < 2:
        raise UserError("calibration holds one input: balance(method='obs') needs two or more, better some hundred")
    chain = TorchChain(model, names, parts)
    judge = _Judge(chain, inputs[first_part(len(parts)) * size :][:images].to(chain.device))
    patterns = [ColumnPattern(sparsity, pattern.tile, pattern.group) for sparsity in FITTED]
    found: dict[str, dict[float, float]] = {}
    work: dict[str, float] = {}
    with dense_walk(chain, chain.inputs(), progress) as steps:
        for at, layer, store, values in steps:
            row = losses(store, layer, values, patterns, partial(judge.loss, at))
            found[layer.name] = {known.sparsity: loss for known, loss in row.items()}
            work[layer.name] = multiply_adds(layer, judge.held[layer.input].shape)
            judge.advance(at)
    return found, work


class _Judge:
    """The dense network up to one layer on inputs that no layer is fitted to, and what it answers on them."""

    def __init__(self, chain: TorchChain, inputs: Tensor) -> None:
        self.chain, self.runner, self.bounds = chain, chain.runner, chain.bounds
        with self._quick():
            self.held = self.runner.run(0, self.bounds[1], {self.runner.needed[0].name: inputs})
            self.wanted = self.runner.answers(self.bounds[1], self.held)

    def loss(self, at: int, trial: Trial) -> float:
        """Of the answers, with layers[at] as it is in the trial."""
        with self._quick(), self.chain.changed(self.chain.layers[at], trial.weight, trial.bias):
            return distance([self.runner.answers(self.bounds[at + 1], self.held)], [self.wanted])

    def advance(self, at: int) -> None:
        """Go on behind layers[at]."""
        with self._quick():
            self.held = self.runner.run(self.bounds[at + 1], self.bounds[at + 2], self.held)

    def _quick(self) -> torch.autocast:
        # Without its cache: weights change, and the cache would go on with the old ones.
        device = self.chain.device
        return torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device), cache_enabled=False)
