"""Modules with transformed weights: 3x3 convolutions that are pruned where Winograd's minimal filtering multiplies."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from colonnade.errors import UserError
from colonnade.onnx_winograd import DOMAIN, operator
from colonnade.sparsify.transformed import MOST_COLUMNS
from colonnade.workload.winograd import SIZES, Size, matrices, seen, transform


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution at stride 1, padded by one pixel; ``weight`` [OC, IC, m + 2, m' + 2] is G w G'ᵀ to begin with.

    It is a convolution for everything that looks at weights: a tile of rows shares columns of K = (m + 2) (m' + 2) IC.
    Forward, the transforms are multiplied into the weights, which takes (m + 2) (m' + 2) multiply-adds a pixel, for
    training and for answers; compiled, a kept weight takes 1 / (m m') of one.
    """

    def __init__(self, convolution: nn.Conv2d, size: str = "2x2") -> None:
        my, mx = m = _size(size)
        bias, weight = convolution.bias, convolution.weight
        super().__init__(
            convolution.in_channels, convolution.out_channels, seen(m), padding=1, bias=bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        self.size = size
        self.exported = False  # on the way to a file, where it is one operator
        for name, at in (("into", 0), ("back", 2)):
            tensor = torch.from_numpy(np.kron(matrices(my)[at], matrices(mx)[at])).to(weight.device, weight.dtype)
            self.register_buffer(name, tensor, persistent=False)
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(transform(weight.detach().float().cpu().numpy(), m)))
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)
                self.bias.requires_grad_(bias.requires_grad)
        self.weight.requires_grad_(weight.requires_grad)
        self.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        """[N, IC, H, W] → [N, OC, H, W]"""
        (my, mx), (height, width) = SIZES[self.size], input.shape[-2:]
        if self.exported:
            bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
            shape = (input.shape[0], self.out_channels, height, width)
            named = f"{DOMAIN}::{operator(self.size)}"
            return torch.onnx.ops.symbolic(named, (input, self.weight, bias), dtype=input.dtype, shape=shape, version=1)
        into, back = cast(Tensor, self.into), cast(Tensor, self.back)
        taken = torch.einsum("rp,ocp,pq->orcq", back, self.weight.flatten(2), into)
        kernel = taken.reshape(self.out_channels * my * mx, self.in_channels, *self.kernel_size)
        padded = functional.pad(input, (1, mx, 1, my))
        apart = functional.conv2d(padded, kernel, stride=(my, mx))
        count, _, rows, columns = apart.shape
        parts = apart.reshape(count, self.out_channels, my, mx, rows, columns).permute(0, 1, 4, 2, 5, 3)
        y: Tensor = parts.reshape(count, self.out_channels, rows * my, columns * mx)[..., :height, :width]
        return y if self.bias is None else y + self.bias[:, None, None]


def _size(name: str) -> Size:
    if name not in SIZES:
        raise UserError(f"size is {name!r}: expected {', '.join(SIZES)}")
    return SIZES[name]


def fits(module: nn.Module) -> bool:
    """Is it a plain 3x3 convolution at stride 1, padded by one pixel of zeros, in one group?"""
    if type(module) is not nn.Conv2d or parametrize.is_parametrized(module):
        return False
    shape = (module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), 1, "zeros") and module.padding in (1, (1, 1), "same")


def winograd_(model: nn.Module, size: str = "2x2", *, least: int = 16, exclude: Iterable[str] = ()) -> list[str]:
    """Make ``model``'s 3x3 convolutions at stride 1 ones with transformed weights, in place; their names.

    The model computes what it did, up to rounding, until it is pruned. size: "2x2", "4x4" or "4x1", rows
    and columns of output pixels that are made together. least:
    channels that a convolution has at least on both sides, a stem has fewer. exclude: names or globs. Convolutions of
    more than MOST_COLUMNS transformed columns stay.

    Raises UserError for another size, for a model without such a convolution, or that is one itself, and for weights
    that several modules share.
    """
    m = _size(size)
    globs = list(exclude)
    found: dict[nn.Conv2d, list[str]] = {}  # a module may have several names
    owners = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d))
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not fits(module) or any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            continue
        convolution = cast(nn.Conv2d, module)
        few = min(convolution.in_channels, convolution.out_channels) < least
        if few or convolution.in_channels * prod(seen(m)) > MOST_COLUMNS:
            continue
        if owners[id(convolution.weight)] > 1:
            raise UserError(f"{name} shares its weight with another module: exclude both, or give each its own")
        found.setdefault(convolution, []).append(name)
    if not found:
        raise UserError(f"{type(model).__name__} has no 3x3 convolution at stride 1 whose weights could be transformed")
    for convolution, names in found.items():
        made = WinogradConv2d(convolution, size)
        for name in names:
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, made)
    return [names[0] for names in found.values()]
