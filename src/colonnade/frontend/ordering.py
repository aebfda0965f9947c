"""Channels in the order in which the tiles of a pruned convolution compute them.

Rows of a tile come from anywhere in their layer, so what tiles store, one after the other, would stand scattered: a
core that sees no stream reads every line before it is written, and walks its page tables for each. What order channels
have between two layers is nobody's concern, so rows of the one and columns of the other are put into that of the tiles.

Channels that are added to each other, or pass one by one through pools and depthwise convolutions, have one order: that
of the first convolution that writes them without adding, for where something is added its lines have been read. An
order that anybody outside of such steps could see stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.frontend.draft import Draft, Tensor, Value
from colonnade.frontend.ties import Ties
from colonnade.pattern import discover
from colonnade.workload import Conv2d, GlobalPool, Linear, Pool2d, Repeat, is_depthwise, matrix

Order = npt.NDArray[np.int64]
WEIGHTS = {"weight", "bias"}  # constants of a step that knows its channels by these alone


def order_channels(steps: Sequence[Draft]) -> list[Draft]:
    """The steps with weights and biases of another order; all else is as it was."""
    ties, seen = Ties(), list[Tensor]()
    for step in steps:
        tied = _tied(step)
        if step.output is not None and tied is not None:
            ties.tie(step.output, *tied)
        else:
            seen += [tensor for value in step.inputs for tensor in value.read]
            seen += [step.output] if step.output is not None else []
    orders: dict[Tensor, Order | None] = dict.fromkeys(map(ties.find, seen))  # None: it stays
    for step in sorted(steps, key=_adds):
        if step.output is None or not _is_plain(step.workload) or (alike := ties.find(step.output)) in orders:
            continue
        tiled = discover(matrix(step.constants["weight"]))
        if not tiled.is_dense:
            orders[alike] = np.concatenate([tile.rows for tile in tiled.tiles]).astype(np.int64)
    return [_ordered(step, lambda tensor: orders.get(ties.find(tensor))) for step in steps]


def _tied(step: Draft) -> list[Tensor] | None:
    """What has the order of the step's output, if it can take its channels in another one."""
    work, output = step.workload, step.output
    read = [tensor for value in step.inputs if (tensor := _whole(value)) is not None]
    if output is None or step.channels is not None or step.external or not read or len(read) < len(step.inputs):
        return None
    if isinstance(work, Pool2d | GlobalPool | Repeat):
        return read if len(read) == 1 and not step.constants else None
    if not set(step.constants) <= WEIGHTS:
        return None
    if isinstance(work, Linear):
        return [] if len(read) == 1 and step.inputs[0].shape == read[0].shape else None
    if not isinstance(work, Conv2d) or work.prologue is not None:
        return None
    if _is_plain(work):
        return read[1:]
    return read if is_depthwise(work) and output.channels == read[0].channels else None


def _is_plain(work: object) -> bool:
    """Is it a convolution of one group?"""
    return isinstance(work, Conv2d) and work.groups == 1


def _adds(step: Draft) -> bool:
    return isinstance(step.workload, Conv2d) and step.workload.epilogue.residual


def _whole(value: Value) -> Tensor | None:
    """The tensor that a value is all of, channel by channel."""
    tensor = value.tensor
    return tensor if tensor is not None and value.width == tensor.channels and value.centre is None else None


def _ordered(step: Draft, order: Callable[[Tensor], Order | None]) -> Draft:
    """The step with its constants in the order of its output's channels, and of its input's."""
    work, constants = step.workload, dict(step.constants)
    read = _whole(step.inputs[0]) if step.inputs else None
    if not isinstance(work, Conv2d | Linear) or step.output is None or read is None:
        return step
    rows, columns = order(step.output), order(read)
    if rows is not None:
        constants = {name: np.ascontiguousarray(array[rows]) for name, array in constants.items()}
    if columns is not None and not is_depthwise(work):
        constants["weight"] = np.ascontiguousarray(constants["weight"][:, columns])
    return replace(step, constants=constants)
