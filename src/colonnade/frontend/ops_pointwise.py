"""Operators that touch each element once."""

from __future__ import annotations

from functools import partial
from math import inf, prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting, exact, is_vector
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_tokens import of_two, scale_and_shift, with_constant
from colonnade.workload import FUNCTIONS, RELU, Activation, Affine, Array, Binary, Elementwise, Function, Reduce, Unary

Wide = npt.NDArray[np.float64]


def batch_norm(importer: Importer, node: ir.Node) -> None:
    """BatchNormalization → into the convolution before it, else Affine."""
    x = importer.value(node, 0)
    gamma, beta, mean, variance = (importer.numbers(node, 1 + i, "statistics").astype(np.float64) for i in range(4))
    if node.attributes.get_int("training_mode", 0):
        _batch_statistics(importer, node, x, gamma, beta, mean, variance)
        return
    if importer.more_outputs(node) or (len(node.outputs) > 1 and importer.graph.opset_imports.get("", 18) < 14):
        raise Unsupported("it is in training mode; export the model with .eval()")
    channels = x.shape[1] if len(x.shape) > 1 else 1
    if channels != gamma.size:
        raise Unsupported(f"{gamma.size} statistics do not fit shape {list(x.shape)}; expected [N, {gamma.size}, ...]")
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    per_channel_affine(importer, node, x, scale.astype(np.float32), (beta - mean * scale).astype(np.float32))


def _batch_statistics(importer: Importer, node: ir.Node, x: Value, *parameters: Wide) -> None:
    """BatchNormalization in training mode: by the mean and variance of the batch, which the running ones follow."""
    gamma, beta, mean, variance = parameters
    x = importer.dense(x)
    rank, channels = len(x.shape), x.shape[1]
    name = node.outputs[0].name or ""
    order = [1, 0, *range(2, rank)]
    tables = counting(x.shape)
    moved = importer.take(node, x, [tables[i] for i in order])
    count, column = prod(x.shape) // channels, (channels, 1)
    matrix, wide = moved.seen((channels, count)), ((channels, count), (channels, 1))

    def step(kind: str, a: Value, b: Value, index: int = 0) -> Value:
        work = Elementwise(kind, (a.shape, b.shape))
        return importer.dense_step(node, work, [a, b], work.shape, index=index)

    def constant(numbers: Wide) -> Value:
        return importer.brought(name, numbers.astype(np.float32).reshape(-1, 1))

    average = importer.dense_step(node, Reduce("avg", channels, count, 1), [matrix], column)
    less = step("sub", matrix, average)
    square = importer.emit(node, Unary(Function("square"), wide[0]), [less], wide[0])
    spread = importer.dense_step(node, Reduce("avg", channels, count, 1), [square], column)
    momentum = node.attributes.get_float("momentum", 0.9)
    for index, now, before in ((1, average, mean), (2, spread, variance)):
        if index < len(node.outputs):
            share = step("mul", now, constant(np.full(1, 1 - momentum)), index)
            importer.set(node, step("add", share, constant(before * momentum), index).seen((channels,)), index)
    epsilon = step("add", spread, constant(np.full(1, node.attributes.get_float("epsilon", 1e-5))))
    deviation = importer.emit(node, Unary(Function("sqrt"), column), [epsilon], column)
    done = step("add", step("mul", step("div", less, deviation), constant(gamma)), constant(beta)).seen(moved.shape)
    back = counting(moved.shape)
    importer.take(node, done, [back[order.index(i)] for i in range(rank)])


