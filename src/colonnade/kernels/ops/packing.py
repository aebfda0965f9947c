"""The packed feed of the offset-gather convolution: kept rows of the im2col matrix gathered strip by strip.

A panel ``[row][lanes of a strip]`` is private to a thread and made just before the tiles run over it, so a strip is
gathered once and read once a tile. Its source may be planes of any pitch, halo and phases that the stride is a
multiple of: padding is written, not read. The published system feeds all its convolutions like this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import f32, u32
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, Placed, Planes, round_up
from colonnade.pattern import TiledWeights
from colonnade.workload import Conv2d, Reach

TAP = Struct(
    "cn_tap",
    "A position in the window. Output pixel (y, x) of image n reads lane n * in_image + y * in_row + x * in_column + "
    "source of a plane, and a zero where y or x is outside.",
    (
        Member("source", "i32", "lanes"),
        Member("top", "u32", "first output row that reads a pixel"),
        Member("bottom", "u32", "first row below them"),
        Member("left", "u32"),
        Member("right", "u32"),
    ),
)
TAP_DTYPE = np.dtype([("source", "<i4"), ("top", "<u4"), ("bottom", "<u4"), ("left", "<u4"), ("right", "<u4")])
MEMBERS = (
    Member("taps", "const cn_tap *"),
    Member("runs", "const uint32_t *", "tap and number of panel rows [run_count][2]"),
    Member("planes", "const uint32_t *", "offset of the plane of every panel row"),
    Member("scale", "const float *", "of every panel row, or null: pixels are taken as they are"),
    Member("shift", "const float *"),
    Member("panel_rows", "u32"),
    Member("panel_lanes", "u32", "of a row, where a strip's length is known beforehand"),
    Member("run_count", "u32"),
    Member("contiguous", "u32", "lanes of the input are those of the output: a row of a panel is one run of lanes"),
    Member("in_image", "u32"),
    Member("in_row", "u32"),
    Member("in_column", "u32"),
    Member("pitch", "u32", "of the output"),
    Member("image_rows", "u32", "of the output"),
    Member("out_height", "u32"),
    Member("out_width", "u32"),
    Member("before_low", "f32", "limits of what is scaled and shifted"),
    Member("before_high", "f32"),
    Member(
        "window", "u32", "are they no panels but windows? Then taps are phases, with rows and columns for bottom and"
    ),
    Member("images", "u32", "right, planes are channels, whose offsets stand there (channels of a source in panels),"),
    Member(
        "before", "u32", "panel_rows of them, and a column's offset is a row of the window: lanes of a row in front"
    ),
    Member("around", "u32", "of its strips', and as many as these and those behind"),
    Member("shifts", "const uint32_t *", "of every kept column: lanes from a row's begin to what lane 0 reads"),
    Member("made", "char *", "where windows of a strip are left as panels that a later call reads, or null: used here"),
)
PANELS: dict[str, Field] = {
    "window": 0,
    "images": 0,
    "before": 0,
    "around": 0,
    "shifts": None,
    "made": None,
}  # no windows


def direct(conv: Conv2d, source: Planes, target: Planes) -> bool:
    """Can the convolution read ``source`` in place: pitch of its output, phases of its stride, halos wide enough?"""
    down, right = Reach.of(conv, 0), Reach.of(conv, 1, source.shifted)
    return (
        conv.prologue is None
        and source.phases == conv.stride
        and set(product(down.phases, right.phases)) <= set(source.stored_phases)
        and (source.pitch, source.image_rows) == (target.pitch, target.image_rows)
        and source.pitch >= max(source.columns + right.before, conv.out_width + right.after)
        and source.image_rows >= max(source.rows + down.before, conv.out_height + down.after)
        and source.lead >= down.before * source.pitch + right.before
    )


def packable(conv: Conv2d, source: Planes) -> bool:
    """Can panels be gathered from ``source``: is the stride a multiple of its phases, are those there that are read?
    Planes that are shifted were made for kernels that read in place."""
    if source.shifted:
        return False
    for axis in range(2):
        if conv.stride[axis] % source.phases[axis]:
            return False
    return set(_phases(conv, source)) <= set(source.stored_phases)


def _phases(conv: Conv2d, source: Planes) -> list[tuple[int, int]]:
    """The phase of ``source`` that each tap reads."""
    taps = product(range(conv.kernel[0]), range(conv.kernel[1]))
    shifts = [(kh * conv.dilation[0] - conv.padding[0], kw * conv.dilation[1] - conv.padding[1]) for kh, kw in taps]
    return [(y % source.phases[0], x % source.phases[1]) for y, x in shifts]


@dataclass(frozen=True, eq=False)
class Panel:
    """Which columns of the im2col matrix a panel holds, in their order: (group, k), kept by some tile."""

    groups: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    @staticmethod
    def of(conv: Conv2d, tiled: TiledWeights) -> Panel:
        """The union of the tiles' supports."""
        per_group = conv.out_channels // conv.groups
        kept = np.zeros((conv.groups, conv.k), bool)
        for tile in tiled.tiles:
            kept[int(tile.rows[0]) // per_group, tile.columns] = True
        if not kept.any():  # all weights are zero: a strip still needs something to stand on
            kept[0, 0] = True
        groups, columns = np.nonzero(kept)
        return Panel(groups, columns)

    @property
    def rows(self) -> int:
        """Rows of a panel."""
        return len(self.columns)

    def offsets(self, conv: Conv2d, step: int) -> list[npt.NDArray[np.int64]]:
        """Per group int64 [K]: ``step`` times the panel row of every column; 0 for those that nobody keeps."""
        table = np.zeros((conv.groups, conv.k), np.int64)
        table[self.groups, self.columns] = step * np.arange(self.rows)
        return list(table)


def panel_bytes(panel: Panel, strip_block: int, row_lanes: int, isa: Isa) -> int:
    """Scratch of one thread: the panels of a block of strips, and a vector that may be written beyond them."""
    return round_up(isa.itemsize * (strip_block * panel.rows * row_lanes + isa.lanes), LINE)


def fields(
    conv: Conv2d, source: Placed, target: Planes, panel: Panel, constants: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, Field]:
    """The fields of ``MEMBERS`` that do not depend on the kernel; ``constants`` of the step, for the prologue."""
    layout = source.planes
    (py, px), phases = layout.phases, layout.stored_phases
    step_y, step_x = conv.stride[0] // py, conv.stride[1] // px
    taps = np.zeros(conv.kernel[0] * conv.kernel[1], TAP_DTYPE)
    phase_of = np.array([phases.index(phase) for phase in _phases(conv, layout)])
    for index in range(len(taps)):
        kh, kw = divmod(index, conv.kernel[1])
        row, y = divmod(kh * conv.dilation[0] - conv.padding[0], py)
        column, x = divmod(kw * conv.dilation[1] - conv.padding[1], px)
        taps[index]["source"] = row * layout.pitch + column
        taps[index]["top"], taps[index]["bottom"] = _inside(
            row, step_y, len(range(y, layout.height, py)), conv.out_height
        )
        taps[index]["left"], taps[index]["right"] = _inside(
            column, step_x, len(range(x, layout.width, px)), conv.out_width
        )
    per_group = conv.in_channels // conv.groups
    tap, channel = np.divmod(panel.columns, per_group)
    channel = channel + panel.groups * per_group
    starts = np.flatnonzero(np.r_[True, (np.diff(tap) != 0) | (np.diff(panel.groups) != 0)])
    lengths = np.diff(np.r_[starts, panel.rows])
    planes = source.offsets.reshape(conv.in_channels, len(phases))
    scaled, plain = conv.prologue is not None, replace(conv, prologue=None)
    return {
        "taps": Const(taps),
        "runs": u32(np.stack([tap[starts], lengths], axis=1)),
        "planes": u32(planes[channel, phase_of[tap]]),
        "scale": f32(constants["before_scale"][channel]) if scaled else None,
        "shift": f32(constants["before_shift"][channel]) if scaled else None,
        "panel_rows": panel.rows,
        "run_count": len(starts),
        # halos that may be read in place may be copied; only they must not be scaled
        "contiguous": int(direct(plain, layout, target) and not (scaled and any(conv.padding))),
        "in_image": layout.image_rows * layout.pitch,
        "in_row": step_y * layout.pitch,
        "in_column": step_x,
        "pitch": target.pitch,
        "image_rows": target.image_rows,
        "out_height": conv.out_height,
        "out_width": conv.out_width,
        "before_low": float(conv.prologue.low) if conv.prologue is not None else -np.inf,
        "before_high": float(conv.prologue.high) if conv.prologue is not None else np.inf,
        **PANELS,
    }


def _inside(start: int, step: int, size: int, out: int) -> tuple[int, int]:
    """Outputs [first, last) whose input ``start + step * output`` lies in [0, size)."""
    first = min(max(0, -(start // step)), out)
    return first, min(max(first, -((start - size) // step)), out)
