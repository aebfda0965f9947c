"""ONNX made plain: fixed shapes, folded constants, BatchNorm and Pad inside convolutions.

onnx-ir and onnxscript do the work. Of onnxscript's default rules those are used that an inference graph of
convolutions can meet. Its rule for ``auto_pad`` is left out (it does not look at dilations); the importer reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassError, PassManager, Sequential, common
from onnxscript.optimizer import _constant_folding as folding
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    _basic_rules,
    _fuse_batchnorm,
    _fuse_pad_into_conv,
    _min_max_to_clip,
    _no_op,
)

from colonnade.errors import UserError
from colonnade.frontend.expand import FOLDED, expand, foreign
from colonnade.frontend.patterns import recognise
from colonnade.frontend.rebatch import rebatch
from colonnade.frontend.transposes import sink
from colonnade.frontend.written import Nodes, computable, infer_shapes, known_shape, quiet

RULES = (
    *_no_op.rules,
    *_min_max_to_clip.rules,
    _basic_rules.no_op_cast_rule,
    _basic_rules.no_op_expand_rule,
    _basic_rules.no_op_transpose_rule,
    _basic_rules.transpose_transpose_rule,
    _fuse_batchnorm.fuse_batchnorm_into_conv_rule,
    _fuse_batchnorm.fuse_batchnorm_into_gemm_rule,
)
PADS = _fuse_pad_into_conv.fuse_pad_into_conv_rule
CUT = "colonnade.cut"  # in a cleaned model's properties: the operators behind the outputs that it was cut at
FOLD_LIMIT = 1 << 28  # elements: weights may be computed (transposed, cast, dequantised) from constants


def read(model: str | Path | ir.Model | Any) -> ir.Model:
    """A model of our own to change: from a file, an ``onnx_ir.Model`` or an ``onnx.ModelProto``."""
    if isinstance(model, ir.Model):
        ours = model.clone()
        _one_domain(ours)
        return ours
    if isinstance(model, (str, Path)):
        from colonnade.onnx_io import load_onnx

        model = load_onnx(Path(model))
    try:
        ours = ir.from_proto(model)
    except ir.serde.SerdeError as error:
        raise UserError(f"the model cannot be read: {error.__cause__ or error}; check it with onnx.checker") from error
    _one_domain(ours)
    return ours


def _one_domain(model: ir.Model) -> None:
    """ONNX's own operators may call their domain "ai.onnx"; here it is the empty one."""
    if (version := model.opset_imports.pop("ai.onnx", None)) is not None:
        model.opset_imports.setdefault("", version)
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            if node.domain == "ai.onnx":
                node.domain = ""


@quiet("onnxscript.optimizer._constant_folding")
def clean(
    model: ir.Model,
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    outputs: Sequence[str] | None = None,
    known: Collection[str] = (),
) -> ir.Model:
    """Fix all shapes, cut at ``outputs``, fold what can be folded. Changes ``model`` and returns it.

    Operators that are not in ``known`` are replaced by what ONNX defines them by, where it does.

    Raises:
        UserError: an input or output name is not in the model, or a size stays free.
    """
    common.RemoveInitializersFromInputsPass()(model)
    try:
        common.InlinePass(foreign)(model)
    except (PassError, ValueError) as error:  # functions that call each other, or are written for another opset
        raise UserError(f"the model's functions cannot be written out: {error.__cause__ or error}") from error
    if outputs:
        _cut(model, outputs)
    _fix_shapes(model, batch, dict(input_shapes or {}))
    try:
        names = [value.name for value in model.graph.outputs]
        _casts_like(model)
        _old_pads(model)
        _old_broadcasts(model)
        fold = folding.FoldConstantsPass(
            shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT,
            should_fold=lambda node: None if computable(node, model.opset_imports.get("", 18)) else False,
        )  # fmt: skip
        expand(model, known, fold)
        PassManager(
            [
                fold,
                RewritePass(_rules(model)),
                common.RemoveUnusedNodesPass(),
            ],
            steps=3,
        )(model)
        Sequential(
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.TopologicalSortPass(),
        )(model)
        recognise(model)
        if sink(model):
            Sequential(RewritePass(_rules(model)), common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(
                model
            )  # what was turned already may stand further behind
            recognise(model)
        _name_outputs(model.graph, names)
    except Exception as error:  # the passes raise many types on graphs that are not valid ONNX
        strange = sorted({node.op_type for node in model.graph} - {*known, *FOLDED})
        if known and strange:
            raise UserError(
                f"{', '.join(strange)}: operator not supported; cut the model before it with --outputs"
            ) from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"the model cannot be simplified: {cause}; check it with onnx.checker".replace("\n", " ")
        ) from error
    return model


def _rules(model: ir.Model) -> tuple[Any, ...]:
    return RULES if model.graph.opset_imports.get("", 18) < 11 else (*RULES, PADS)


