"""What stands between the transforms of minimal filtering: a product at every position of a tile.

All of them are one convolution with one row of tiles of weights after the other, each of which reads its own
position's planes and writes sums of its own position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Const, Field, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import pairs, panels, registers, strips, tables, then
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, u32
from colonnade.kernels.registry import Operands
from colonnade.kernels.structs import Member
from colonnade.layout import LINE, VECTOR_LANES
from colonnade.pattern import Tile, TiledWeights
from colonnade.workload import Conv2d, WinogradConv2d, matrix
from colonnade.workload.winograd import Size, matrices, transform

PIXELS = (
    Member("arena", "char *", "base of output and residual"),
    Member("planes", "const uint32_t *", "offset of every channel's plane; null: it is in panels"),
    Member("residual", "const uint32_t *", "likewise of the plane to add"),
    *LEAD_MEMBERS,
    Member("height", "u32", "rows of pixels"),
    Member("width", "u32", "pixels of a row"),
    Member("lanes", "u32", "up to the last pixel"),
    Member("plane", "u32", "lanes of a whole plane, all of them written"),
    Member("added", "u32", "is there a residual?"),
    Member("strip_vectors", "u32", "registers of a strip of the panels"),
    *(member for member in panels.MEMBERS if member.name.startswith(("out_", "add_"))),
    Member("low", "f32"),
    Member("high", "f32"),
)  # of a transform back: where its pixels go, and what is added to them


def pixels(step: Operands, isa: Isa) -> dict[str, Field]:
    """The fields of ``PIXELS``."""
    conv, output = step.workload, step.output
    assert isinstance(conv, Conv2d) and output is not None
    residual = step.inputs[1] if conv.epilogue.residual else None
    through, _ = panels.fields(None, output, residual, 0, 0, False, isa)
    return {
        **lead(output), "arena": Arena(), "planes": panels.planes(output), "residual": panels.planes(residual),
        "height": conv.out_height, "width": conv.out_width, "lanes": output.grid.lanes, "plane": output.grid.plane,
        "added": int(residual is not None), "strip_vectors": max(panels.vectors(output, *step.inputs), default=0),
        **{name: value for name, value in through.items() if name.startswith(("out_", "add_"))},
        "low": float(conv.epilogue.activation.low), "high": float(conv.epilogue.activation.high),
    }  # fmt: skip


def shapes(step: Operands, isa: Isa) -> list[tuple[int, int, int]]:
    """Kernels for the products of weights that were pruned where they are multiplied: (MR, NV, in pairs?)."""
    tiled, plain = tables.tiling(step, dense_tile=0), registers.shapes(isa)
    kernels = [(mr, nv, 0) for mr, nv in plain] + paired(step, isa)
    if not tiled.is_dense:
        alike = {(nv, p): [(m, n) for m, n, q in kernels if (n, q) == (nv, p)] for _, nv, p in kernels}
        kernels = [(mr, nv, p) for mr, nv, p in kernels if registers.worth_trying(mr, tiled, alike[nv, p])]
    return kernels


def kept(step: Operands) -> float:
    """Share of the transformed weights."""
    conv = step.workload
    assert isinstance(conv, WinogradConv2d)
    return tables.tiling(step, dense_tile=0).kept / (conv.out_channels * conv.k)


def paired(step: Operands, isa: Isa) -> list[tuple[int, int, int]]:
    """Kernels that take columns in pairs: (MR, NV, 1)."""
    return [(mr, nv, 1) for mr, nv in pairs.shapes(isa)] if pairs.applies(step, isa) else []


def cut(lanes: int, mr: int, nv: int, isa: Isa, paired: bool) -> strips.Strips:
    """Of so many lanes: with a tail where that takes fewer multiply-adds."""
    whole, tailed = strips.whole(lanes, nv, isa), strips.tailed(lanes, mr, nv, isa, paired)
    if tailed is None or tailed.vectors * mr + tailed.done * strips.lane_cost(mr, isa) >= whole.vectors * mr:
        return whole
    return tailed


def turns(cut: strips.Strips, mr: int, nv: int, isa: Isa, paired: bool) -> float:
    """Multiply-adds of a vector that a weight takes over all lanes, its share of what stands around them included."""
    whole = sum(cut.widths) * (pairs.work(mr) / mr if paired else 1)
    return (whole + cut.done * strips.lane_cost(mr, isa) / mr) * (1 + 0.5 / nv + 0.5 / mr)


def cycles(blocks: int, columns: float, mr: int, lmul: int) -> float:
    """Of a two-wide in-order core, for blocks of ``mr`` rows by a register group, each of so many kept columns: as
    `costs.cost_in_order` counts them."""
    return blocks * (columns * (max(mr * lmul, mr + 3.5) + 1 + 0.2 * lmul) + 5 * mr * lmul)


def places(channels: int, plane: int, positions: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Lanes from one position to the next, and the bytes at which every plane begins, [positions, channels]. Behind the
    last plane is room for what a vector writes beyond it."""
    position = channels * plane + VECTOR_LANES
    position += LINE // 4 if position % 1024 == 0 else 0
    at = np.add.outer(np.arange(positions, dtype=np.int64) * position, np.arange(channels) * plane)
    return position, 4 * at


