"""A torch model as torch.fx's graph, run part by part: what calibration and reconstruction look at layers with.

torch.fx gives the order of operators; the modules themselves stay what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from colonnade.errors import UserError
from colonnade.sparsify.masks import evaluating

Weighted = (nn.Conv1d, nn.Conv2d, nn.Linear)
Norms = (nn.BatchNorm1d, nn.BatchNorm2d)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    """Weighted layers and norms are leaves, also when they carry masks."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (*Weighted, *Norms)) or super().is_leaf_module(module, qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a model. Raises UserError where its forward pass depends on values."""
    try:
        return _written_out(_Tracer().trace(model), model)
    except Exception as error:  # whatever a forward method does with a Proxy
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{type(model).__name__} cannot be traced ({reason[0] if reason else type(error).__name__}): "
            "export it to ONNX and prune the file"
        ) from error


def _written_out(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """What works in place gives a value of its own, which all that stands behind it reads instead of the argument."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        changed = (
            getattr(model.get_submodule(str(node.target)), "inplace", False) if node.op == "call_module"
            else node.target in IN_PLACE or bool(node.kwargs.get("inplace")) if node.op == "call_function"
            else node.op == "call_method" and str(node.target).endswith("_")
        )  # fmt: skip
        if changed and node.args and isinstance(first := node.args[0], fx.Node):
            for user in [user for user in first.users if position[user] > position[node]]:
                user.replace_input_with(first, node)
    return graph


def ordered(graph: fx.Graph) -> list[fx.Node]:
    """Nodes in an order in which the operand of an addition that has fewer operators behind it is computed first, so
    that the deeper one (more weights) can make up for its errors. Placeholders lead, the output is left out."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[other] for other in node.all_input_nodes), default=0)
    output = next(node for node in graph.nodes if node.op == "output")
    done: dict[fx.Node, None] = {node: None for node in graph.nodes if node.op == "placeholder"}
    stack = list(output.all_input_nodes)
    while stack:
        node = stack[-1]
        missing = sorted((other for other in node.all_input_nodes if other not in done), key=lambda other: depth[other])
        if missing and node not in done:
            stack.append(missing[0])
            continue
        done.setdefault(stack.pop())
    return list(done)


def batches(calibration: Any, model: nn.Module) -> list[tuple[Tensor, ...]]:
    """The inputs of calibration batches: tensors, or tuples of (inputs, targets) as data loaders give them; floats in
    the model's precision. Raises UserError where they are no tensors, none, or do not fit the model."""
    if isinstance(calibration, Tensor):
        calibration = torch.split(calibration, 32)
    found: list[tuple[Tensor, ...]] = []
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(0))
    for batch in cast(Iterable[Any], calibration):
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(inputs, Tensor):
            raise UserError(f"calibration holds {type(inputs).__name__}: expected tensors or (inputs, targets) batches")
        if inputs.ndim and len(inputs):
            found.append((inputs.detach().to(first.dtype) if inputs.is_floating_point() else inputs,))
    if not found:
        raise UserError("calibration holds no input")
    one = found[0][0][:1]
    try:
        with torch.no_grad(), evaluating(model):
            model(one.to(first.device))
    except RuntimeError as error:
        shape = "x".join(map(str, one.shape))
        raise UserError(
            f"a calibration input ({shape}, {str(one.dtype).removeprefix('torch.')}) does not fit "
            f"{type(model).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    except TypeError:
        pass  # of another number of inputs, which whoever traces the model says
    return found


class Runner:
    """Runs parts of a model's graph on values held by name."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.nodes = ordered(graph)
        self.output = next(node for node in graph.nodes if node.op == "output")
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.needed = [node for node in self.placeholders if node.users]
        if len(self.needed) != 1:
            raise UserError(f"{type(model).__name__} takes {len(self.needed)} inputs: calibration supports one")
        position = {node: at for at, node in enumerate(self.nodes)}
        position[self.output] = len(self.nodes)
        self.last_use = {
            node: max((position[user] for user in node.users if user in position), default=-1) for node in self.nodes
        }
        self.position = position

    def run(self, first: int, stop: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run nodes[first:stop]; returns the values used at or after `stop`."""
        known = dict(values)
        for node in self.nodes[first:stop]:
            if node.op != "placeholder":
                known[node.name] = self._call(node, known, values)
        kept = {}
        for node in self.nodes[:stop]:
            if self.last_use[node] >= stop and node.name in known:
                kept[node.name] = values.get(node.name, known[node.name])
        return kept

    def answers(self, first: int, values: Mapping[str, Any]) -> Tensor:
        """What the model gives, from nodes[first] on. Raises UserError where that is more than one tensor."""
        last = self.output.args[0]
        if not isinstance(last, fx.Node):
            raise UserError(f"{type(self.model).__name__} returns more than one value: expected one tensor")
        self.last_use[last] = len(self.nodes)
        return cast(Tensor, self.run(first, len(self.nodes), values)[last.name]).float()

    def live(self, at: int) -> list[fx.Node]:
        """Values computed before nodes[at] and used at or after it."""
        return [node for node in self.nodes[:at] if self.last_use[node] >= at]

    def _call(self, node: fx.Node, known: dict[str, Any], held: Mapping[str, Any]) -> Any:
        def look(argument: fx.Node) -> Any:
            value = known[argument.name]
            if isinstance(value, Tensor) and value.dtype == torch.float16 and argument.name in held:
                value = known[argument.name] = value.float()
            return value

        def own(args: tuple[Any, ...]) -> tuple[Any, ...]:
            """Arguments of an operator that works in place: others may still want its first one."""
            first = node.args[0]
            spent = (
                isinstance(first, fx.Node) and self.last_use[first] == self.position[node] and self._fresh(first, held)
            )
            if spent and not torch.is_grad_enabled():
                return args
            return (args[0].clone(), *args[1:])

        args = cast(tuple[Any, ...], fx.node.map_arg(node.args, look))
        kwargs = cast(dict[str, Any], fx.node.map_arg(node.kwargs, look))
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if getattr(module, "inplace", False):
                args = own(args)
            return module(*args, **kwargs)
        if node.op == "call_function":
            if node.target in IN_PLACE or kwargs.get("inplace"):
                args = own(args)
            return cast(Any, node.target)(*args, **kwargs)
        if node.op == "call_method":
            if str(node.target).endswith("_"):
                args = own(args)
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            found: Any = self.model
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        raise UserError(f"cannot run {node.op} {node.name}")

    def _fresh(self, node: fx.Node, held: Mapping[str, Any]) -> bool:
        """Whether a value has memory of its own: it is neither held nor a view of another one. (What works in place was
        given such.)"""
        if node.name in held:
            return False
        if node.op == "call_module":
            return isinstance(self.model.get_submodule(str(node.target)), (*Weighted, *Norms))
        return node.op == "call_function" and node.target in (*ADDITIONS, *IN_PLACE)
