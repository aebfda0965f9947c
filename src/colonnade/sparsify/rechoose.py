"""Masks that are chosen anew while training: SR-STE for column tiles, and sparsity that rises gradually.

The forward pass sees the masked weight, the gradient reaches all weights as if nothing were masked (straight-through),
and what is masked decays towards zero, so that masks settle: SR-STE of "Learning N:M Fine-grained Structured Sparse
Neural Networks From Scratch" (arXiv 2102.04010), with whole columns of a tile in the place of single weights. Sparsity
may rise along the cubic of "To prune, or not to prune" (arXiv 1710.01878). Which rows form a tile does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, consecutive_rows, group_rows
from colonnade.sparsify.masks import ColumnMask, masks


@dataclass(frozen=True)
class Rechoose:
    """When masks are chosen anew.

    every: steps between two choices.
    decay: rate at which masked weights shrink, times the learning rate, a step (SR-STE's lambda).
    ramp:  share of all steps in which the sparsity rises from `start` to the pattern's; 0: it is there from the first.
    until: share of all steps after which masks stay as they are.
    score: "l1" or "l2": how a column's importance is measured from its weights in a tile.
    """

    every: int = 1
    decay: float = 2e-4
    ramp: float = 0.0
    start: float = 0.0
    until: float = 0.8
    score: str = "l1"

    def __post_init__(self) -> None:
        if self.every < 1 or not self.decay >= 0 or not 0 <= self.ramp <= self.until <= 1 or not 0 <= self.start < 1:
            raise UserError(f"{self}: expected every >= 1, decay >= 0, 0 <= ramp <= until <= 1 and 0 <= start < 1")
        if self.score not in ("l1", "l2"):
            raise UserError(f"score is {self.score!r}: expected 'l1' or 'l2'")

    def sparsity(self, final: float, progress: float) -> float:
        """The sparsity of a pattern with the sparsity `final`, at the share `progress` of all steps."""
        if progress >= self.ramp:
            return final
        first = min(self.start, final)
        return final + (first - final) * (1 - progress / self.ramp) ** 3


class _StraightThrough(torch.autograd.Function):
    """The masked weight; its gradient goes to all weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class MovableMask(ColumnMask):
    """A mask that training may choose anew; the values of masked weights are kept. Frozen, it is a `ColumnMask`.

    pattern: what every tile keeps; groups: of the convolution; rows: int64 [tiles, T], filled up with OC.
    """

    rows: Tensor

    def __init__(self, mask: Tensor, pattern: ColumnPattern, groups: int) -> None:
        super().__init__(mask)
        self.pattern, self.groups, self.frozen = pattern, groups, False
        self.register_buffer("rows", tile_rows(mask, pattern, groups).to(mask.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        if self.frozen:
            return super().forward(weight)
        return cast(Tensor, _StraightThrough.apply(weight, self.mask))  # type: ignore[no-untyped-call]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when a weight is assigned: all of it."""
        return weight

    @torch.no_grad()
    def choose(self, weight: Tensor, sparsity: float, score: str) -> None:
        """Take the columns with the largest scores in every tile, as many as the pattern keeps at `sparsity`."""
        matrix = weight.detach().movedim(1, -1).reshape(len(weight), -1).float()
        size = matrix.abs() if score == "l1" else matrix.square()
        padded = torch.cat([size, size.new_zeros(1, size.shape[1])])
        columns = padded[self.rows].sum(1)
        kept = keep_largest(columns, replace(self.pattern, sparsity=sparsity))
        chosen = torch.zeros(len(padded), size.shape[1], dtype=torch.bool, device=weight.device)
        chosen[self.rows] = kept[:, None].expand(-1, self.rows.shape[1], -1)
        shape = weight.shape
        self.mask.copy_(chosen[:-1].reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1))


def keep_largest(columns: Tensor, pattern: ColumnPattern) -> Tensor:
    """Of every row of scores [n, K] the columns that a tile keeps, bool [n, K]; of equals the left ones."""
    kept = torch.zeros_like(columns, dtype=torch.bool)
    spans = pattern.spans(columns.shape[1])
    width, count = spans[0][1] - spans[0][0], spans[0][2]
    full = sum(stop - first == width for first, stop, _ in spans)
    parts = [(columns[:, : full * width].reshape(-1, width), slice(0, full * width), count)]
    parts += [(columns[:, first:stop], slice(first, stop), n) for first, stop, n in spans[full:]]
    for scores, where, n in parts:
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :n]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        kept[:, where] = chosen.reshape(len(columns), -1)
    return kept


def tile_rows(mask: Tensor, pattern: ColumnPattern, groups: int) -> Tensor:
    """The rows of every tile, int64 [tiles, T], read off a mask: rows that keep the same columns, filled up with OC."""
    matrix = mask.movedim(1, -1).reshape(len(mask), -1).cpu().numpy()
    span = group_rows(len(matrix), groups)
    tiles: list[npt.NDArray[Any]] = []
    for base in range(0, len(matrix), span):
        _, labels = np.unique(matrix[base : base + span], axis=0, return_inverse=True)
        for label in range(int(labels.max()) + 1):
            rows = base + np.flatnonzero(labels.reshape(-1) == label)
            tiles += [rows[part] for part in consecutive_rows(len(rows), pattern.tile)]
    tiles.sort(key=lambda rows: int(rows[0]))
    filled = torch.full((len(tiles), pattern.tile), len(matrix), dtype=torch.int64)
    for at, rows in enumerate(tiles):
        filled[at, : len(rows)] = torch.from_numpy(np.asarray(rows, np.int64))
    return filled


def movable_masks(model: nn.Module) -> Iterator[tuple[str, MovableMask]]:
    """(name of the layer, its mask) of every mask that may move."""
    for name, part in masks(model):
        if isinstance(part, MovableMask):
            yield name.rpartition(".")[0], part


class Rechooser:
    """Moves the masks of a model while it is trained for `steps` steps; see `Rechoose`.

    Raises UserError for a model without movable masks.
    """

    def __init__(self, model: nn.Module, options: Rechoose, steps: int) -> None:
        self.options, self.steps = options, steps
        self.last = round(options.until * steps)
        self.layers = [(cast(Any, model.get_submodule(name)).parametrizations.weight, mask)
                       for name, mask in movable_masks(model)]  # fmt: skip
        if not self.layers:
            raise UserError("no mask of the model can move: prune it with sparsify_(…, movable=True)")

    def before(self, step: int) -> None:
        """Before a step: choose where it is time; freeze at the end."""
        if (step < self.last and step % self.options.every == 0) or step == self.last:
            for parametrized, mask in self.layers:
                sparsity = self.options.sparsity(mask.pattern.sparsity, step / self.steps)
                mask.choose(parametrized.original, sparsity, self.options.score)
        for _, mask in self.layers:
            mask.frozen = step >= self.last

    @torch.no_grad()
    def after(self, lr: float) -> None:
        """After the optimizer's step: what is masked shrinks."""
        for parametrized, mask in self.layers:
            if not mask.frozen:
                weight = parametrized.original
                weight.mul_(torch.where(mask.mask, 1.0, 1.0 - lr * self.options.decay).to(weight.dtype))

    def settle(self) -> None:
        """At the end of training: the last choice, if it is still to come."""
        if self.last >= self.steps:
            self.before(self.last)


def freeze(model: nn.Module) -> None:
    """Turn movable masks into plain ones, in place: what they mask becomes zero for good."""
    for name, mask in list(movable_masks(model)):
        module = cast(Any, model.get_submodule(name))
        parametrized = cast(parametrize.ParametrizationList, module.parametrizations.weight)
        at = list(parametrized).index(mask)
        parametrized[at] = ColumnMask(mask.mask)
        with torch.no_grad():
            parametrized.original.mul_(mask.mask)
