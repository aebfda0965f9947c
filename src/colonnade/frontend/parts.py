"""Large maps a few channels at a time: a convolution and the steps behind it that work channel by channel.

What the first layer of an inverted residual writes has left the near caches when the depthwise one reads it, and so has
a large map that a max pool reads. Where a convolution's output is read by one such step alone, both are cut into parts
of some output channels each, and the part's map is read where it was just written. Tiles stay whole; the last steps of
all parts write planes of one tensor, so its readers notice nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt

from colonnade.frontend.draft import Draft, Tensor, whole
from colonnade.pattern import discover
from colonnade.workload import Conv2d, Convert, Pool2d, Workload, is_depthwise, matrix

LARGE = 1 << 20  # bytes of a map that is cut: more than a second cache keeps beside all else
PART = 384 << 10  # bytes of a part's map, but for ...
ROWS = 8  # ... the least channels of a part: fewer are no block of registers


def part(steps: list[Draft]) -> list[Draft]:
    """The steps with large maps in parts."""
    readers: dict[Tensor, list[Draft]] = {}
    for step in steps:
        for tensor in {tensor for value in step.inputs for tensor in value.read}:
            readers.setdefault(tensor, []).append(step)
    chains: dict[int, list[Draft]] = {}  # by the last step, what replaces it and those before
    parted: set[int] = set()
    for step in steps:
        chain = _chain(step, readers)
        if chain and len(cuts := _cuts(step)) > 1:
            chains[id(chain[-1])] = _parts(chain, cuts)
            parted.update(map(id, chain))
    result: list[Draft] = []
    for step in steps:
        if id(step) in chains:
            result += chains[id(step)]
        elif id(step) not in parted:
            result.append(step)
    return result


def _chain(conv: Draft, readers: dict[Tensor, list[Draft]]) -> list[Draft]:
    """``conv`` and the steps behind it that are cut with it, or none."""
    work, output = conv.workload, conv.output
    if (
        not isinstance(work, Conv2d)
        or output is None
        or work.groups != 1
        or work.prologue is not None
        or conv.panels
        or len(conv.inputs) != 1
        or output.itemsize * prod(output.shape) <= LARGE
    ):
        return []
    chain = [conv]
    while output is not None and len(following := readers.get(output, [])) == 1 and _by_channel(following[0], output):
        chain.append(following[0])
        if not isinstance(following[0].workload, Convert):
            return chain
        output = following[0].output
    return []


def _by_channel(step: Draft, x: Tensor) -> bool:
    """Does ``step`` compute each channel from the same one of ``x``, and of nothing else?"""
    work = step.workload
    if step.output is None or len(step.inputs) != 1 or step.inputs[0].tensor is not x or step.panels:
        return False
    if isinstance(work, Conv2d):
        return (
            is_depthwise(work) and work.out_channels == work.in_channels and set(step.constants) <= {"weight", "bias"}
        )
    return isinstance(work, Pool2d) or (isinstance(work, Convert) and work.kind == "planes")


def _cuts(conv: Draft) -> list[npt.NDArray[np.int64]]:
    """The output channels of every part: whole tiles, or neighbours where all is dense."""
    work, output = conv.workload, conv.output
    assert isinstance(work, Conv2d) and output is not None
    most = max(PART * work.out_channels // (output.itemsize * prod(output.shape)) // ROWS * ROWS, ROWS)
    tiled = discover(matrix(conv.constants["weight"]))
    if tiled.is_dense:
        return np.split(np.arange(work.out_channels), range(most, work.out_channels, most))
    cuts: list[npt.NDArray[np.int64]] = []
    for rows in (rows for tile in tiled.tiles for rows in np.split(tile.rows, range(most, tile.rows.size, most))):
        if cuts and cuts[-1].size + rows.size <= most:
            cuts[-1] = np.concatenate([cuts[-1], rows])
        else:
            cuts.append(rows.astype(np.int64))
    return cuts


def _parts(chain: Sequence[Draft], cuts: Sequence[npt.NDArray[np.int64]]) -> list[Draft]:
    """The steps of ``chain`` part by part, ``cuts`` the output channels of each."""
    steps: list[Draft] = []
    for index, channels in enumerate(cuts):
        x = chain[0].inputs
        for step in chain:
            output, last = step.output, step is chain[-1]
            assert output is not None
            shape = (output.shape[0], len(channels), *output.shape[2:])
            mine = output if last else replace(output, name=f"{output.name}.{index}", shape=shape)
            constants = {role: array[channels] for role, array in step.constants.items()}
            work = _fewer(step.workload, len(channels))
            written = channels if last else None
            steps.append(Draft(f"{step.name}.{index}", work, x, mine, constants, channels=written))
            x = [whole(mine)]
    return steps


def _fewer(work: Workload, count: int) -> Workload:
    """The same for so many channels."""
    if isinstance(work, Conv2d):
        if is_depthwise(work):
            return replace(work, in_channels=count, out_channels=count, groups=count)
        return replace(work, out_channels=count)
    if isinstance(work, Pool2d):
        return replace(work, channels=count)
    assert isinstance(work, Convert)
    return replace(work, shape=(work.shape[0], count, *work.shape[2:]))
