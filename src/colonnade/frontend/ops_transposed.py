"""ConvTranspose."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, layer_name
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_conv import pair
from colonnade.workload import ConvTranspose2d


def conv_transpose(importer: Importer, node: ir.Node) -> None:
    """ConvTranspose → ConvTranspose2d, with its weights' channels the way round that Conv has them."""
    weight = importer.numbers(node, 1, "weight")
    bias = importer.numbers(node, 2, "bias") if importer.has(node, 2) else None
    if weight.ndim != 4:
        raise Unsupported(f"weight {list(weight.shape)}: only two-dimensional convolutions; reshape to [N, C, H, W]")
    x = importer.planes(node, 0)
    n, channels, h, w = x.shape
    groups = node.attributes.get_int("group", 1)
    if channels != weight.shape[0] or channels % groups:
        raise Unsupported(f"weight {list(weight.shape)} in {groups} groups does not fit {channels} input channels")
    outs, kernel = weight.shape[1] * groups, (weight.shape[2], weight.shape[3])
    if bias is not None and bias.shape != (outs,):
        raise Unsupported(f"bias {list(bias.shape)} does not fit {outs} output channels")
    stride, dilation = pair(importer, node, "strides"), pair(importer, node, "dilations")
    extra = importer.ints(node, "output_padding") or [0, 0]
    pads = _padding(importer, node, (h, w), kernel, stride, dilation, extra)
    workload = ConvTranspose2d(n, channels, outs, h, w, kernel, stride, pads, (extra[0], extra[1]), dilation, groups)
    out = (n, outs, workload.out_height, workload.out_width)
    if min(out) < 1:
        raise Unsupported(f"padding {list(pads)} leaves nothing of the output; use larger inputs")
    rows = weight.reshape(groups, channels // groups, outs // groups, *kernel).swapaxes(1, 2)
    constants = {
        "weight": np.ascontiguousarray(rows.reshape(outs, channels // groups, *kernel)),
        "bias": np.zeros(outs, np.float32) if bias is None else np.ascontiguousarray(bias),
    }
    importer.emit(node, workload, [x], out, constants=constants, name=layer_name(node))


def _padding(
    importer: Importer, node: ir.Node, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int], extra: list[int],
) -> tuple[int, int, int, int]:  # fmt: skip
    """(top, left, bottom, right) from ``pads``, ``auto_pad`` or ``output_shape``."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    shape = importer.ints(node, "output_shape")
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad={mode} is not known; give pads")
    if shape is None and mode in ("NOTSET", "VALID"):
        pads = importer.ints(node, "pads") if mode == "NOTSET" else None
        if pads is not None and min(pads) < 0:
            raise Unsupported(f"negative padding {pads} is not supported; pad after it")
        top, left, bottom, right = pads or (0, 0, 0, 0)
        return top, left, bottom, right
    wanted = shape[-2:] if shape is not None else [s * d for s, d in zip(size, stride, strict=True)]
    before, after = [], []
    for axis in range(2):
        full = stride[axis] * (size[axis] - 1) + extra[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        total = max(full - wanted[axis], 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before[0], before[1], after[0], after[1]


HANDLERS: dict[str, Handler] = {"ConvTranspose": conv_transpose}
