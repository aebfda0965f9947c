"""Convolutions in float16: which of them, and the steps that change what stands between them and all others.

Numbers of 11 bits are enough for most networks' convolutions, and a vector holds twice as many. Those whose weights
float16 cannot hold stay in float32. Stems that are joined with their max pool read float32, most often the user's
array, and write float16. Pools, sums, products and scales of such maps are in float16 too where this takes no more
conversions; all other steps stay in float32, and linear layers have their weights alone in float16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from colonnade.frontend.draft import Draft, Tensor, Value, is_import, whole
from colonnade.workload import (
    Affine,
    Binary,
    Conv2d,
    Convert,
    ConvPool,
    ConvTranspose2d,
    GlobalPool,
    Linear,
    Pool2d,
    Precision,
    Repeat,
    WinogradConv2d,
)

LARGEST = 60000.0  # of a weight or bias: float16 ends at 65504
ROUNDED = 2.0**-10  # of what is multiplied, at most this share may be lost: it ends at 6e-8 too


def halve(steps: Sequence[Draft], functions: Collection[str]) -> list[Draft]:
    """The steps with convolutions and what suits them in float16, and conversions where they meet others.

    ``functions``: those that their kernels apply themselves.
    """
    chosen = _with_others(steps, {id(step) for step in steps if _can(step, functions)})
    for step in steps:
        if id(step) in chosen and step.output is not None and not step.output.is_rows:
            step.output.itemsize = 2
    reading = {id(step) for step in steps if id(step) in chosen and _reads_half(step)}
    _import_rounded(steps, reading)
    made: dict[tuple[Tensor, int], Tensor] = {}
    result: list[Draft] = []
    for step in steps:
        inputs = []
        for value in step.inputs:
            wanted = 2 if id(step) in reading and not value.is_rows else 4
            for tensor in value.tensors:
                if tensor.itemsize != wanted and (tensor, wanted) not in made:
                    other = Tensor(f"{tensor.name}.f{8 * wanted}", tensor.shape, itemsize=wanted)
                    made[tensor, wanted] = other
                    result.append(Draft(other.name, Precision(tensor.shape, wanted), [whole(tensor)], other))
            inputs.append(_as(value, wanted, made))
        step.inputs = inputs
        if type(step.workload) is Linear and _fits(step):
            step.workload = replace(step.workload, dtype="f16")
            rounded = step.constants["weight"].astype(np.float16).astype(np.float32)
            step.constants = {**step.constants, "weight": rounded}
        result.append(step)
    return result


def _import_rounded(steps: Sequence[Draft], reading: set[int]) -> None:
    """The user's numbers are rounded where they are imported, if nobody reads them as they are. ``reading``: the steps
    that read float16, by their ids."""
    wanted: dict[Tensor, set[int]] = defaultdict(set)
    for step in steps:
        for tensor in {tensor for value in step.inputs if not value.is_rows for tensor in value.tensors}:
            wanted[tensor].add(2 if id(step) in reading else 4)
    for step in steps:
        brings = isinstance(step.workload, Convert) and is_import(step)
        if brings and step.output is not None and wanted[step.output] == {2}:
            step.output.itemsize = 2


def _as(value: Value, wanted: int, made: dict[tuple[Tensor, int], Tensor]) -> Value:
    return replace(value, tensors=tuple(made.get((t, wanted), t) for t in value.tensors))


def _with_others(steps: Sequence[Draft], convolutions: set[int]) -> set[int]:
    """``convolutions`` and, by their ids too, the steps that are to read float16 like them.

    One that could does if it reads any, unless more numbers were converted then. In the order of the steps, so what a
    step reads is known; of its readers, those that can do either have no say. Whatever is converted for another reader
    costs nothing.
    """
    takes: dict[int, int] = {}  # by step, bytes of the elements of maps
    readers: dict[Tensor, list[int]] = defaultdict(list)
    for step in steps:
        if not _can_follow(step):
            takes[id(step)] = 2 if id(step) in convolutions and _reads_half(step) else 4
        for tensor in {tensor for value in step.inputs for tensor in value.tensors}:
            readers[tensor].append(id(step))
    halves = {step.output for step in steps if id(step) in convolutions}

    def wanted(tensor: Tensor, itemsize: int) -> bool:
        return any(takes.get(reader) == itemsize for reader in readers[tensor])

    def converted(step: Draft, itemsize: int) -> int:
        maps = {tensor for value in step.inputs if not value.is_rows for tensor in value.tensors}
        moved = [t for t in maps if (t in halves) != (itemsize == 2) and not wanted(t, itemsize)]
        y = step.output
        if y is not None and not y.is_rows and wanted(y, 2 if itemsize == 4 else 4):
            moved.append(y)
        return sum(prod(tensor.shape) for tensor in moved)

    for step in steps:
        if id(step) not in takes:
            reads = any(tensor in halves for value in step.inputs for tensor in value.tensors)
            takes[id(step)] = 2 if reads and converted(step, 2) <= converted(step, 4) else 4
            if takes[id(step)] == 2 and step.output is not None and not step.output.is_rows:
                halves.add(step.output)
    return convolutions | {step for step, itemsize in takes.items() if itemsize == 2}


def _reads_half(step: Draft) -> bool:
    """Does it read float16, if it computes with it?"""
    return not isinstance(step.workload, ConvPool)


def _can_follow(step: Draft) -> bool:
    """Is it another step that has kernels for maps of float16? What it writes in rows is float32."""
    work = step.workload
    if isinstance(work, Affine):
        return not step.inputs[0].is_rows and work.activation.function is None and _fits(step)
    if isinstance(work, Binary):
        # quotients by small numbers leave the range of float16
        return not step.inputs[0].is_rows and work.kind != "div" and work.activation.function is None
    return isinstance(work, Pool2d | GlobalPool | Repeat) and not step.inputs[0].is_rows


def _can(step: Draft, functions: Collection[str]) -> bool:
    """Is it a convolution that has kernels for float16, of numbers that it can hold?"""
    conv = step.workload
    if isinstance(conv, ConvPool):
        return _fits(step)
    if not isinstance(conv, Conv2d | ConvTranspose2d) or isinstance(conv, WinogradConv2d):
        return False
    function = conv.epilogue.activation.function
    if function is not None and function.name not in functions:
        return False
    return _fits(step)


def _fits(step: Draft) -> bool:
    """Can float16 hold its constants?"""
    if any(np.abs(array).max(initial=0.0) > LARGEST for array in step.constants.values()):
        return False
    factors = step.constants.get("weight", step.constants.get("scale", np.zeros(1, np.float32)))
    lost = np.linalg.norm((factors - factors.astype(np.float16)).reshape(-1))
    return bool(lost <= ROUNDED * np.linalg.norm(factors.reshape(-1)))