def per_channel_affine(importer: Importer, node: ir.Node, x: Value, scale: Array, shift: Array) -> None:
    """``x * scale + shift``, one number for every entry of axis 1."""
    if not x.is_rows:  # planes may have more axes in front of their maps
        inner = x.width // len(scale)
        scale, shift = np.repeat(scale, inner), np.repeat(shift, inner)
    if not x.is_rows or is_vector(x.shape):
        x = x.matrix(len(x.shape) - 1) if x.is_rows else x
        shape = importer.value(node, 0).shape
        importer.affine(node, x, scale, shift)
        if x.is_rows:
            importer.reshape(node, shape)
    elif len(x.shape) == 4:
        importer.affine(node, importer.in_planes(x), scale, shift)
    else:
        inner = prod(x.shape[2:])
        importer.affine(node, x, np.repeat(scale, inner), np.repeat(shift, inner))


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
                _clip(importer, node)
                return
            limits.append(float(np.asarray(array, np.float32).reshape(-1)[0]))
        else:
            limits.append(node.attributes.get_float(name, default))
    low, high = limits
    importer.activation(node, Activation(min(low, high), high))


def _clip(importer: Importer, node: ir.Node) -> None:
    """Clip with computed limits."""
    x = importer.dense(importer.value(node, 0))
    for index, kind in ((1, "max"), (2, "min")):
        if importer.has(node, index):
            limit = importer.array(node, index)
            x = importer.dense_step(node, Elementwise(kind, (x.shape, limit.shape)), [x, limit], x.shape)


def function(importer: Importer, node: ir.Node, name: str, attributes: tuple[str, ...] = ()) -> None:
    """A function of every element → an activation; ``attributes`` name those that hold its parameters."""
    defaults = FUNCTIONS[name][1:]
    numbers = [node.attributes.get_float(key, default) for key, default in zip(attributes, defaults, strict=False)]
    importer.activation(node, Activation(function=Function.of(name, *numbers)))


def gelu(importer: Importer, node: ir.Node) -> None:
    """Gelu, exact or by tanh."""
    function(importer, node, "gelu_tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu")


def is_inf(importer: Importer, node: ir.Node) -> None:
    """IsInf, of either sign or one."""
    sides = [float(node.attributes.get_int(f"detect_{side}", 1)) for side in ("positive", "negative")]
    importer.activation(node, Activation(function=Function("is_inf", *sides)))


def swish(importer: Importer, node: ir.Node) -> None:
    """x * sigmoid(alpha * x)."""
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        function(importer, node, "silu")
        return
    x = importer.dense(importer.value(node, 0))
    factor = importer.brought(node.outputs[0].name or "", np.full(1, alpha, np.float32))
    inner = importer.dense_step(node, Elementwise("mul", (x.shape, (1,))), [x, factor], x.shape)
    gate = importer.emit(node, Unary(Function("sigmoid"), inner.placed_shape), [inner], inner.placed_shape, x.shape)
    importer.dense_step(node, Elementwise("mul", (x.shape, x.shape)), [x, gate], x.shape)


def power(importer: Importer, node: ir.Node) -> None:
    """Pow by one constant → a function; else element by element."""
    exponent = importer.constant(node, 1)
    plain = exponent is not None and exponent.size == 1 and importer.constant(node, 0) is None
    if exponent is None or not plain or exponent.ndim > len(importer.value(node, 0).shape):  # the result has more axes
        elementwise(importer, node, "pow")
        return
    e = float(np.asarray(exponent, np.float32).reshape(-1)[0])
    known = {2.0: Function("square"), 0.5: Function("sqrt"), -1.0: Function("reciprocal")}
    importer.activation(node, Activation(function=known.get(e, Function("pow", e))))


