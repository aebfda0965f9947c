"""ONNX nodes → drafts: the context that handlers work with, and the fusions they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.errors import UserError
from colonnade.frontend.draft import Draft, Tensor, Value, activate, can_activate, whole
from colonnade.plan import Port
from colonnade.workload import (
    NONE,
    Activation,
    Affine,
    Array,
    Cast,
    Constant,
    Conv2d,
    Convert,
    ConvTranspose2d,
    Epilogue,
    Linear,
    Take,
    Unary,
    Workload,
    activation_of,
    digest,
    spread,
)

# element types of the model's inputs and outputs: numpy's names
TYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "float64",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT8: "int8", ir.DataType.INT16: "int16", ir.DataType.INT32: "int32", ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8", ir.DataType.UINT16: "uint16", ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
}  # fmt: skip
Handler = Callable[["Importer", ir.Node], None]


class Unsupported(Exception):
    """A node that cannot be imported; the text says why and what to do. Collected, reported all at once."""


class Importer:
    """Walks a cleaned graph once; ``steps`` are in order when ``run`` returns."""

    def __init__(self, graph: ir.Graph, handlers: dict[str, Handler]) -> None:
        self.graph = graph
        self.handlers = handlers
        self.steps: list[Draft] = []
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.problems: list[str] = []
        self._values: dict[ir.Value, Value] = {}
        self._unknown: set[ir.Value] = set()
        self._trusted = True  # the shapes that the graph says
        self._writer: dict[Tensor, Draft] = {}
        self._names: set[str] = set()
        self._planes: dict[tuple[Tensor, tuple[int, ...]], Tensor] = {}
        self._dense: dict[object, tuple[Tensor, Value]] = {}

    # --- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Import the whole graph.

        Raises:
            UserError: naming every operator that is not supported, with its node and what to do.
        """
        self.walk()
        if self.problems:
            count = len(self.problems)
            raise UserError("\n".join([f"{count} part{'s' * (count > 1)} of the model not supported:", *self.problems]))
        order = [value.name for value in self.graph.outputs]
        self.outputs.sort(key=lambda port: order.index(port.name))

    def walk(self) -> None:
        """Import what can be; ``problems`` names the rest."""
        for value in self.graph.inputs:
            self._import(value)
        for node in self.graph:
            self._node(node)
            for value in node.outputs:
                if value.is_graph_output() and value in self._values:
                    self._export(value)
        for value in self.graph.outputs:
            if value.is_graph_input() and value in self._values:
                self._export(value)
            elif value not in self._values and value not in self._unknown:
                self._export_constant(value)

    def _node(self, node: ir.Node) -> None:
        label = f"{node.op_type} {node.name or node.outputs[0].name!r}"
        try:
            constant = node.inputs and all(value is None or value.const_value is not None for value in node.inputs)
            if constant and self._fold(node):
                return
            if node.op_type == "Shape" and node.inputs[0] in self._values:
                self._shape_of(node)
                return
            if node.domain not in ("", "ai.onnx") or node.op_type not in self.handlers:
                domain = f" of domain {node.domain}" if node.domain not in ("", "ai.onnx") else ""
                raise Unsupported(f"operator{domain} not supported; cut the model before it with outputs=/--outputs")
            if any(value in self._unknown for value in node.inputs if value is not None):
                self._unknown.update(node.outputs)
                return
            self.handlers[node.op_type](self, node)
            self._check_shapes(node)
        except Unsupported as problem:
            self.problems.append(f"{label}: {problem}")
        except (ArithmeticError, LookupError, ValueError) as error:  # attributes and shapes that contradict each other
            self.problems.append(f"{label}: is malformed ({error}); check the model with onnx.checker")
        self._unknown.update(v for v in node.outputs if v not in self._values and v.const_value is None)

    def _fold(self, node: ir.Node) -> bool:
        """Compute a node whose inputs are all constant (now that sizes are); False where it cannot be."""
        from onnx.reference import ReferenceEvaluator

        values = [value for value in node.inputs if value is not None]
        feeds = {value.name or "": value.const_value.numpy() for value in values if value.const_value is not None}
        opset = self.graph.opset_imports.get("", 18)
        try:
            results = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, feeds)
        except Exception:  # it raises whatever its operators raise
            return False
        for value, result in zip(node.outputs, results, strict=True):
            value.const_value = ir.tensor(np.asarray(result))
        return True

    def _shape_of(self, node: ir.Node) -> None:
        """Shape: a constant, all sizes being fixed."""
        shape = self.value(node, 0).shape
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        node.outputs[0].const_value = ir.tensor(np.array(shape[slice(start, end)], np.int64))

    def _check_shapes(self, node: ir.Node) -> None:
        """Our shapes must be those that ONNX infers: a mistake here would be a wrong result."""
        for value in node.outputs:
            ours = self._values.get(value)
            if ours is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
                continue
            if tuple(value.shape) == ours.shape:
                continue
            if node.attributes.get_int("ceil_mode", 0):
                self._trusted = False  # ONNX's inference keeps the last window that begins in the padding
            if self._trusted:
                raise Unsupported(f"{value.name}: shape {list(ours.shape)} is not the {list(value.shape)} of the model")

    def _import(self, value: ir.Value) -> None:
        shape = tuple(int(d) for d in value.shape or () if isinstance(d, int))
        name = value.name or "input"
        kind = TYPES.get(value.dtype) if value.dtype is not None and isinstance(value.type, ir.TensorType) else None
        if kind == "float64":
            self.problems.append(
                f"input {name}: is float64, but everything is computed in float32; cast before the model"
            )
        elif not isinstance(value.type, ir.TensorType):
            self.problems.append(f"input {name}: is no plain array (optional, sequence); only arrays are supported")
        elif kind is None:
            self.problems.append(f"input {name}: is {value.dtype}; only numbers and truths; cast before the model")
        elif prod(shape) == 0:
            self.problems.append(f"input {name}: shape {list(shape)} is empty; give one with --input-shape")
        else:
            moved = {node.op_type for node, _ in value.uses()} <= {"Transpose", "Reshape", "Flatten"}
            planes = kind == "float32" and len(shape) == 4 and shape[2:] != (1, 1) and not moved
            placed = shape if planes else (shape[0] if shape else 1, prod(shape[1:]))
            tensor = Tensor(name, placed)
            workload = Convert("import", placed) if kind == "float32" else Cast("import", placed, kind)
            self.add(Draft(self.unique(name), workload, [], tensor, external=name))
            self._values[value] = whole(tensor, shape)
            self.inputs.append(Port(name, shape, kind))
            return
        self._unknown.add(value)

    def _export_constant(self, value: ir.Value) -> None:
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is None or array.size == 0 or TYPES.get(ir.DataType.from_numpy(array.dtype)) is None:
            self.problems.append(f"output {value.name}: is an empty constant or no number; remove it from the outputs")
            return
        try:
            self._values[value] = self.brought(value.name or "output", array)
        except Unsupported as problem:
            self.problems.append(f"output {value.name}: {problem}")
            return
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self._export(value)

    def _export(self, value: ir.Value) -> None:
        ours = self._values[value]
        name = value.name or "output"
        kind = TYPES.get(value.dtype or ir.DataType.FLOAT)
        if kind is None:
            self.problems.append(
                f"output {name}: is {value.dtype}; only numbers and truths; cut before it with --outputs"
            )
            return
        self.outputs.append(Port(name, ours.shape, kind))
        workload: Workload = Convert("export", ours.placed_shape)
        if kind != "float32":
            ours = self.dense(ours, name)
            workload = Cast("export", ours.shape, kind)
        self.add(Draft(self.unique(f"{name}.export"), workload, [ours], None, external=name))

    # --- what handlers read -----------------------------------------------------------------------------------------

    def value(self, node: ir.Node, index: int) -> Value:
        """The imported value of an input."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or source not in self._values:
            raise Unsupported(f"input {index} must be computed from the model's inputs; it is a constant or missing")
        ours = self._values[source]
        return replace(ours, sole=ours.sole and len(source.uses()) == 1 and not source.is_graph_output())

    def shape(self, node: ir.Node, index: int) -> tuple[int, ...]:
        """Of an input, computed or constant."""
        constant = self.constant(node, index)
        return tuple(constant.shape) if constant is not None else self.value(node, index).shape

    def planes(self, node: ir.Node, index: int) -> Value:
        """The value of an input that must be [N, C, H, W], in planes."""
        value = self.value(node, index)
        if len(value.shape) != 4:
            raise Unsupported(f"expected [N, C, H, W] with pixels, got shape {list(value.shape)}")
        return self.in_planes(value)

    def in_planes(self, value: Value) -> Value:
        """[N, C, H, W] in planes, copied there once where it is a dense array."""
        if not value.is_rows:
            return value
        tensor = value.tensors[0]
        key = (tensor, value.shape)
        if key not in self._planes:
            writer = self._writer[tensor]
            planes = Tensor(f"{tensor.name}.planes", value.shape)
            name = self.unique(planes.name)
            if not writer.inputs and isinstance(writer.workload, Convert) and writer.workload.kind == "import":
                self.add(Draft(name, Convert("import", value.shape), [], planes, external=writer.external))
            else:
                self.add(Draft(name, Convert("unflatten", value.shape), [value], planes))
            self._planes[key] = planes
        return replace(whole(self._planes[key]), sole=False)

    def dense(self, value: Value, name: str = "") -> Value:
        """A dense array of the same shape, in row-major order; planes are copied there once."""
        if value.is_rows:
            return value
        key = value.identity()
        if key not in self._dense:
            n, c, h, w = value.placed_shape
            tensor = Tensor(f"{name or value.tensors[0].name}.rows", (n, c * h * w))
            whole_tensor = value.tensor
            writer = self._writer.get(whole_tensor) if whole_tensor is not None else None
            label = self.unique(f"{name or value.tensors[0].name}.flatten")
            if writer is not None and not writer.inputs and writer.external:
                self.add(Draft(label, Convert("import", tensor.shape), [], tensor, external=writer.external))
            else:
                self.add(Draft(label, Convert("flatten", (n, c, h, w)), [value], tensor))
            self._dense[key] = (tensor, value)
        return Value(value.shape, (self._dense[key][0],), sole=False)

    def array(self, node: ir.Node, index: int) -> Value:
        """An input as a dense array, constants brought into the arena."""
        constant = self.constant(node, index)
        if constant is None:
            return self.dense(self.value(node, index), node.outputs[0].name or "")
        return self.brought(node.outputs[0].name or "", constant)

    def brought(self, name: str, constant: npt.NDArray[np.generic]) -> Value:
        """A constant as a dense array in the arena."""
        numbers = exact(constant)
        placed = (numbers.shape[0] if numbers.ndim else 1, prod(numbers.shape[1:]))
        tensor = Tensor(f"{name}.constant", placed)
        self.add(Draft(self.unique(tensor.name), Constant(placed), [], tensor, {"value": numbers}))
        return Value(numbers.shape, (tensor,), sole=False)

    def more_outputs(self, node: ir.Node) -> bool:
        """Does anybody want an output of the node beyond the first?"""
        return any(value.uses() or value.is_graph_output() for value in node.outputs[1:])

    def is_integer(self, node: ir.Node, index: int = 0) -> bool:
        """Is that input of a type of whole numbers?"""
        value = node.inputs[index]
        return value is not None and value.dtype is not None and "int" in TYPES.get(value.dtype, "")

    def constant(self, node: ir.Node, index: int) -> npt.NDArray[np.generic] | None:
        """The array of an input, or None when that input is absent or no constant."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or source.const_value is None:
            return None
        return source.const_value.numpy()

    def has(self, node: ir.Node, index: int) -> bool:
        """Is that input given?"""
        return index < len(node.inputs) and node.inputs[index] is not None

    def numbers(self, node: ir.Node, index: int, what: str) -> Array:
        """A constant float input.

        Raises:
            Unsupported: it is no constant, or holds NaN or infinity.
        """
        array = self.constant(node, index)
        if array is None:
            raise Unsupported(f"its {what} must be constant; export the model in inference mode")
        numbers = np.asarray(array, np.float32)
        if not np.isfinite(numbers).all():
            raise Unsupported(f"its {what} holds NaN or infinity; repair the weights")
        return numbers

    def ints(self, node: ir.Node, attribute: str, index: int | None = None) -> list[int] | None:
        """Integers given as attribute (older opsets) or as constant input ``index``; None when absent."""
        if attribute in node.attributes:
            return [int(i) for i in node.attributes[attribute].as_ints()]
        if index is None or not self.has(node, index):
            return None
        array = self.constant(node, index)
        if array is None:
            raise Unsupported(f"its {attribute} must be constant; export the model with fixed shapes")
        return [int(i) for i in array.reshape(-1)]

    # --- what handlers write ----------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """``name``, or with a number behind it when it is taken."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}.{count}"
        self._names.add(candidate)
        return candidate

    def add(self, step: Draft) -> None:
        """Append a step."""
        self.steps.append(step)
        if step.output is not None:
            self._writer[step.output] = step

    def set(self, node: ir.Node, value: Value, index: int = 0) -> None:
        """The node's output is ``value``."""
        self._values[node.outputs[index]] = value

    def result(self, node: ir.Node, index: int = 0) -> Value:
        """What the node's output is by now, for a handler that goes on with it."""
        return self._values[node.outputs[index]]

    def reshape(self, node: ir.Node, shape: tuple[int, ...]) -> None:
        """See the node's output, a dense array, with another shape."""
        self.set(node, self.result(node).seen(shape))

    def emit(
        self,
        node: ir.Node,
        workload: Workload,
        inputs: list[Value],
        placed: tuple[int, ...],
        shape: tuple[int, ...] | None = None,
        constants: dict[str, Array] | None = None,
        name: str = "",
    ) -> Value:
        """Append the step that computes the node's output, a tensor ``placed`` = (N, C, H, W) or (N, C)."""
        tensor = Tensor(node.outputs[0].name or node.op_type, placed)
        name = name or node.name or tensor.name
        self.add(Draft(self.unique(name), workload, inputs, tensor, constants or {}))
        value = whole(tensor, shape)
        self.set(node, value)
        return value

    def writer(self, value: Value) -> Draft | None:
        """The step that computed exactly this value when nobody else reads it: it may be changed."""
        tensor = value.tensor
        return self._writer.get(tensor) if value.sole and tensor is not None else None

    def dense_step(
        self, node: ir.Node, workload: Workload, inputs: list[Value], shape: tuple[int, ...],
        constants: dict[str, Array] | None = None, index: int = 0, name: str = "",
    ) -> Value:  # fmt: skip
        """Append a step that writes a dense array of ``shape``, the node's output ``index``."""
        output = node.outputs[index].name or node.op_type
        tensor = Tensor(output, (shape[0] if shape else 1, prod(shape[1:])))
        self.add(Draft(self.unique(name or node.name or output), workload, inputs, tensor, constants or {}))
        value = Value(shape, (tensor,))
        self.set(node, value, index)
        return value

    def take(
        self, node: ir.Node, x: Value, tables: list[npt.NDArray[np.int64]], fill: float = 0.0, index: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> Value:  # fmt: skip
        """Append a move of elements (see ``workload.Take``); ``shape`` is the output's when it is not one axis a table.

        Planes stay planes where every row of the output comes from one row of pixels.
        """
        target = tuple(len(table) for table in tables)
        if prod(target) == 0:
            raise Unsupported(f"its result {list(target)} is empty; remove it from the model")
        constants: dict[str, Array] = {f"axis{i}": table for i, table in enumerate(tables)}  # type: ignore[misc]
        planar = shape is None and len(target) == 4 and target[2:] != (1, 1) and not x.is_rows and fill == 0.0
        if planar and separable(tables, x.shape[-1]):
            take = Take(x.placed_shape, target, digest(tables), fill)
            tensor = Tensor(node.outputs[index].name or node.op_type, target)
            self.add(Draft(self.unique(node.name or tensor.name), take, [x], tensor, constants))
            value = whole(tensor)
            self.set(node, value, index)
            return value
        dense = self.dense(x, node.outputs[0].name or "")
        take = Take(dense.shape, target, digest(tables), fill)
        return self.dense_step(node, take, [dense], target if shape is None else shape, constants, index)

    def to_rows(self, node: ir.Node, value: Value) -> Value:
        """``value`` as rows: pixels flattened in (channel, row, column) order."""
        return self.dense(value, node.outputs[0].name or "").matrix(len(value.shape) - 1)

    # --- fusions ----------------------------------------------------------------------------------------------------

    def activation(self, node: ir.Node, activation: Activation) -> None:
        """``clip`` or a function, in the step that computes its input where that may be."""
        value = self.value(node, 0)
        step = self.writer(value)
        if step is not None and can_activate(step):
            activate(step, activation)
            self.set(node, value)
        elif activation.function is not None:
            placed = value.placed_shape
            self.emit(node, Unary(activation.function, placed), [value], placed, value.shape)
        else:
            placed = value.placed_shape
            ones = np.ones(placed[1], np.float32)
            self._affine(node, value, placed, ones, ones * 0, activation)

    def affine(self, node: ir.Node, value: Value, scale: Array, shift: Array) -> None:
        """``value * scale[c] + shift[c]``: into the weights before it where that may be, else a step.

        c are the channels of planes, or the last elements of a dense array: as many as ``scale`` has.
        """
        step = self.writer(value)
        count = len(scale)
        if step is not None and step.output is not None and activation_of(step.workload) == NONE:
            constants, workload = step.constants, step.workload
            outs = step.output.channels
            if value.is_rows and count == 1:
                scale, shift = np.broadcast_to(scale, outs), np.broadcast_to(shift, outs)
            foldable = isinstance(workload, (Conv2d, ConvTranspose2d, Linear)) and not workload.epilogue.residual
            if (foldable or isinstance(workload, Affine)) and len(scale) == outs:
                wide = scale.astype(np.float64)
                if isinstance(workload, Affine):
                    constants["shift"] = (constants["shift"] * wide + shift).astype(np.float32)
                    constants["scale"] = (constants["scale"] * wide).astype(np.float32)
                else:
                    weight = constants["weight"]
                    product = weight * wide.reshape(-1, *[1] * (weight.ndim - 1))
                    constants["weight"] = product.astype(np.float32)
                    constants["bias"] = (constants["bias"] * wide + shift).astype(np.float32)
                self.set(node, value)
                return
            scale, shift = scale[:count], shift[:count]
        placed = value.placed_shape
        if value.is_rows:
            if count == 1:
                count = value.shape[-1] if value.shape else 1
                scale, shift = np.broadcast_to(scale, count), np.broadcast_to(shift, count)
            placed = (prod(value.shape) // count, count)
        self._affine(node, value, placed, scale, shift, NONE)

    def _affine(
        self, node: ir.Node, value: Value, placed: tuple[int, ...], scale: Array, shift: Array, activation: Activation
    ) -> None:
        constants = {"scale": np.ascontiguousarray(scale, np.float32), "shift": np.ascontiguousarray(shift, np.float32)}
        x = value.seen(placed) if value.is_rows else value
        self.emit(node, Affine(placed, activation), [x], placed, value.shape, constants)

    def add_residual(self, node: ir.Node, a: Value, b: Value) -> bool:
        """Fuse ``a + b`` into the convolution or linear layer that computes one of them, if there is one."""
        steps = [(step, other) for value, other in ((a, b), (b, a)) if (step := self.writer(value)) is not None]
        # the later one: what it adds has been computed by then
        for step, other in sorted(steps, key=lambda pair: -self.steps.index(pair[0])):
            workload = step.workload
            if not isinstance(workload, (Conv2d, Linear)) or workload.epilogue != Epilogue():
                continue
            if isinstance(workload, Linear):  # element by element beside its own matrix
                assert step.output is not None
                other = other.seen(step.output.shape)
            step.workload = replace(workload, epilogue=Epilogue(residual=True))
            step.inputs.append(other)
            self.steps.remove(step)
            self.steps.append(step)
            assert step.output is not None
            self.set(node, whole(step.output, a.shape))
            return True
        return False

    def linear(
        self, node: ir.Node, x: Value, weight: Array, bias: Array | None, shape: tuple[int, ...], name: str = ""
    ) -> None:
        """A ``Linear`` step on a matrix; ``shape`` is the ONNX shape of its output."""
        (outs, ins) = weight.shape
        batch = prod(x.shape) // ins
        x = x.seen((batch, ins))
        bias = np.zeros(outs, np.float32) if bias is None else bias
        constants = {"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}
        self.emit(node, Linear(batch, ins, outs), [x], (batch, outs), shape, constants, name)


def layer_name(node: ir.Node) -> str:
    """The name of a layer as its author knows it: that of its weight without the ending, if it has one."""
    weight = node.inputs[1]
    name = weight.name if weight is not None else None
    if name and name.endswith(".weight"):
        return name.removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


def separable(tables: list[npt.NDArray[np.int64]], width: int) -> bool:
    """Does every row of the result come from one row of ``width`` source elements?"""
    last, rows = tables[-1], spread(tables[:-1]).reshape(-1)
    used = last[last >= 0]
    return bool((used < width).all() and not (rows[rows >= 0] % width).any())


def strides(shape: Sequence[int]) -> list[int]:
    """Elements from one entry of every axis to the next, in row-major order."""
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def counting(shape: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """The tables of a move that moves nothing: change them to say what does."""
    return [np.arange(d, dtype=np.int64) * s for d, s in zip(shape, strides(shape), strict=True)]


def exact(constant: npt.NDArray[np.generic]) -> Array:
    """Constant numbers as float32.

    Raises:
        Unsupported: whole numbers that float32 does not hold.
    """
    numbers = np.asarray(constant).astype(np.float32)
    if constant.dtype.kind in "iu" and not np.array_equal(numbers.astype(constant.dtype), constant):
        raise Unsupported(f"holds whole numbers beyond {1 << 24}, which are not computed exactly; use smaller ones")
    return numbers


def is_vector(shape: Sequence[int]) -> bool:
    """At most one axis behind the batch is longer than 1, so that rows can hold it without reordering."""
    return len(shape) > 0 and max(shape[1:], default=1) == prod(shape[1:])
