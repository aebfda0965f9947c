"""Channels in the order in which the tiles of a pruned convolution compute them.

Rows of a tile come from anywhere in their layer, so what tiles store, one after the other, would stand scattered: a
core that sees no stream reads every line before it is written, and walks its page tables for each. What order channels
have between two layers is nobody's concern, so rows of the one and columns of the other are put into that of the tiles.

Channels that are added to each other, or pass one by one through pools and depthwise convolutions, have one order: that
of the first convolution that writes them without adding, for where something is added its lines have been read. An
order that anybody outside of such steps could see stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.frontend.draft import Draft, Tensor, Value
from colonnade.frontend.feeding import is_depthwise
from colonnade.pattern import discover
from colonnade.workload import Conv2d, GlobalPool, Linear, Pool2d, matrix

Order = npt.NDArray[np.int64]
WEIGHTS = {"weight", "bias"}  # constants of a step that knows its channels by these alone


def order_channels(steps: Sequence[Draft]) -> list[Draft]:
    """The steps with weights and biases of another order; all else is as it was."""
    alike = _Alike()
    for step in steps:
        if not _follows(step, alike):
            alike.fix([*(tensor for value in step.inputs for tensor in value.read), step.output])
    orders: dict[Tensor, Order] = {}
    for step in sorted(steps, key=lambda step: _adds(step)):
        output = step.output
        if output is None or not _is_plain(step.workload) or alike.is_fixed(output):
            continue
        tiled = discover(matrix(step.constants["weight"]))
        if not tiled.is_dense and alike.find(output) not in orders:
            orders[alike.find(output)] = np.concatenate([tile.rows for tile in tiled.tiles]).astype(np.int64)
    return [_ordered(step, alike, orders) for step in steps]


class _Alike:
    """Tensors whose channels have one order, and those where that is fixed."""

    def __init__(self) -> None:
        self._parent: dict[Tensor, Tensor] = {}
        self._fixed: set[Tensor] = set()

    def find(self, tensor: Tensor) -> Tensor:
        while (above := self._parent.get(tensor, tensor)) is not tensor:
            tensor = above
        return tensor

    def tie(self, one: Tensor, other: Tensor) -> None:
        one, other = self.find(one), self.find(other)
        if one is not other:
            self._parent[other] = one
            if other in self._fixed:
                self._fixed.add(one)

    def fix(self, tensors: Sequence[Tensor | None]) -> None:
        self._fixed.update(self.find(tensor) for tensor in tensors if tensor is not None)

    def is_fixed(self, tensor: Tensor) -> bool:
        return self.find(tensor) in self._fixed


def _follows(step: Draft, alike: _Alike) -> bool:
    """Can the step take its channels in another order? What it ties is tied then."""
    work, output = step.workload, step.output
    read = [tensor for value in step.inputs if (tensor := _whole(value)) is not None]
    if output is None or step.channels is not None or step.external or not read or len(read) < len(step.inputs):
        return False
    if isinstance(work, Linear):
        alike.fix([output])
        return len(read) == 1 and step.inputs[0].shape == read[0].shape and set(step.constants) <= WEIGHTS
    if isinstance(work, Pool2d | GlobalPool):
        tied = read
        able = len(read) == 1 and not step.constants
    else:
        tied = read[1:] if _is_plain(work) else read
        able = isinstance(work, Conv2d) and work.prologue is None and set(step.constants) <= WEIGHTS
        able = able and (_is_plain(work) or (is_depthwise(work) and output.channels == read[0].channels))
    if able:
        for tensor in tied:
            alike.tie(output, tensor)
    return able


def _is_plain(work: object) -> bool:
    """Is it a convolution of one group?"""
    return isinstance(work, Conv2d) and work.groups == 1 and not is_depthwise(work)


def _adds(step: Draft) -> bool:
    return isinstance(step.workload, Conv2d) and step.workload.epilogue.residual


def _whole(value: Value) -> Tensor | None:
    """The tensor that a value is all of, channel by channel."""
    tensor = value.tensor
    return tensor if tensor is not None and value.width == tensor.channels and value.centre is None else None


def _ordered(step: Draft, alike: _Alike, orders: dict[Tensor, Order]) -> Draft:
    """The step with its constants in the order of its output's channels, and of its input's."""
    work, constants = step.workload, dict(step.constants)
    if "weight" not in constants or not isinstance(work, Conv2d | Linear) or step.output is None or not step.inputs:
        return step
    made, read = (_order(tensor, alike, orders) for tensor in (step.output, _whole(step.inputs[0])))
    if made is not None:
        constants = {name: np.ascontiguousarray(array[made]) for name, array in constants.items()}
    if read is not None and not is_depthwise(work):
        constants["weight"] = np.ascontiguousarray(constants["weight"][:, read])
    return step if made is None and read is None else replace(step, constants=constants)


def _order(tensor: Tensor | None, alike: _Alike, orders: dict[Tensor, Order]) -> Order | None:
    return None if tensor is None or alike.is_fixed(tensor) else orders.get(alike.find(tensor))
