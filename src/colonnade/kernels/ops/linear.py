"""The classifier: a tile's rows in the lanes, one broadcast input a kept column."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import Identity, f32, u32
from colonnade.kernels.ops.tables import TILE, TILE_DTYPE
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import ELEMENTS, Placed, Rows
from colonnade.pattern import TiledWeights, discover
from colonnade.workload import Linear

LINEAR = Struct(
    "cn_linear",
    "y[n, row] = clip(sum over kept columns + bias + residual). Fields of a cn_tile index rows, columns and weights.",
    (
        Member("x", "const char *", "all columns are bytes from here"),
        Member("columns", "const uint32_t *", "offset of the input of every kept column, image 0"),
        Member("weights", "const float *", "of kernels of float16 such numbers"),
        Member("bias", "const float *", "in the order of rows"),
        Member("rows", "const uint32_t *", "output channel of every row, tile by tile"),
        Member("residual", "const float *", "[batch, out_channels], or null"),
        Member("y", "float *", "[batch, out_channels]"),
        Member("tiles", "const cn_tile *"),
        Member("tile_count", "u32"),
        Member("batch", "u32"),
        Member("in_image", "u32", "bytes of x from one image to the next"),
        Member("out_channels", "u32"),
        Member("low", "f32"),
        Member("high", "f32"),
    ),
)
ITEMSIZE = {"f32": 4, "f16": 2}  # of a weight
# (MB images, NV vectors): 16 accumulators at most leave registers for weights everywhere
SHAPES = [(mb, nv) for mb in (1, 2, 4) for nv in (1, 2, 4) if mb * nv + nv < 16]


def _symbol(mb: int, nv: int, isa: Isa) -> str:
    return f"{isa.prefix}_splinear_{mb}x{nv}v__{isa.name}"


def _shapes(isa: Isa) -> list[tuple[int, int]]:
    """Weights of float16 fill half of the registers that they are widened into, so no single one."""
    return [(mb, nv) for mb, nv in SHAPES if isa.itemsize == 4 or nv > 1]


def _variants(isa: Isa) -> Iterator[Variant]:
    for each in isa.forms:
        for mb, nv in _shapes(each):
            yield Variant(_symbol(mb, nv, each), "splinear.c.in", {"MB": mb, "NV": nv, "half": each.itemsize == 2})


def _candidates(operands: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """MB x NV; pruned weights keep their tiles or (dense) are cut anew into tiles of NV vectors."""
    linear = operands.workload
    assert isinstance(linear, Linear)
    isa, lanes = isa.of(ITEMSIZE[linear.dtype]), isa.lanes or 8
    weight = operands.constants["weight"]
    pruned = not _tiling(Identity(weight), 0).is_dense
    for mb, nv in _shapes(isa):
        if mb > 1 and mb >= 2 * linear.batch:
            continue
        for dense in (0, 1) if pruned else (1,):
            tile = nv * lanes
            tiled = _tiling(Identity(weight), tile if dense else 0)
            vectors = sum(-(-len(t.rows) // lanes) * len(t.columns) for t in tiled.tiles)
            passes = -(-linear.batch // mb)
            # a multiply-add a vector and image, a weight load a vector and pass; few sums in flight wait for each other
            waiting = max(1.0, 8 / (nv * min(mb, linear.batch)))
            shares = -(-len(tiled.tiles) // threads) * threads / len(tiled.tiles)
            cost = vectors * (passes + 0.5 * linear.batch * waiting) * shares
            yield Candidate(_symbol(mb, nv, isa), {"dense": dense, "tile": tile if dense else 0}, cost)


@lru_cache(maxsize=16)
def _tiling(weight: Identity, dense_tile: int) -> TiledWeights:
    """The tiles read off the zeros, or all columns in tiles of ``dense_tile`` rows."""
    return TiledWeights.dense_tiles(weight.array, dense_tile) if dense_tile else discover(weight.array)


def _inputs(x: Placed) -> tuple[npt.NDArray[np.int64], int]:
    """(byte offset of every channel's number in image 0, bytes from one image to the next)."""
    if isinstance(x.layout, Rows):
        itemsize = x.layout.itemsize
        return x.offsets[0] + np.arange(x.layout.width, dtype=np.int64) * itemsize, x.layout.width * itemsize
    layout = x.planes
    assert layout.height == layout.width == 1, f"{x.name}: a linear layer reads rows or 1x1 maps"
    return x.offsets, layout.image_rows * layout.pitch * layout.itemsize


def _bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    linear, y = operands.workload, operands.output
    assert isinstance(linear, Linear) and y is not None
    assert y.rows.width == linear.out_channels
    tiled = _tiling(Identity(operands.constants["weight"]), candidate.params["tile"])
    places, in_image = _inputs(operands.inputs[0])
    records = np.zeros(len(tiled.tiles), TILE_DTYPE)
    row = column = weight = 0
    for record, tile in zip(records, tiled.tiles, strict=True):
        record["rows"], record["columns"] = len(tile.rows), len(tile.columns)
        record["first_row"], record["first_column"], record["first_weight"] = row, column, weight
        row, column, weight = row + len(tile.rows), column + len(tile.columns), weight + tile.values.size
    order = np.concatenate([tile.rows for tile in tiled.tiles])
    values = np.concatenate([tile.values.reshape(-1) for tile in tiled.tiles])
    bias = operands.constants.get("bias")
    fields: dict[str, Field] = {
        "x": Arena(),
        "columns": u32(np.concatenate([places[tile.columns] for tile in tiled.tiles])),
        "weights": Const(values.astype(ELEMENTS[ITEMSIZE[linear.dtype]])),
        "bias": f32(np.zeros(len(order)) if bias is None else bias[order]),
        "rows": u32(order),
        "residual": Arena(int(operands.inputs[1].offsets[0])) if linear.epilogue.residual else None,
        "y": Arena(int(y.offsets[0])),
        "tiles": Const(records),
        "tile_count": len(tiled.tiles),
        "batch": linear.batch,
        "in_image": in_image,
        "out_channels": linear.out_channels,
        "low": float(linear.epilogue.activation.low),
        "high": float(linear.epilogue.activation.high),
    }
    return (Call(candidate.kernel, LINEAR.name, fields),)


ROWS: tuple[Operator, ...] = (Operator("linear", (TILE, LINEAR), _variants, _candidates, _bind),)
