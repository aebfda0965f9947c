"""ONNX nodes → drafts: the walk over the graph, its inputs and its outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from colonnade.errors import UserError
from colonnade.frontend import edges
from colonnade.frontend.context import Unsupported
from colonnade.frontend.expand import FOLDED, OURS
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.fusion import Fusing
from colonnade.frontend.written import computable
from colonnade.onnx_winograd import DOMAIN
from colonnade.workload.small import INTEGERS
from colonnade.workload.typed import WIDE

Handler = Callable[["Importer", ir.Node], None]
QUANTIZED = {
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear",
}  # fmt: skip
ARITHMETIC = {*WIDE, *INTEGERS}  # types whose arithmetic is not that of float32


class Importer(Fusing):
    """Walks a cleaned graph once; ``steps`` are in order when ``run`` returns."""

    def __init__(
        self, graph: ir.Graph, handlers: dict[str, Handler], costs: LayoutCosts | None = None,
        typed: dict[str, Handler] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(graph, costs)
        self.handlers = handlers
        self.typed_handlers = typed or {}  # for operators on other numbers than float32
        self.problems: list[str] = []
        self._unknown: set[ir.Value] = set()
        self._trusted = True  # the shapes that the graph says

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
            ours = edges.import_input(self, value)
            if ours is None:
                self._unknown.add(value)
            else:
                self._values[value] = ours
        for node in self.graph:
            self._node(node)
            for value in node.outputs:
                if value.is_graph_output() and value in self._values:
                    edges.export_output(self, value, self._values[value])
        for value in self.graph.outputs:
            if value.is_graph_input() and value in self._values:
                edges.export_output(self, value, self._values[value])
            elif value not in self._values and value not in self._unknown:
                constant = edges.export_constant(self, value)
                if constant is not None:
                    edges.export_output(self, value, constant)

    def _node(self, node: ir.Node) -> None:
        label = f"{node.op_type} {node.name or node.outputs[0].name!r}"
        try:
            constant = node.inputs and all(value is None or value.const_value is not None for value in node.inputs)
            if constant and self._fold(node):
                return
            if node.op_type == "Shape" and node.inputs[0] in self._values:
                self._shape_of(node)
                return
            if node.op_type == "Constant":  # an output that folding has left as one
                node.outputs[0].const_value = ir.convenience.get_const_tensor(node.outputs[0])
                return
            if node.domain not in ("", "ai.onnx", DOMAIN) or node.op_type not in self.handlers:
                if node.op_type in FOLDED and any(value in self._unknown for value in node.inputs):
                    self._unknown.update(node.outputs)
                    return
                if node.op_type in FOLDED:
                    raise Unsupported("its inputs must be constant, sizes being fixed; export with fixed shapes")
                if node.op_type in OURS:
                    raise Unsupported(
                        "the sizes of its inputs do not follow from the model's; export with fixed shapes"
                    )
                if node.domain == "com.microsoft":
                    raise Unsupported("is onnxruntime's own; take the model as it was before onnxruntime optimised it")
                if node.op_type in QUANTIZED:
                    raise Unsupported("is of a quantized model; take the model as it was before, in floats")
                domain = f" of domain {node.domain}" if node.domain not in ("", "ai.onnx") else ""
                raise Unsupported(f"operator{domain} not supported; cut the model before it with outputs=/--outputs")
            if any(value in self._unknown for value in node.inputs if value is not None):
                self._unknown.update(node.outputs)
                return
            self._handler(node)(self, node)
            self._check_shapes(node)
        except Unsupported as problem:
            self.problems.append(f"{label}: {problem}")
        except (ArithmeticError, LookupError, ValueError) as error:  # attributes and shapes that contradict each other
            self.problems.append(f"{label}: is malformed ({error}); check the model with onnx.checker")
        self._unknown.update(v for v in node.outputs if v not in self._values and v.const_value is None)

    def _handler(self, node: ir.Node) -> Handler:
        """Arithmetic on whole numbers and on float64 has handlers of its own."""
        typed = self.typed_handlers.get(node.op_type)
        kind = self.type_of(node, 1 if node.op_type == "Where" else 0)
        return typed if typed is not None and kind in ARITHMETIC else self.handlers[node.op_type]

    def _fold(self, node: ir.Node) -> bool:
        """Compute a node whose inputs are all constant (now that sizes are); False where it cannot be."""
        from onnx.reference import ReferenceEvaluator

        values = [value for value in node.inputs if value is not None]
        feeds = {value.name or "": value.const_value.numpy() for value in values if value.const_value is not None}
        opset = self.graph.opset_imports.get("", 18)
        if not computable(node, opset):
            return False
        if node.op_type == "Unsqueeze" and "axes" in node.attributes:  # before opset 13; onnx's own cannot compute it
            (array,) = feeds.values()
            node.outputs[0].const_value = ir.tensor(np.expand_dims(array, tuple(node.attributes["axes"].as_ints())))
            return True
        try:
            results = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, feeds)
        except Exception:  # it raises whatever its operators raise
            return False
        for value, result in zip(node.outputs, results, strict=True):
            value.const_value = ir.tensor(np.asarray(result))
        return True

    def _shape_of(self, node: ir.Node) -> None:
        """Shape: a constant, all sizes being fixed."""
        shape = self.raw(node, 0).shape
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
            # ONNX's inference keeps the last window that begins in the padding, and multiplies scales otherwise
            scaled = node.op_type in ("Resize", "Upsample") and not self.has(node, 3)
            if node.attributes.get_int("ceil_mode", 0) or scaled:
                self._trusted = False
            if self._trusted:
                raise Unsupported(f"{value.name}: shape {list(ours.shape)} is not the {list(value.shape)} of the model")
