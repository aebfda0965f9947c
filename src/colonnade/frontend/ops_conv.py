"""Convolutions and linear layers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from colonnade.frontend.importer import Handler, Importer, Unsupported, layer_name
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
    """An attribute of two integers, 1 by default."""
    values = importer.ints(node, attribute) or [1, 1]
    if len(values) != 2:
        raise Unsupported(
            f"{attribute} {values}: only two-dimensional operators are supported; reshape to [N, C, H, W]"
        )
    return values[0], values[1]


def conv(importer: Importer, node: ir.Node) -> None:
    """Conv → Conv2d; on a single pixel, or with a kernel as large as the map, → Linear."""
    weight = importer.numbers(node, 1, "weight")
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else None
    if weight.ndim != 4:
        raise Unsupported(f"weight {list(weight.shape)}: only two-dimensional convolutions; reshape to [N, C, H, W]")
    x = importer.value(node, 0)
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
    if x.is_rows and out[2:] != (1, 1):
        pixels = importer.pixels_of_input(x)
        if pixels is None:
            raise Unsupported("a convolution that pads one computed pixel to several is not supported; pad less")
        x = pixels
    if x.is_rows:
        flat = expand_groups(_tap_at_origin(weight, pads, dilation), groups)
        importer.linear(node, x, flat, bias, out, layer_name(node))
    elif kernel == (h, w) and groups == 1 and not any(pads) and dilation == (1, 1):
        rows = importer.to_rows(node, x)
        importer.linear(node, rows, weight.reshape(weight.shape[0], -1), bias, out, layer_name(node))
    else:
        bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias
        constants = {"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}
        importer.emit(node, workload, [x], out, constants=constants, name=layer_name(node))


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


def gemm(importer: Importer, node: ir.Node) -> None:
    """Gemm with constant B and C → Linear."""
    x = importer.value(node, 0)
    weight = importer.numbers(node, 1, "weight (B)")
    if node.attributes.get_int("transA", 0) or not x.is_rows or len(x.shape) != 2:
        raise Unsupported(f"expected rows [N, K] for A without transA, got shape {list(x.shape)}; flatten before it")
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    weight = weight if node.attributes.get_int("transB", 0) else weight.T
    outs = weight.shape[0]
    bias = None
    if importer.has(node, 2):
        c = importer.numbers(node, 2, "bias (C)")
        if c.ndim > 2 or (c.ndim == 2 and c.shape[0] != 1):
            raise Unsupported(f"bias (C) of shape {list(c.shape)} varies over the batch; use one of shape [{outs}]")
        bias = np.broadcast_to(c.reshape(-1) * np.float32(beta), outs).copy()
    weight = np.asarray(weight * np.float32(alpha), np.float32)
    importer.linear(node, x, weight, bias, (x.shape[0], outs), layer_name(node))


def matmul(importer: Importer, node: ir.Node) -> None:
    """MatMul of rows with a constant matrix → Linear."""
    x = importer.value(node, 0)
    weight = importer.numbers(node, 1, "right operand")
    if not x.is_rows or weight.ndim != 2 or x.shape[-1] != weight.shape[0] or x.width != weight.shape[0]:
        raise Unsupported(f"only rows [N, K] times a constant [K, M]; got {list(x.shape)} and {list(weight.shape)}")
    importer.linear(node, x, weight.T, None, (*x.shape[:-1], weight.shape[1]), layer_name(node))


HANDLERS: dict[str, Handler] = {"Conv": conv, "Gemm": gemm, "MatMul": matmul}
