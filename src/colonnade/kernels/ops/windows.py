"""The windowed feed of the offset-gather convolution, on scalable ISAs: what some strips read of every channel, as
planes of the output's pitch with their halo, private to a thread and made just before the tiles run over it.

A window holds a pixel once for all taps, where a panel (``ops.packing``) holds it once a tap; its few kilobytes are in
few memory pages and near caches, where planes are a page a channel. Its source may be planes or panels of any pitch,
so nobody writes phases or halos for the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Const, Field
from colonnade.kernels.ops.packing import TAP_DTYPE
from colonnade.kernels.ops.shared import u32
from colonnade.layout import LINE, VECTOR_LANES, Panels, Placed, Planes, fitting, round_up
from colonnade.pattern import TiledWeights
from colonnade.workload import Conv2d, Reach


def readable(conv: Conv2d, source: Placed, target: Planes) -> bool:
    """Can the convolution read windows: has the output's pitch room for the halo, is the source in no phases?"""
    down, right = Reach.of(conv, 0), Reach.of(conv, 1)
    rows, columns = -(-conv.height // conv.stride[0]), -(-conv.width // conv.stride[1])
    return (
        conv.prologue is None
        and source.grid.phases == (1, 1)
        and not source.grid.shifted
        and target.pitch >= max(columns + right.before, conv.out_width + right.after)
        and target.image_rows >= max(rows + down.before, conv.out_height + down.after)
    )


@dataclass(frozen=True, eq=False)
class Window:
    """Channels (int64) that some tile keeps, phases in which their planes stand there, and how many lanes a row holds
    in front of and beyond those of its strips."""

    channels: npt.NDArray[np.int64]
    phases: tuple[tuple[int, int], ...]
    before: int
    around: int
    shifts: npt.NDArray[np.int64]  # int64 [groups, K]: lanes from a row's begin to what lane 0 of a strip reads
    rows: npt.NDArray[np.int64]  # int64 [groups, K]: of the window

    @staticmethod
    def of(conv: Conv2d, tiled: TiledWeights, target: Planes) -> Window:
        """What the columns of ``tiled`` read."""
        per_group, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        kept = np.zeros((conv.groups, conv.k), bool)
        for tile in tiled.tiles:
            kept[int(tile.rows[0]) // per_group, tile.columns] = True
        kept[0, 0] |= not kept.any()  # all weights are zero: a strip still needs something to stand on
        used = kept.reshape(conv.groups, -1, channels).any(axis=1).reshape(-1)
        down, right = Reach.of(conv, 0), Reach.of(conv, 1)
        phases = tuple(product(down.phases, right.phases))
        before = down.before * target.pitch + right.before
        around = before + down.after * target.pitch + right.after
        number = np.cumsum(used) - 1
        shifts, rows = np.zeros((conv.groups, conv.k), np.int64), np.zeros((conv.groups, conv.k), np.int64)
        for tap, (kh, kw) in enumerate(product(range(conv.kernel[0]), range(conv.kernel[1]))):
            row, y = divmod(kh * conv.dilation[0] - conv.padding[0], conv.stride[0])
            column, x = divmod(kw * conv.dilation[1] - conv.padding[1], conv.stride[1])
            here = slice(tap * channels, (tap + 1) * channels)
            shifts[:, here] = before + row * target.pitch + column
            rows[:, here] = number.reshape(conv.groups, -1) * len(phases) + phases.index((y, x))
        return Window(np.flatnonzero(used), phases, before, around, shifts, np.where(kept, rows, 0))

    @property
    def count(self) -> int:
        """Rows: a channel's phases."""
        return len(self.channels) * len(self.phases)

    def left(self, lanes: int, nv: int, itemsize: int) -> int:
        """Bytes of all strips' windows where they are left as panels."""
        return round_up(itemsize * self.count * round_up(lanes, nv * fitting(VECTOR_LANES, itemsize)), LINE)

    def bytes(self, lanes: int, nv: int, strip_block: int, itemsize: int) -> int:
        """Scratch of one thread for strips of ``nv`` of the longest vectors, ``strip_block`` of them at a time."""
        strip, line = nv * fitting(VECTOR_LANES, itemsize), LINE // itemsize
        held = min(round_up(lanes, strip), strip_block * strip) if strip_block else round_up(lanes, strip)
        return round_up(itemsize * (self.count * (round_up(held + self.around, line) + line) + strip), LINE)


def fields(conv: Conv2d, source: Placed, target: Planes, window: Window) -> dict[str, Field]:
    """The fields of ``packing.MEMBERS``, but for ``shifts``."""
    grid = source.grid
    (sy, sx), phases = conv.stride, np.zeros(len(window.phases), TAP_DTYPE)
    for index, (y, x) in enumerate(window.phases):
        phases[index]["source"] = y * grid.pitch + x
        phases[index]["bottom"], phases[index]["right"] = len(range(y, conv.height, sy)), len(range(x, conv.width, sx))
    stored = isinstance(source.layout, Panels)
    return {
        "taps": Const(phases),
        "runs": None,
        "planes": u32(window.channels if stored else source.offsets[window.channels]),
        "scale": None,
        "shift": None,
        "panel_rows": len(window.channels),
        "panel_lanes": 0,
        "run_count": len(window.phases),
        "contiguous": 0,
        "in_image": grid.image_rows * grid.pitch,
        "in_row": sy * grid.pitch,
        "in_column": sx,
        "pitch": target.pitch,
        "image_rows": target.image_rows,
        "out_height": 0,
        "out_width": 0,
        "before_low": -np.inf,
        "before_high": np.inf,
        "window": 1,
        "made": None,
        "images": conv.batch,
        "before": window.before,
        "around": window.around,
    }
