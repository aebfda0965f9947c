"""Learning from the dense model: its answers, and the outputs of its blocks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colonnade.errors import UserError
from colonnade.sparsify.masks import Prunable, masks


def answers_distance(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened answers, a mean over the batch; the factor keeps gradients at the size of the other
    loss's ("Distilling the Knowledge in a Neural Network", arXiv 1503.02531)."""
    ours, theirs = (functional.log_softmax(_wide(logits) / temperature, dim=1) for logits in (outputs, wanted))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def _wide(values: Tensor) -> Tensor:
    """At least single precision: under autocast outputs have half."""
    return values if values.dtype == torch.float64 else values.float()


def block_names(model: nn.Module) -> list[str]:
    """The modules whose outputs are compared: members of sequences with two weights or more inside (residual blocks),
    innermost first choice; of a model without such, its masked layers."""
    found = [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Sequential | nn.ModuleList)
        and sum(isinstance(part, Prunable) for part in module.modules()) >= 2
    ]
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return inner or [name.rpartition(".")[0] for name, _ in masks(model)]


def chosen_blocks(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The modules that match one of the globs, in the model's order; `block_names` without any. Raises UserError for
    a glob without a match, and where there is nothing to compare."""
    globs = list(wanted)
    names = [name for name, _ in model.named_modules() if name]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise UserError(f"blocks {glob!r} matches no module of {type(model).__name__}")
    found = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    found = found if globs else block_names(model)
    if not found:
        raise UserError(f"{type(model).__name__} has no blocks to compare: name some by blocks=")
    return found


class BlockOutputs:
    """Keeps what the named modules return in each forward pass of a model; as context, hooks come off at the end."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.values: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(name).register_forward_hook(self._keeper(name)) for name in self.names]

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise UserError(
                    f"block {name} returns {type(output).__name__}: expected a tensor; name others by blocks="
                )
            self.values[name] = output

        return keep

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.values.clear()


def blocks_distance(ours: BlockOutputs, theirs: BlockOutputs) -> Tensor:
    """Squared error of every block's output relative to the dense one's mean square, by sample, then the mean over
    samples and blocks: a mean over the batch, so that shares of it add up."""
    parts = []
    for name in ours.names:
        out, wanted = _wide(ours.values[name]), _wide(theirs.values[name].detach())
        if out.shape != wanted.shape:
            raise UserError(f"block {name} returns {tuple(out.shape)}, the teacher's {tuple(wanted.shape)}")
        error, power = ((value.square().flatten(1).mean(1)) for value in (out - wanted, wanted))
        parts.append((error / power.clamp_min(1e-6)).mean())
    return torch.stack(parts).mean()
