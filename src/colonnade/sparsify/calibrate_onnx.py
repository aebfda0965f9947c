"""Second-order pruning of an ONNX graph: statistics are gathered by onnxruntime, one stage of the graph at a time.

No torch is needed; where it is installed, its products and factors are used. The graph is cut before every layer that
is to be pruned; a stage runs in a session of its own, on values that are held in memory, so nothing is computed twice
and only what is still needed is held.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.onnx_io import check_samples, graph_inputs
from colonnade.onnx_winograd import size_of
from colonnade.pattern import Floats
from colonnade.sparsify.arrays import host_arrays
from colonnade.sparsify.samples import Layer, Rectifier, Values
from colonnade.sparsify.transformed import sizes

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, npt.NDArray[Any]]
LARGEST_BATCH = 32


@dataclass(frozen=True, eq=False)
class Target:
    """A layer of the file that is to be pruned. rows_last: the stored weight is [K, OC]."""

    name: str
    node: onnx.NodeProto
    tensor: onnx.TensorProto
    rows_last: bool
    groups: int

    def stored(self, weight: Floats) -> Floats:
        """A layer's weight as the file has it."""
        if name := size_of(self.node.domain, self.node.op_type):
            return np.asarray(weight * sizes(name), np.float32)
        return weight.T if self.rows_last else weight


def unfit(node: onnx.NodeProto, graph: onnx.GraphProto) -> str | None:
    """Why a layer's statistics cannot be gathered, or None. Such layers are pruned by magnitude."""
    stored = {tensor.name: len(tensor.dims) for tensor in graph.initializer} | {
        other.output[0]: len(attribute.t.dims)
        for other in graph.node
        if other.op_type == "Constant"
        for attribute in other.attribute
    }
    if node.op_type == "Conv":
        if stored.get(node.input[1], 4) not in (3, 4):
            return "kernels of three axes"
        if _text(node, "auto_pad", "NOTSET") != "NOTSET":
            return f"auto_pad {_text(node, 'auto_pad', '')}"
    elif node.op_type == "Gemm":
        if any(_number(node, name, 1.0) != 1.0 for name in ("alpha", "beta")) or _number(node, "transA", 0):
            return "a Gemm with factors or a transposed input"
    elif node.op_type == "MatMul" and node.input[1] not in stored:
        return "weights on the left of the product"
    if node.input[1] not in stored:
        return "weights behind another operator"
    return None


