"""A convolution and the max pool that alone reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from colonnade.workload.base import Array, Workload
from colonnade.workload.conv import Conv2d
from colonnade.workload.pool import Pool2d


@dataclass(frozen=True)
class ConvPool(Workload):
    """``pool(conv(x))``, where the map between them (a stem's 3.2 MB) is never written.

    x [N, IC, H, W], w [OC, IC, KH, KW]; the convolution is dense, its epilogue a bias and limits.
    """

    op: ClassVar[str] = "conv_pool"
    conv: Conv2d
    pool: Pool2d
    dtype: str = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.conv.batch, self.conv.in_channels, self.conv.height, self.conv.width

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolution, which is dense."""
        return self.conv.macs

    def reference(self, x: Array, weight: Array, bias: Array | None = None, *_: Any) -> Array:
        """[N, OC, rows and columns of the pool]"""
        return self.pool.reference(self.conv.reference(x, weight, bias))


FILTERS = (3, 4)  # taps along a column, of those that read rows of one parity, which kernels have minimal filters for
CHANNELS = 7  # of the input, at most: kernels transform it once for all outputs, and Winograd's convolution takes more
BEFORE = 16  # columns of padding on the left, at most


def taps(conv: Conv2d) -> int:
    """The most rows of the kernel that read input rows of one parity (of the stride)."""
    return -(-conv.kernel[0] // conv.stride[0])


def joinable(conv: Conv2d, pool: Pool2d) -> bool:
    """Are there kernels for both together, the convolution being dense?"""
    return (
        taps(conv) in FILTERS
        and conv.groups == 1
        and conv.in_channels <= CHANNELS
        and conv.dilation == (1, 1)
        and conv.padding[1] <= BEFORE
        and conv.prologue is None
        and not conv.epilogue.residual
        and conv.epilogue.activation.function is None
        and (pool.kind, pool.kernel, pool.stride, pool.dilation) == ("max", (3, 3), (2, 2), (1, 1))
        and max(pool.padding[:2]) <= 1
        and max(pool.padding[2:]) <= 2  # every window holds a pixel
    )
