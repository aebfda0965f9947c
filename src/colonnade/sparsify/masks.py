"""Column-wise pruning of torch models in place: masks as parametrizations of the weights they belong to.

A mask is a buffer of its layer (torch.nn.utils.parametrize), so it goes wherever the layer goes: state_dict, deepcopy,
DataParallel and DistributedDataParallel, torch.compile, autocast. What the forward pass sees is the masked weight;
gradients of removed weights are exactly zero, and the stored values start at zero, so neither momentum nor weight
decay can bring one back.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.select import SCORES, as_matrix, from_matrix, select

Prunable = (nn.Conv1d, nn.Conv2d, nn.Linear)
# Listed with what happened, never pruned: the rows of their weights are inputs, or no kernel would use the zeros.
Unprunable: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "transposed convolution",
    nn.ConvTranspose2d: "transposed convolution",
    nn.ConvTranspose3d: "transposed convolution",
    nn.Conv3d: "three-dimensional convolution",
}


class ColumnMask(nn.Module):
    """The parametrization: a weight where ``mask`` (bool, of its shape) is true, zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with (0 * NaN would be NaN, so zeros are selected, not multiplied)."""
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when a weight is assigned: its kept values."""
        return self.forward(weight)


@dataclass(frozen=True)
class LayerPruning:
    """What happened to one layer. ``sparsity``: share of its weights that are zero. ``pattern`` None: left dense."""

    name: str
    shape: tuple[int, ...]
    pattern: ColumnPattern | None
    sparsity: float
    reason: str = ""


