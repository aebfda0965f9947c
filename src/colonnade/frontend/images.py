"""Large batches image by image: activations of one image stay in the caches, those of many do not.

ResNet-50 at batch 8 moves more than 50 MB of activations at once and is bound by memory; one image after the other it
is as fast as at batch 1, whose weights are read again for each image in the shadow of the arithmetic.

Behind the last large map it is the other way round: a classifier's weights are all that it moves, 8 MB in ResNet-50 and
470 MB in VGG-16. Steps from there on run once, for all images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from math import prod
from typing import Any

import numpy as np

from colonnade.errors import UserError
from colonnade.frontend.draft import Draft, Tensor, whole
from colonnade.frontend.importer import Importer
from colonnade.plan import Port
from colonnade.workload import Convert, Workload
from colonnade.workload.typed import F32

# operators that by their definition compute each image (the first of their sizes) from that image alone
INDEPENDENT = frozenset(
    (
        *("affine", "binary", "conv2d", "conv_transpose2d", "convert", "global_pool", "interleave", "linear", "lrn"),
        *("pool2d", "resample", "softmax", "unary", "zeros"),
    )
)
NEAR = 8 << 20  # bytes a step may touch before a batch is taken apart: more is not kept by the caches of most machines
SMALL = 1 << 20  # bytes that steps for all images may touch in any case: a second cache holds them
HEAVY = 256 << 10  # bytes of constants that are worth being read once: fewer stay in the caches from image to image


def one_by_one(many: Importer, single: Callable[[], Importer]) -> tuple[Importer, int, Port | None]:
    """The importer to go on with, how many images its steps are to be run for, one after the other, and the seam to
    those steps of it that are run once (see ``Plan``).

    ``single`` imports the same model for one image. That is taken where a batch touches much memory at once and each
    of its images is computed by itself.
    """
    sizes = {port.shape[:1] for port in (*many.inputs, *many.outputs)}
    images = next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else 1
    if images == 1 or max(map(_touched, many.steps), default=0) <= NEAR:
        return many, 1, None
    try:
        one = single()
    except UserError:  # some graphs are written for one batch size only
        return many, 1, None
    alike = len(one.steps) == len(many.steps) and all(map(_repeats, one.steps, many.steps, [images] * len(one.steps)))
    ports = [(p.name, p.dtype, (images, *p.shape[1:])) for p in (*one.inputs, *one.outputs) if p.shape[:1] == (1,)]
    if not alike or ports != [(p.name, p.dtype, p.shape) for p in (*many.inputs, *many.outputs)]:
        return many, 1, None
    return one, images, _join(one, many)


def _join(one: Importer, many: Importer) -> Port | None:
    """Put the last steps of ``many`` in the place of those of ``one``, from the first on where that pays."""
    found: tuple[int, Tensor] | None = None
    kept = worth = 0
    for start in range(len(many.steps) - 1, 0, -1):
        step = many.steps[start]
        own = _kept(step)
        if _touched(step) > max(SMALL, own) or not step.inputs:
            break
        kept += own
        if (tensor := _crossing(many.steps, start)) is not None:
            found, worth = (start, tensor), kept
    if found is None or worth < HEAVY:
        return None
    start, tensor = found
    part = next(a.output for a, b in zip(one.steps, many.steps, strict=True) if b.output is tensor)
    assert part is not None
    name = "all images"
    while name in {port.name for port in (*many.inputs, *many.outputs)}:
        name += "'"
    store = Draft(f"{tensor.name}.stored", Convert("export", part.shape), [whole(part)], None, external=name)
    fetch = Draft(f"{tensor.name}.together", Convert("import", tensor.shape), [], tensor, external=name)
    one.steps[start:] = [store, fetch, *many.steps[start:]]
    return Port(name, tensor.shape)


def _crossing(steps: list[Draft], start: int) -> Tensor | None:
    """The only tensor, of f32, that steps from ``start`` on read from those before."""
    made = {step.output for step in steps[start:]}
    values = [v for step in steps[start:] for v in step.inputs if not made.issuperset(v.tensors)]
    tensors = {tensor for value in values for tensor in value.tensors}
    return tensors.pop() if len(tensors) == 1 and all(v.dtype == F32 for v in values) else None


def _kept(step: Draft) -> int:
    """Bytes of the constants that pruning left."""
    return sum(4 * int(np.count_nonzero(array)) for array in step.constants.values())


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
