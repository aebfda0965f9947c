"""Large batches image by image: activations of one image stay in the caches, those of many do not.

ResNet-50 at batch 8 moves more than 50 MB of activations at once and is bound by memory; one image after the other it
is as fast as at batch 1, whose weights are read again for each image in the shadow of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from math import prod
from typing import Any

import numpy as np

from colonnade.errors import UserError
from colonnade.frontend.draft import Draft
from colonnade.frontend.importer import Importer
from colonnade.workload import Workload

# operators that by their definition compute each image (the first of their sizes) from that image alone
INDEPENDENT = frozenset(
    (
        *("affine", "binary", "conv2d", "conv_transpose2d", "convert", "global_pool", "interleave", "linear", "lrn"),
        *("pool2d", "resample", "softmax", "unary", "zeros"),
    )
)
NEAR = 8 << 20  # bytes a step may touch before a batch is taken apart: more is not kept by the caches of most machines


def one_by_one(many: Importer, single: Callable[[], Importer]) -> tuple[Importer, int]:
    """The importer to go on with, and how many images its steps are to be run for, one after the other.

    ``single`` imports the same model for one image. That is taken where a batch touches much memory at once and each
    of its images is computed by itself.
    """
    sizes = {port.shape[:1] for port in (*many.inputs, *many.outputs)}
    images = next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else 1
    if images == 1 or max(map(_touched, many.steps), default=0) <= NEAR:
        return many, 1
    try:
        one = single()
    except UserError:  # some graphs are written for one batch size only
        return many, 1
    alike = len(one.steps) == len(many.steps) and all(map(_repeats, one.steps, many.steps, [images] * len(one.steps)))
    whole = [(p.name, p.dtype, (images, *p.shape[1:])) for p in (*one.inputs, *one.outputs) if p.shape[:1] == (1,)]
    if not alike or whole != [(p.name, p.dtype, p.shape) for p in (*many.inputs, *many.outputs)]:
        return many, 1
    return one, images


def _touched(step: Draft) -> int:
    """Bytes of a step's inputs and output."""
    shapes = [value.placed_shape for value in step.inputs] + ([step.output.shape] if step.output is not None else [])
    return sum(4 * prod(shape) for shape in shapes)


def _repeats(one: Draft, many: Draft, images: int) -> bool:
    """Does ``many`` do what ``one`` does, for that many images?"""
    same = one.name == many.name and one.constants.keys() == many.constants.keys()
    same = same and many.workload.op in INDEPENDENT and _enlarged(one.workload, images) == many.workload
    return same and all(np.array_equal(one.constants[role], many.constants[role]) for role in one.constants)


def _enlarged(workload: Workload, images: int) -> Workload:
    """The same for ``images`` times as many."""
    named = {field.name for field in fields(workload)}  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    if "batch" in named:
        changed["batch"] = images * workload.batch  # type: ignore[attr-defined]
    elif "shape" in named:
        shape = workload.shape  # type: ignore[attr-defined]
        changed["shape"] = (images * shape[0], *shape[1:])
    return replace(workload, **changed)  # type: ignore[type-var]
