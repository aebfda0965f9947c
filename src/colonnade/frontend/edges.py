"""The model's inputs and outputs: from and to arrays of the user's types."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import onnx_ir as ir

from colonnade.frontend.context import TYPES, Unsupported
from colonnade.frontend.draft import Draft, Tensor, Value, whole
from colonnade.frontend.tokens import Tokens
from colonnade.plan import Port
from colonnade.workload import Cast, Convert, Workload
from colonnade.workload.typed import F32, WIDE, lanes

if TYPE_CHECKING:
    from colonnade.frontend.importer import Importer


def import_input(importer: Importer, value: ir.Value) -> Value | None:
    """The step that brings one of the model's inputs in; None where that cannot be, and why among the problems."""
    shape = tuple(int(d) for d in value.shape or () if isinstance(d, int))
    name = value.name or "input"
    kind = TYPES.get(value.dtype) if value.dtype is not None and isinstance(value.type, ir.TensorType) else None
    if not isinstance(value.type, ir.TensorType):
        importer.problems.append(f"input {name}: is no plain array (optional, sequence); only arrays are supported")
    elif kind is None:
        importer.problems.append(f"input {name}: is {value.dtype}; only numbers and truths; cast before the model")
    elif prod(shape) == 0:
        importer.problems.append(f"input {name}: shape {list(shape)} is empty; give one with --input-shape")
    else:
        moved = {node.op_type for node, _ in value.uses()} <= {"Transpose", "Reshape", "Flatten"}
        planes = kind == F32 and len(shape) == 4 and shape[2:] != (1, 1) and not moved
        held = kind if kind in WIDE else F32
        rows = (shape[0] if shape else 1, prod(shape[1:]))
        tensor = Tensor(name, shape if planes else (rows[0], rows[1] * lanes(held)))
        placed = shape if planes else rows
        workload = Convert("import", placed) if kind == F32 else Cast("import", placed, kind, held)
        importer.add(Draft(importer.unique(name), workload, [], tensor, external=name))
        importer.inputs.append(Port(name, shape, kind))
        return whole(tensor, shape) if held == F32 else Value(shape, (tensor,), dtype=held)
    return None


def export_constant(importer: Importer, value: ir.Value) -> Value | None:
    """An output that is a constant: brought into the arena. Where it is empty there is nothing to bring or to write."""
    array = value.const_value.numpy() if value.const_value is not None else None
    kind = TYPES.get(ir.DataType.from_numpy(array.dtype)) if array is not None and array.dtype != object else None
    if array is None or kind is None:
        importer.problems.append(f"output {value.name}: is no constant number; remove it from the outputs")
        return None
    value.dtype = ir.DataType.from_numpy(array.dtype)
    if array.size == 0:
        importer.outputs.append(Port(value.name or "output", tuple(array.shape), kind))
        return None
    try:
        return importer.brought(value.name or "output", array, kind if kind in WIDE else F32)
    except Unsupported as problem:
        importer.problems.append(f"output {value.name}: {problem}")
        return None


def export_output(importer: Importer, value: ir.Value, ours: Value | Tokens) -> None:
    """The step that writes one of the model's outputs into the user's array."""
    name = value.name or "output"
    ours = importer.ordinary(ours, name)
    kind = TYPES.get(value.dtype) if value.dtype is not None else ours.dtype
    if kind is None:
        importer.problems.append(
            f"output {name}: is {value.dtype}; only numbers and truths; cut before it with --outputs"
        )
        return
    importer.outputs.append(Port(name, ours.shape, kind))
    workload: Workload = Convert("export", ours.placed_shape)
    if kind != F32 or ours.dtype != F32:
        ours = importer.dense(ours, name)
        if ours.dtype != F32 and ours.dtype != kind:
            ours = importer.converted(ours, kind if kind in WIDE else F32, name)
        workload = Cast("export", ours.shape, ours.dtype, kind)
        if (ours.dtype, kind) == (F32, F32):
            workload = Convert("export", ours.placed_shape)
    importer.add(Draft(importer.unique(f"{name}.export"), workload, [ours], None, external=name))
