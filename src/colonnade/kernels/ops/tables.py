"""What a convolution's kernels read: tiles of weights in reading order, and where every kept column stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from colonnade.kernels.ops import pairs, panels, then
from colonnade.kernels.ops.shared import Identity
from colonnade.kernels.registry import Operands
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import ELEMENTS, Panels, Placed
from colonnade.pattern import TiledWeights, discover
from colonnade.workload import Conv2d, matrix

T = TypeVar("T", bound=np.generic)
TILE = Struct(
    "cn_tile",
    "A tile: `rows` output channels that share `columns` kept columns. The first_ fields index the tables of cn_conv.",
    (
        Member("rows", "u32"),
        Member("columns", "u32"),
        Member("first_row", "u32", "into rows, bias and residual"),
        Member("first_column", "u32", "into offsets"),
        Member("first_weight", "u64", "into weights: [columns][rows]"),
    ),
)
CONV = Struct(
    "cn_conv",
    "Convolution from planes or panels to such: out[row] = clip(bias + residual + sum over kept columns).",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("offsets", "const uint32_t *", "of every kept column at lane 0"),
        Member("weights", "const float *", "of kernels of float16 such numbers"),
        Member("bias", "const float *", "in the order of rows; of float16 in the first half of a place"),
        Member("rows", "const uint32_t *", "offset of the output's lane 0 of every row, tile by tile"),
        Member("residual", "const uint32_t *", "likewise of what is added, or null"),
        Member("tiles", "const cn_tile *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        Member(
            "starts",
            "const uint32_t *",
            "the furthest offset into every input plane that is read at all; of panels the first channel",
        ),
        Member("lead", "char *", "zero lanes in front of the output's first plane"),
        Member("lead_bytes", "u32"),
        Member("start_count", "u32", "planes, or channels from the first to the last"),
        Member("tile_count", "u32"),
        Member("row_count", "u32"),
        Member("lanes", "u32", "lanes up to the last pixel"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("strips", "u32", "that share out the lanes, where a strip's length is known beforehand"),
        Member("tail", "u32", "last of the lanes, computed with rows in the lanes of a vector, or 0"),
        Member("strip_block", "u32", "strips that run through all tiles before the next ones start"),
        Member("prefetch", "u32", "kept columns to prefetch ahead; 0: none"),
        Member("weights_ahead", "u32", "bytes of weights likewise, where a strip's length is known beforehand"),
        Member(
            "fetch", "u32", "lines to ask for before they are needed: 1 where sums are stored, 2 what is added, 3 both"
        ),
        Member("split_tiles", "u32", "threads share out 0: strips (those that parts meet in, by tiles), 1: tiles"),
        Member("packed", "u32", "is this the head of a cn_packed_conv?"),
        Member("low", "f32"),
        Member("high", "f32"),
        *then.MEMBERS,
        *panels.MEMBERS,
        *pairs.MEMBERS,
    ),
)
OFFSETS_AHEAD = 64  # the offset table is padded by this many entries, so looking ahead needs no test
WEIGHTS_PADDED = 1024  # bytes behind the weights, for loads; what is only asked for may lie beyond
TILES_AHEAD = 5  # records, likewise
# Bytes by which kernels of fixed vectors ask for weights. 1 KB ahead are a hundred nanoseconds, too late for what comes
# from memory. On a small map that is most of a layer's time; on a large one every strip but the first finds weights in
# the second cache, and 8 KB of them push out what is needed sooner.
ASKED, ASKED_EARLY = 1 << 10, 8 << 10
FEW_LANES = 1024  # of a map, up to which weights are asked for early, ...
MANY_BYTES = 128 << 10  # ... and of weights, from which on


def tiling(step: Operands, dense_tile: int) -> TiledWeights:
    """The tiles of the step's weights: read off their zeros, or all columns in tiles of ``dense_tile`` rows."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    return _tiling(Identity(step.constants["weight"]), conv.groups, dense_tile)


@lru_cache(maxsize=64)
def _tiling(weight: Identity, groups: int, dense_tile: int) -> TiledWeights:
    rows = matrix(weight.array)
    return TiledWeights.dense_tiles(rows, dense_tile, groups) if dense_tile else discover(rows, groups)


def column_offsets(conv: Conv2d, source: Placed, group: int, strip: int = 0) -> npt.NDArray[np.int64]:
    """int64 [K]: byte offset from the arena's base of column k = (kh, kw, ic) of ``group`` at output lane 0.
    Of an input in panels: see ``panels.offsets``.

    Tap (kh, kw) of output pixel (0, 0) is pixel (kh * dh - top, kw * dw - left) of the input. With stride s that is
    pixel ``floor(. / s)`` of phase ``. mod s``: one lane further in the output is one lane further in the phase. Where
    planes are shifted there is one that begins at this column.
    """
    if isinstance(source.layout, Panels):
        channels = conv.in_channels // conv.groups
        return panels.offsets(source, strip)[group * channels : (group + 1) * channels]
    layout = source.planes
    if layout.phases != conv.stride:
        raise ValueError(f"{conv.key()}: input in phases {layout.phases}, needed {conv.stride}")
    phases = layout.stored_phases
    planes = source.offsets.reshape(conv.in_channels, len(phases))
    per_group = conv.in_channels // conv.groups
    mine = planes[group * per_group : (group + 1) * per_group]
    top, left = conv.padding[:2]
    parts = []
    for kh, kw in product(range(conv.kernel[0]), range(conv.kernel[1])):
        row, py = divmod(kh * conv.dilation[0] - top, conv.stride[0])
        begin = kw * conv.dilation[1] - left
        column, px = (0, begin) if layout.shifted else divmod(begin, conv.stride[1])
        parts.append(mine[:, phases.index((py, px))] + (row * layout.pitch + column) * layout.itemsize)
    return np.concatenate(parts)


