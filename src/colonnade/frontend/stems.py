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
    alone: dict[Tensor | None, Draft] = {s.output: s for s in steps if s.output is not None and readers[s.output] == 1}
    joined: dict[int, Draft] = {}
    gone: set[int] = set()
    for step in steps:
        pool, conv = step.workload, alone.get(step.inputs[0].tensor) if step.inputs else None
        if conv is None or not isinstance(pool, Pool2d) or not _joinable(conv, pool):
            continue
        assert isinstance(conv.workload, Conv2d)
        x, external = conv.inputs, ""
        brought = alone.get(x[0].tensor)
        if brought is not None and isinstance(brought.workload, Convert) and is_import(brought):
            x, external = [], brought.external
            gone.add(id(brought))
        gone.add(id(conv))
        joined[id(step)] = Draft(conv.name, ConvPool(conv.workload, pool), x, step.output, conv.constants, external)
    return [joined.get(id(step), step) for step in steps if id(step) not in gone]


def _joinable(conv: Draft, pool: Pool2d) -> bool:
    """Is it a convolution that has a kernel together with the pool behind it?"""
    work = conv.workload
    return type(work) is Conv2d and joinable(work, pool) and discover(matrix(conv.constants["weight"])).is_dense
