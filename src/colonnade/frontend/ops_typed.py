"""Casts, and arithmetic on numbers that float32 does not hold: whole ones, and float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import TYPES, Unsupported, counting
from colonnade.frontend.draft import Value
from colonnade.frontend.importer import Handler, Importer
from colonnade.workload import (
    Activation,
    Cast,
    Function,
    TypedElementwise,
    TypedMatMul,
    TypedReduce,
    Unary,
)
from colonnade.workload.small import FLOATS, INTEGERS, POWERS
from colonnade.workload.typed import F32, WIDE

Then = Callable[[Importer, ir.Node, str], Value]  # (importer, node, type to compute in) → the result


def cast(importer: Importer, node: ir.Node) -> None:
    """Cast, CastLike: to float64 and long whole numbers another array, else what float32 has too much rounded away."""
    like = importer.type_of(node, 1) if node.op_type == "CastLike" else ""
    target = TYPES.get(ir.DataType(node.attributes["to"].as_int()), "") if "to" in node.attributes else like
    source = importer.type_of(node)
    if not target or not source:
        raise Unsupported("between strings or complex numbers and others is not supported; only numbers and truths")
    x, name = importer.raw(node, 0), node.outputs[0].name or ""
    if target in WIDE:
        importer.set(node, importer.converted(importer.dense(importer.ordinary(x, name)), target, name))
    elif isinstance(x, Value) and x.dtype != F32:
        direct = "int8" if target in SHORTEST else target  # whose lowest bits are those of the number
        if direct in CUT:
            importer.dense_step(node, Cast("within", x.shape, x.dtype, direct), [x], x.shape)
        else:
            importer.set(node, importer.converted(x, F32, name))
        if target not in (*CUT, F32):
            y = importer.result(node)
            importer.emit(node, Unary(rounding(node, target), y.placed_shape), [y], y.placed_shape, y.shape)
    elif target == F32 or source in (target, "bool") or _holds(target, source):
        importer.set(node, x)
    else:
        importer.activation(node, Activation(function=rounding(node, target)))


CUT = ("bool", "float16", "int8", "uint8", "int16", "uint16")  # to which the arena's types have casts of their own
SHORTEST = ("int4", "uint4", "int2", "uint2")


def rounding(node: ir.Node, target: str) -> Function:
    """To numbers of a type that float32 holds."""
    saturate = float(node.attributes.get_int("saturate", 1))
    if target == "float16":
        return Function("half")
    if target == POWERS:
        mode = node.attributes.get_string("round_mode", "up")
        return Function(f"to_{target}", saturate, {"up": 0.0, "down": 1.0, "nearest": 2.0}[mode])
    return Function(f"to_{target}", saturate if target in FLOATS and target != "bfloat16" else 0.0)


def _holds(target: str, source: str) -> bool:
    """Does every number of one short whole type fit the other, or float16?"""
    if source not in INTEGERS:
        return False
    bits, signed = INTEGERS[source], not source.startswith("u")
    if target == "float16":
        return bits <= 8
    if target not in INTEGERS:
        return False
    room, minus = INTEGERS[target], not target.startswith("u")
    return (minus and room >= bits + (not signed)) if minus or signed else room >= bits


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _in_type(importer: Importer, node: ir.Node, then: Then, primary: int = 0) -> None:
    """Compute in the type of an input: short whole numbers in int32, of whose result the low bits count."""
    kind = importer.type_of(node, primary)
    if kind not in INTEGERS:
        then(importer, node, kind)
        return
    y = then(importer, node, "int32")
    if y.dtype != F32:
        importer.dense_step(node, Cast("within", y.shape, "int32", kind), [y], y.shape)


def _step(importer: Importer, node: ir.Node, kind: str, dtype: str, operands: list[Value]) -> Value:
    work = TypedElementwise(kind, dtype, tuple(x.shape for x in operands))
    return importer.dense_step(node, work, operands, work.shape, dtype=work.result)


def _elementwise(importer: Importer, node: ir.Node, dtype: str, kind: str) -> Value:
    total = importer.typed(node, 0, dtype)
    if len(node.inputs) == 1:
        return _step(importer, node, kind, dtype, [total]) if kind in ALONE else _same(importer, node, total)
    for index in range(1, len(node.inputs)):
        total = _step(importer, node, kind, dtype, [total, importer.typed(node, index, dtype)])
    return total


def _same(importer: Importer, node: ir.Node, x: Value) -> Value:
    importer.set(node, x)
    return x


def _mean(importer: Importer, node: ir.Node, dtype: str) -> Value:
    total = _elementwise(importer, node, dtype, "add")
    count = importer.brought(node.outputs[0].name or "", np.full(1, len(node.inputs), dtype), dtype)
    return _step(importer, node, "div", dtype, [total, count])


def _where(importer: Importer, node: ir.Node, dtype: str) -> Value:
    condition = importer.dense(importer.array(node, 0))
    return _step(importer, node, "where", dtype, [condition, *(importer.typed(node, i, dtype) for i in (1, 2))])


def _pow(importer: Importer, node: ir.Node, dtype: str) -> Value:
    """Whole numbers to the power of floats: in float64."""
    if importer.type_of(node, 1) not in ("float16", F32, "float64") or dtype == "float64":
        return _elementwise(importer, node, dtype, "pow")
    y = _elementwise(importer, node, "float64", "pow")
    return _same(importer, node, importer.converted(y, dtype, node.outputs[0].name or ""))


def _mod(importer: Importer, node: ir.Node, dtype: str) -> Value:
    return _elementwise(importer, node, dtype, "fmod" if node.attributes.get_int("fmod", 0) else "mod")


def _clip(importer: Importer, node: ir.Node, dtype: str) -> Value:
    x = importer.typed(node, 0, dtype)
    for index, kind in ((1, "max"), (2, "min")):
        if importer.has(node, index):
            x = _step(importer, node, kind, dtype, [x, importer.typed(node, index, dtype)])
    return _same(importer, node, x)


def _relu(importer: Importer, node: ir.Node, dtype: str) -> Value:
    zero = importer.brought(node.outputs[0].name or "", np.zeros(1, dtype), dtype)
    return _step(importer, node, "max", dtype, [importer.typed(node, 0, dtype), zero])


def _reduce(importer: Importer, node: ir.Node, dtype: str, kind: str) -> Value:
    x = importer.typed(node, 0, dtype)
    rank = len(x.shape)
    given = importer.ints(node, "axes", 1)
    if kind in ("l2", "logsum", "logsumexp") and dtype != "float64":
        raise Unsupported(f"of {importer.type_of(node)} is not supported; cast to float before it")
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        if kind not in ("avg", "sum", "max", "min", "prod"):
            raise Unsupported("without axes (noop_with_empty_axes) is not supported; remove it")
        return x
    axes = sorted(a % rank for a in given or range(rank))
    keep, others = node.attributes.get_int("keepdims", 1), [i for i in range(rank) if i not in axes]
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes)
    if others + axes != list(range(rank)):
        tables = counting(x.shape)
        x = importer.take(node, x, [tables[i] for i in (*others, *axes)])
    outer = prod(x.shape[: len(others)])
    work = TypedReduce(kind, dtype, outer, prod(x.shape) // outer, 1)
    return importer.dense_step(node, work, [x], shape, dtype=dtype)


def _matmul(importer: Importer, node: ir.Node, dtype: str) -> Value:
    return _product(importer, node, dtype, importer.typed(node, 0, dtype), importer.typed(node, 1, dtype))


def _product(importer: Importer, node: ir.Node, dtype: str, a: Value, b: Value) -> Value:
    left, right = len(a.shape) == 1, len(b.shape) == 1
    a = a.seen((1, *a.shape)) if left else a
    b = b.seen((*b.shape, 1)) if right else b
    if a.shape[-1] != b.shape[-2]:
        raise Unsupported(f"shapes {list(a.shape)} and {list(b.shape)} do not fit together")
    work = TypedMatMul(dtype, a.shape[:-2], b.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1])
    shape = (*work.batch, *(() if left else (work.rows,)), *(() if right else (work.columns,)))
    return importer.dense_step(node, work, [a, b], shape, dtype=dtype)


def _gemm(importer: Importer, node: ir.Node, dtype: str) -> Value:
    operands = []
    for index, flag in enumerate(("transA", "transB")):
        x = importer.typed(node, index, dtype)
        turned = node.attributes.get_int(flag, 0)
        operands.append(importer.take(node, x, counting(x.shape)[::-1]) if turned else x)
    y = _scaled(importer, node, dtype, _product(importer, node, dtype, *operands), "alpha")
    if importer.has(node, 2):
        addend = _scaled(importer, node, dtype, importer.typed(node, 2, dtype), "beta")
        y = _step(importer, node, "add", dtype, [y, addend])
    return y


def _scaled(importer: Importer, node: ir.Node, dtype: str, x: Value, attribute: str) -> Value:
    factor = node.attributes.get_float(attribute, 1.0)
    if factor == 1.0:
        return x
    if dtype != "float64" and factor != int(factor):
        raise Unsupported(f"{attribute} {factor} of whole numbers is not supported; cast to float before it")
    number = importer.brought(node.outputs[0].name or "", np.full(1, factor).astype(dtype), dtype)
    return _step(importer, node, "mul", dtype, [x, number])


def _softmax(importer: Importer, node: ir.Node, dtype: str) -> Value:
    if dtype != "float64":
        raise Unsupported(f"of {importer.type_of(node)} is not supported; cast to float before it")
    x = importer.typed(node, 0, dtype)
    rank = len(x.shape)
    old = importer.graph.opset_imports.get("", 13) < 13
    axis = node.attributes.get_int("axis", 1 if old else -1) % rank
    last = rank if old else axis + 1
    outer, count, inner = prod(x.shape[:axis]), prod(x.shape[axis:last]), prod(x.shape[last:])
    wide, ends = x.seen((outer, count, inner)), (outer, 1, inner)
    top = importer.dense_step(node, TypedReduce("max", dtype, outer, count, inner), [wide], ends, dtype=dtype)
    power = _step(importer, node, "exp", dtype, [_step(importer, node, "sub", dtype, [wide, top])])
    total = importer.dense_step(node, TypedReduce("sum", dtype, outer, count, inner), [power], ends, dtype=dtype)
    return _same(importer, node, _step(importer, node, "div", dtype, [power, total]).seen(x.shape))


def _typed(then: Callable[..., Value], primary: int = 0, **fixed: str) -> Handler:
    return partial(_in_type, then=partial(then, **fixed), primary=primary)


def _of(kind: str) -> Handler:
    return _typed(_elementwise, kind=kind)


ALONE = {"abs", "neg", "sign", "ceil", "cos", "erf", "exp", "floor", "log", "reciprocal", "round", "sigmoid", "sin",
         "sqrt", "tanh"}  # fmt: skip
CASTS: dict[str, Handler] = {"Cast": cast, "CastLike": cast}
HANDLERS: dict[str, Handler] = {
    **{name: _of(name.lower()) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    **{name: _of(name.lower()) for name in ("Abs", "Neg", "Sign", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log")},
    **{name: _of(name.lower()) for name in ("Reciprocal", "Round", "Sigmoid", "Sin", "Sqrt", "Tanh")},
    "Sum": _of("add"),
    "Pow": _typed(_pow),
    "Mean": _typed(_mean),
    "PRelu": _of("prelu"),
    "Mod": _typed(_mod),
    "Clip": _typed(_clip),
    "Relu": _typed(_relu),
    "Where": _typed(_where, primary=1),
    "Equal": _of("equal"),
    "Less": _of("less"),
    "LessOrEqual": _of("less_equal"),
    "Greater": _of("greater"),
    "GreaterOrEqual": _of("greater_equal"),
    "ReduceMean": _typed(_reduce, kind="avg"),
    "ReduceSum": _typed(_reduce, kind="sum"),
    "ReduceMax": _typed(_reduce, kind="max"),
    "ReduceMin": _typed(_reduce, kind="min"),
    "ReduceProd": _typed(_reduce, kind="prod"),
    "ReduceL1": _typed(_reduce, kind="l1"),
    "ReduceL2": _typed(_reduce, kind="l2"),
    "ReduceSumSquare": _typed(_reduce, kind="sumsq"),
    "ReduceLogSum": _typed(_reduce, kind="logsum"),
    "ReduceLogSumExp": _typed(_reduce, kind="logsumexp"),
    "MatMul": _typed(_matmul),
    "Gemm": _typed(_gemm),
    "Softmax": _typed(_softmax),
}