class OnnxChain:
    """A graph as `sequential.Chain`. Weights and biases of `model` change in place.

    inputs: the graph's inputs, each with all calibration samples along axis 0.

    Raises UserError for control flow, inputs that do not fit the graph, and graphs that onnxruntime cannot run.
    """

    def __init__(self, model: onnx.ModelProto, targets: Sequence[Target], inputs: Arrays) -> None:
        self.model = model
        self.graph = model.graph
        self.arrays = host_arrays()
        if any(attribute.HasField("g") for node in self.graph.node for attribute in node.attribute):
            raise UserError("calibration runs no graph with If, Loop or Scan: use --method magnitude without --balance")
        self.constants = _constants(self.graph)
        self.nodes = _ordered(self.graph, self.constants)
        self.given = _checked(self.graph, inputs)
        self.users: dict[str, list[int]] = {}
        for at, node in enumerate(self.nodes):
            for name in node.input:
                self.users.setdefault(name, []).append(at)
        self.made = {name: at for at, node in enumerate(self.nodes) for name in node.output}
        self.outputs = {value.name for value in self.graph.output}
        places = {node.output[0]: at for at, node in enumerate(self.nodes)}
        self.targets = sorted(targets, key=lambda target: places[target.node.output[0]])
        self.starts = [places[target.node.output[0]] for target in self.targets]
        self.bounds = [0, *self.starts, len(self.nodes)]
        self.layers = [self._layer(target, at) for target, at in zip(self.targets, self.starts, strict=True)]
        self.kinds: dict[str, Any] = {}
        self.sessions: dict[int, Any] = {}

    def inputs(self, parts: int = 1) -> Sequence[Values]:
        """The calibration inputs; where the graph leaves the batch free, in so many batches at least."""
        first = next(iter(self.given.values()))
        batch = _batch(self.graph) or max(1, min(LARGEST_BATCH, len(first) // parts))
        if len(first) < batch:
            raise UserError(f"calibration holds {len(first)} inputs, fewer than the model's batch of {batch}")
        starts = range(0, len(first) - batch + 1, batch)
        return [{name: array[at : at + batch] for name, array in self.given.items()} for at in starts]

    def run(self, stage: int, values: Values) -> Values:
        first, stop = self.bounds[stage], self.bounds[stage + 1]
        part = self.nodes[first:stop]
        inside = {name for node in part for name in node.output if name}
        read = {name for node in part for name in node.input if name and name not in self.constants} - inside
        written = sorted(name for name in inside if self._last_use(name) >= stop)
        results: dict[str, Any] = {}
        if written:
            feed = {name: self.whole(name, values[name]) for name in sorted(read)}
            session = self._session(stage, part, feed, written)
            try:
                found = session.run(written, feed)
            except Exception as error:  # onnxruntime has its own exception for every kind
                raise UserError(f"onnxruntime cannot run the model on the calibration inputs: {_line(error)}") from None
            results = dict(zip(written, found, strict=True))
            for name, value in results.items():
                self.kinds[name] = value.dtype
        kept = {name: value for name, value in values.items() if self._last_use(name) >= stop}
        return {**kept, **results}

    def assign(self, layer: Layer, weight: Floats, bias: Floats) -> None:
        import onnx

        at = next(index for index, other in enumerate(self.layers) if other is layer)
        target = self.targets[at]
        stored = target.stored(weight)
        name = target.tensor.name
        target.tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(stored), name))
        self.constants[target.node.input[1]] = onnx.numpy_helper.from_array(
            np.ascontiguousarray(stored), target.node.input[1]
        )
        if layer.intercept:
            self._add_bias(target, self.nodes[self.starts[at]], bias)
        self.sessions.pop(at + 1, None)

    def _add_bias(self, target: Target, node: onnx.NodeProto, bias: Floats) -> None:
        import onnx

        old = node.input[2] if len(node.input) > 2 else ""
        values = bias + (onnx.numpy_helper.to_array(self.constants[old]).reshape(-1) if old else np.float32(0))
        users = [at for at in self.users.get(old, []) if old]
        taken = {value for other in self.graph.node for value in (*other.input, *other.output)} | set(self.constants)
        name = old
        if not old or len(users) > 1:
            stem = f"{target.tensor.name}_bias"
            name = next(
                n for n in (f"{stem}{end}" for end in itertools.chain([""], itertools.count(1))) if n not in taken
            )
        tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)
        stored = next((other for other in self.graph.initializer if other.name == name), None)
        constant = next((n for n in self.graph.node if n.op_type == "Constant" and n.output[0] == name), None)
        if stored is not None:
            stored.CopyFrom(tensor)
        elif constant is not None:
            next(a for a in constant.attribute if a.name == "value").t.CopyFrom(tensor)
        else:
            self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        for changed in (node, target.node):
            while len(changed.input) < 3:
                changed.input.append("")
            changed.input[2] = name
        if name != old and not any(old in other.input for other in self.graph.node):
            for left in [tensor for tensor in self.graph.initializer if tensor.name == old]:
                self.graph.initializer.remove(left)

    def _last_use(self, name: str) -> int:
        if name in self.outputs:
            return len(self.nodes) - 1 if name not in self.users else max(self.users[name])
        return max(self.users.get(name, [-1]))

    def whole(self, name: str, value: Any) -> Any:
        """A value, held in half precision perhaps, in the precision that the graph gives it."""
        kind = self.kinds.get(name)
        return np.ascontiguousarray(value if kind is None or value.dtype == kind else value.astype(kind))

    def _session(self, stage: int, part: Sequence[onnx.NodeProto], feed: Arrays, written: Sequence[str]) -> Any:
        """The stage's session; sessions of stages whose weights changed are made anew."""
        if stage in self.sessions:
            return self.sessions[stage]
        import onnx
        import onnxruntime

        helper = onnx.helper
        used = sorted({name for node in part for name in node.input if name in self.constants})
        graph = helper.make_graph(
            list(part),
            "stage",
            [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), None) for n, v in feed.items()],
            [helper.make_empty_tensor_value_info(name) for name in written],
            [self.constants[name] for name in used],
        )
        model = helper.make_model(graph, opset_imports=list(self.model.opset_import), ir_version=self.model.ir_version)
        model.functions.extend(self.model.functions)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        options.log_severity_level = 3
        # Threads that wait sleep: spinning, they take the cores from others and from each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(f"onnxruntime cannot run the model: {_line(error)}") from None
        self.sessions = {stage: session}  # one at a time: each holds a copy of its weights
        return session

    def _layer(self, target: Target, at: int) -> Layer:
        import onnx

        node = self.nodes[at]
        stored = onnx.numpy_helper.to_array(target.tensor)
        weight = np.ascontiguousarray(stored.T if target.rows_last else stored).astype(np.float32)
        end, scale = node.output[0], None
        # behind a MatMul axis 1, which a BatchNormalization is over, may be tokens
        norm = self._only_user(end) if node.op_type != "MatMul" else None
        if norm is not None and norm.op_type == "BatchNormalization" and {*norm.input[1:]} <= set(self.constants):
            gain, spread = (onnx.numpy_helper.to_array(self.constants[norm.input[at]]) for at in (1, 4))
            scale = (gain / np.sqrt(spread + _number(norm, "epsilon", 1e-5))).astype(np.float32)
            end = norm.output[0]
        residual = None
        addition = self._only_user(end)
        if addition is not None and addition.op_type == "Add":
            other = next((name for name in addition.input if name != end), None)
            known = other in self.given or self.made.get(other or "", len(self.nodes)) < at
            residual = other if other not in self.constants and known else None
            end = addition.output[0] if residual is not None else end
        bias = node.input[2] if len(node.input) > 2 else ""
        plain = not bias or (bias in self.constants and int(np.prod(self.constants[bias].dims)) == len(weight))
        common: dict[str, Any] = {"scale": scale, "residual": residual, "intercept": node.op_type != "MatMul" and plain}
        most = self._most(self._only_user(end))
        if most is not None and plain:
            offset = onnx.numpy_helper.to_array(self.constants[bias]).reshape(-1) if bias else np.zeros(len(weight))
            if norm is not None and scale is not None:
                shift, mean = (onnx.numpy_helper.to_array(self.constants[norm.input[at]]) for at in (2, 3))
                offset = (offset - mean) * scale + shift
            common["rectifier"] = Rectifier(offset.astype(np.float32), most)
        if name := size_of(node.domain, node.op_type):
            weight = (weight / sizes(name)).astype(np.float32)
            return Layer(target.name, weight, node.input[0], padding=(1, 1, 1, 1), winograd=name, **common)
        if node.op_type != "Conv":
            return Layer(target.name, weight, node.input[0], **common)
        axes = weight.ndim - 2
        strides, dilation = _numbers(node, "strides", [1] * axes), _numbers(node, "dilations", [1] * axes)
        pads = _numbers(node, "pads", [0] * (2 * axes))
        if axes == 1:
            strides, dilation, pads = [1, *strides], [1, *dilation], [0, pads[0], 0, pads[1]]
        return Layer(
            target.name, weight, node.input[0], (strides[0], strides[1]), (pads[0], pads[1], pads[2], pads[3]),
            (dilation[0], dilation[1]), target.groups, **common,
        )  # fmt: skip

    def _most(self, node: onnx.NodeProto | None) -> float | None:
        """What the output of a Relu, or of a Clip from 0 on, reaches at most; None for everything else."""
        import onnx

        if node is None or node.op_type not in ("Relu", "Clip"):
            return None
        if node.op_type == "Relu":
            return math.inf
        ends = [self.constants.get(name) for name in node.input[1:]]
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            return None
        low, high = (float(onnx.numpy_helper.to_array(end)) for end in ends if end is not None)
        return high if low == 0 else None

    def _only_user(self, name: str) -> onnx.NodeProto | None:
        users = self.users.get(name, [])
        return self.nodes[users[0]] if len(users) == 1 and name not in self.outputs else None


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    import onnx

    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        value = next((attribute for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
            found[node.output[0]] = tensor
    return found


def _ordered(graph: onnx.GraphProto, constants: Mapping[str, Any]) -> list[onnx.NodeProto]:
    """Nodes in an order in which the operand of an addition with fewer operators behind it comes first, so that the
    deeper one, with more weights, can make up for its errors. Nodes that nothing needs are left out."""
    made = {
        name: node
        for node in graph.node
        if node.op_type != "Constant" or node.output[0] not in constants
        for name in node.output
        if name
    }
    depth: dict[str, int] = {}
    for node in graph.node:
        level = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, level))
    done: dict[str, onnx.NodeProto] = {}
    stack = [value.name for value in reversed(graph.output)]
    while stack:
        node_or_none = made.get(stack[-1])
        if node_or_none is None or node_or_none.output[0] in done:
            stack.pop()
            continue
        node = node_or_none
        missing = [name for name in node.input if name in made and made[name].output[0] not in done]
        if missing:
            stack.append(min(missing, key=lambda name: depth[name]))
            continue
        done[node.output[0]] = node
        stack.pop()
    return list(done.values())


