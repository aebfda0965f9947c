"""Operators on planes in any order of axes (``tokens.Tokens``): each does its part of a handler or says it cannot."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Context
from colonnade.frontend.draft import Tensor, Value, whole
from colonnade.frontend.fusion import Fusing
from colonnade.frontend.tokens import Axis, Run, Tokens, joined_runs
from colonnade.workload import (
    FILL,
    NONE,
    Affine,
    Array,
    Binary,
    ChannelNorm,
    ChannelSoftmax,
    Constant,
    PlaneProduct,
)


def channel_norm(
    importer: Context, node: ir.Node, axis: int, epsilon: float, scale: Array, shift: Array, centred: bool
) -> bool:
    """LayerNorm over features where they are planes."""
    x = importer.tokens(node, 0)
    ends = range(axis, len(x.axes)) if x is not None else ()
    if x is None or not any(x.axes[i] for i in ends) or not all(x.has_planes(i) or not x.axes[i] for i in ends):
        return False
    if any(not run.lanes for runs in x.axes[:axis] for run in runs):
        return False  # several normalisations a pixel
    x = x.ordered()
    n, c, h, w = x.planes.placed_shape
    constants = {"scale": np.ascontiguousarray(scale), "shift": np.ascontiguousarray(shift)}
    work = ChannelNorm((n, c, h, w), epsilon, centred)
    done = importer.emit(node, work, [x.planes], work.shape, constants=constants)
    importer.set(node, x.on(done))
    return True


def channel_softmax(importer: Context, node: ir.Node, axis: int) -> bool:
    """Softmax over an axis of planes."""
    x = importer.tokens(node, 0)
    if x is None or not x.has_planes(axis):
        return False
    x = x.ordered(axis)
    n, c, h, w = x.planes.placed_shape
    work = ChannelSoftmax((n, c, h, w), c // x.shape[axis])
    importer.set(node, x.on(importer.emit(node, work, [x.planes], work.shape)))
    return True


def plane_product(importer: Context, node: ir.Node) -> bool:
    """MatMul of two computed arrays: the rows of the left one stay in the lanes."""
    x, a = importer.tokens(node, 0), importer.tokens(node, 1)
    if x is None or a is None or len(x.axes) != len(a.axes) or len(x.axes) < 2 or x.shape[-1] != a.shape[-2]:
        return False
    n, _, height, w = x.planes.placed_shape
    lanes = joined_runs([Run(w, 1, True)])
    other = joined_runs([Run(a.planes.placed_shape[3], 1, True)])
    across = a.axes[-2] == other and (a.has_planes(len(a.axes) - 1) or a.shape[-1] == 1)
    along = a.axes[-1] == other and (a.has_planes(len(a.axes) - 2) or a.shape[-2] == 1)
    if height != 1 or a.planes.placed_shape[2] != 1 or a.planes.placed_shape[0] != n or not (across or along):
        return False
    if x.axes[-2] != lanes or not (x.has_planes(len(x.axes) - 1) or x.shape[-1] == 1):
        return False
    for left, right in zip(x.axes[:-2], a.axes[:-2], strict=True):
        if _images(left, x, n) != _images(right, a, n) or prod(r.size for r in left) != prod(r.size for r in right):
            return False
    x, a = x.ordered(), a.ordered()
    if (x.planes.tensor is None and not _steady(x.planes)) or (a.planes.tensor is None and not _steady(a.planes)):
        return False
    groups = prod(run.size for axis in x.axes[:-2] for run in axis if not run.lanes)
    rows, inner = a.shape[-1], x.shape[-1]
    factor, operands = 1.0, [x.planes, a.planes]
    for i, planes in enumerate(operands):
        before = importer.writer(planes)
        if before is not None and isinstance(before.workload, Affine) and before.workload.activation == NONE:
            scale = before.constants["scale"]
            if not before.constants["shift"].any() and (scale == scale[0]).all() and _steady(before.inputs[0]):
                factor, operands[i] = factor * float(scale[0]), before.inputs[0]
    work = PlaneProduct(n, groups, rows, inner, w, across, factor)
    done = importer.emit(node, work, operands, (n, groups * rows, 1, w))
    axes, step = list[Axis](), groups * rows
    for axis in x.axes[:-2]:
        runs = []
        for run in axis:
            step //= 1 if run.lanes else run.size
            runs.append(run if run.lanes else Run(run.size, step, False))
        axes.append(joined_runs(runs))
    importer.set(node, Tokens(done, (*axes, lanes, joined_runs([Run(rows, 1, False)]))))
    return True


def _images(axis: Axis, x: Tokens, images: int) -> str | None:
    """What a batch axis is made of: planes, all images, or nothing; None for anything else."""
    if not axis:
        return "none"
    if not any(run.lanes for run in axis):
        return "planes"
    return "images" if axis == joined_runs([Run(images, x.image, True)]) else None


def _steady(value: Value) -> bool:
    """Are these planes of one tensor, equally far apart?"""
    steps = np.diff(value.planes[:, 1])
    return len(value.tensors) == 1 and bool((steps == steps[:1]).all())


def with_constant(importer: Fusing, node: ir.Node, kind: str, x: Tokens, constant: Array, first: bool) -> bool:
    """x <kind> constant, or constant <kind> x when ``first``, in planes."""
    try:
        if np.broadcast_shapes(constant.shape, x.shape) != x.shape:
            return False
    except ValueError:
        return False
    x = x.all_planes()
    varies = constant.reshape((1,) * (len(x.shape) - constant.ndim) + constant.shape)
    if not any(run.lanes for axis, d in zip(x.axes, varies.shape, strict=True) if d > 1 for run in axis):
        tables = x.sources(constant.shape)
        assert tables is not None  # it does not vary over pixels
        c = np.ascontiguousarray(constant.reshape(-1)[tables[1]], np.float32)
        pair = scale_and_shift(kind, c, first)
        if pair is not None:
            importer.affine(node, x.planes, *pair)
            importer.set(node, x.on(importer.result(node)))
            return True
    if first and kind in ("sub", "div"):
        return False
    tables = x.sources(constant.shape)
    if tables is None or kind == "div":
        return False
    n, c_, h, w = x.planes.placed_shape
    where = tables[0][:, None, None, None] + tables[1][:, None, None] + tables[2][:, None] + tables[3]
    values = np.ascontiguousarray(constant.reshape(-1)[where], np.float32)
    if kind == "add" and _add_to_constant(importer, x.planes, values):
        importer.set(node, x)
        return True
    operand = importer.constant_planes(node, values)
    importer.emit(node, Binary(kind, (n, c_, h, w)), [x.planes, operand], (n, c_, h, w))
    importer.set(node, x.on(importer.result(node)))
    return True


def _add_to_constant(importer: Context, planes: Value, values: Array) -> bool:
    """One sum of two constants, where planes are the sum of something and a constant."""
    step = importer.writer(planes)
    if step is None or not isinstance(step.workload, Binary) or step.workload.kind != "add":
        return False
    before = importer.writer(replace(step.inputs[1], sole=True))
    if before is None or not isinstance(before.workload, Constant) or step.workload.activation != NONE:
        return False
    if before.workload.shape != values.shape:
        return False
    before.constants = {"value": before.constants["value"] + values}
    return True


def concat_tokens(importer: Context, node: ir.Node, axis: int) -> bool:
    """Constant tokens in front of or behind computed ones: one copy that leaves them room, and a sum."""
    parts = [importer.constant(node, i) for i in range(len(node.inputs))]
    computed = [i for i, part in enumerate(parts) if part is None]
    x = importer.tokens(node, computed[0]) if len(computed) == 1 else None
    if x is None or x.axes[axis] != joined_runs([Run(x.image, 1, True)]):
        return False
    n, c, _, _ = x.planes.placed_shape
    images = joined_runs([Run(n, x.image, True)])
    others = [runs for i, runs in enumerate(x.axes) if i != axis and any(run.lanes for run in runs)]
    if others != ([images] if images else []):
        return False
    x = x.all_planes()
    sizes = [x.shape[axis] if part is None else part.shape[axis] for part in parts]
    total, before = sum(sizes), sum(sizes[: computed[0]])
    filled = np.full(total, FILL, np.int64)
    filled[before : before + x.image] = np.arange(x.image)
    source, target = x.planes.placed_shape, (n, c, 1, total)
    tables = [np.arange(n) * c * x.image, np.arange(c) * x.image, np.zeros(1, np.int64), filled]
    tensor = Tensor(f"{node.outputs[0].name}.room", target)
    importer.reorder(x.planes, source, target, tables, tensor)
    axes = [joined_runs([Run(n, total, True)]) if runs == images and images else runs for runs in x.axes]
    axes[axis] = joined_runs([Run(total, 1, True)])
    wide = Tokens(whole(tensor), tuple(axes))
    values = np.zeros(wide.shape, np.float32)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            values[(slice(None),) * axis + (slice(start, start + size),)] = part
        start += size
    where = wide.sources(wide.shape)
    assert where is not None
    places = where[0][:, None, None, None] + where[1][:, None, None] + where[2][:, None] + where[3]
    operand = importer.constant_planes(node, np.ascontiguousarray(values.reshape(-1)[places]))
    done = importer.emit(node, Binary("add", target), [wide.planes, operand], target)
    importer.set(node, wide.on(done))
    return True


def scale_and_shift(kind: str, c: Array, first: bool) -> tuple[Array, Array] | None:
    """x <kind> c (c <kind> x when ``first``) as scale and shift; None where that is no number or none."""
    if kind not in ("add", "sub", "mul", "div") or (kind == "div" and first):
        return None
    ones, zeros = np.ones_like(c), np.zeros_like(c)
    scale, shift = {
        "add": (ones, c),
        "sub": (-ones if first else ones, c if first else -c),
        "mul": (c, zeros),
        "div": (np.divide(ones, c, where=c != 0, out=np.full_like(c, np.inf)), zeros),
    }[kind]
    # inf * 0 is no number
    return (scale, shift) if np.isfinite(scale).all() and np.isfinite(shift).all() else None


def of_two(importer: Fusing, node: ir.Node, kind: str) -> bool:
    """x <kind> y, one of them planes in any order of axes, the other one likewise or broadcast to it."""
    x, y = importer.tokens(node, 0), importer.tokens(node, 1)
    swapped = x is None or (y is not None and prod(y.shape) > prod(x.shape))
    if swapped and kind not in ("add", "mul", "max", "min"):
        return False
    if swapped:
        x, y = y, x
    if x is None:
        return False
    x = x.all_planes()
    y = y.all_planes() if y is not None else None
    shape = x.planes.placed_shape
    other = importer.raw(node, 0 if swapped else 1)
    if y is not None and y.axes == x.axes and y.planes.placed_shape == shape and not (x.pixel or y.pixel):
        beside, broadcast = y.planes, False
    else:
        try:
            if np.broadcast_shapes(other.shape, x.shape) != x.shape:
                return False
        except ValueError:
            return False
        name = node.outputs[0].name or ""
        dense = importer.dense(importer.ordinary(other, name), name)
        tables = x.sources(dense.shape)
        if tables is None:
            return False
        broadcast = not (tables[2].any() or tables[3].any() or prod(dense.shape) == prod(x.shape))
        beside_ = importer.of_channels(node, dense, tables) if broadcast else importer.in_tokens(dense, x, name)
        if beside_ is None:
            return False
        beside = beside_
    if kind == "add" and not broadcast and importer.add_residual(node, x.planes, beside):
        importer.set(node, x.on(importer.result(node)))
        return True
    importer.emit(node, Binary(kind, shape, broadcast), [x.planes, beside], shape)
    importer.set(node, x.on(importer.result(node)))
    return True
