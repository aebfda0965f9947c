"""Pools and reductions over pixels."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer, Unsupported
from colonnade.frontend.ops_conv import padding, pair
from colonnade.workload import GlobalPool, Pool2d


def pool(importer: Importer, node: ir.Node, kind: str) -> None:
    """MaxPool, AveragePool → Pool2d; a mean or maximum over the whole map → GlobalPool."""
    x = importer.value(node, 0)
    kernel, stride, dilation = (pair(importer, node, name) for name in ("kernel_shape", "strides", "dilations"))
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise Unsupported("the indices of a maximum are not supported; remove their reader")
    if len(x.shape) != 4:
        raise Unsupported(f"expected an input [N, C, H, W], got shape {list(x.shape)}")
    if x.is_rows and kernel == stride == (1, 1) and not any(importer.ints(node, "pads") or []):
        importer.set(node, x)
        return
    x = importer.planes(node, 0)
    n, c, h, w = x.shape
    pads = padding(importer, node, (h, w), kernel, stride, dilation)
    include = bool(node.attributes.get_int("count_include_pad", 0))
    ceil = bool(node.attributes.get_int("ceil_mode", 0))
    workload = Pool2d(kind, n, c, h, w, kernel, stride, pads, dilation, ceil, include)
    out = (n, c, workload.out_height, workload.out_width)
    if min(out) < 1:
        raise Unsupported(f"kernel {kernel} does not fit into the padded {h}x{w} input; use larger inputs")
    if kernel == (h, w) and out[2:] == (1, 1) and not any(pads) and dilation == (1, 1):
        importer.emit(node, GlobalPool(kind, n, c, h, w), [x], (n, c), out)
    else:
        importer.emit(node, workload, [x], out)


def global_pool(importer: Importer, node: ir.Node, kind: str) -> None:
    """GlobalAveragePool, GlobalMaxPool → GlobalPool."""
    x = importer.value(node, 0)
    _global(importer, node, x, kind, (*x.shape[:2], *[1] * (len(x.shape) - 2)))


def reduce(importer: Importer, node: ir.Node, kind: str) -> None:
    """ReduceMean, ReduceSum, ReduceMax over the pixels → GlobalPool."""
    x = importer.value(node, 0)
    axes = sorted(a % len(x.shape) for a in importer.ints(node, "axes", 1) or range(len(x.shape)))
    if len(x.shape) != 4 or axes != [2, 3]:
        raise Unsupported(f"only over rows and columns (axes 2, 3) of [N, C, H, W]; got axes {axes} of {list(x.shape)}")
    keep = node.attributes.get_int("keepdims", 1)
    _global(importer, node, x, kind, (*x.shape[:2], 1, 1) if keep else x.shape[:2])


def _global(importer: Importer, node: ir.Node, x: Value, kind: str, shape: tuple[int, ...]) -> None:
    if x.is_rows and len(x.shape) == 4 and x.shape[2:] == (1, 1):
        importer.set(node, Value(shape, x.tensors, sole=x.sole))
        return
    n, c, h, w = importer.planes(node, 0).shape
    importer.emit(node, GlobalPool(kind, n, c, h, w), [x], (n, c), shape)


HANDLERS: dict[str, Handler] = {
    "MaxPool": partial(pool, kind="max"),
    "AveragePool": partial(pool, kind="avg"),
    "GlobalAveragePool": partial(global_pool, kind="avg"),
    "GlobalMaxPool": partial(global_pool, kind="max"),
    "ReduceMean": partial(reduce, kind="avg"),
    "ReduceSum": partial(reduce, kind="sum"),
    "ReduceMax": partial(reduce, kind="max"),
}