def binary(importer: Importer, node: ir.Node, kind: str) -> None:
    """Add, Sub, Mul, Div, Max, Min → a fused residual, Binary, with constants Affine; else element by element."""
    if len(node.inputs) == 1:
        importer.set(node, importer.value(node, 0))
        return
    if len(node.inputs) > 2:
        _chain(importer, node, kind)
        return
    constants = [importer.constant(node, index) for index in range(2)]
    if any(c is not None for c in constants):
        index = 0 if constants[0] is not None else 1
        tokens, c = importer.tokens(node, 1 - index), constants[index]
        if tokens is not None and c is not None and with_constant(importer, node, kind, tokens, exact(c), index == 0):
            return
        if not _with_constant(importer, node, kind, importer.value(node, 1 - index), constants[index], index == 0):
            elementwise(importer, node, kind)
        return
    if of_two(importer, node, kind):
        return
    a, b = importer.value(node, 0), importer.value(node, 1)
    if kind in ("add", "mul", "max", "min") and (
        prod(b.shape) > prod(a.shape) or (a.shape == b.shape and a.is_rows and not b.is_rows)
    ):
        a, b = b, a
    if a.shape == b.shape and len(a.shape) == 4 and not a.is_rows and b.is_rows:
        b = importer.in_planes(b)
    if kind == "add" and a.shape == b.shape and a.is_rows == b.is_rows and importer.add_residual(node, a, b):
        return
    if a.shape != b.shape or a.is_rows != b.is_rows:
        fitting = _broadcast(importer, node, a, b)
        if fitting is None:
            elementwise(importer, node, kind)
            return
        b = fitting
    broadcast = b.is_rows and not a.is_rows
    importer.emit(node, Binary(kind, a.placed_shape, broadcast), [a, b], a.placed_shape, a.shape)


def _chain(importer: Importer, node: ir.Node, kind: str) -> None:
    """An operator of many inputs as a chain of those of two."""
    total = importer.array(node, 0)
    for index in range(1, len(node.inputs)):
        other = importer.array(node, index)
        work = Elementwise(kind, (total.shape, other.shape))
        total = importer.dense_step(node, work, [total, other], work.shape)


def mean(importer: Importer, node: ir.Node) -> None:
    """Mean of several arrays."""
    if len(node.inputs) == 1:
        importer.set(node, importer.value(node, 0))
        return
    _chain(importer, node, "add")
    total = importer.result(node)
    count = np.full(1, 1 / len(node.inputs), np.float32)
    importer.affine(node, total, count, count * 0)


def elementwise(importer: Importer, node: ir.Node, kind: str) -> None:
    """Any two (where: three) operands with broadcasting, as dense arrays."""
    operands = [importer.array(node, index) for index in range(len(node.inputs))]
    work = Elementwise(kind, tuple(value.shape for value in operands))
    importer.dense_step(node, work, operands, work.shape)


def prelu(importer: Importer, node: ir.Node) -> None:
    """PRelu: one slope → LeakyRelu; one a channel of planes → max(x, 0) + slope * min(x, 0)."""
    x, slope = importer.value(node, 0), importer.constant(node, 1)
    if slope is not None and slope.ndim == 1 and len(x.shape) > 1 and slope.size == x.shape[1] != x.shape[-1]:
        slope = slope.reshape(-1, *[1] * (len(x.shape) - 2))  # as old exporters write it
    if slope is not None and slope.size == 1:
        importer.activation(node, Activation(function=Function("leaky_relu", float(slope.reshape(-1)[0]))))
        return
    c = None if slope is None or x.is_rows else per_channel(x, np.asarray(slope, np.float32))
    if c is None and slope is not None:
        x, slopes = importer.dense(x), importer.brought(node.outputs[0].name or "", slope)
        work = Elementwise("prelu", (x.shape, slopes.shape))
        importer.dense_step(node, work, [x, slopes], work.shape)
        return
    if c is None:
        elementwise(importer, node, "prelu")
        return
    ones, zeros, placed = np.ones_like(c), np.zeros_like(c), x.placed_shape
    below = Affine(placed, Activation(high=0.0))
    low = importer.emit(node, below, [x], placed, x.shape, {"scale": ones, "shift": zeros})
    low = importer.emit(node, Affine(placed), [low], placed, x.shape, {"scale": c, "shift": zeros})
    above = Affine(placed, RELU)
    high = importer.emit(node, above, [x], placed, x.shape, {"scale": ones, "shift": zeros})
    importer.emit(node, Binary("add", placed), [high, low], placed, x.shape)


