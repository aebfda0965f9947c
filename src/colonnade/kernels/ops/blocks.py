"""The order of a tile's columns and blocks of K, for cores whose caches and translation buffers are small.

A kept column is (tap, channel). Channel by channel, the taps of one plane follow each other: it is one page and a few
lines for all of them, where tap by tap it is met again when all other planes have passed. And a convolution may run
in several calls, each over a block of channels, every one but the first beginning with the sums that the one before
left in the output: what a block reads stays in a near cache while all tiles pass over it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Field
from colonnade.kernels.ops import tables, then
from colonnade.kernels.ops.shared import slots
from colonnade.layout import LINE
from colonnade.pattern import Tile, TiledWeights
from colonnade.workload import NONE, Conv2d, ConvTranspose2d


def by_channel(tiled: TiledWeights, conv: Conv2d) -> TiledWeights:
    """The same tiles, their columns in the order of (channel, tap)."""
    if conv.kernel == (1, 1):
        return tiled
    channels = conv.in_channels // conv.groups

    def ordered(tile: Tile) -> Tile:
        order = np.lexsort((tile.columns // channels, tile.columns % channels))
        return Tile(tile.rows, tile.columns[order], np.ascontiguousarray(tile.values[order]))

    return replace(tiled, tiles=tuple(map(ordered, tiled.tiles)))


def cut(tiled: TiledWeights, conv: Conv2d | ConvTranspose2d, count: int) -> list[TiledWeights]:
    """``count`` parts that add up to ``tiled``, each with the columns of about as many channels. A tile may keep none
    of a part's."""
    channels = conv.in_channels // conv.groups
    ends = [channels * (i + 1) // count for i in range(count)]

    def part(tile: Tile, first: int, end: int) -> Tile:
        channel = tile.columns % channels
        here = (channel >= first) & (channel < end)
        return Tile(tile.rows, tile.columns[here], np.ascontiguousarray(tile.values[here]))

    return [
        replace(tiled, tiles=tuple(part(tile, first, end) for tile in tiled.tiles))
        for first, end in zip([0, *ends], ends, strict=False)
    ]


def ends(
    conv: Conv2d | ConvTranspose2d,
    bias: npt.NDArray[np.float32],
    ring: int,
    index: int,
    count: int,
    itemsize: int,
) -> dict[str, Field]:
    """What the call of block ``index`` of ``count`` begins and ends with: the first one with the bias (in the order of
    rows, for a kernel with a ring of ``ring`` columns), the last one with the limits and the function."""
    limits = conv.epilogue.activation if index + 1 == count else NONE
    return {
        "bias": slots(tables.beyond(np.zeros_like(bias) if index else bias, ring), itemsize),
        "low": float(limits.low), "high": float(limits.high), **then.fields(limits.function),
    }  # fmt: skip


NEAR = 1 << 17  # bytes of input that tile after tile find in the second cache, whatever else passes through it
STRIP = 15 << 10  # bytes of input a strip, all its taps beside them, that a first cache keeps
READ = 3 << 17  # bytes of weights that the second cache keeps from strip to strip
WIDE = 3 << 14  # bytes of a strip in a panel that pass through a first cache anew for every tile
SMALL = 3 << 15  # bytes of weights that stay near while strips pass, however many pass together
FEWEST = 36  # columns that a tile keeps of a block, below which its begin and end cost more than the caches
SHORT = 4  # rows of a tile up to which a column is over before its lines come from the second cache
FIRST = 26 << 10  # bytes of lines that stay in the first cache beside weights


def split(tiled: list[TiledWeights], count: int, feed: int, threads: int) -> int:
    """What threads had better share out: 1: tiles; 0: strips, where these are few or what they read is little."""
    least = min((len(tile.columns) for t in tiled for tile in t.tiles), default=0)
    return int(threads > 1 and count > 4 and (feed != 0 or least >= 2 * FEWEST))


def reach(conv: Conv2d, lmul: int, itemsize: int) -> int:
    """Bytes of the lines that a strip of ``lmul`` registers reads of planes, all channels and taps (VLEN 256)."""
    runs = conv.in_channels * conv.kernel[0] * min(conv.kernel[1], conv.stride[1])
    return runs * (32 * lmul + itemsize * (conv.kernel[1] - 1) * conv.dilation[1] // conv.stride[1] + LINE)


def orders(
    tiled: list[TiledWeights],
    count: int,
    feed: int,
    held: int,
    threads: int = 1,
    reached: int = 0,
    together: int = 1,
    itemsize: int = 4,
) -> list[tuple[int, int]]:
    """(strips at a time, blocks of K) by what the caches of an in-order core show (modelled), the best first.

    Few strips run through some tiles together, so that their weights come from memory once; then what they read must
    stay near, block by block. Of many in planes one at a time passes all tiles of a block: so many blocks that a
    strip's part of one, all its taps, stays in the first cache, and its weights in the second; where K is not cut, four
    of them, whose lines lie side by side in every plane. A strip in a panel fills the first cache alone, and the next
    one comes while it is used; a wide one goes in two parts. Of weights that would fill the second cache, half are in
    use at a time; where they are more than that they are read once, for all strips if these fit. ``held``: bytes of the
    input, 0 where K cannot be cut.

    Tiles of few rows pass over columns faster than these come from the second cache, so whatever a strip reads
    (``reached`` bytes of planes) is cut until the first one keeps it; where strips are few, until it keeps one of two.

    Cores of a cluster share their second cache: with tiles shared out they go from strip to strip side by side, and of
    what all of them read each has its own part of the weights. Of few strips each takes one, which its first cache
    keeps, and all walk over the same weights.

    ``together``: strips that a function is applied to at a time (``ops.then``).
    """
    # of one call at a time
    weights = itemsize * max((sum(tile.values.size for tile in t.tiles) for t in tiled), default=0)
    least = min((len(tile.columns) for t in tiled for tile in t.tiles), default=0)
    parts = 1
    while parts < 8 and held >= parts * NEAR and least >= 2 * parts * FEWEST:
        parts *= 2
    found: list[tuple[int, int]]
    if held and feed not in (1, 3) and max(len(tile.rows) for t in tiled for tile in t.tiles) <= SHORT:
        near = FIRST if count > 4 else 2 * FIRST
        most = max(least // FEWEST, 1)
        cut = min(max(-(-(reached or held // count) // near), -(-weights // READ) if count > 4 else 1), most)
        found = [(1 if count > 4 else 0, n) for n in (cut, cut + 1, cut - 1, 1) if 1 <= n <= most]
    elif count <= 4:
        found = [(0, parts), (0, 2 * parts if parts > 1 else 1), (0, 1), (2, 1), (1, 1)]
        if threads == 1 and feed != 0 and parts > 1 and weights <= parts * READ:
            found = [(1, parts), *found]
    elif feed == 0:
        cut, wanted = 1, max(held / (count * STRIP), weights / READ) if held else 0
        while cut < 8 and cut <= wanted and least >= (8 if cut > 1 else 4) * cut * FEWEST:
            cut *= 2
        if weights <= cut * READ:
            close = threads > 1 and least >= 2 * FEWEST and weights <= SMALL
            some = 4 if close or (cut == 1 and threads == 1) else 1
            half = [(-(-count // 2), cut)] if cut > 1 else []  # where the second cache holds half of what is said here
            found = [(some, cut), *half, (1, 1), (4, 1), (0, 1)]
        else:
            found = [(-(-count // 2), min(parts, 4)), (0, parts), (0, 1), (1, 1)]
    elif feed in (2, 4):  # panels, by whoever they were written
        two = min(parts, 2) if held >= count * WIDE else 1
        if weights <= READ:
            found = [(1, two if weights > SMALL * 2 else 1), (1, 1), (2, 1), (4, 1), (0, 1)]
        elif weights <= 2 * READ:
            found = [(1, two), (1, 1), (2, 1), (4, 1)]
        elif held <= 2 * NEAR:
            found = [(0, 1), (1, 1), (2, 1), (4, 1)]
        else:
            found = [(2, two), (2, 1), (1, two), (4, 1)]
    else:
        found = [(1, 1), (4, 1), (0, 1), (8, min(parts, 2))]
    if all(len(t.tiles) == 1 for t in tiled) and feed in (0, 2):
        # strips of a single tile follow each other, in one run of a kernel or few
        found = [(0 if together == 1 else 8 * together, found[0][1]), *found]
    found = [(max(b, together) if b else b, n) for b, n in found]
    return list(dict.fromkeys((b, n) for b, n in found if b < count)) or [(0, 1)]
