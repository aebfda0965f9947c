"""Convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, layer_name
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.workload import Array, Conv2d


def padding(
    importer: Importer, node: ir.Node, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:  # fmt: skip
    """(top, left, bottom, right) from ``pads`` or ``auto_pad``."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        return 0, 0, 0, 0
    if mode == "NOTSET":
        pads = importer.ints(node, "pads") or [0, 0, 0, 0]
        pads = [0, pads[0], 0, pads[1]] if len(pads) == 2 else pads
        if min(pads) < 0:
            raise Unsupported(f"negative padding {pads} is not supported; slice before it")
        top, left, bottom, right = pads
        return top, left, bottom, right
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad={mode} is not known; give pads")
    before, after = [], []
    for axis in range(2):
        out = -(-size[axis] // stride[axis])
        total = max((out - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - size[axis], 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before[0], before[1], after[0], after[1]


def pair(importer: Importer, node: ir.Node, attribute: str) -> tuple[int, int]:
    """An attribute of two integers, 1 by default; of one where there is only one axis."""
    values = importer.ints(node, attribute) or [1, 1]
    values = [1, *values] if len(values) == 1 else values
    if len(values) != 2:
        raise Unsupported(
            f"{attribute} {values}: only two-dimensional operators are supported; reshape to [N, C, H, W]"
        )
    return values[0], values[1]


LARGEST = 1 << 26  # weights of a convolution of three axes, written out for two


def along(importer: Importer, node: ir.Node, x: Value, then: Callable[[Value], None]) -> None:
    """Do with [N, C, 1, W] what the node does with [N, C, W]."""
    n, c, w = x.shape
    then(importer.dense(x).seen((n, c, 1, w)))
    for index in range(1 + importer.more_outputs(node)):
        done = importer.dense(importer.result(node, index), node.outputs[index].name or "")
        importer.set(node, done.seen((*done.shape[:2], done.shape[3])), index)


def conv(importer: Importer, node: ir.Node) -> None:
    """Conv → Conv2d; on a single pixel, or with a kernel as large as the map, → Linear."""
    weight = importer.numbers(node, 1, "weight")
    x = importer.value(node, 0)
    if weight.ndim == 3 and len(x.shape) == 3:
        along(importer, node, x, lambda flat: _conv(importer, node, flat, weight[:, :, None]))
    elif weight.ndim == 5 and len(x.shape) == 5:
        _conv_3d(importer, node, x, weight)
    else:
        _conv(importer, node, x, weight)


def _conv_3d(importer: Importer, node: ir.Node, x: Value, weight: Array) -> None:
    """Three axes of pixels: the depth becomes channels, and what a depth does not see zeros that cost nothing."""
    n, c, depth, h, w = x.shape
    outs, ins, kd = weight.shape[:3]
    groups = node.attributes.get_int("group", 1)
    strides, dilations = (importer.ints(node, name) or [1, 1, 1] for name in ("strides", "dilations"))
    pads = importer.ints(node, "pads") or [0] * 6
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or min(pads) < 0:
        raise Unsupported("automatic or negative padding of three axes is not supported; give pads")
    deep = (depth + pads[0] + pads[3] - (kd - 1) * dilations[0] - 1) // strides[0] + 1
    if deep < 1 or outs * deep * c * depth * weight[0, 0, 0].size > LARGEST:
        raise Unsupported(f"a convolution of {depth} by {h} by {w} pixels is too large to be done plane by plane")
    wide = np.zeros((outs, deep, c, depth, *weight.shape[3:]), np.float32)
    for o in range(deep):
        for t in range(kd):
            d = o * strides[0] + t * dilations[0] - pads[0]
            for g in range(groups if 0 <= d < depth else 0):
                mine = slice(g * (outs // groups), (g + 1) * (outs // groups))
                wide[mine, o, g * ins : (g + 1) * ins, d] = weight[mine, :, t]
    flat_weight = wide.reshape(outs * deep, c * depth, *weight.shape[3:])
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else np.zeros(outs, np.float32)
    flat = importer.in_planes(importer.dense(x).seen((n, c * depth, h, w)))
    conv = Conv2d(
        n, c * depth, outs * deep, h, w, (weight.shape[3], weight.shape[4]), (strides[1], strides[2]),
        (pads[1], pads[2], pads[4], pads[5]), (dilations[1], dilations[2]),
    )  # fmt: skip
    out = (n, outs * deep, conv.out_height, conv.out_width)
    if min(out) < 1:
        raise Unsupported(f"its kernel does not fit into the padded {h}x{w} input; use larger inputs")
    constants = {"weight": flat_weight, "bias": np.repeat(bias, deep)}
    done = importer.emit(node, conv, [flat], out, constants=constants, name=layer_name(node))
    importer.set(node, importer.dense(done).seen((n, outs, deep, *out[2:])))


def _conv(importer: Importer, node: ir.Node, x: Value, weight: Array) -> None:
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else None
    if weight.ndim != 4:
        raise Unsupported(f"weight {list(weight.shape)}: only two-dimensional convolutions; reshape to [N, C, H, W]")
    if len(x.shape) != 4:
        raise Unsupported(f"expected an input [N, C, H, W], got shape {list(x.shape)}")
    n, channels, h, w = x.shape
    kernel = (weight.shape[2], weight.shape[3])
    stride, dilation = pair(importer, node, "strides"), pair(importer, node, "dilations")
    pads = padding(importer, node, (h, w), kernel, stride, dilation)
    groups = node.attributes.get_int("group", 1)
    if channels != weight.shape[1] * groups or weight.shape[0] % groups:
        raise Unsupported(f"weight {list(weight.shape)} in {groups} groups does not fit {channels} input channels")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Unsupported(f"bias {list(bias.shape)} does not fit {weight.shape[0]} output channels")
    workload = Conv2d(n, channels, weight.shape[0], h, w, kernel, stride, pads, dilation, groups)
    out = (n, weight.shape[0], workload.out_height, workload.out_width)
    if min(out) < 1:
        raise Unsupported(f"kernel {kernel} does not fit into the padded {h}x{w} input; use larger inputs")
    if x.is_rows and (h, w) == (1, 1) and out[2:] == (1, 1):
        flat = expand_groups(_tap_at_origin(weight, pads, dilation), groups)
        importer.linear(node, x, flat, bias, out, layer_name(node))
    elif kernel == (h, w) and groups == 1 and not any(pads) and dilation == (1, 1):
        rows = importer.to_rows(node, x)
        importer.linear(node, rows, weight.reshape(weight.shape[0], -1), bias, out, layer_name(node))
    else:
        bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias
        constants = {"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}
        importer.emit(node, workload, [importer.in_planes(x)], out, constants=constants, name=layer_name(node))


def _tap_at_origin(weight: Array, pads: tuple[int, ...], dilation: tuple[int, int]) -> Array:
    """[OC, IC/g]: the only tap that meets a one-pixel input; all the others meet padding."""
    (top, left), (kh, kw) = pads[:2], weight.shape[2:]
    i, j = top // dilation[0], left // dilation[1]
    if top % dilation[0] or left % dilation[1] or i >= kh or j >= kw:
        return np.zeros(weight.shape[:2], np.float32)
    return weight[:, :, i, j]


def expand_groups(weight: Array, groups: int) -> Array:
    """[OC, IC/g] → [OC, IC], zero outside of each group."""
    if groups == 1:
        return weight
    outs, ins = weight.shape
    dense = np.zeros((groups, outs // groups, groups, ins), np.float32)
    for g in range(groups):
        dense[g, :, g] = weight.reshape(groups, outs // groups, ins)[g]
    return dense.reshape(outs, groups * ins)


HANDLERS: dict[str, Handler] = {"Conv": conv}