def _broadcast(importer: Importer, node: ir.Node, a: Value, b: Value) -> Value | None:
    """``b`` in a form that can stand beside the planes ``a``: repeated planes, or a number a channel; or None."""
    if a.is_rows or len(a.shape) != 4 or len(b.shape) != 4 or b.shape[0] != a.shape[0]:
        return None
    if b.shape[1:] == (a.shape[1], 1, 1):
        return importer.to_rows(node, b)
    if b.shape[1:] == (1, *a.shape[2:]):
        planes = importer.in_planes(b)
        assert planes.channels is not None
        return Value(a.shape, planes.tensors, np.repeat(planes.channels, a.width, axis=0), sole=False)
    return None


def _with_constant(
    importer: Importer, node: ir.Node, kind: str, x: Value, constant: npt.NDArray[np.generic] | None, first: bool
) -> bool:
    """x <kind> constant, or constant <kind> x when ``first``; False where that is no scale and shift."""
    assert constant is not None
    c = per_channel(x, exact(constant))
    pair = scale_and_shift(kind, c, first) if c is not None else None
    if c is None or pair is None:
        return False
    scale, shift = pair
    importer.affine(node, x, scale, shift)
    return True


def per_channel(x: Value, constant: Array) -> Array | None:
    """A constant that broadcasts to ``x``: float32 [C] for planes, or for a dense array one period of it.

    None where it does not, or where it varies over the images or pixels of planes.
    """
    try:
        full = np.broadcast_shapes(constant.shape, x.shape)
    except ValueError:
        return None
    if full != x.shape:
        return None
    c = constant.reshape((1,) * (len(x.shape) - constant.ndim) + constant.shape)
    if x.is_rows:
        if c.size == 1:
            return c.reshape(1).copy()
        split = next(i for i, d in enumerate(c.shape) if d > 1)
        split = min(split, len(x.shape) - 1)
        return np.broadcast_to(c[(0,) * split], x.shape[split:]).reshape(-1).copy()
    for axis in (0, -2, -1):
        if (c != c.take([0], axis)).any():
            return None
        c = c.take([0], axis)
    return np.broadcast_to(c, (1, *x.shape[1:-2], 1, 1)).reshape(-1).copy()


def _plain(name: str, *attributes: str) -> Handler:
    return partial(function, name=name, attributes=attributes)


def _pair(kind: str) -> Handler:
    return partial(elementwise, kind=kind)


def modulo(importer: Importer, node: ir.Node) -> None:
    """Mod as Python's or as C's."""
    elementwise(importer, node, "fmod" if node.attributes.get_int("fmod", 0) else "mod")


HANDLERS: dict[str, Handler] = {
    "BatchNormalization": batch_norm,
    "Relu": relu,
    "Clip": clip,
    **{name: partial(binary, kind=name.lower()) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    "Sum": partial(binary, kind="add"),
    "Mean": mean,
    "Pow": power,
    "PRelu": prelu,
    "Mod": modulo,
    "Gelu": gelu,
    "Swish": swish,
    "IsInf": is_inf,
    "Equal": _pair("equal"),
    "Less": _pair("less"),
    "LessOrEqual": _pair("less_equal"),
    "Greater": _pair("greater"),
    "GreaterOrEqual": _pair("greater_equal"),
    "And": _pair("and"),
    "Or": _pair("or"),
    "Xor": _pair("xor"),
    "Where": _pair("where"),
    "Not": _plain("logical_not"),
    "Celu": _plain("celu", "alpha"),
    "Elu": _plain("elu", "alpha"),
    "HardSigmoid": _plain("hard_sigmoid", "alpha", "beta"),
    "HardSwish": _plain("hard_swish"),
    "IsNaN": _plain("is_nan"),
    "LeakyRelu": _plain("leaky_relu", "alpha"),
    "Selu": _plain("selu", "alpha", "gamma"),
    "Shrink": _plain("shrink", "lambd", "bias"),
    "ThresholdedRelu": _plain("thresholded_relu", "alpha"),
    **{
        name: _plain(name.lower())
        for name in (
            "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor",
            "Log", "Mish", "Neg", "Reciprocal", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
            "Sqrt", "Tan", "Tanh",
        )
    },
}  # fmt: skip