def masks(model: nn.Module) -> Iterator[tuple[str, ColumnMask]]:
    """(name of the weight, its mask) of every masked weight, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for part in cast(Iterable[nn.Module], cast(nn.ModuleDict, module.parametrizations)["weight"]):
                if isinstance(part, ColumnMask):
                    yield f"{name}.weight" if name else "weight", part


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time: BatchNorm's statistics stay as they are, and so do parts that were in it before."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _order(model: nn.Module, example_inputs: Any) -> list[str]:
    """Names of the layers with weights in the order in which they run (without inputs: of their registration)."""
    kinds: tuple[type[nn.Module], ...] = (*Prunable, *Unprunable)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    if example_inputs is None:
        return list(layers.values())
    order: list[str] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        if (name := layers[module]) not in order:
            order.append(name)

    handles = [module.register_forward_pre_hook(note) for module in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _dense_by_default(order: list[str], model: nn.Module) -> dict[str, str]:
    """Layers that stay dense unless they are named: layer -> why."""
    reasons = _never(order, model)
    order = [name for name in order if name not in reasons]
    convolutions = [name for name in order if not isinstance(model.get_submodule(name), nn.Linear)]
    for name in convolutions:
        convolution = cast(nn.Conv2d, model.get_submodule(name))
        if convolution.groups > 1 and convolution.weight.shape[1] == 1:
            reasons[name] = "depthwise"
    if convolutions:
        reasons[convolutions[0]] = "stem"
    if len(order) > 1:
        reasons[order[-1]] = "classifier"
    return reasons


def prunable(model: nn.Module, example_inputs: Any, exclude: Iterable[str] = ()) -> dict[str, bool]:
    """The layers that `sparsify_` lists, in running order, and whether one pattern for all of them prunes each."""
    order, excluded = _order(model, example_inputs), list(exclude)
    reasons = _dense_by_default(order, model)
    return {name: name not in reasons and not any(_matches(key, name) for key in excluded) for name in order}


def check_excluded(model: nn.Module, example_inputs: Any, exclude: Iterable[str]) -> None:
    """Raises UserError for an ``exclude`` of `sparsify_` that names no layer: the one that it was meant for would be
    pruned."""
    order = _order(model, example_inputs)
    for key in exclude:
        if not any(_matches(key, name) for name in order):
            raise UserError(f"exclude {key!r} matches no layer: expected a name, glob or regular expression of {order}")


def _never(order: list[str], model: nn.Module) -> dict[str, str]:
    """Layers that cannot be pruned: layer -> why."""
    return {
        name: reason
        for name in order
        for kind, reason in Unprunable.items()
        if isinstance(model.get_submodule(name), kind)
    }


def _matches(key: str, name: str) -> bool:
    """Whether ``key``, a regular expression or a glob, means the whole of ``name``."""
    if key == name or fnmatch.fnmatchcase(name, key):
        return True
    try:
        return re.fullmatch(key, name) is not None
    except re.error:
        return False  # only a glob


def _choose(
    names: list[str], pattern: ColumnPattern | Mapping[str, ColumnPattern | None], reasons: Mapping[str, str]
) -> dict[str, ColumnPattern | None]:
    """The pattern of every layer; None: dense. A layer that is named exactly is pruned whatever its place."""
    if isinstance(pattern, ColumnPattern):
        return {name: None if name in reasons else pattern for name in names}
    chosen: dict[str, ColumnPattern | None] = {}
    unused = set(pattern)
    for name in names:
        chosen[name] = None
        for key, value in pattern.items():
            if _matches(key, name):
                unused.discard(key)
                chosen[name] = value if key == name or name not in reasons else None
                break
    for key in sorted(unused):
        if not any(_matches(key, name) for name in names):
            raise UserError(f"pattern {key!r} matches no layer: expected a name, glob or regular expression of {names}")
    return chosen


def sparsify_(
    model: nn.Module,
    pattern: ColumnPattern | Mapping[str, ColumnPattern | None],
    example_inputs: Any = None,
    *,
    score: str = "l1",
    group_rows: bool = True,
    exclude: Iterable[str] = (),
    method: str = "magnitude",
    calibration: Any = None,
    movable: bool = False,
) -> list[LayerPruning]:
    """Prune ``model`` column-wise, in place, and hold the zeros there by masks.

    model:          any module with convolutions and linear layers, in any mode and on any device.
    pattern:        one for all layers, or ``{glob or regular expression of layer names: pattern}``, of which the first
                    that matches counts (None: dense). Layers that nothing matches stay dense.
    example_inputs: a tensor or a tuple of them; the model runs once on them so that stem (the first convolution) and
                    classifier (the last layer) are known by the order in which layers run. Without, by their order
                    in the model. Both, and depthwise convolutions, stay dense unless named exactly.
    score:          "l1" or "l2": how the importance of a column is measured from its weights in a tile.
    group_rows:     put rows with similar columns into one tile, instead of consecutive ones.
    exclude:        globs or regular expressions of layers that stay dense.
    method:         "magnitude", or "obs": columns by second order, kept weights and biases (or BatchNorm's means)
                    fitted to the dense layers' outputs on calibration inputs, layer after layer. Layers that run more
                    than once go by magnitude.
    movable:        keep the values of removed weights, so that `finetune(…, rechoose=…)` may choose anew.
    calibration:    for "obs": a tensor of a few hundred inputs, or batches of them ((inputs, targets) will do).

    Returns what happened, layer by layer in running order. Raises UserError for unknown options, weights that are not
    finite, layers that share one weight, and models without anything to prune; the model is then as it was.
    Pruning a model a second time starts from the weights that are left.
    """
    if method not in ("magnitude", "obs"):
        raise UserError(f"method is {method!r}: expected 'magnitude' or 'obs'")
    if (method == "obs") != (calibration is not None):
        raise UserError("method 'obs' needs calibration=, and no other method takes it")
    if score not in SCORES:
        raise UserError(f"score is {score!r}: expected one of {', '.join(SCORES)}")
    order = _order(model, example_inputs)
    if len(order) == len(_never(order, model)):
        raise UserError(f"{type(model).__name__} has no convolution or linear layer to prune")
    never, reasons = _never(order, model), _dense_by_default(order, model)
    excluded = list(exclude)
    chosen = _choose(order, pattern, reasons)
    for name, one in chosen.items():
        if one is not None and one.winograd:
            plain = replace(one, winograd="")
            raise UserError(f"layer {name}: transform its weights by winograd_(model), and take {plain}")
    for name in order:
        if name in never and chosen[name] is not None:
            raise UserError(
                f"layer {name} is a {never[name]} ({type(model.get_submodule(name)).__name__}) and stays dense: "
                "take it out of the patterns"
            )
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner)
    planned: list[tuple[LayerPruning, Tensor | None]] = []
    for name in order:
        module = model.get_submodule(name)
        weight = cast(Tensor, module.weight)
        wanted, reason = chosen[name], reasons.get(name, "not named")
        if wanted is not None and any(_matches(key, name) for key in excluded):
            wanted, reason = None, "excluded"
        if wanted is None:
            planned.append((LayerPruning(name, tuple(weight.shape), None, _zeros(weight), reason), None))
            continue
        if not parametrize.is_parametrized(module, "weight"):
            if "weight" not in dict(module.named_parameters(recurse=False)):
                raise UserError(
                    f"layer {name}: a hook computes its weight (weight_norm, spectral_norm): remove that first"
                )
            if len(sharing := owners[id(weight)]) > 1:
                raise UserError(
                    f"layers {' and '.join(sharing)} share one weight: exclude them all, or give each a copy"
                )
        if not bool(torch.isfinite(weight.detach()).all()):
            raise UserError(f"layer {name}: its weights hold NaN or infinity: train or load it again")
        groups = int(getattr(module, "groups", 1))
        array = weight.detach().to("cpu", torch.float32).numpy()
        kept = select(as_matrix(array), wanted, groups=groups, score=score, similar_rows=group_rows).mask
        mask = torch.from_numpy(from_matrix(kept, array.shape).copy()).to(weight.device)
        planned.append((LayerPruning(name, tuple(weight.shape), wanted, 1 - float(mask.float().mean())), mask))
    if all(mask is None for _, mask in planned):
        raise UserError(f"nothing was pruned: every layer stays dense ({_summary(planned)}); name layers to prune them")
    if method == "obs":
        planned = _fit(model, planned, calibration, group_rows)
    for layer, chosen_mask in planned:
        if chosen_mask is not None and not movable:
            set_mask(model.get_submodule(layer.name), chosen_mask)
        elif layer.pattern is not None and movable:
            set_movable_mask(model.get_submodule(layer.name), chosen_mask, layer.pattern)
    return [layer for layer, _ in planned]


def _fit(
    model: nn.Module, planned: list[tuple[LayerPruning, Tensor | None]], calibration: Any, group_rows: bool
) -> list[tuple[LayerPruning, Tensor | None]]:
    """The plan with layers that could be fitted already masked, and their masks taken out of it."""
    from colonnade.sparsify.sequential import Options
    from colonnade.sparsify.torch_obs import second_order_

    patterns = {layer.name: layer.pattern for layer, mask in planned if mask is not None and layer.pattern is not None}
    fitted = second_order_(model, patterns, calibration, Options(similar_rows=group_rows))
    return [(layer, None if layer.name in fitted else mask) for layer, mask in planned]


def _summary(planned: Iterable[tuple[LayerPruning, Tensor | None]]) -> str:
    return ", ".join(f"{layer.name}: {layer.reason}" for layer, _ in planned)


def _zeros(weight: Tensor) -> float:
    return float((weight.detach() == 0).float().mean())


def set_mask(module: nn.Module, mask: Tensor, weight: Tensor | None = None) -> None:
    """Give ``module.weight`` this mask (bool, the weight's shape), in the place of one it may have, and new values."""
    if parametrize.is_parametrized(module, "weight"):
        parts = cast(nn.ModuleDict, module.parametrizations)["weight"]
        for at, part in enumerate(cast(Iterable[nn.Module], parts)):
            if isinstance(part, ColumnMask):
                # The old weight is read before the new mask is there.
                values = (cast(Tensor, module.weight) if weight is None else weight).detach()
                if type(part) is ColumnMask:
                    part.mask = mask
                else:  # one that may move
                    cast(nn.ModuleList, parts)[at] = ColumnMask(mask)
                module.weight = values
                return
    if weight is not None:
        with torch.no_grad():
            cast(Tensor, module.weight).copy_(weight)
    parametrize.register_parametrization(module, "weight", ColumnMask(mask))


def set_movable_mask(module: nn.Module, mask: Tensor | None, pattern: ColumnPattern) -> None:
    """Give ``module.weight`` a mask that may move, over all its values; None: the mask that it has already."""
    from colonnade.sparsify.rechoose import MovableMask

    groups = int(getattr(module, "groups", 1))
    if parametrize.is_parametrized(module, "weight"):
        parts = cast(nn.ModuleDict, module.parametrizations)["weight"]
        for at, part in enumerate(cast(Iterable[nn.Module], parts)):
            if isinstance(part, ColumnMask):
                cast(nn.ModuleList, parts)[at] = MovableMask(part.mask if mask is None else mask, pattern, groups)
                return
    assert mask is not None
    parametrize.register_parametrization(module, "weight", MovableMask(mask, pattern, groups))


def mask_zeros_(model: nn.Module, *, least: float = 0.05) -> list[str]:
    """Put masks on a model that was pruned elsewhere: where a weight is zero now, it stays zero.

    Layers of which at least the share ``least`` is zero get a mask. Returns their names.
    """
    named = []
    for name, module in model.named_modules():
        if isinstance(module, Prunable) and not parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            if _zeros(weight) >= least:
                set_mask(module, weight.detach() != 0)
                named.append(name)
    return named


def remove_masks(model: nn.Module) -> nn.Module:
    """Take the masks off, in place: plain parameters with exact zeros stay. Returns ``model``.

    Parametrizations that others put on the same weights are made permanent too (torch removes all or none).
    """
    for name, _ in list(masks(model)):
        module = model.get_submodule(name.rpartition(".")[0])
        # A deepcopy shares the class that torch made for the parametrized layer, and removing changes that class: work
        # on one of the layer's own, or the other copies lose their weights.
        shared = type(module)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
