"""Modules with transformed weights: 3x3 convolutions that are pruned where Winograd's minimal filtering multiplies."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from colonnade.errors import UserError
from colonnade.onnx_winograd import DOMAIN, operator
from colonnade.sparsify.transformed import MOST_COLUMNS
from colonnade.workload.winograd import SIZES, matrices, transform


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution at stride 1, padded by one pixel; ``weight`` [OC, IC, m + 2, m + 2] is G w Gᵀ to begin with.

    It is a convolution for everything that looks at weights: a tile of rows shares columns of K = (m + 2)² IC. Forward,
    the transforms are multiplied into the weights, which takes (m + 2)² multiply-adds a pixel, for training and for
    answers; compiled, a kept weight takes 1 / m² of one.
    """

    def __init__(self, convolution: nn.Conv2d, m: int = 2) -> None:
        if m not in SIZES:
            raise UserError(f"m is {m}: expected {' or '.join(map(str, SIZES))}")
        bias, weight = convolution.bias, convolution.weight
        super().__init__(
            convolution.in_channels, convolution.out_channels, m + 2, padding=1, bias=bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        self.m = m
        self.exported = False  # on the way to a file, where it is one operator
        into, _, back = matrices(m)
        for name, matrix in (("into", into), ("back", back)):
            tensor = torch.from_numpy(np.kron(matrix, matrix)).to(weight.device, weight.dtype)
            self.register_buffer(name, tensor, persistent=False)
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(transform(weight.detach().float().cpu().numpy(), m)))
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, IC, H, W] → [N, OC, H, W]"""
        m, (height, width) = self.m, input.shape[-2:]
        if self.exported:
            bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
            shape = (input.shape[0], self.out_channels, height, width)
            named = f"{DOMAIN}::{operator(m)}"
            return torch.onnx.ops.symbolic(named, (input, self.weight, bias), dtype=input.dtype, shape=shape, version=1)
        into, back = cast(Tensor, self.into), cast(Tensor, self.back)
        taken = torch.einsum("rp,ocp,pq->orcq", back, self.weight.flatten(2), into)
        kernel = taken.reshape(self.out_channels * m * m, self.in_channels, m + 2, m + 2)
        padded = functional.pad(input, (1, m, 1, m))
        y = functional.pixel_shuffle(functional.conv2d(padded, kernel, stride=m), m)[..., :height, :width]
        return y if self.bias is None else y + self.bias[:, None, None]


def fits(module: nn.Module) -> bool:
    """Is it a plain 3x3 convolution at stride 1, padded by one pixel of zeros, in one group?"""
    if type(module) is not nn.Conv2d or parametrize.is_parametrized(module):
        return False
    shape = (module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), 1, "zeros") and module.padding in (1, (1, 1), "same")


def winograd_(model: nn.Module, m: int = 2, *, least: int = 16, exclude: Iterable[str] = ()) -> list[str]:
    """Make ``model``'s 3x3 convolutions at stride 1 ones with transformed weights, in place; their names.

    The model computes what it did, up to rounding, until it is pruned. m: side of a tile of output pixels. least:
    channels that a convolution has at least on both sides, a stem has fewer. exclude: names or globs. Convolutions of
    more than MOST_COLUMNS transformed columns stay.

    Raises UserError for another m, and for a model without such a convolution.
    """
    if m not in SIZES:
        raise UserError(f"m is {m}: expected {' or '.join(map(str, SIZES))}")
    globs, done = list(exclude), []
    for name, module in list(model.named_modules()):
        if not fits(module) or any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            continue
        convolution = cast(nn.Conv2d, module)
        few = min(convolution.in_channels, convolution.out_channels) < least
        if few or convolution.in_channels * (m + 2) ** 2 > MOST_COLUMNS:
            continue
        made = WinogradConv2d(convolution, m).train(convolution.training)
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, made)
        done.append(name)
    if not done:
        raise UserError(f"{type(model).__name__} has no 3x3 convolution at stride 1 whose weights could be transformed")
    return done
