"""Tensors in panels, as convolutions write and pointwise ones read them: who can, and the tables that say where.

A panel tensor stands strip by strip, all channels of a strip side by side (``layout.Panels``). A strip of a pointwise
convolution's input is then one block of memory, where planes are a page a channel. Nothing is gathered: the
convolution in front stores its rows there instead of into planes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Const, Field, Scratch
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.structs import Member
from colonnade.layout import LINE, Panels, Placed, Planes, round_up
from colonnade.workload import Conv2d

TOGETHER = 16  # channels whose pixels are finished before they go into panels, at most
NEAREST = 16 << 10  # bytes of their pixels: half of a first cache
ROWS_AHEAD = 32  # entries by which tables of rows reach beyond the last one, for kernels that look ahead

MEMBERS = (
    Member("scratch", "char *", "thread_bytes for every thread: offsets that depend on a strip's length, then panels"),
    Member("thread_bytes", "u32"),
    Member("offset_count", "u32", "entries of offsets"),
    Member("source", "const char *", "where an input in panels stands, null: in the arena"),
    Member("in_panels", "u32", "channels of an input in panels, 0: it is in planes"),
    Member("out_panels", "u32", "likewise of the output"),
    Member("add_panels", "u32", "and of the residual"),
    Member("in_base", "u32", "where they begin; the tables hold channels where a strip's length is known at run time"),
    Member("out_base", "u32", "only, offsets from the arena otherwise"),
    Member("add_base", "u32"),
)
NONE: dict[str, Field] = {
    "scratch": None,
    "source": None,
    **{member.name: 0 for member in MEMBERS if not member.is_pointer},
}  # a convolution from planes to planes


def vectors(*tensors: Placed) -> set[int]:
    """The strips, in vector registers, of those that are in panels."""
    return {t.layout.vectors for t in tensors if isinstance(t.layout, Panels)}


def planes(tensor: Placed | None) -> Const | None:
    """Of a tensor in planes, where they begin."""
    return None if tensor is None or isinstance(tensor.layout, Panels) else u32(tensor.offsets)


def together(output: Placed, size: int, isa: Isa) -> int:
    """Channels whose pixels, ``size`` bytes each, are finished before they go into ``output``: into panels so many that
    lines of a strip are written one behind the other, which spares cores of small caches to read them before."""
    return max(1, min(TOGETHER, NEAREST // size)) if isa.scalable and isinstance(output.layout, Panels) else 1


def readable(conv: Conv2d, source: Placed, target: Planes) -> bool:
    """Is the convolution one that reads panels, and are they cut into the rows and images of its output?"""
    grid = source.grid
    return (
        isinstance(source.layout, Panels)
        and conv.prologue is None
        and (conv.kernel, conv.stride) == ((1, 1), (1, 1))
        and not any(conv.padding)
        and (grid.pitch, grid.image_rows) == (target.pitch, target.image_rows)
    )


def offsets(tensor: Placed, strip: int) -> npt.NDArray[np.int64]:
    """int64 [C]: of every channel in the first strip, from the arena; ``strip`` lanes, 0 where only the machine knows:
    then the channels themselves."""
    if not isinstance(tensor.layout, Panels):
        return tensor.offsets
    channels = np.arange(tensor.shape[1], dtype=np.int64)
    return channels if strip == 0 else int(tensor.offsets[0]) + channels * strip * tensor.layout.itemsize


def fields(
    source: Placed | None,
    output: Placed | None,
    residual: Placed | None,
    gathered: int,
    entries: int,
    window: bool,
    isa: Isa,
) -> tuple[dict[str, Field], int]:
    """The fields of ``MEMBERS`` and the scratch of one thread in bytes. ``source``: None where the panels are gathered
    (then ``gathered`` bytes a thread hold them, or its ``window``); ``entries``: of the offset table."""
    found: dict[str, Field] = {}
    tables = entries if window else 0
    for name, tensor in (("in", source), ("out", output), ("add", residual)):
        stored = tensor is not None and isinstance(tensor.layout, Panels)
        found[f"{name}_panels"] = tensor.shape[1] if stored and tensor is not None else 0
        found[f"{name}_base"] = int(tensor.offsets[0]) if stored and tensor is not None else 0
        if stored and name != "in" and output is not None:
            tables += output.shape[1] + ROWS_AHEAD
    size = (round_up(4 * tables, LINE) if isa.scalable else 0) + gathered
    found |= {"source": None, "scratch": Scratch() if size else None, "thread_bytes": size, "offset_count": entries}
    return found, size
