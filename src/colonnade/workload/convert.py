"""Changes of layout: the values stay, only their places change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import Array, Workload


@dataclass(frozen=True)
class Convert(Workload):
    """``import``: the user's dense array → planes or rows. ``export``: planes or rows → the user's dense array.
    ``planes``: planes → planes of another pitch, of phases (``kept_phases`` may drop some) or shifted ones; step
    ``stride`` picks pixels ``[::sy, ::sx]``. ``flatten``: planes → rows in (channel, row, column) order,
    and ``unflatten`` rows → planes likewise."""

    op: ClassVar[str] = "convert"
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    dtype: str = "f32"

    def reference(self, x: Array, *_: Any) -> Array:
        """The same values: [N, C, H, W] or, for ``flatten``, [N, C*H*W]."""
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        if self.kind == "flatten":
            x = x.reshape(x.shape[0], -1)
        if self.kind == "unflatten":
            x = x.reshape(self.shape)
        return np.ascontiguousarray(x, np.float32)


@dataclass(frozen=True)
class Zeros(Workload):
    """Planes full of zeros [N, C, H, W]: the channels that a channel-padding shortcut appends."""

    op: ClassVar[str] = "zeros"
    shape: tuple[int, ...]
    dtype: str = "f32"

    def reference(self, *_: Any) -> Array:
        """Zeros of ``shape``."""
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True)
class Precision(Workload):
    """Planes [N, C, H, W] on the same lanes as float32 or float16: ``itemsize`` bytes an element are written."""

    op: ClassVar[str] = "precision"
    shape: tuple[int, ...]
    itemsize: int

    def reference(self, x: Array, *_: Any) -> Array:
        """The values as rounded; what float16 cannot hold becomes infinite."""
        with np.errstate(over="ignore"):
            return x.astype(np.float16 if self.itemsize == 2 else np.float32).astype(np.float32)
