"""The classifier: one vector a sample, rows of the weights in the lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from colonnade.workload.base import PLAIN, Array, Epilogue, Workload


@dataclass(frozen=True)
class Linear(Workload):
    """``activation(x @ w.T + bias + residual)``; x [N, IC], w [OC, IC]. Also a 1x1 convolution on 1x1 maps. ``dtype``:
    ``f16`` where weights are float16 numbers and stored so; all else is float32."""

    op: ClassVar[str] = "linear"
    batch: int
    in_channels: int
    out_channels: int
    epilogue: Epilogue = PLAIN
    dtype: str = "f32"
    tile: int = 0
    columns: int = -1

    @property
    def k(self) -> int:
        """Columns of one row of the weight matrix."""
        return self.in_channels

    @property
    def macs(self) -> int:
        """Multiply-adds when dense."""
        return self.batch * self.out_channels * self.in_channels

    @property
    def kept_macs(self) -> int:
        """Multiply-adds on kept weights."""
        return self.macs if self.columns < 0 else self.batch * self.columns

    def reference(
        self, x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None, *_: Any
    ) -> Array:
        """[N, OC], summed in float64."""
        y = x.astype(np.float64) @ weight.astype(np.float64).T
        if bias is not None:
            y = y + bias
        if self.epilogue.residual:
            assert residual is not None
            y = y + residual
        return self.epilogue.activation(y.astype(np.float32))