def _batch(graph: onnx.GraphProto) -> int:
    """The batch that the graph's inputs fix; 0 where it is free."""
    for value in graph_inputs(graph):
        if value.type.tensor_type.shape.dim:
            return int(value.type.tensor_type.shape.dim[0].dim_value)
    return 0


def _checked(graph: onnx.GraphProto, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Calibration samples for every input of the graph, in its type. Raises UserError for those that do not fit."""
    import onnx

    wanted = graph_inputs(graph)
    if len(wanted) == 1 and len(inputs) == 1:
        inputs = {wanted[0].name: next(iter(inputs.values()))}
    names = ", ".join(value.name for value in wanted)
    for value in wanted:
        if value.name not in inputs:
            raise UserError(
                f"calibration holds {', '.join(inputs)}: expected an array for each input of the model: {names}"
            )
    found: dict[str, npt.NDArray[Any]] = {}
    for value in wanted:
        array = np.asarray(inputs[value.name])
        check_samples(value, array)
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        found[value.name] = array.astype(kind, copy=False)
    if len({len(array) for array in found.values()}) != 1:
        raise UserError("calibration inputs differ in their number of samples")
    return found


def _number(node: onnx.NodeProto, name: str, default: float) -> float:
    import onnx

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else float(onnx.helper.get_attribute_value(found))


def _numbers(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    import onnx

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else [int(value) for value in onnx.helper.get_attribute_value(found)]


def _text(node: onnx.NodeProto, name: str, default: str) -> str:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else found.s.decode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