def gains(m: int) -> npt.NDArray[np.float64]:
    """[m + 2]: how much larger than the layer's the inputs of a position are, as if pixels were independent."""
    return np.asarray(np.sqrt(np.square(matrices(m)[0]).sum(1)))


def tiles(step: Operands, m: Size, count: int, some: range, mr: int) -> tuple[Tile, ...]:
    """What ``some`` of ``count`` positions multiply, one after the other: tiles of ``mr`` rows of all their columns, or
    those that the zeros of transformed weights show. At each a tile has the columns that it keeps there, or one."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    oc = conv.out_channels
    rows = np.array_split(np.arange(oc, dtype=np.int32), range(mr, oc, mr))
    if not isinstance(conv, WinogradConv2d):
        dense = matrix(transform(step.constants["weight"], m)).reshape(oc, count, -1)
        every = np.arange(dense.shape[2], dtype=np.int32)
        return tuple(
            Tile(place * oc + r, every, np.ascontiguousarray(dense[r, p].T))
            for place, p in enumerate(some)
            for r in rows
        )
    width = conv.k // count
    tiled = tables.tiling(step, dense_tile=0)
    if tiled.is_dense:
        tiled = tables.tiling(step, dense_tile=mr)
    found = []
    for place, p in enumerate(some):
        for tile in tiled.tiles:
            at = slice(*np.searchsorted(tile.columns, (p * width, (p + 1) * width)))
            columns, values = tile.columns[at] - np.int32(p * width), tile.values[at]
            if not len(columns):
                columns, values = np.zeros(1, np.int32), np.zeros((1, len(tile.rows)), np.float32)
            found.append(Tile(place * oc + tile.rows, columns, np.ascontiguousarray(values)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Planes:
    """Where the products of one step read and write; offsets in bytes from the arena of their call.

    sources: of every position, of its columns. sums: of every position and output channel. ones: the position of which
    the transform back makes the same pixel everywhere in a tile, for the bias; None: it is not among these. gains: of
    every position, how much larger its inputs are than the layer's. lanes: of a product. plane: lanes from one plane of
    sums to the next. first, count: these positions begin with that one, of so many in a tile; 0: they are all.
    """

    sources: Sequence[npt.NDArray[np.int64]]
    sums: npt.NDArray[np.int64]
    ones: int | None
    gains: npt.NDArray[np.float64]
    lanes: int
    plane: int
    first: int = 0
    count: int = 0


def fields(
    step: Operands, m: Size, shape: tuple[int, int], in_pairs: bool, isa: Isa, planes: Planes, in_panels: int = 0
) -> dict[str, Field]:
    """Of the convolution that multiplies. in_panels: rows of the panels that it reads, 0: it reads planes."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    (mr, nv), oc, positions = shape, conv.out_channels, len(planes.sources)
    found = tiles(step, m, planes.count or positions, range(planes.first, planes.first + positions), mr)
    tiled = TiledWeights((positions * oc, len(planes.sources[0])), found, positions)
    bias = np.zeros(positions * oc, np.float32)
    order = np.concatenate([tile.rows for tile in found])
    ring = registers.places(mr, nv, isa)
    if planes.ones is not None:
        bias[planes.ones * oc : (planes.ones + 1) * oc] = step.constants.get("bias", 0)
    begun: Mapping[str, Field] = {"bias": f32(tables.beyond(bias[order], ring)), **pairs.NONE}
    if in_pairs:
        assert step.rms is not None
        rms = np.repeat(step.rms * planes.gains, len(found) // positions)
        tiled, factors = pairs.scaled(tiled, rms)
        begun = pairs.fields(tiled, factors, bias, mr, rms)
    through: Mapping[str, Field] = panels.NONE
    if in_panels:
        through = {**panels.NONE, "source": Shared(0), "in_panels": in_panels}
    filled = tables.tables(conv.key(), list(planes.sources), tiled, oc, ring)
    split = cut(planes.lanes, mr, nv, isa, in_pairs)
    return {
        "arena": Shared(0),
        "offsets": Const(filled.offsets),
        "weights": Const(filled.weights),
        "weights_ahead": filled.ahead(planes.lanes),
        "rows": u32(tables.beyond(planes.sums.reshape(-1)[order], ring)),
        "residual": None,
        "tiles": Const(filled.tiles),
        "mask": Const(np.full(planes.plane // 8 + 64, 255, np.uint8)),
        "lead": Shared(0),
        "lead_bytes": 0,
        "starts": None,
        "start_count": 0,
        "tile_count": len(found),
        "row_count": positions * oc,
        "lanes": planes.lanes,
        "plane": planes.plane,
        "strips": split.count,
        "tail": split.tail,
        # a tile's weights stay near while all its lanes pass; threads share out the many tiles
        "strip_block": 0,
        "packed": 0,
        "prefetch": 0,
        "fetch": 1,  # products go through all of the transformed output
        "split_tiles": 1,
        "low": -np.inf,
        "high": np.inf,
        **then.NONE,
        **through,
        **begun,
    }
