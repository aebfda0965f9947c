"""Convolutions in float16: which of them, and the steps that change what stands between them and all others.

Numbers of 11 bits are enough for most networks' convolutions, and a vector holds twice as many. What is no convolution
stays in float32, as do the first one, which reads the user's numbers, and those whose weights float16 cannot hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from colonnade.frontend.draft import Draft, Tensor, Value, is_import, whole
from colonnade.workload import Conv2d, Precision, is_depthwise

LARGEST = 60000.0  # of a weight or bias: float16 ends at 65504


def halve(steps: Sequence[Draft], functions: Collection[str]) -> list[Draft]:
    """The steps with convolutions in float16, and conversions where they meet others. ``functions``: those that their
    kernels apply themselves."""
    imported = {step.output for step in steps if is_import(step)}
    chosen = {id(step) for step in steps if _can(step, imported, functions)}
    for step in steps:
        if id(step) in chosen and step.output is not None:
            step.output.itemsize = 2
    made: dict[tuple[Tensor, int], Tensor] = {}
    result: list[Draft] = []
    for step in steps:
        wanted = 2 if id(step) in chosen else 4
        for value in step.inputs:
            for tensor in value.tensors:
                if tensor.itemsize != wanted and (tensor, wanted) not in made:
                    other = Tensor(f"{tensor.name}.f{8 * wanted}", tensor.shape, itemsize=wanted)
                    made[tensor, wanted] = other
                    result.append(Draft(other.name, Precision(tensor.shape, wanted), [whole(tensor)], other))
        step.inputs = [_as(value, wanted, made) for value in step.inputs]
        result.append(step)
    return result


def _as(value: Value, wanted: int, made: dict[tuple[Tensor, int], Tensor]) -> Value:
    return replace(value, tensors=tuple(made.get((t, wanted), t) for t in value.tensors))


def _can(step: Draft, imported: set[Tensor | None], functions: Collection[str]) -> bool:
    """Is it a convolution that has kernels for float16, of numbers that it can hold?"""
    conv = step.workload
    if type(conv) is not Conv2d or is_depthwise(conv) or conv.prologue is not None:
        return False
    if any(tensor in imported for tensor in step.inputs[0].tensors):
        return False
    function = conv.epilogue.activation.function
    if function is not None and function.name not in functions:
        return False
    return all(np.abs(array).max(initial=0.0) <= LARGEST for array in step.constants.values())
