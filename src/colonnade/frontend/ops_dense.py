"""Matrix products, softmax and normalisations: what runs on dense arrays."""

from __future__ import annotations

from functools import partial
from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting, layer_name
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_pointwise import per_channel_affine
from colonnade.frontend.ops_tokens import channel_norm, channel_softmax, plane_product
from colonnade.workload import Array, Elementwise, Function, MatMul, Normalise, Reduce, Softmax, Unary


def gemm(importer: Importer, node: ir.Node) -> None:
    """Gemm → Linear where B is constant, else MatMul; C added behind it where it is no bias."""
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    weight, c = importer.constant(node, 1), importer.constant(node, 2)
    trans_a, trans_b = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    shape = importer.shape(node, 0)
    if len(shape) != 2:
        raise Unsupported(f"expected a matrix for A, got shape {list(shape)}; flatten before it")
    rows = shape[1] if trans_a else shape[0]
    bias = None
    if weight is not None:
        matrix = importer.numbers(node, 1, "weight (B)")
        matrix = np.asarray((matrix if trans_b else matrix.T) * np.float32(alpha), np.float32)
        outs = matrix.shape[0]
        if c is not None and np.broadcast_shapes(c.shape, (1, outs)) == (1, outs):
            numbers = importer.numbers(node, 2, "bias (C)").reshape(-1)
            bias = np.broadcast_to(numbers * np.float32(beta), outs).copy()
        if importer.constant(node, 0) is not None or trans_a:
            a = importer.array(node, 0)
            a = _transposed(importer, node, a) if trans_a else a
            importer.linear(node, a, matrix, bias, (rows, outs), layer_name(node))
        else:
            importer.linear_of(node, matrix, bias, layer_name(node))
    else:
        a, b = importer.array(node, 0), importer.array(node, 1)
        a = _transposed(importer, node, a) if trans_a else a
        b = _transposed(importer, node, b) if trans_b else b
        outs = b.shape[1]
        importer.dense_step(node, MatMul((), (), rows, a.shape[1], outs, alpha), [a, b], (rows, outs))
    if importer.has(node, 2) and bias is None and beta:
        product, addend = importer.result(node), importer.array(node, 2)
        if beta != 1.0:
            scaled = Elementwise("mul", (addend.shape, (1,)))
            factor = importer.brought(node.outputs[0].name or "", np.full(1, beta, np.float32))
            addend = importer.dense_step(node, scaled, [addend, factor], scaled.shape)
        importer.dense_step(node, Elementwise("add", (product.shape, addend.shape)), [product, addend], (rows, outs))


def _transposed(importer: Importer, node: ir.Node, x: Value) -> Value:
    """A matrix the other way round."""
    return importer.take(node, x, counting(x.shape)[::-1])


def matmul(importer: Importer, node: ir.Node) -> None:
    """MatMul by a constant matrix → Linear; of computed operands, with batches → MatMul."""
    weight = importer.constant(node, 1)
    if weight is not None and weight.ndim == 2 and importer.constant(node, 0) is None:
        importer.linear_of(node, importer.numbers(node, 1, "right operand").T, None, layer_name(node))
        return
    if plane_product(importer, node):
        return
    a, b = importer.array(node, 0), importer.array(node, 1)
    ends = (a.shape[:-2], b.shape[:-2])
    left, right = len(a.shape) == 1, len(b.shape) == 1
    a = a.seen((1, *a.shape)) if left else a
    b = b.seen((*b.shape, 1)) if right else b
    if a.shape[-1] != b.shape[-2]:
        raise Unsupported(f"shapes {list(a.shape)} and {list(b.shape)} do not fit together")
    work = MatMul(() if left else ends[0], () if right else ends[1], a.shape[-2], a.shape[-1], b.shape[-1])
    shape = (*work.batch, *(() if left else (work.rows,)), *(() if right else (work.columns,)))
    importer.dense_step(node, work, [a, b], shape)


