"""A model that was exported for one batch, given another one: what exporters wrote into the graph follows.

Sizes of batches stand in targets of Reshape and Expand, and in sizes of Resize. What they were is known from the shapes
that the model had, so a size is the batch, heads times the batch, or neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.errors import UserError
from colonnade.frontend.written import infer_shapes, known_shape

TARGETS = {"Reshape": 1, "Expand": 1, "Resize": 3}  # which input says the sizes of the output
BATCH = "colonnade.batch"  # in a cleaned model's properties: the batch that it was exported for, if it got another one


def rebatch(model: ir.Model, before: Mapping[str, int]) -> None:
    """Let sizes follow the batch of those inputs whose first sizes were ``before``. Changes ``model``.

    Raises UserError where a size follows from the batch in no way that is known.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    name, old = next(iter(before.items()))
    new = known_shape(inputs[name])[0]
    shapes = _shapes(model, before)
    scaled: list[tuple[ir.Node, str]] = []
    for node in _behind(model, before):
        place = TARGETS.get(node.op_type, len(node.inputs))
        data, sizes = node.inputs[0], node.inputs[place] if place < len(node.inputs) else None
        given = None if sizes is None else ir.convenience.get_const_tensor(sizes)
        if given is None or data is None or "axes" in node.attributes or given.size < 1 or given.numpy()[0] < 1:
            continue
        target, was = given.numpy().astype(np.int64), shapes.get(data.name or "", ())
        if 0 in target and "allowzero" in node.attributes:
            continue  # an empty tensor
        if node.op_type == "Reshape" and was and target[0] == was[0] and was[0] != old:
            target[0] = 0  # whatever it is
        elif node.op_type == "Reshape" or target[0] == old:
            if node.op_type == "Reshape" and was and target[0] != was[0]:
                scaled.append((node, data.name or ""))
            if target[0] * new % old:
                raise _refusal(node, old)
            target[0] = target[0] * new // old
        else:
            continue
        node.attributes.pop("allowzero", None)
        node.replace_input_with(place, _constant(model, f"{node.outputs[0].name}.shape", target))
    after = _shapes(model, {})
    for node, source in scaled:
        was, now = shapes.get(source, ()), after.get(source, ())
        if was and now and now[0] * old != was[0] * new:
            raise _refusal(node, old)  # its first axis was no batch before
    model.metadata_props[BATCH] = str(old)


def _refusal(node: ir.Node, old: int) -> UserError:
    name = node.name or node.outputs[0].name
    return UserError(
        f"{node.op_type} {name!r}: sizes of a batch of {old}, for which the model was exported, are written into it: "
        "export it with a free batch"
    )


def _shapes(model: ir.Model, first: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Of all values, by name, as far as ONNX infers them; with these first sizes of inputs."""
    copy = model.clone()
    for value in copy.graph.inputs:
        if (size := first.get(value.name or "")) is not None and value.shape is not None:
            value.shape = ir.Shape([size, *list(value.shape)[1:]])
    infer_shapes(copy)
    values = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
    return {value.name or "": known_shape(value) for value in values}


def _behind(model: ir.Model, inputs: Mapping[str, int]) -> list[ir.Node]:
    """Nodes that compute from these inputs; what is computed from constants knows no batch."""
    reached = {value for value in model.graph.inputs if value.name in inputs}
    found = []
    for node in model.graph:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def _constant(model: ir.Model, name: str, array: npt.NDArray[np.int64]) -> ir.Value:
    made = ir.Value(
        name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.INT64),
    )  # fmt: skip
    model.graph.register_initializer(made)
    return made
