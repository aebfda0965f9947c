"""Attention of opset 23 as the products that older exporters write: what the importer keeps in planes.

Only what networks have: no past, no soft cap, as many heads of keys as of queries. For the rest ONNX's own definition
(``expand.py``) serves.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir

from colonnade.frontend.written import Nodes, known_shape

PLAIN = {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softmax_precision", "qk_matmul_output_mode"}
LOWEST = float(np.finfo(np.float32).min)


def written_out(node: ir.Node, graph: ir.Graph) -> bool:
    """Attention: its two products and the softmax between them; with past or soft cap as ONNX defines it.

    False where it is more than the plain one, or its shapes are not known. A query all of whose keys are masked (by
    False or -inf) has zeros for an answer.
    """
    sizes = _sizes(node)
    if sizes is None:
        return False
    batch, heads, queries, keys, width, depth = sizes
    q, k, v = (cast(ir.Value, value) for value in node.inputs[:3])
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    flat = len(known_shape(q)) == 3
    nodes = Nodes(node, graph)
    op = nodes.op

    def apart(x: ir.Value, tokens: int, part: int) -> ir.Value:
        if not flat:
            return x
        return op("Transpose", op("Reshape", x, np.array([batch, tokens, heads, part])), perm=[0, 2, 1, 3])

    scale = node.attributes.get_float("scale", 0.0) or width**-0.5
    scores = op(
        "MatMul",
        op("Mul", apart(q, queries, width), np.array(scale, np.float32)),
        op("Transpose", apart(k, keys, width), perm=[0, 1, 3, 2]),
    )
    some = None  # 1 where a query has a key left
    if mask is not None:
        mask = _unexpanded(mask)
        if mask.dtype == ir.DataType.BOOL:
            some = op("ReduceMax", op("Cast", mask, to=1), np.array([-1]), keepdims=1)
            bias = op("Where", mask, np.zeros(1, np.float32), np.full(1, LOWEST, np.float32))
        else:
            most = op("ReduceMax", mask, np.array([-1]), keepdims=1)
            some = op("Cast", op("Greater", most, np.full(1, -np.inf, np.float32)), to=1)
            bias = op("Max", mask, np.full(1, LOWEST, np.float32))
        scores = op("Add", scores, bias)
    elif node.attributes.get_int("is_causal", 0):
        scores = op("Add", scores, np.triu(np.full((queries, keys), LOWEST, np.float32), 1))
    y = op("MatMul", op("Softmax", scores, axis=-1), apart(v, keys, depth))
    if some is not None:
        y = op("Mul", y, some)
    if flat:
        y = op("Reshape", op("Transpose", y, perm=[0, 2, 1, 3]), np.array([batch, queries, heads * depth]))
    nodes.done(y)
    return True


def _sizes(node: ir.Node) -> tuple[int, int, int, int, int, int] | None:
    """(batch, heads, queries, keys, width of a key, width of a value) of a plain one, or None."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    more = [value for value in inputs[4:] if value is not None] + [v for v in node.outputs[1:] if v.name]
    strange = {*node.attributes} - PLAIN
    if strange == {"softcap"} and not node.attributes["softcap"].as_float():
        strange = set()
    if more or strange or node.attributes.get_int("softmax_precision", 1) != 1:
        return None
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in inputs[:3]):
        return None
    shapes = [known_shape(value) for value in inputs[:3]]
    if {len(shape) for shape in shapes} == {3}:
        heads = [node.attributes.get_int(f"{kind}_num_heads", 0) for kind in ("q", "kv", "kv")]
        if 0 in heads or any(shape[2] % h for shape, h in zip(shapes, heads, strict=True)):
            return None
        shapes = [(s[0], h, s[1], s[2] // h) for s, h in zip(shapes, heads, strict=True)]
    if {len(shape) for shape in shapes} != {4}:
        return None
    q, k, v = shapes
    if q[:2] != k[:2] or q[:2] != v[:2] or k[2] != v[2] or q[3] != k[3]:
        return None
    return (q[0], q[1], q[2], k[2], q[3], v[3]) if _plain_mask(node, inputs[3], k[2]) else None


def _plain_mask(node: ir.Node, mask: ir.Value | None, keys: int) -> bool:
    """None, or one for every key, and alone: together with ``is_causal`` it may leave a query no key."""
    if mask is None:
        return True
    shape = known_shape(mask)
    fits = len(shape) >= 2 and shape[-1] == keys and mask.dtype in (ir.DataType.FLOAT, ir.DataType.BOOL)
    return fits and not node.attributes.get_int("is_causal", 0)


def _unexpanded(mask: ir.Value) -> ir.Value:
    """The mask that was expanded to this one, if its keys are all there: adding broadcasts."""
    node = mask.producer()
    if node is None or node.op_type != "Expand" or node.inputs[0] is None:
        return mask
    narrow, wide = known_shape(node.inputs[0]), known_shape(mask)
    return node.inputs[0] if len(narrow) == len(wide) and narrow[-1] == wide[-1] else mask
