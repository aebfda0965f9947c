"""The offset-gather convolution: strips of haloed planes times column-pruned (or dense) tiles of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed
from colonnade.pattern import Tile, TiledWeights, discover
from colonnade.workload import Conv2d, matrix

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
    "Convolution from planes to planes: out[row] = clip(bias + residual + sum over kept columns).",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("offsets", "const uint32_t *", "of every kept column at lane 0"),
        Member("weights", "const float *"),
        Member("bias", "const float *", "in the order of rows"),
        Member("rows", "const uint32_t *", "offset of the output plane of every row, tile by tile"),
        Member("residual", "const uint32_t *", "likewise of the plane to add, or null"),
        Member("tiles", "const cn_tile *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        Member("lead", "char *", "zero lanes in front of the output's first plane"),
        Member("lead_bytes", "u32"),
        Member("tile_count", "u32"),
        Member("row_count", "u32"),
        Member("lanes", "u32", "lanes up to the last pixel"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("strip_block", "u32", "strips that run through all tiles before the next ones start"),
        Member("prefetch", "u32", "kept columns to prefetch ahead; 0: none"),
        Member("split_tiles", "u32", "threads share out 0: strips, 1: tiles"),
        Member("low", "f32"),
        Member("high", "f32"),
    ),
)
PREFETCH_MAX = 16  # the offset table is padded by this many entries, so looking ahead needs no test