def furthest(source: Placed, offsets: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """uint32: of every plane that is read, the largest of ``offsets`` into it; what the next strips read of it that
    the ones before did not. The last one stands there twice, for readers that look one ahead."""
    planes = np.sort(source.offsets)
    ordered = np.unique(offsets).astype(np.int64)
    # a tap may stand up to a halo in front of its plane
    plane = np.searchsorted(planes, ordered + source.planes.lead_lanes * source.planes.itemsize, side="right")
    last = np.flatnonzero(np.r_[plane[1:] != plane[:-1], True])
    return np.concatenate([ordered[last], ordered[-1:]]).astype(np.uint32)


@dataclass(frozen=True, eq=False)
class Tables:
    offsets: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.floating[Any]]
    tiles: npt.NDArray[np.void]

    def ahead(self, lanes: int) -> int:
        """Bytes by which weights are asked for where they meet so many lanes."""
        return ASKED_EARLY if self.weights.nbytes > MANY_BYTES and lanes <= FEW_LANES else ASKED


TILE_DTYPE = np.dtype(
    [("rows", "<u4"), ("columns", "<u4"), ("first_row", "<u4"), ("first_column", "<u4"), ("first_weight", "<u8")]
)


def tables(
    key: str, full: list[npt.NDArray[np.int64]], tiled: TiledWeights, per_group: int, ring: int = 1, itemsize: int = 4
) -> Tables:
    """Offsets, weights and tile records; tiles of equal supports share one run of offsets. ``full``: offsets of all
    columns of every group. ``ring``: places of the kernel that takes them, in whose order a run begins. ``itemsize``:
    bytes of a weight."""
    runs: list[npt.NDArray[np.int64]] = []
    starts: dict[tuple[int, bytes], int] = {}
    records = np.zeros(len(tiled.tiles), TILE_DTYPE)
    row = column = weight = 0
    for record, tile in zip(records, tiled.tiles, strict=True):
        group = int(tile.rows[0]) // per_group
        support = (group, tile.columns.tobytes())
        if support not in starts:
            starts[support] = column
            runs.append(_placed(full[group][tile.columns], full[group][0], ring))
            column += len(runs[-1])
        record["rows"], record["columns"] = len(tile.rows), len(tile.columns)
        record["first_row"], record["first_column"], record["first_weight"] = row, starts[support], weight
        row += len(tile.rows)
        weight += tile.values.size
    # looking ahead runs past the last column: repeat an offset that is there, so every prefetch hits the arena
    padding = np.full(OFFSETS_AHEAD, next((run[0] for run in runs if len(run)), full[0].max()))
    offsets = np.concatenate([*runs, padding])
    if offsets.min() < 0 or offsets.max() >= 2**32:
        raise ValueError(f"{key}: a column offset lies outside the arena ({offsets.min()} .. {offsets.max()})")
    # likewise weights, by eight columns of a tile
    spare = np.zeros(max(WEIGHTS_PADDED // itemsize, 8 * max(len(tile.rows) for tile in tiled.tiles)))
    weights = np.concatenate([*(tile.values.reshape(-1) for tile in tiled.tiles), spare]).astype(ELEMENTS[itemsize])
    if ring > 1:  # records are looked up, and lines of them asked for, some tiles ahead
        records = np.concatenate([records, np.repeat(records[-1:], TILES_AHEAD)])
    return Tables(offsets.astype(np.uint32), weights, records)


def beyond(rows: npt.NDArray[T], ring: int) -> npt.NDArray[T]:
    """A table of rows for a kernel with a ring of ``ring`` columns, which looks at tiles ahead, there or not."""
    return rows if ring == 1 else np.concatenate([rows, np.zeros(panels.ROWS_AHEAD, rows.dtype)])


def _placed(offsets: npt.NDArray[np.int64], any_: int, ring: int) -> npt.NDArray[np.int64]:
    """A tile's offsets as a kernel with a ring of ``ring`` columns loads them first, place by place: columns beyond
    whole turns go through the last places, those behind them from the front on. A short tile's other places get
    ``any_``."""
    if ring == 1:
        return offsets
    first = np.full(ring, any_)
    first[: len(offsets)] = offsets[:ring]
    return np.concatenate([np.roll(first, -(len(offsets) % ring)), offsets[ring:]])
