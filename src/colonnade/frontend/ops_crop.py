"""CenterCropPad."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting
from colonnade.frontend.importer import Handler, Importer
from colonnade.workload import FILL


def center_crop_pad(importer: Importer, node: ir.Node) -> None:
    """CenterCropPad: a move of the middle of every axis, zeros around what is too small."""
    x = importer.value(node, 0)
    rank = len(x.shape)
    sizes = importer.ints(node, "shape", 1)
    if sizes is None:
        raise Unsupported("its shape must be constant; export the model with fixed shapes")
    axes = [a % rank for a in importer.ints(node, "axes") or range(rank)]
    tables = counting(x.shape)
    for size, axis in zip(sizes, axes, strict=True):
        here = x.shape[axis]
        first = (here - size) // 2 if size < here else -((size - here) // 2)
        where = np.arange(first, first + size)
        inside = (where >= 0) & (where < here)
        tables[axis] = np.where(inside, tables[axis][np.where(inside, where, 0)], FILL)
    importer.take(node, x, tables)


HANDLERS: dict[str, Handler] = {"CenterCropPad": center_crop_pad}