def _casts_like(model: ir.Model) -> None:
    """CastLike with attributes → Cast with the same ones, which constant folding would drop on that way."""
    nodes = [node for node in model.graph if node.op_type == "CastLike" and node.attributes]
    if nodes:
        infer_shapes(model)
    for node in nodes:
        like = node.inputs[1]
        if like is None or like.dtype is None:
            continue
        old, to = node.outputs[0], ir.AttrInt64("to", like.dtype.value)
        new = ir.Value(name=old.name, shape=old.shape, type=ir.TensorType(like.dtype))
        made = ir.Node("", "Cast", [node.inputs[0]], [*node.attributes.values(), to], outputs=[new], name=node.name)
        model.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _old_pads(model: ir.Model) -> None:
    """No padding, said as the rules below know it; Pad of opsets before 11 → into the convolution behind it."""
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose") and node.attributes.get_string("auto_pad", "") == "VALID":
            for name in ("auto_pad", "pads"):
                node.attributes.pop(name, None)
    if model.graph.opset_imports.get("", 18) >= 11:
        return
    for node in [node for node in model.graph if node.op_type == "Pad"]:
        uses = list(node.outputs[0].uses())
        pads = [int(p) for p in node.attributes["pads"].as_ints()] if "pads" in node.attributes else []
        zeros = node.attributes.get_string("mode", "constant") == "constant" and not node.attributes.get_float(
            "value", 0
        )
        half = len(pads) // 2
        edges = [*pads[:2], *pads[half : half + 2]]
        if len(uses) != 1 or not pads or not zeros or any(edges) or min(pads) < 0 or node.outputs[0].is_graph_output():
            continue
        conv = uses[0].node
        if conv.op_type != "Conv" or uses[0].idx != 0 or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            continue
        more = [*pads[2:half], *pads[half + 2 :]]
        own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * len(more)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, more, strict=True)])
        conv.replace_input_with(0, node.inputs[0])
        model.graph.remove(node, safe=True)


def _old_broadcasts(model: ir.Model) -> None:
    """Operators of two inputs before opset 7, where an attribute says which axis the second one's first is, with a
    second input of as many axes as behind that one."""
    graph, version = model.graph, model.opset_imports.get("", 18)
    nodes = [node for node in graph if len(node.inputs) == 2 and {"broadcast", "axis"} <= node.attributes.keys()]
    if version >= 7 or not nodes:
        return
    infer_shapes(model)
    for node in nodes:
        first, second = node.inputs
        sizes, own = known_shape(first), known_shape(second)
        if first is None or second is None or not sizes:
            name = node.outputs[0].name
            raise UserError(f"{node.op_type} {name!r}: of opset {version}, sizes unknown: export it with a newer opset")
        behind = len(sizes) - node.attributes.get_int("axis", 0) % len(sizes) - len(own)
        new = Nodes(node, graph)
        aligned = new.op("Reshape", second, np.array([*own, *[1] * behind]))
        new.done(new.op(node.op_type, first, aligned))


def _name_outputs(graph: ir.Graph, names: Sequence[str | None]) -> None:
    """Every output under its name: where some are the same value, the passes leave it one of their names."""
    for index, (value, name) in enumerate(zip(graph.outputs, names, strict=True)):
        if value.name != name:
            copy = ir.Node("", "Identity", [value], outputs=[ir.Value(name=name, shape=value.shape, type=value.type)])
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]


def _cut(model: ir.Model, names: Sequence[str]) -> None:
    values = {value.name: value for node in model.graph for value in node.outputs}
    values.update({value.name: value for value in model.graph.inputs})
    missing = [name for name in names if name not in values]
    if missing:
        known = ", ".join(str(value.name) for value in model.graph.outputs)
        raise UserError(f"no value named {', '.join(missing)} in the model; its outputs are {known}")
    before = Counter(node.op_type for node in model.graph)
    model.graph.outputs[:] = [values[name] for name in names]
    common.RemoveUnusedNodesPass()(model)
    before.subtract(node.op_type for node in model.graph)
    behind = [f"{count} {kind}" for kind, count in sorted(before.items()) if count and kind != "Constant"]
    model.metadata_props[CUT] = ", ".join(behind)


def _fix_shapes(model: ir.Model, batch: int | None, shapes: dict[str, Sequence[int]]) -> None:
    names = [value.name for value in model.graph.inputs]
    if unknown := [name for name in shapes if name not in names]:
        raise UserError(
            f"no input named {', '.join(unknown)} in the model; its inputs are {', '.join(map(str, names))}"
        )
    before: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise UserError(f"input {value.name}: is no plain array (optional, sequence); only arrays are supported")
        if value.shape is None:
            if value.name not in shapes:
                raise UserError(
                    f"input {value.name} has no shape; give one with --input-shape {value.name}=1x3x224x224"
                )
            value.shape = ir.Shape(list(shapes[value.name]))
        old = value.shape.dims
        new = list(shapes.get(value.name or "", [d if isinstance(d, int) else -1 for d in old]))
        if len(new) != len(old):
            raise UserError(
                f"input {value.name} has {len(old)} dimensions {list(old)}, its shape was given with {len(new)}"
            )
        if new and new[0] == -1:
            new[0] = 1 if batch is None else batch
        elif new and batch is not None:
            new[0] = batch
        if value.name in shapes and min(new, default=1) < 1:
            raise UserError(f"input {value.name}: shape {new} was given, expected sizes of at least 1")
        if any(d < 1 for d in new):
            free = ", ".join(str(d) for d, size in zip(old, new, strict=True) if size < 1)
            usual = 224 if len(new) == 4 else 128  # pixels, or tokens
            example = "x".join(str(size if size > 0 else usual) for size in new)
            raise UserError(
                f"input {value.name} has free sizes {free}; give them, such as --input-shape {value.name}={example}"
            )
        if old and isinstance(old[0], int) and old[0] != new[0]:
            before[value.name or ""] = old[0]
        value.shape = ir.Shape(new)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # inferred again from the sizes fixed now; a file's own may be stale or symbolic
    if before:
        rebatch(model, before)
