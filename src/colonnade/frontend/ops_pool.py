"""Pools and reductions over pixels."""

from __future__ import annotations

from functools import partial
from math import prod

import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_conv import along, padding, pair
from colonnade.frontend.ops_shape import view
from colonnade.workload import GlobalPool, MaxIndices, Pool2d, Reduce


def pool(importer: Importer, node: ir.Node, kind: str) -> None:
    """MaxPool, AveragePool → Pool2d; a mean or maximum over the whole map → GlobalPool."""
    x = importer.value(node, 0)
    if len(x.shape) == 3:
        along(importer, node, x, lambda flat: _pool(importer, node, flat, kind))
    elif len(x.shape) == 5:
        _pool_3d(importer, node, x, kind)
    else:
        _pool(importer, node, x, kind)


def _pool_3d(importer: Importer, node: ir.Node, x: Value, kind: str) -> None:
    """A window of three axes: first over rows and columns, then over the depth (maxima and means both allow it)."""
    if importer.more_outputs(node):
        raise Unsupported("the indices of a maximum over three axes are not supported; remove their reader")
    n, c, d, h, w = x.shape
    kernel, stride, dilation = (
        importer.ints(node, name) or [1, 1, 1] for name in ("kernel_shape", "strides", "dilations")
    )
    pads = importer.ints(node, "pads") or [0] * 6
    if (mode := node.attributes.get_string("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        raise Unsupported(f"auto_pad={mode} of three axes is not supported; give pads")
    ceil = bool(node.attributes.get_int("ceil_mode", 0))
    include = bool(node.attributes.get_int("count_include_pad", 0))
    flat = importer.in_planes(importer.dense(x).seen((n, c * d, h, w)))
    first = Pool2d(
        kind, n, c * d, h, w, (kernel[1], kernel[2]), (stride[1], stride[2]), (pads[1], pads[2], pads[4], pads[5]),
        (dilation[1], dilation[2]), ceil, include,
    )  # fmt: skip
    oh, ow = first.out_height, first.out_width
    done = importer.dense(importer.emit(node, first, [flat], (n, c * d, oh, ow)))
    second = Pool2d(
        kind, n, c, d, oh * ow, (kernel[0], 1), (stride[0], 1), (pads[0], 0, pads[3], 0), (dilation[0], 1),
        ceil, include,
    )  # fmt: skip
    deep = importer.in_planes(done.seen((n, c, d, oh * ow)))
    od = second.out_height
    if min(od, oh, ow) < 1:
        raise Unsupported("its kernel does not fit into the padded input; use larger inputs")
    done = importer.dense(importer.emit(node, second, [deep], (n, c, od, oh * ow)))
    importer.set(node, done.seen((n, c, od, oh, ow)))


def _pool(importer: Importer, node: ir.Node, x: Value, kind: str) -> None:
    kernel, stride, dilation = (pair(importer, node, name) for name in ("kernel_shape", "strides", "dilations"))
    if len(x.shape) != 4:
        raise Unsupported(f"expected an input [N, C, H, W], got shape {list(x.shape)}")
    x = importer.in_planes(x)
    n, c, h, w = x.shape
    pads = padding(importer, node, (h, w), kernel, stride, dilation)
    include = bool(node.attributes.get_int("count_include_pad", 0))
    ceil = bool(node.attributes.get_int("ceil_mode", 0))
    workload = Pool2d(kind, n, c, h, w, kernel, stride, pads, dilation, ceil, include)
    out = (n, c, workload.out_height, workload.out_width)
    if min(out) < 1:
        raise Unsupported(f"kernel {kernel} does not fit into the padded {h}x{w} input; use larger inputs")
    if importer.more_outputs(node):
        work = MaxIndices(workload, bool(node.attributes.get_int("storage_order", 0)))
        importer.dense_step(node, work, [importer.dense(x)], out, index=1, dtype="int64")
    if kernel == (h, w) and out[2:] == (1, 1) and not any(pads) and dilation == (1, 1):
        importer.emit(node, GlobalPool(kind, n, c, h, w), [x], (n, c), out)
    else:
        importer.emit(node, workload, [x], out)


def global_pool(importer: Importer, node: ir.Node, kind: str) -> None:
    """GlobalAveragePool, GlobalMaxPool → GlobalPool."""
    x = importer.value(node, 0)
    _global(importer, node, x, kind, (*x.shape[:2], *[1] * (len(x.shape) - 2)))


def reduce(importer: Importer, node: ir.Node, kind: str) -> None:
    """ReduceMean, ...: over the pixels of planes → GlobalPool, else Reduce of a dense array."""
    x = importer.value(node, 0)
    rank = len(x.shape)
    given = importer.ints(node, "axes", 1)
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        if kind not in ("avg", "sum", "max", "min", "prod"):
            raise Unsupported("without axes (noop_with_empty_axes) is not supported; remove it")
        importer.set(node, x)
        return
    axes = sorted(a % rank for a in given or range(rank))
    keep = node.attributes.get_int("keepdims", 1)
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes)
    if not x.is_rows and rank == 4 and axes == [2, 3] and kind in ("avg", "sum", "max"):
        _global(importer, node, x, kind, shape)
        return
    dense = importer.dense(x, node.outputs[0].name or "")
    axes = [a for a in axes if x.shape[a] > 1] or axes[-1:]
    if axes != list(range(axes[0], axes[-1] + 1)):  # what is summed up must stand side by side
        tables, others = counting(x.shape), [i for i in range(rank) if i not in axes]
        dense = importer.take(node, dense, [tables[i] for i in (*others, *axes)])
        axes = list(range(len(others), rank))
    sizes = dense.shape
    outer, count, inner = prod(sizes[: axes[0]]), prod(sizes[a] for a in axes), prod(sizes[axes[-1] + 1 :])
    importer.dense_step(node, Reduce(kind, outer, count, inner), [dense], shape)


def _global(importer: Importer, node: ir.Node, x: Value, kind: str, shape: tuple[int, ...]) -> None:
    if prod(x.shape[2:]) == 1:
        view(importer, node, x, shape)
    elif len(x.shape) == 4 and (not x.is_rows or kind == "max"):
        n, c, h, w = x.shape
        importer.emit(node, GlobalPool(kind, n, c, h, w), [importer.in_planes(x)], (n, c), shape)
    else:
        count = prod(x.shape[2:])
        importer.dense_step(node, Reduce(kind, prod(x.shape[:2]), count, 1), [importer.dense(x)], shape)


HANDLERS: dict[str, Handler] = {
    "MaxPool": partial(pool, kind="max"),
    "AveragePool": partial(pool, kind="avg"),
    "GlobalAveragePool": partial(global_pool, kind="avg"),
    "GlobalMaxPool": partial(global_pool, kind="max"),
    "ReduceMean": partial(reduce, kind="avg"),
    "ReduceSum": partial(reduce, kind="sum"),
    "ReduceMax": partial(reduce, kind="max"),
    "ReduceMin": partial(reduce, kind="min"),
    "ReduceProd": partial(reduce, kind="prod"),
    "ReduceL1": partial(reduce, kind="l1"),
    "ReduceL2": partial(reduce, kind="l2"),
    "ReduceSumSquare": partial(reduce, kind="sumsq"),
    "ReduceLogSum": partial(reduce, kind="logsum"),
    "ReduceLogSumExp": partial(reduce, kind="logsumexp"),
}
