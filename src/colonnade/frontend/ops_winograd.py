"""Convolutions whose weights were transformed before they were pruned."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, layer_name
from colonnade.frontend.importer import Handler, Importer
from colonnade.onnx_winograd import OPERATORS
from colonnade.workload import WinogradConv2d
from colonnade.workload.winograd import SIZES, seen


def conv(importer: Importer, node: ir.Node) -> None:
    """(x, transformed weights, bias) → WinogradConv2d."""
    m = SIZES[OPERATORS[node.op_type]]
    weight, bias = importer.numbers(node, 1, "weight"), importer.numbers(node, 2, "bias")
    x = importer.value(node, 0)
    if len(x.shape) != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], *seen(m)):
        raise Unsupported(f"weight {list(weight.shape)} does not fit an input {list(x.shape)}")
    if bias.shape != weight.shape[:1]:
        raise Unsupported(f"bias {list(bias.shape)} does not fit {weight.shape[0]} output channels")
    n, channels, h, w = x.shape
    workload = WinogradConv2d(n, channels, weight.shape[0], h, w, (3, 3), padding=(1, 1, 1, 1), m=m)
    constants = {"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}
    out = (n, weight.shape[0], h, w)
    importer.emit(node, workload, [importer.in_planes(x)], out, constants=constants, name=layer_name(node))


HANDLERS: dict[str, Handler] = dict.fromkeys(OPERATORS, conv)