def softmax(importer: Importer, node: ir.Node) -> None:
    """Softmax over any axis; before opset 13 over all axes from the given one on."""
    rank = len(importer.shape(node, 0))
    old = importer.graph.opset_imports.get("", 13) < 13
    axis = node.attributes.get_int("axis", 1 if old else -1) % rank
    if (axis == rank - 1 or not old) and channel_softmax(importer, node, axis):
        return
    x = importer.array(node, 0)
    if old or axis == rank - 1:
        matrix = x.matrix(rank - axis)
        importer.dense_step(node, Softmax((matrix.shape[0], matrix.shape[1])), [matrix], x.shape)
        return
    order = [*(i for i in range(rank) if i != axis), axis]
    tables = counting(x.shape)
    moved = importer.take(node, x, [tables[i] for i in order])
    matrix = moved.matrix(1)
    done = importer.dense_step(node, Softmax((matrix.shape[0], matrix.shape[1])), [matrix], moved.shape)
    back = counting(moved.shape)
    importer.take(node, done, [back[order.index(i)] for i in range(rank)])


def log_softmax(importer: Importer, node: ir.Node) -> None:
    """LogSoftmax: x less its largest, less the logarithm of the sum of the exponentials of that."""
    x = importer.array(node, 0)
    rank = len(x.shape)
    old = importer.graph.opset_imports.get("", 13) < 13
    axis = node.attributes.get_int("axis", 1 if old else -1) % rank
    last = rank if old else axis + 1
    outer, count, inner = prod(x.shape[:axis]), prod(x.shape[axis:last]), prod(x.shape[last:])
    whole, one = (outer, count, inner), (outer, 1, inner)
    largest = importer.dense_step(node, Reduce("max", *whole), [x], one)
    # large numbers less their sum's logarithm would be rounded as large ones are
    low = importer.dense_step(node, Elementwise("sub", (whole, one)), [x.seen(whole), largest], whole)
    sums = importer.dense_step(node, Reduce("logsumexp", *whole), [low], one)
    importer.dense_step(node, Elementwise("sub", (whole, one)), [low, sums], whole)
    importer.reshape(node, x.shape)


def layer_norm(importer: Importer, node: ir.Node, centred: bool) -> None:
    """LayerNormalization, RMSNormalization over the last axes."""
    shape = importer.shape(node, 0)
    axis = node.attributes.get_int("axis", -1) % len(shape)
    ends = shape[axis:]
    if importer.more_outputs(node):
        _statistics(importer, node, importer.array(node, 0), axis)

    def along(index: int, what: str) -> Array:
        numbers = importer.numbers(node, index, what)
        while numbers.ndim > len(ends) and len(numbers) == 1:
            numbers = numbers[0]
        return np.broadcast_to(numbers, ends).reshape(-1)

    scale = along(1, "scale")
    shift = along(2, "bias") if importer.has(node, 2) else np.zeros_like(scale)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if channel_norm(importer, node, axis, epsilon, scale, shift, centred):
        return
    x = importer.array(node, 0)
    _normalise(importer, node, x, prod(ends), epsilon, scale, shift, centred)


def _statistics(importer: Importer, node: ir.Node, x: Value, axis: int) -> None:
    """The further outputs of LayerNormalization: the mean, and one over the standard deviation."""
    outer, count = prod(x.shape[:axis]), prod(x.shape[axis:])
    shape, column = (*x.shape[:axis], *[1] * (len(x.shape) - axis)), (outer, 1)
    mean = importer.dense_step(node, Reduce("avg", outer, count, 1), [x.seen((outer, count))], shape, None, 1)
    wide = ((outer, count), column)
    less = importer.dense_step(node, Elementwise("sub", wide), [x.seen(wide[0]), mean.seen(column)], wide[0])
    square = importer.emit(node, Unary(Function("square"), wide[0]), [less], wide[0])
    variance = importer.dense_step(node, Reduce("avg", outer, count, 1), [square], column)
    epsilon = importer.brought(node.outputs[0].name or "", np.full(1, node.attributes.get_float("epsilon", 1e-5)))
    total = importer.dense_step(node, Elementwise("add", (column, (1,))), [variance, epsilon], column)
    inverse = importer.emit(node, Unary(Function("pow", -0.5), column), [total], column, shape)
    if len(node.outputs) > 2:
        importer.set(node, inverse, 2)


