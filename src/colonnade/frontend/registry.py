"""Every ONNX operator that can be imported, one row each: its name and the handler that turns it into steps."""

from __future__ import annotations

from colonnade.frontend import (
    ops_conv,
    ops_crop,
    ops_dense,
    ops_pointwise,
    ops_pool,
    ops_resize,
    ops_shape,
    ops_transposed,
    ops_typed,
    ops_winograd,
)
from colonnade.frontend.importer import Handler

HANDLERS: dict[str, Handler] = {
    **ops_conv.HANDLERS,
    **ops_crop.HANDLERS,
    **ops_transposed.HANDLERS,
    **ops_pool.HANDLERS,
    **ops_pointwise.HANDLERS,
    **ops_shape.HANDLERS,
    **ops_dense.HANDLERS,
    **ops_resize.HANDLERS,
    **ops_typed.CASTS,
    **ops_winograd.HANDLERS,
}
TYPED: dict[str, Handler] = ops_typed.HANDLERS  # the same operators on whole numbers and on float64
