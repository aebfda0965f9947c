"""A convolution of few channels and the max pool behind it as one step, where there is a kernel for both."""

from __future__ import annotations

from collections import Counter

from colonnade.frontend.draft import Draft, Tensor, is_import
from colonnade.pattern import discover
from colonnade.workload import Conv2d, Convert, ConvPool, Pool2d, matrix
from colonnade.workload.conv_pool import joinable


def join(steps: list[Draft]) -> list[Draft]:
    """The steps with such pairs joined: a dense convolution, and a pool that alone reads it. Of an input of the model
    that nobody else reads, they read the user's array."""
    readers = Counter(tensor for step in steps for value in step.inputs for tensor in value.tensors)
    convs: dict[Tensor | None, Draft] = {step.output: step for step in steps if _alone(step, readers)}
    imported = {step.output: step for step in steps if is_import(step) and isinstance(step.workload, Convert)}
    joined: dict[int, Draft] = {}
    gone: set[int] = set()
    for step in steps:
        pool = step.workload
        if not isinstance(pool, Pool2d) or len(step.inputs) != 1:
            continue
        conv = convs.get(step.inputs[0].tensor)
        if conv is None or step.channels is not None:
            continue
        assert isinstance(conv.workload, Conv2d)
        if joinable(conv.workload, pool) and discover(matrix(conv.constants["weight"])).is_dense:
            work, x = ConvPool(conv.workload, pool), conv.inputs
            brought = imported.get(x[0].tensor)
            if brought is not None and readers[x[0].tensors[0]] == 1:
                gone.add(id(brought))
                x = []
            external = brought.external if brought is not None and not x else ""
            joined[id(step)] = Draft(conv.name, work, x, step.output, conv.constants, external)
            gone.add(id(conv))
    return [joined.get(id(step), step) for step in steps if id(step) not in gone]


def _alone(step: Draft, readers: Counter[Tensor]) -> bool:
    """Is it a convolution whose output has one reader?"""
    output = step.output
    return isinstance(step.workload, Conv2d) and output is not None and readers[output] == 1 and len(step.inputs) == 1
