"""Operators that can be written as others, replaced by these: by ONNX's own definitions (RotaryEmbedding, AffineGrid,
losses, …), and by ours.

Only operators without a handler of their own are, and only where everything in their definition can be imported or
folded: the others keep their name, so that what is refused is what the model's author wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from colonnade.frontend import attention, einsum
from colonnade.frontend.written import (
    gather_elements,
    gather_nd,
    index_of_extreme,
    infer_shapes,
    known_shape,
)
from colonnade.onnx_winograd import DOMAIN

FOLDED = {"Constant", "ConstantOfShape", "Range", "Shape", "Size"}  # by the importer, from sizes and constants
# our own, for what ONNX has no definition, or none that is quick
OURS = {
    "ArgMax": index_of_extreme,
    "ArgMin": index_of_extreme,
    "Attention": attention.written_out,
    "Einsum": einsum.written_out,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
}
DEPTH = 4  # definitions that use definitions


def expand(model: ir.Model, known: Collection[str], fold: Callable[[ir.Model], object]) -> None:
    """Replace every node that is not in ``known`` and has a definition in terms of what is. Changes ``model``.

    The model's inputs have fixed shapes; ``fold`` infers those that follow, on which definitions may depend.
    """
    for _ in range(DEPTH):
        nodes = [node for node in model.graph if node.domain in ("", "ai.onnx") and node.op_type not in known]
        if not any(node.op_type in OURS or _schema(node.op_type, model) for node in nodes):
            return
        fold(model)
        nodes = [node for node in nodes if node.graph is model.graph]
        if any(node.op_type in OURS and node.inputs and not known_shape(node.inputs[0]) for node in nodes):
            infer_shapes(model)
        for count, node in enumerate(nodes):
            if node.op_type in OURS and OURS[node.op_type](node, model.graph):
                continue
            body = _definition(node, model)
            if body is None or not _importable(body, known, model):
                continue
            for index, value in enumerate(node.outputs):
                value.name = value.name or f"{node.outputs[0].name}.unused{index}"
            node.overload = body.overload = f"{node.op_type}.{count}"
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function
        common.InlinePass(foreign)(model)


def foreign(function: ir.Function) -> bool:
    """Is it not one of this project's own, which have handlers?"""
    return function.domain != DOMAIN


def _schema(kind: str, model: ir.Model) -> Any:
    """Of an operator that has a definition; onnx's stubs do not know what there is of it."""
    try:
        schema: Any = onnx.defs.get_schema(kind, model.opset_imports.get("", 18))
    except onnx.defs.SchemaError:
        return None
    return schema if schema.has_function or schema.has_context_dependent_function else None


def _definition(node: ir.Node, model: ir.Model) -> onnx.FunctionProto | None:
    """What a node stands for; None where ONNX does not say it, or not for such inputs."""
    schema = _schema(node.op_type, model)
    if schema is None:
        return None
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)
    version = model.opset_imports.get("", 18)
    body = onnx.FunctionProto()
    if schema.has_function:
        body.ParseFromString(schema.get_function_with_opset_version(version))
    else:
        types = [_type(value).SerializeToString() for value in node.inputs]
        text = ir.to_proto(node).SerializeToString()
        body.ParseFromString(schema.get_context_dependent_function_with_opset_version(version, text, types))
    if not body.node:
        return None
    made = {name for inner in body.node for name in inner.output}
    del body.output[len(node.outputs) :]
    for name in body.output:
        if name not in made:  # an output that this node does not have
            body.node.append(onnx.helper.make_node("Identity", [body.node[0].output[0]], [name]))
    for opset in body.opset_import:  # asked for in the model's version, whatever it was written for
        opset.version = model.opset_imports.get(opset.domain, opset.version)
    return body


def _type(value: ir.Value | None) -> onnx.TypeProto:
    return ir.to_proto(value).type if value is not None and value.type is not None else onnx.TypeProto()


def _importable(body: onnx.FunctionProto, known: Collection[str], model: ir.Model) -> bool:
    """Is every operator of a definition known, folded, or defined by others in turn?"""
    kinds = {node.op_type for node in body.node} - {*known, *FOLDED, *OURS}
    return all(_schema(kind, model) is not None for kind in kinds)
