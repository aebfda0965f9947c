"""Operators that touch each element once."""

from __future__ import annotations

from functools import partial
from math import inf

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer, Unsupported
from colonnade.workload import RELU, Activation, Array, Binary, Softmax


def batch_norm(importer: Importer, node: ir.Node) -> None:
    """BatchNormalization → into the convolution before it, else Affine."""
    if node.attributes.get_int("training_mode", 0):
        raise Unsupported("it is in training mode; export the model with .eval()")
    x = importer.value(node, 0)
    gamma, beta, mean, variance = (importer.numbers(node, 1 + i, "statistics").astype(np.float64) for i in range(4))
    if x.width != gamma.size or x.shape[1] != gamma.size:
        raise Unsupported(f"{gamma.size} statistics do not fit shape {list(x.shape)}; expected [N, {gamma.size}, ...]")
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    importer.affine(node, x, scale.astype(np.float32), (beta - mean * scale).astype(np.float32))


def relu(importer: Importer, node: ir.Node) -> None:
    """Relu → an activation."""
    importer.activation(node, RELU)


def clip(importer: Importer, node: ir.Node) -> None:
    """Clip with constant limits → an activation."""
    limits = []
    for index, (name, default) in enumerate((("min", -inf), ("max", inf)), 1):
        if importer.has(node, index):
            array = importer.constant(node, index)
            if array is None:
                raise Unsupported(f"its limit {name} must be constant; export the model in inference mode")
            limits.append(float(np.asarray(array, np.float32).reshape(-1)[0]))
        else:
            limits.append(node.attributes.get_float(name, default))
    low, high = limits
    importer.activation(node, Activation(min(low, high), high))


def binary(importer: Importer, node: ir.Node, kind: str) -> None:
    """Add, Sub, Mul, Div → a fused residual, Binary, or with constants Affine."""
    constants = [importer.constant(node, index) for index in range(2)]
    for index, constant in enumerate(constants):
        if constant is not None:
            _with_constant(importer, node, kind, importer.value(node, 1 - index), constant, index == 0)
            return
    a, b = importer.value(node, 0), importer.value(node, 1)
    if kind in ("add", "mul") and (b.width > a.width or (a.is_rows and not b.is_rows)):
        a, b = b, a
    if kind == "add" and a.shape == b.shape and a.is_rows == b.is_rows and importer.add_residual(node, a, b):
        return
    if a.shape != b.shape or a.is_rows != b.is_rows:
        b = _broadcast(importer, node, a, b)
    broadcast = b.is_rows and not a.is_rows
    importer.emit(node, Binary(kind, a.placed_shape, broadcast), [a, b], a.placed_shape, a.shape)


def _broadcast(importer: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    """``b`` in a form that can stand beside ``a``: the same planes repeated, or a number a channel."""
    refused = Unsupported(
        f"shapes {list(a.shape)} and {list(b.shape)}: only equal shapes, one number a channel [N, C, 1, 1] or one "
        "plane for all channels [N, 1, H, W]; expand the smaller one"
    )
    if a.is_rows or len(a.shape) != 4 or len(b.shape) != 4 or b.shape[0] != a.shape[0]:
        raise refused
    if b.shape[1:] == (a.shape[1], 1, 1):
        rows = importer.to_rows(node, b)
        return Value(b.shape, rows.tensors)
    if not b.is_rows and b.shape[1:] == (1, *a.shape[2:]):
        assert b.channels is not None
        return Value(a.shape, b.tensors, np.repeat(b.channels, a.width, axis=0))
    raise refused


def _with_constant(
    importer: Importer, node: ir.Node, kind: str, x: Value, constant: npt.NDArray[np.generic], first: bool
) -> None:
    """x <kind> constant, or constant <kind> x when ``first``."""
    c = per_channel(x, np.asarray(constant, np.float32))
    ones, zeros = np.ones_like(c), np.zeros_like(c)
    if kind == "div" and first:
        raise Unsupported("a constant divided by a tensor is not supported; multiply by its reciprocal")
    scale, shift = {
        "add": (ones, c),
        "sub": (-ones if first else ones, c if first else -c),
        "mul": (c, zeros),
        "div": (np.divide(ones, c, where=c != 0, out=np.full_like(c, np.inf)), zeros),
    }[kind]
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise Unsupported("its constant is zero, NaN or infinite where it may not be; repair the weights")
    importer.affine(node, x, scale, shift)


def per_channel(x: Value, constant: Array) -> Array:
    """float32 [C]: a constant that broadcasts against ``x`` without varying over images or pixels."""
    refused = Unsupported(f"constant of shape {list(constant.shape)} beside {list(x.shape)}: only one number a channel")
    try:
        full = np.broadcast_shapes(constant.shape, x.shape)
    except ValueError:
        raise refused from None
    if full != x.shape:
        raise refused
    c = constant.reshape((1,) * (len(x.shape) - constant.ndim) + constant.shape)
    for axis in (0,) if x.is_rows else (0, -2, -1):
        if (c != c.take([0], axis)).any():
            raise refused
        c = c.take([0], axis)
    if x.is_rows:
        return np.broadcast_to(c, (1, *x.shape[1:])).reshape(-1).copy()
    return np.broadcast_to(c, (1, *x.shape[1:-2], 1, 1)).reshape(-1).copy()


def softmax(importer: Importer, node: ir.Node) -> None:
    """Softmax over the last axis of rows."""
    x = importer.value(node, 0)
    axis = node.attributes.get_int("axis", 1 if importer.graph.opset_imports.get("", 13) < 13 else -1) % len(x.shape)
    if not x.is_rows or x.shape[axis] != x.width:
        raise Unsupported(f"only over the channels of rows [N, C]; got axis {axis} of shape {list(x.shape)}")
    shape = (x.shape[0], x.width)
    importer.emit(node, Softmax(shape), [x], shape, x.shape)


HANDLERS: dict[str, Handler] = {
    "BatchNormalization": batch_norm,
    "Relu": relu,
    "Clip": clip,
    "Add": partial(binary, kind="add"),
    "Sub": partial(binary, kind="sub"),
    "Mul": partial(binary, kind="mul"),
    "Div": partial(binary, kind="div"),
    "Softmax": softmax,
}
