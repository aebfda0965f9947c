"""Functions that exporters write as several nodes, found again in the graph: one node in their place.

A pattern is a function of a node, the last of its group; it answers the name of the function and the value that it is
computed from, or None. What is left of the group goes away when nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isclose, sqrt

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

Match = tuple[str, ir.Value, dict[str, object]]
Pattern = Callable[[ir.Node], Match | None]


def number(value: ir.Value | None) -> float | None:
    """The one number of a constant, or None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(np.asarray(value.const_value.numpy(), np.float64).reshape(-1)[0])


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of type ``kind`` that computes the value for a single reader, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != kind or value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def sides(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of a node of two operands."""
    a, b = node.inputs[0], node.inputs[1]
    if a is not None and b is not None:
        yield a, b
        yield b, a


def scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
    """x of ``factor * x`` or ``x / (1 / factor)``, or None."""
    if (node := made_by(value, "Mul")) is not None:
        for x, c in sides(node):
            if (n := number(c)) is not None and isclose(n, factor, rel_tol=1e-4):
                return x
    if (node := made_by(value, "Div")) is not None:
        n = number(node.inputs[1])
        if n is not None and isclose(n, 1 / factor, rel_tol=1e-4):
            return node.inputs[0]
    return None


def plus(value: ir.Value | None, addend: float) -> ir.Value | None:
    """x of ``x + addend``, or None."""
    if (node := made_by(value, "Add")) is not None:
        for x, c in sides(node):
            if (n := number(c)) is not None and isclose(n, addend, rel_tol=1e-4):
                return x
    return None


def silu(node: ir.Node) -> Match | None:
    """x * sigmoid(x)."""
    if node.op_type == "Mul":
        for x, gate in sides(node):
            inner = made_by(gate, "Sigmoid")
            if inner is not None and inner.inputs[0] is x:
                return "Swish", x, {}
    return None


def hard_swish(node: ir.Node) -> Match | None:
    """x * hard_sigmoid(x) with slope 1/6, or x * clip(x + 3, 0, 6) / 6 in any order of the last two."""
    if node.op_type == "Mul":
        for x, gate in sides(node):
            inner = made_by(gate, "HardSigmoid")
            if inner is not None and inner.inputs[0] is x:
                alpha, beta = inner.attributes.get_float("alpha", 0.2), inner.attributes.get_float("beta", 0.5)
                if isclose(alpha, 1 / 6, rel_tol=1e-4) and isclose(beta, 0.5, rel_tol=1e-4):
                    return "HardSwish", x, {}
            if (gated := scaled(gate, 1 / 6)) is not None and _relu6_of(gated, x):
                return "HardSwish", x, {}
    whole = scaled(node.outputs[0], 1 / 6) if node.op_type in ("Mul", "Div") else None
    if node.op_type in ("Mul", "Div") and whole is None:
        constant = number(node.inputs[1])
        wanted = 6.0 if node.op_type == "Div" else 1 / 6
        product = made_by(node.inputs[0], "Mul")
        if constant is not None and product is not None and isclose(constant, wanted, rel_tol=1e-4):
            for x, gate in sides(product):
                if _relu6_of(gate, x):
                    return "HardSwish", x, {}
    return None


def hard_sigmoid(node: ir.Node) -> Match | None:
    """clip(x + 3, 0, 6) / 6."""
    inner = None
    if node.op_type == "Mul":
        inner = next(
            (v for v, c in sides(node) if (n := number(c)) is not None and isclose(n, 1 / 6, rel_tol=1e-4)), None
        )
    elif node.op_type == "Div" and (n := number(node.inputs[1])) is not None and isclose(n, 6.0, rel_tol=1e-4):
        inner = node.inputs[0]
    clip = made_by(inner, "Clip")
    if clip is not None and len(clip.inputs) > 2 and number(clip.inputs[1]) == 0 and number(clip.inputs[2]) == 6:
        x = plus(clip.inputs[0], 3.0)
        if x is not None:
            return "HardSigmoid", x, {"alpha": 1 / 6, "beta": 0.5}
    return None


def _relu6_of(value: ir.Value, x: ir.Value) -> bool:
    clip = made_by(value, "Clip")
    if clip is None or len(clip.inputs) < 3 or number(clip.inputs[1]) != 0 or number(clip.inputs[2]) != 6:
        return False
    return plus(clip.inputs[0], 3.0) is x


def mish(node: ir.Node) -> Match | None:
    """x * tanh(softplus(x))."""
    if node.op_type == "Mul":
        for x, gate in sides(node):
            inner = made_by(gate, "Tanh")
            soft = made_by(inner.inputs[0], "Softplus") if inner is not None else None
            if soft is not None and soft.inputs[0] is x:
                return "Mish", x, {}
    return None


def gelu(node: ir.Node) -> Match | None:
    """0.5 * x * (1 + erf(x / sqrt(2))), multiplied in any order."""
    if node.op_type != "Mul":
        return None
    for a, b in sides(node):
        x = _gelu_gate(b)  # (0.5 * x) * gate
        if x is not None and scaled(a, 0.5) is x:
            return "Gelu", x, {}
        if (n := number(a)) is not None and isclose(n, 0.5, rel_tol=1e-4):  # 0.5 * (x * gate)
            product = made_by(b, "Mul")
            for p, q in sides(product) if product is not None else ():
                if _gelu_gate(q) is p:
                    return "Gelu", p, {}
        half = scaled(b, 0.5)  # x * (0.5 * gate)
        if half is not None and _gelu_gate(half) is a:
            return "Gelu", a, {}
    return None


def _gelu_gate(value: ir.Value | None) -> ir.Value | None:
    """x of 1 + erf(x / sqrt(2)), or None."""
    erf = made_by(plus(value, 1.0), "Erf")
    return scaled(erf.inputs[0], 1 / sqrt(2)) if erf is not None else None


def layer_norm(node: ir.Node) -> Match | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * scale + shift over the last axis, as one node."""
    if node.op_type != "Add":
        return None
    for product, shift in sides(node):
        mul = made_by(product, "Mul")
        if shift.const_value is None or mul is None:
            continue
        for normal, scale in sides(mul):
            found = _normalised(normal)
            if found is None or scale.const_value is None:
                continue
            x, epsilon = found
            width = x.shape[-1] if x.shape is not None and len(x.shape) else None
            ends = list(scale.const_value.shape)[-1:] == [width]
            if scale.const_value.size == shift.const_value.size == width and ends:
                return "LayerNormalization", x, {"axis": -1, "epsilon": epsilon, "scale": scale, "shift": shift}
    return None


def _normalised(value: ir.Value) -> tuple[ir.Value, float] | None:
    div = made_by(value, "Div")
    less = div.inputs[0].producer() if div is not None and div.inputs[0] is not None else None
    root = made_by(div.inputs[1], "Sqrt") if div is not None else None
    total = made_by(root.inputs[0], "Add") if root is not None else None
    if less is None or less.op_type != "Sub" or total is None:
        return None
    x, mean = less.inputs[0], made_by(less.inputs[1], "ReduceMean")
    if x is None or mean is None or mean.inputs[0] is not x or not _last_axis(mean):
        return None
    for variance, constant in sides(total):
        epsilon, around = number(constant), made_by(variance, "ReduceMean")
        if epsilon is None or around is None or not _last_axis(around):
            continue
        square = around.inputs[0].producer() if around.inputs[0] is not None else None
        if square is None or square.inputs[0] is not less.outputs[0]:
            continue
        if (square.op_type == "Pow" and number(square.inputs[1]) == 2) or (
            square.op_type == "Mul" and square.inputs[1] is less.outputs[0]
        ):
            return x, epsilon
    return None


def _last_axis(node: ir.Node) -> bool:
    """Does this reduction keep its dimensions and run over the last axis alone?"""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes: list[int] | None = None
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    elif given is not None and given.const_value is not None:
        axes = [int(a) for a in given.const_value.numpy().reshape(-1)]
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    rank = len(shape) if shape is not None else 0
    keeps = bool(node.attributes.get_int("keepdims", 1)) and rank > 0
    return keeps and axes is not None and [a % rank for a in axes] == [rank - 1]


PATTERNS: tuple[Pattern, ...] = (silu, hard_swish, hard_sigmoid, mish, gelu, layer_norm)


def recognise(model: ir.Model) -> None:
    """Replace every group that is one function. Changes ``model``."""
    for node in list(model.graph):
        for pattern in PATTERNS:
            match = pattern(node)
            if match is None:
                continue
            kind, x, extra = match
            constants = [extra.pop(key) for key in ("scale", "shift") if key in extra]
            attributes = [_attribute(name, value) for name, value in extra.items()]
            old = node.outputs[0]
            new = ir.Value(name=old.name, shape=old.shape, type=old.type)
            made = ir.Node("", kind, [x, *constants], attributes, outputs=[new], name=node.name)  # type: ignore[list-item]
            model.graph.insert_before(node, made)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            break
    common.RemoveUnusedNodesPass()(model)


def _attribute(name: str, value: object) -> ir.Attr:
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrFloat32(name, float(str(value)))
