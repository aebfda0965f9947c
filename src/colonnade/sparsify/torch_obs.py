"""Second-order pruning of torch modules, on the device their weights are on.

Weights change in place. What a layer's mean output loses goes into its bias or, where a BatchNorm follows, into that
one's running mean.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.arrays import Arrays, HostArrays, NumpyArrays, TorchArrays
from colonnade.sparsify.masks import remove_masks, set_mask
from colonnade.sparsify.samples import Layer, Rectifier, Values
from colonnade.sparsify.sequential import LayerResult, Options, prune_chain
from colonnade.sparsify.torch_graph import ADDITIONS, Norms, Runner, Weighted, batches, trace
from colonnade.sparsify.transformed import sizes
from colonnade.sparsify.winograd_torch import WinogradConv2d

# Modules, functions and methods, and what their output reaches at most.
RECTIFIERS: dict[Any, float] = {
    nn.ReLU: math.inf, nn.ReLU6: 6.0, torch.relu: math.inf, torch.relu_: math.inf, functional.relu: math.inf,
    functional.relu6: 6.0, "relu": math.inf, "relu_": math.inf,
}  # fmt: skip


def _ordered(value: Any, order: torch.memory_format) -> Any:
    """Maps with their values in this order; anything else as it is."""
    maps = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=order) if maps else value


class TorchChain:
    """A model as `sequential.Chain`. names: the layers that begin stages, in any order."""

    def __init__(self, model: nn.Module, names: Iterable[str], calibration: Sequence[tuple[Tensor, ...]]) -> None:
        self.model = model
        self.runner = Runner(model, trace(model))
        self.calibration = calibration
        self.order = torch.channels_last  # convolutions are quickest in it
        wanted = set(names)
        nodes = [n for n in self.runner.nodes if n.op == "call_module" and str(n.target) in wanted]
        calls: dict[str, int] = {}
        for node in nodes:
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        self.skipped = {name for name, count in calls.items() if count > 1} | (wanted - set(calls))
        self.starts = [node for node in nodes if str(node.target) not in self.skipped]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.arrays: Arrays = HostArrays() if device.type == "cpu" else TorchArrays(device)
        self.device = device
        self.tokens = self._linear_over_tokens()
        self.layers = [self._layer(node) for node in self.starts]
        self.bounds = [0, *(self.runner.position[node] for node in self.starts), len(self.runner.nodes)]

    def _linear_over_tokens(self) -> set[str]:
        """Linear layers whose inputs have tokens beside samples and features: BatchNorms behind them are over these."""
        linear = [str(node.target) for node in self.starts if isinstance(self._module(node), nn.Linear)]
        found: set[str] = set()

        def look(name: str, given: tuple[Any, ...]) -> None:
            if given[0].ndim > 2:
                found.add(name)

        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: look(name, given))
            for name in linear
        ]
        try:
            if linear and self.calibration:
                with torch.no_grad():
                    self.runner.answers(0, {self.runner.needed[0].name: self.calibration[0][0][:1].to(self.device)})
        except (RuntimeError, UserError, IndexError):  # what is wrong with the inputs shows where all of them are run
            found.update(linear)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(str(node.target))

    def norm(self, node: fx.Node) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
        """The BatchNorm that is the only reader of a layer, and of no other; of a linear layer, one over features."""
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or str(node.target) in self.tokens:
            return None
        if sum(other.op == "call_module" and other.target == users[0].target for other in self.runner.nodes) > 1:
            return None
        module = self.model.get_submodule(str(users[0].target))
        return module if isinstance(module, Norms) and module.track_running_stats else None

    def _layer(self, node: fx.Node) -> Layer:
        module = cast(nn.Conv2d | nn.Linear, self.model.get_submodule(str(node.target)))
        norm = self.norm(node)
        scale: Floats | None = None
        end = node
        if norm is not None:
            end = next(iter(node.users))
            spread = (cast(Tensor, norm.running_var) + norm.eps).sqrt()
            gain = norm.weight if norm.affine else torch.ones_like(spread)
            scale = (gain / spread).detach().cpu().numpy()
        weight = np.asarray(module.weight.detach().float().cpu().numpy() / _sizes(module), np.float32)
        source = node.all_input_nodes[0].name
        residual = self._residual(node, end)
        intercept = norm is not None or module.bias is not None
        rectifier = self._rectifier(end if residual is None else next(iter(end.users)), module, norm, scale)
        if isinstance(module, nn.Linear):
            return Layer(
                str(node.target), weight, source, scale=scale, residual=residual, intercept=intercept,
                rectifier=rectifier,
            )  # fmt: skip
        two = [part if len(part) == 2 else (1, *part) for part in (module.stride, module.dilation)]
        return Layer(
            str(node.target), weight, source, (two[0][0], two[0][1]), _padding(module), (two[1][0], two[1][1]),
            module.groups, scale, residual, intercept, rectifier,
            module.size if isinstance(module, WinogradConv2d) else "",
        )  # fmt: skip

    def _residual(self, node: fx.Node, end: fx.Node) -> str | None:
        """What is added to the layer's (scaled) output and is known before the layer runs."""
        users = list(end.users)
        if len(users) != 1 or users[0].target not in (*ADDITIONS, "add", "add_"):
            return None
        others = [other for other in users[0].args if other is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or users[0].kwargs:
            return None
        known = self.runner.position[others[0]] < self.runner.position[node]
        return others[0].name if known else None

    def _rectifier(
        self, end: fx.Node, module: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d | None, scale: Floats | None
    ) -> Rectifier | None:
        """The ReLU or ReLU6 that is the only reader of a layer's (scaled) output, or of its sum with the residual."""
        users = list(end.users)
        most = self._most(users[0]) if len(users) == 1 else None
        if most is None:
            return None
        bias = cast(Tensor | None, module.bias)
        offset = torch.zeros(len(cast(Tensor, module.weight))) if bias is None else bias.detach().float().cpu()
        if norm is not None and scale is not None:
            shift = torch.zeros(()) if norm.bias is None else norm.bias.detach().cpu()
            offset = (offset - cast(Tensor, norm.running_mean).cpu()) * torch.from_numpy(scale) + shift
        return Rectifier(offset.numpy().astype(np.float32), most)

    def _most(self, node: fx.Node) -> float | None:
        """What a ReLU's output reaches at most; None for everything else."""
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return RECTIFIERS.get(type(module))
        return RECTIFIERS.get(node.target)

    def inputs(self) -> list[Values]:
        name = self.runner.needed[0].name
        return [{name: self._out(batch[0].detach().to(self.device))} for batch in self.calibration]

    def _out(self, value: Any) -> Any:
        """A value as the solver's arrays, in the same memory."""
        return value.numpy() if isinstance(value, Tensor) and isinstance(self.arrays, NumpyArrays) else value

    @torch.no_grad()
    def run(self, stage: int, values: Values) -> Values:
        given = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
        try:
            found = self._run(stage, given)
        except RuntimeError:  # a model may look at maps in a way that only their usual order allows
            if self.order is torch.contiguous_format:
                raise
            self.order = torch.contiguous_format
            found = self._run(stage, given)
        # What is passed on stays the same object: that is how equal values of both models are known.
        return {name: values[name] if name in values else self._out(value) for name, value in found.items()}

    def _run(self, stage: int, given: Values) -> Values:
        ordered = {name: _ordered(value, self.order) for name, value in given.items()}
        return self.runner.run(self.bounds[stage], self.bounds[stage + 1], ordered)

    @contextlib.contextmanager
    def changed(self, layer: Layer, weight: Floats, bias: Floats) -> Iterator[None]:
        """`assign`, undone at the end."""
        module = cast(nn.Conv2d | nn.Linear, self.model.get_submodule(layer.name))
        norm = self.norm(self.starts[self.layers.index(layer)])
        tensors = [module.weight, module.bias, None if norm is None else norm.running_mean]
        stored = [(tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None]
        self.assign(layer, weight, bias)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in stored:
                    tensor.copy_(before)

    @torch.no_grad()
    def assign(self, layer: Layer, weight: Floats, bias: Floats) -> None:
        module = cast(nn.Conv2d | nn.Linear, self.model.get_submodule(layer.name))
        node = self.starts[[other.name for other in self.layers].index(layer.name)]
        stored = module.weight
        module.weight.copy_(torch.from_numpy(weight * _sizes(module)).to(stored.device, stored.dtype))
        norm = self.norm(node)
        added = torch.from_numpy(bias).to(stored.device, stored.dtype)
        if module.bias is not None:
            module.bias += added
        elif norm is not None:
            cast(Tensor, norm.running_mean).sub_(added)


@torch.no_grad()
def second_order_(
    model: nn.Module,
    patterns: Mapping[str, ColumnPattern],
    calibration: Any,
    options: Options | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, LayerResult]:
    """Fit the named layers of ``model`` in place (see sequential.py); results by name, masks among them.

    Layers that the model calls more than once, or not at all, are left out of the result and as they were.
    Raises UserError if the model cannot be traced or the calibration inputs are no good; it is then as it was.
    """
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        raise UserError("method 'obs' needs a float32 model: call model.float() first, and convert it afterwards")
    given = batches(calibration, model)
    work = remove_masks(copy.deepcopy(model)).eval()
    for name in patterns:
        if parametrize.is_parametrized(work.get_submodule(name), "weight"):
            raise UserError(f"layer {name}: a parametrization computes its weight (weight_norm?): remove it first")
    chain = TorchChain(work, patterns, given)
    results = prune_chain(chain, dict(patterns), options, progress)
    for result in results:
        module = model.get_submodule(result.layer.name)
        work_weight = cast(Tensor, work.get_submodule(result.layer.name).weight)
        set_mask(module, torch.from_numpy(result.mask.copy()).to(work_weight.device), work_weight)
    for name, done in work.named_modules():  # without masks, unlike the model itself
        module = model.get_submodule(name)
        if isinstance(module, Weighted) and module.bias is not None:
            module.bias.copy_(cast(Tensor, done.bias))
        elif isinstance(module, Norms) and module.track_running_stats:
            cast(Tensor, module.running_mean).copy_(cast(Tensor, done.running_mean))
    return {result.layer.name: result for result in results}


def _sizes(module: nn.Module) -> Floats:
    """What weights in a `Layer` are divided by."""
    return sizes(module.size) if isinstance(module, WinogradConv2d) else np.ones(1, np.float32)


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, left, bottom, right). Raises UserError for padding that is not zeros."""
    if module.padding_mode != "zeros":
        raise UserError(f"padding_mode {module.padding_mode!r} is not supported by method 'obs'")
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return 0, 0, 0, 0
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        before = [part // 2 for part in whole]
        after = [part - half for part, half in zip(whole, before, strict=True)]
        before, after = [0] * (2 - len(before)) + before, [0] * (2 - len(after)) + after
        return before[0], before[1], after[0], after[1]
    padding = module.padding if len(module.padding) == 2 else (0, *module.padding)
    return padding[0], padding[1], padding[0], padding[1]