def _normalise(
    importer: Importer, node: ir.Node, x: Value, width: int, epsilon: float, scale: Array, shift: Array,
    centred: bool = True,
) -> Value:  # fmt: skip
    work = Normalise(prod(x.shape) // width, width, epsilon, centred)
    constants = {"scale": np.ascontiguousarray(scale), "shift": np.ascontiguousarray(shift)}
    return importer.dense_step(node, work, [x.seen((work.rows, width))], x.shape, constants)


def group_norm(importer: Importer, node: ir.Node) -> None:
    """InstanceNormalization, GroupNormalization: every group of channels of every image by itself."""
    x = importer.array(node, 0)
    scale, shift = importer.numbers(node, 1, "scale"), importer.numbers(node, 2, "bias")
    channels = x.shape[1]
    groups = node.attributes.get_int("num_groups", channels)
    if channels % groups or len(scale) not in (channels, groups):
        raise Unsupported(f"{groups} groups and {len(scale)} scales do not fit {channels} channels")
    width = prod(x.shape[1:]) // groups
    ones = np.ones(width, np.float32)
    done = _normalise(importer, node, x, width, node.attributes.get_float("epsilon", 1e-5), ones, ones * 0)
    repeat = channels // len(scale)
    per_channel_affine(importer, node, done, scale.repeat(repeat), shift.repeat(repeat))


def lp_norm(importer: Importer, node: ir.Node) -> None:
    """LpNormalization: an axis over its norm."""
    x = importer.array(node, 0)
    axis = node.attributes.get_int("axis", -1) % len(x.shape)
    outer, count, inner = prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :])
    kind = "l1" if node.attributes.get_int("p", 2) == 1 else "l2"
    norm = importer.dense_step(node, Reduce(kind, outer, count, inner), [x], (outer, 1, inner))
    shapes = ((outer, count, inner), norm.shape)
    importer.dense_step(node, Elementwise("div_or_zero", shapes), [x.seen(shapes[0]), norm], shapes[0])
    importer.reshape(node, x.shape)


def mean_variance(importer: Importer, node: ir.Node) -> None:
    """MeanVarianceNormalization: less the mean, over the standard deviation plus 1e-9."""
    x = importer.array(node, 0)
    rank = len(x.shape)
    axes = [a % rank for a in importer.ints(node, "axes") or [0, 2, 3]]
    order = [*(i for i in range(rank) if i not in axes), *axes]
    tables = counting(x.shape)
    moved = importer.take(node, x, [tables[i] for i in order])
    outer, count = prod(x.shape[i] for i in range(rank) if i not in axes), prod(x.shape[i] for i in axes)
    matrix, wide = moved.seen((outer, count)), ((outer, count), (outer, 1))
    mean = importer.dense_step(node, Reduce("avg", outer, count, 1), [matrix], (outer, 1))
    less = importer.dense_step(node, Elementwise("sub", wide), [matrix, mean], (outer, count))
    square = importer.emit(node, Unary(Function("square"), (outer, count)), [less], (outer, count))
    variance = importer.dense_step(node, Reduce("avg", outer, count, 1), [square], (outer, 1))
    deviation = importer.emit(node, Unary(Function("sqrt"), (outer, 1)), [variance], (outer, 1))
    tiny = importer.brought(node.outputs[0].name or "", np.full(1, 1e-9, np.float32))
    deviation = importer.dense_step(node, Elementwise("add", ((outer, 1), (1,))), [deviation, tiny], (outer, 1))
    done = importer.dense_step(node, Elementwise("div", wide), [less, deviation], (outer, count)).seen(moved.shape)
    back = counting(moved.shape)
    importer.take(node, done, [back[order.index(i)] for i in range(rank)])


HANDLERS: dict[str, Handler] = {
    "Gemm": gemm,
    "MatMul": matmul,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "LayerNormalization": partial(layer_norm, centred=True),
    "RMSNormalization": partial(layer_norm, centred=False),
    "InstanceNormalization": group_norm,
    "GroupNormalization": group_norm,
    "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance,
}
