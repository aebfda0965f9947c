"""ConvTranspose."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, layer_name
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_conv import LARGEST, along, pair
from colonnade.workload import Array, ConvTranspose2d


def conv_transpose(importer: Importer, node: ir.Node) -> None:
    """ConvTranspose → ConvTranspose2d, with its weights' channels the way round that Conv has them."""
    weight = importer.numbers(node, 1, "weight")
    x = importer.value(node, 0)
    if weight.ndim == 3 and len(x.shape) == 3:
        along(importer, node, x, lambda flat: _conv_transpose(importer, node, flat, weight[:, :, None]))
    elif weight.ndim == 5 and len(x.shape) == 5:
        _three_axes(importer, node, x, weight)
    else:
        _conv_transpose(importer, node, x, weight)


def _conv_transpose(importer: Importer, node: ir.Node, x: Value, weight: Array) -> None:
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else None
    if weight.ndim != 4 or len(x.shape) != 4:
        raise Unsupported(f"weight {list(weight.shape)}: only two-dimensional convolutions; reshape to [N, C, H, W]")
    x = importer.in_planes(x)
    n, channels, h, w = x.shape
    groups = node.attributes.get_int("group", 1)
    if channels != weight.shape[0] or channels % groups:
        raise Unsupported(f"weight {list(weight.shape)} in {groups} groups does not fit {channels} input channels")
    outs, kernel = weight.shape[1] * groups, (weight.shape[2], weight.shape[3])
    if bias is not None and bias.shape != (outs,):
        raise Unsupported(f"bias {list(bias.shape)} does not fit {outs} output channels")
    stride, dilation = pair(importer, node, "strides"), pair(importer, node, "dilations")
    pads, extra = _padding(importer, node, (h, w), kernel, stride, dilation)
    workload = ConvTranspose2d(n, channels, outs, h, w, kernel, stride, pads, extra, dilation, groups)
    out = (n, outs, workload.out_height, workload.out_width)
    if min(out) < 1:
        raise Unsupported(f"padding {list(pads)} leaves nothing of the output; use larger inputs")
    rows = weight.reshape(groups, channels // groups, outs // groups, *kernel).swapaxes(1, 2)
    constants = {
        "weight": np.ascontiguousarray(rows.reshape(outs, channels // groups, *kernel)),
        "bias": np.zeros(outs, np.float32) if bias is None else np.ascontiguousarray(bias),
    }
    importer.emit(node, workload, [x], out, constants=constants, name=layer_name(node))


def _three_axes(importer: Importer, node: ir.Node, x: Value, weight: Array) -> None:
    """Three axes of pixels: the depth becomes channels, as for Conv; pairs that do not meet get zeros, which are no
    work."""
    n, c, depth, h, w = x.shape
    groups, (outs, kd) = node.attributes.get_int("group", 1), weight.shape[1:3]
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or importer.ints(
        node, "output_shape"
    ):
        raise Unsupported("automatic padding of three axes is not supported; give pads")
    strides, dilations = (importer.ints(node, name) or [1, 1, 1] for name in ("strides", "dilations"))
    pads, extra = importer.ints(node, "pads") or [0] * 6, importer.ints(node, "output_padding") or [0] * 3
    deep = strides[0] * (depth - 1) + extra[0] + (kd - 1) * dilations[0] + 1 - pads[0] - pads[3]
    every = outs * groups
    if min(pads) < 0 or deep < 1 or every * deep * c * depth * weight[0, 0, 0].size > LARGEST:
        raise Unsupported(f"a convolution of {depth} by {h} by {w} pixels is too large to be done plane by plane")
    wide = np.zeros((every, deep, c, depth, *weight.shape[3:]), np.float32)
    for d in range(depth):
        for t in range(kd):
            o = d * strides[0] + t * dilations[0] - pads[0]
            for g in range(groups if 0 <= o < deep else 0):
                ins = slice(g * (c // groups), (g + 1) * (c // groups))
                wide[g * outs : (g + 1) * outs, o, ins, d] = weight[ins, :, t].swapaxes(0, 1)
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else np.zeros(every, np.float32)
    flat = importer.in_planes(importer.dense(x).seen((n, c * depth, h, w)))
    work = ConvTranspose2d(
        n, c * depth, every * deep, h, w, (weight.shape[3], weight.shape[4]), (strides[1], strides[2]),
        (pads[1], pads[2], pads[4], pads[5]), (extra[1], extra[2]), (dilations[1], dilations[2]),
    )  # fmt: skip
    out = (n, every * deep, work.out_height, work.out_width)
    if min(out) < 1:
        raise Unsupported(f"padding {pads} leaves nothing of the output; use larger inputs")
    constants = {"weight": wide.reshape(every * deep, c * depth, *weight.shape[3:]), "bias": np.repeat(bias, deep)}
    done = importer.emit(node, work, [flat], out, constants=constants, name=layer_name(node))
    importer.set(node, importer.dense(done).seen((n, every, deep, *out[2:])))


def _padding(
    importer: Importer, node: ir.Node, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:  # fmt: skip
    """(top, left, bottom, right) and what is added (rows, columns) from ``pads``, ``output_padding``, ``auto_pad`` or
    ``output_shape``."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    shape = importer.ints(node, "output_shape")
    extra = importer.ints(node, "output_padding") or [0, 0]
    extra = [0, *extra] if len(extra) == 1 else extra
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad={mode} is not known; give pads")
    if shape is None and mode in ("NOTSET", "VALID"):
        pads = (importer.ints(node, "pads") if mode == "NOTSET" else None) or [0, 0, 0, 0]
        if min(pads) < 0:
            raise Unsupported(f"negative padding {pads} is not supported; pad after it")
        top, left, bottom, right = [0, pads[0], 0, pads[1]] if len(pads) == 2 else pads
        return (top, left, bottom, right), (extra[0], extra[1])
    wanted = shape[-2:] if shape is not None else [s * d for s, d in zip(size, stride, strict=True)]
    wanted = [1, *wanted] if len(wanted) == 1 else wanted
    before, after = [], []
    for axis in range(2):
        full = stride[axis] * (size[axis] - 1) + extra[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        if shape is not None:
            extra[axis] += max(wanted[axis] - full, 0)  # one larger than the windows reach is filled up with zeros
        total = max(full - wanted[axis], 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return (before[0], before[1], after[0], after[1]), (extra[0], extra[1])


HANDLERS: dict[str, Handler] = {"ConvTranspose": conv_transpose}
