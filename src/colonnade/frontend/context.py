"""What handlers of ONNX nodes work with: the values so far, the steps so far, conversions between their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.frontend.draft import Draft, Tensor, Value, is_import, whole
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.tokens import Tokens, row_major
from colonnade.onnx_io import layer_of
from colonnade.plan import Port
from colonnade.workload import (
    Array,
    Cast,
    Constant,
    Convert,
    Reorder,
    Take,
    TypedElementwise,
    Workload,
    digest,
    spread,
)
from colonnade.workload.typed import F32, WIDE, as_lanes, lanes

# element types of the model's inputs and outputs: numpy's names (those of ml_dtypes where numpy has none)
TYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "float64",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT8: "int8", ir.DataType.INT16: "int16", ir.DataType.INT32: "int32", ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8", ir.DataType.UINT16: "uint16", ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64", ir.DataType.INT4: "int4", ir.DataType.UINT4: "uint4",
    ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT4E2M1: "float4_e2m1fn",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn", ir.DataType.FLOAT8E4M3FNUZ: "float8_e4m3fnuz",
    ir.DataType.FLOAT8E5M2: "float8_e5m2", ir.DataType.FLOAT8E5M2FNUZ: "float8_e5m2fnuz",
}  # fmt: skip
# of newer versions of ONNX
TYPES |= {
    getattr(ir.DataType, ours): name
    for ours, name in (("FLOAT8E8M0", "float8_e8m0fnu"), ("INT2", "int2"), ("UINT2", "uint2"))
    if hasattr(ir.DataType, ours)
}

# operators that move elements whatever they are: their handlers see values of other types than float32 as they are
MOVES = {
    "CenterCropPad", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape",
    "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Upsample",
}  # fmt: skip


class Unsupported(Exception):
    """A node that cannot be imported; the text says why and what to do. Collected, reported all at once."""


class Context:
    """Values by ONNX value, steps in order, and what was converted already."""

    def __init__(self, graph: ir.Graph, costs: LayoutCosts | None = None) -> None:
        self.graph = graph
        self.costs = costs or LayoutCosts()
        self.steps: list[Draft] = []
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self._values: dict[ir.Value, Value | Tokens] = {}
        self._writer: dict[Tensor, Draft] = {}
        self._names: set[str] = set()
        self._planes: dict[tuple[Tensor, tuple[int, ...]], Tensor] = {}
        self._dense: dict[object, tuple[Tensor, Value]] = {}
        self._reordered: dict[object, tuple[Tensor, Value]] = {}
        self._converted: dict[tuple[Tensor, str], Tensor] = {}

    # --- what handlers read -----------------------------------------------------------------------------------------

    def raw(self, node: ir.Node, index: int) -> Value | Tokens:
        """The imported value of an input, in whatever order of axes it stands and of whatever type it is in memory."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or source not in self._values:
            raise Unsupported(f"input {index} must be computed from the model's inputs; it is a constant or missing")
        ours = self._values[source]
        sole = ours.sole and len(source.uses()) == 1 and not source.is_graph_output()
        if isinstance(ours, Tokens):
            return replace(ours, planes=replace(ours.planes, sole=sole))
        return replace(ours, sole=sole)

    def value(self, node: ir.Node, index: int) -> Value:
        """The imported value of an input: planes (N, \\*dims, H, W) or a dense array; of float32, unless the operator
        only moves elements."""
        ours = self.held(node, index)
        return ours if node.op_type in MOVES else self.narrowed(ours)

    def held(self, node: ir.Node, index: int) -> Value:
        """The imported value of an input, of whatever type it is in memory."""
        return self.ordinary(self.raw(node, index), node.outputs[0].name or "")

    def tokens(self, node: ir.Node, index: int) -> Tokens | None:
        """The imported value of an input if it is planes in another order of axes, all of their pixels."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or not isinstance(self._values.get(source), Tokens):
            return None
        value = self.raw(node, index)
        return value if isinstance(value, Tokens) and value.covers_lanes else None

    def ordinary(self, value: Value | Tokens, name: str = "") -> Value:
        """Planes (N, \\*dims, H, W) or a dense array: planes in another order are copied there once."""
        if isinstance(value, Value):
            return value
        planes = value.value()
        if planes is not None:
            return planes
        tables = value.tables()
        if prod(value.shape) == prod(value.planes.shape) and _counts(tables):  # all of the planes, in their order
            return self.dense(value.planes, name).seen(value.shape)
        key = (value.planes.identity(), digest(tables))
        if key not in self._reordered:
            shape = value.shape
            tensor = Tensor(f"{name or value.planes.tensors[0].name}.rows", (shape[0] if shape else 1, prod(shape[1:])))
            self.reorder(value.planes, value.planes.placed_shape, shape, tables, tensor)
            self._reordered[key] = (tensor, value.planes)
        return Value(value.shape, (self._reordered[key][0],), sole=False)

    def reorder(
        self, x: Value, source: tuple[int, ...], target: tuple[int, ...], tables: list[npt.NDArray[np.int64]],
        output: Tensor,
    ) -> None:  # fmt: skip
        """Append a change of layout between planes and rows."""
        constants: dict[str, Array] = {f"axis{i}": table for i, table in enumerate(tables)}  # type: ignore[misc]
        self.add(Draft(self.unique(output.name), Reorder(source, target, digest(tables)), [x], output, constants))

    def in_tokens(self, value: Value, like: Tokens, name: str = "") -> Value | None:
        """A dense array that broadcasts to the shape of ``like``, in planes (N, C, H, W) as those of ``like`` stand,
        copied there once. Planes that would repeat each other are one. None where it would take more than a copy."""
        tables = like.sources(value.shape)
        if tables is None:
            return None
        distinct, where = np.unique(tables[1], return_inverse=True)
        if len(distinct) < len(tables[1]):
            tables[1] = distinct
        key = (value.tensors[0], like.planes.placed_shape, digest(tables))
        if key not in self._reordered:
            n, _, h, w = like.planes.placed_shape
            tensor = Tensor(f"{name or value.tensors[0].name}.tokens", (n, len(tables[1]), h, w))
            self.reorder(value, value.shape, tensor.shape, tables, tensor)
            self._reordered[key] = (tensor, value)
        planes = whole(self._reordered[key][0])
        if len(distinct) == len(where):
            return replace(planes, sole=False)
        assert planes.channels is not None
        return Value(like.planes.placed_shape, planes.tensors, planes.channels[where], sole=False)

    def shape(self, node: ir.Node, index: int) -> tuple[int, ...]:
        """Of an input, computed or constant."""
        constant = self.constant(node, index)
        return tuple(constant.shape) if constant is not None else self.raw(node, index).shape

    def narrowed(self, value: Value) -> Value:
        """Whole numbers as float32, exact up to 2^24.

        Raises:
            Unsupported: it is float64, which would lose what it is for.
        """
        if value.dtype == "float64":
            raise Unsupported("not in float64; convert the model to float32, weights and all (PyTorch: model.float())")
        return self.converted(value, F32, value.tensors[0].name)

    def converted(self, value: Value, dtype: str, name: str) -> Value:
        """A dense array's numbers as those of another type of the arena; once for all who ask."""
        if value.dtype == dtype:
            return value
        key = (value.tensors[0], dtype)
        if key not in self._converted:
            writer = self._writer[value.tensors[0]]
            n, width = value.placed_shape
            tensor = Tensor(f"{name}.{dtype}", (n, width // lanes(value.dtype) * lanes(dtype)))
            label = self.unique(tensor.name)
            if isinstance(writer.workload, Cast) and is_import(writer) and value.dtype != F32:
                work = replace(writer.workload, target=dtype)
                self.add(Draft(label, work, [], tensor, external=writer.external))
            else:
                self.add(Draft(label, Cast("within", value.shape, value.dtype, dtype), [value], tensor))
            self._converted[key] = tensor
        return Value(value.shape, (self._converted[key],), sole=False, dtype=dtype)

    def typed(self, node: ir.Node, index: int, dtype: str) -> Value:
        """An input as a dense array of numbers of type ``dtype``, constants brought into the arena."""
        name, constant = node.outputs[0].name or "", self.constant(node, index)
        if constant is not None:
            return self.brought(name, constant, dtype)
        return self.converted(self.dense(self.held(node, index), name), dtype, name)

    def type_of(self, node: ir.Node, index: int = 0) -> str:
        """numpy's name of the type that an input has in the model."""
        source = node.inputs[index] if index < len(node.inputs) else None
        constant = self.constant(node, index)
        if constant is not None:
            return str(constant.dtype)
        if source is not None and source.dtype is not None:
            return TYPES.get(source.dtype, "")
        ours = self._values.get(source) if source is not None else None
        return ours.dtype if isinstance(ours, Value) else F32 if ours is not None else ""

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
            if isinstance(writer.workload, Convert) and is_import(writer):
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
            if writer is not None and is_import(writer):
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
        own = node.op_type in MOVES and str(constant.dtype) in WIDE
        return self.brought(node.outputs[0].name or "", constant, str(constant.dtype) if own else F32)

    def brought(self, name: str, constant: npt.NDArray[np.generic], dtype: str = F32) -> Value:
        """A constant as a dense array of ``dtype`` in the arena."""
        numbers = exact(constant) if dtype == F32 else as_lanes(constant, dtype)
        rows = constant.shape[0] if constant.ndim else 1
        placed = (rows, prod(constant.shape[1:]) * lanes(dtype))
        tensor = Tensor(f"{name}.constant", placed)
        self.add(Draft(self.unique(tensor.name), Constant(placed), [], tensor, {"value": numbers.reshape(placed)}))
        return Value(constant.shape, (tensor,), sole=False, dtype=dtype)

    def constant_planes(self, node: ir.Node, values: Array) -> Value:
        """Constant planes [N, C, H, W] in the arena."""
        tensor = Tensor(f"{node.outputs[0].name}.constant", values.shape)
        self.add(Draft(self.unique(tensor.name), Constant(values.shape), [], tensor, {"value": values}))
        return replace(whole(tensor), sole=False)

    def of_channels(self, node: ir.Node, x: Value, tables: list[npt.NDArray[np.int64]]) -> Value:
        """[N, C]: the elements of a dense array that ``tables`` (of images, channels and more) name."""
        shape = (len(tables[0]), len(tables[1]))
        key = (x.tensors[0], shape, digest(tables[:2]))
        if key not in self._reordered:
            tensor = Tensor(f"{node.outputs[0].name}.channels", shape)
            constants: dict[str, Array] = {"axis0": tables[0], "axis1": tables[1]}  # type: ignore[dict-item]
            self.add(Draft(self.unique(tensor.name), Take(x.shape, shape, digest(tables[:2])), [x], tensor, constants))
            self._reordered[key] = (tensor, x)
        return Value(shape, (self._reordered[key][0],), sole=False)

    def more_outputs(self, node: ir.Node) -> bool:
        """Does anybody want an output of the node beyond the first?"""
        return any(value.uses() or value.is_graph_output() for value in node.outputs[1:])

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

    def set(self, node: ir.Node, value: Value | Tokens, index: int = 0) -> None:
        """The node's output is ``value``."""
        planes = value.value() if isinstance(value, Tokens) else None
        self._values[node.outputs[index]] = value if planes is None else planes

    def result(self, node: ir.Node, index: int = 0) -> Value:
        """What the node's output is by now, for a handler that goes on with it."""
        return self.ordinary(self._values[node.outputs[index]])

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
        constants: dict[str, Array] | None = None, index: int = 0, name: str = "", dtype: str = F32,
    ) -> Value:  # fmt: skip
        """Append a step that writes a dense array of ``shape`` and ``dtype``, the node's output ``index``."""
        output = node.outputs[index].name or node.op_type
        tensor = Tensor(output, (shape[0] if shape else 1, prod(shape[1:]) * lanes(dtype)))
        self.add(Draft(self.unique(name or node.name or output), workload, inputs, tensor, constants or {}))
        value = Value(shape, (tensor,), dtype=dtype)
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
        shape = target if shape is None else shape
        if dense.dtype != F32:
            return self._take_typed(node, dense, tables, fill, index, shape)
        take = Take(dense.shape, target, digest(tables), fill)
        return self.dense_step(node, take, [dense], shape, constants, index)

    def _take_typed(
        self, node: ir.Node, x: Value, tables: list[npt.NDArray[np.int64]], fill: float, index: int,
        shape: tuple[int, ...],
    ) -> Value:  # fmt: skip
        """A move of elements that are one or two lanes each; what is filled in is put there by a step of its own."""
        width, target = lanes(x.dtype), tuple(len(table) for table in tables)
        each = [np.where(t < 0, t, t * width) for t in tables] + [np.arange(width)]
        constants = {f"axis{i}": table for i, table in enumerate(each)}
        take = Take((*x.shape, width), (*target, width), digest(each))
        moved = self.dense_step(node, take, [x], shape, constants, index, dtype=x.dtype)
        if fill == 0 or all((t >= 0).all() for t in tables):
            return moved
        name = node.outputs[index].name or ""
        inside = self.brought(name, (spread(tables) >= 0).reshape(shape))
        number = self.brought(name, np.full(1, fill).astype(x.dtype), x.dtype)
        work = TypedElementwise("where", x.dtype, (shape, shape, (1,)))
        return self.dense_step(node, work, [inside, moved, number], shape, None, index, dtype=x.dtype)

    def to_rows(self, node: ir.Node, value: Value) -> Value:
        """``value`` as rows: pixels flattened in (channel, row, column) order."""
        return self.dense(value, node.outputs[0].name or "").matrix(len(value.shape) - 1)


def layer_name(node: ir.Node) -> str:
    """The name of a layer as its author knows it: that of its weight without the ending, if it has one."""
    weight = node.inputs[1]
    name = weight.name if weight is not None else None
    return layer_of(name or "") or node.name or node.outputs[0].name or node.op_type


def separable(tables: list[npt.NDArray[np.int64]], width: int) -> bool:
    """Does every row of the result come from one row of ``width`` source elements?"""
    last, rows = tables[-1], spread(tables[:-1]).reshape(-1)
    used = last[last >= 0]
    return bool((used < width).all() and not (rows[rows >= 0] % width).any())


def _counts(tables: list[npt.NDArray[np.int64]]) -> bool:
    """Does this move move nothing?"""
    return all(np.array_equal(a, b) for a, b in zip(tables, counting([len(t) for t in tables]), strict=True))


def counting(shape: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """The tables of a move that moves nothing: change them to say what does."""
    return [np.arange(d, dtype=np.int64) * s for d, s in zip(shape, row_major(shape), strict=True)]


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
