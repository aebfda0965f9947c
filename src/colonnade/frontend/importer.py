"""ONNX nodes → drafts: the context that handlers work with, and the fusions they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.errors import UserError
from colonnade.frontend.draft import Draft, Tensor, Value, activate, activation_of, can_activate, whole
from colonnade.plan import Port
from colonnade.workload import NONE, Activation, Affine, Array, Conv2d, Convert, ConvTranspose2d, Epilogue, Linear, Workload

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
        self._writer: dict[Tensor, Draft] = {}
        self._names: set[str] = set()

    # --- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Import the whole graph.

        Raises:
            UserError: naming every operator that is not supported, with its node and what to do.
        """
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
                self.problems.append(f"output {value.name}: is a constant; remove it from the model's outputs")
        if self.problems:
            count = len(self.problems)
            raise UserError("\n".join([f"{count} part{'s' * (count > 1)} of the model not supported:", *self.problems]))
        order = [value.name for value in self.graph.outputs]
        self.outputs.sort(key=lambda port: order.index(port.name))

    def _node(self, node: ir.Node) -> None:
        label = f"{node.op_type} {node.name or node.outputs[0].name!r}"
        try:
            if node.domain not in ("", "ai.onnx") or node.op_type not in self.handlers:
                domain = f" of domain {node.domain}" if node.domain not in ("", "ai.onnx") else ""
                raise Unsupported(f"operator{domain} not supported; cut the model before it with outputs=/--outputs")
            if any(value in self._unknown for value in node.inputs if value is not None):
                self._unknown.update(node.outputs)
                return
            self.handlers[node.op_type](self, node)
        except Unsupported as problem:
            self.problems.append(f"{label}: {problem}")
        except (ArithmeticError, LookupError, ValueError) as error:  # attributes and shapes that contradict each other
            self.problems.append(f"{label}: is malformed ({error}); check the model with onnx.checker")
        self._unknown.update(value for value in node.outputs if value not in self._values)

    def _import(self, value: ir.Value) -> None:
        shape = tuple(int(d) for d in value.shape or () if isinstance(d, int))
        name = value.name or "input"
        if value.dtype != ir.DataType.FLOAT:
            self.problems.append(f"input {name}: is {value.dtype}, only float32 is supported; cast before the model")
        elif len(shape) not in (2, 4):
            self.problems.append(f"input {name}: has {len(shape)} dimensions, expected [N, C] or [N, C, H, W]")
        else:
            placed = shape if len(shape) == 4 and shape[2:] != (1, 1) else shape[:2]
            tensor = Tensor(name, placed)
            self.add(Draft(self.unique(name), Convert("import", placed), [], tensor, external=name))
            self._values[value] = whole(tensor, shape)
            self.inputs.append(Port(name, shape))
            return
        self._unknown.add(value)

    def _export(self, value: ir.Value) -> None:
        ours = self._values[value]
        name = value.name or "output"
        self.outputs.append(Port(name, ours.shape))
        workload = Convert("export", ours.placed_shape)
        self.add(Draft(self.unique(f"{name}.export"), workload, [ours], None, external=name))

    # --- what handlers read -----------------------------------------------------------------------------------------

    def value(self, node: ir.Node, index: int) -> Value:
        """The imported value of an input."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or source not in self._values:
            raise Unsupported(f"input {index} must be computed from the model's inputs; it is a constant or missing")
        ours = self._values[source]
        return replace(ours, sole=ours.sole and len(source.uses()) == 1 and not source.is_graph_output())

    def planes(self, node: ir.Node, index: int) -> Value:
        """The value of an input that must be [N, C, H, W] in planes."""
        value = self.value(node, index)
        if value.is_rows or len(value.shape) != 4:
            raise Unsupported(f"expected [N, C, H, W] with pixels, got shape {list(value.shape)}")
        return value

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

    def to_rows(self, node: ir.Node, value: Value) -> Value:
        """``value`` as rows: pixels flattened in (channel, row, column) order."""
        if value.is_rows:
            return value
        n, c, h, w = value.placed_shape
        tensor = Tensor(f"{node.outputs[0].name}.rows", (n, c * h * w))
        name = self.unique(f"{node.name or node.outputs[0].name}.flatten")
        self.add(Draft(name, Convert("flatten", (n, c, h, w)), [value], tensor))
        return whole(tensor)

    def pixels_of_input(self, value: Value) -> Value | None:
        """A one-pixel input of the model, which is in rows, once more in planes; None for any other value."""
        tensor = value.tensor
        source = self._writer.get(tensor) if tensor is not None else None
        if source is None or source.inputs or not source.external:
            return None
        planes = Tensor(f"{source.external}.planes", (*value.placed_shape, 1, 1))
        name = self.unique(planes.name)
        self.add(Draft(name, Convert("import", planes.shape), [], planes, external=source.external))
        return whole(planes)

    # --- fusions ----------------------------------------------------------------------------------------------------

    def activation(self, node: ir.Node, activation: Activation) -> None:
        """``clip``, in the step that computes its input where that may be."""
        value = self.value(node, 0)
        step = self.writer(value)
        if step is not None and can_activate(step):
            activate(step, activation)
            self.set(node, value)
        else:
            ones = np.ones(value.width, np.float32)
            self._affine(node, value, ones, ones * 0, activation)

    def affine(self, node: ir.Node, value: Value, scale: Array, shift: Array) -> None:
        """``value * scale[c] + shift[c]``: into the weights before it where that may be, else a step."""
        step = self.writer(value)
        if step is not None and can_activate(step) and activation_of(step.workload) == NONE:
            constants = step.constants
            if isinstance(step.workload, (Conv2d, ConvTranspose2d, Linear)) and not step.workload.epilogue.residual:
                weight, bias = constants["weight"], constants["bias"]
                wide = weight * scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
                constants["weight"] = wide.astype(np.float32)
                constants["bias"] = (bias * scale.astype(np.float64) + shift).astype(np.float32)
                self.set(node, value)
                return
            if isinstance(step.workload, Affine):
                constants["shift"] = (constants["shift"] * scale.astype(np.float64) + shift).astype(np.float32)
                constants["scale"] = (constants["scale"] * scale.astype(np.float64)).astype(np.float32)
                self.set(node, value)
                return
        self._affine(node, value, scale, shift, NONE)

    def _affine(self, node: ir.Node, value: Value, scale: Array, shift: Array, activation: Activation) -> None:
        placed = value.placed_shape
        constants = {"scale": np.ascontiguousarray(scale, np.float32), "shift": np.ascontiguousarray(shift, np.float32)}
        self.emit(node, Affine(placed, activation), [value], placed, value.shape, constants)

    def add_residual(self, node: ir.Node, a: Value, b: Value) -> bool:
        """Fuse ``a + b`` into the convolution or linear layer that computes one of them, if there is one."""
        steps = [(step, other) for value, other in ((a, b), (b, a)) if (step := self.writer(value)) is not None]
        # the later one: what it adds has been computed by then
        for step, other in sorted(steps, key=lambda pair: -self.steps.index(pair[0])):
            workload = step.workload
            if not isinstance(workload, (Conv2d, Linear)) or workload.epilogue != Epilogue():
                continue
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
        """A ``Linear`` step on rows; ``shape`` is the ONNX shape of its output."""
        batch, (outs, ins) = x.shape[0], weight.shape
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


def is_vector(shape: Sequence[int]) -> bool:
    """At most one axis behind the batch is longer than 1, so that rows can hold it without reordering."""
    return len(shape) > 0 and max(shape[1:], default=1) == prod(shape[1:])
