"""Blocks of registers: which (MR, NV) a convolution is compiled for, their names, and how a tile is cut into them."""

from __future__ import annotations

from colonnade.kernels.isa import Isa
from colonnade.layout import LINE
from colonnade.pattern import TiledWeights


def row_counts(mr: int) -> list[int]:
    """Heights of the register blocks in one kernel: MR, then powers of two for what is left of a tile."""
    return [mr, *(p for p in (16, 8, 4, 2, 1) if p < mr)]


def ring(mr: int, lmul: int) -> tuple[int, int]:
    """Columns and weights a scalable kernel holds ahead of their use: as many columns as registers are left for, six at
    most (LMUL 2 and 8 rows: 80 cycles, longer than an in-order core's way to L2 and back from a late line), four of one
    register, whose loops would need more addresses than there are; weights so that every column finds them in the same
    registers."""
    room = 31 // lmul - mr
    columns = 6 if room >= 6 and lmul == 2 else 4 if room >= 4 else 2 if room >= 2 else 1
    return columns, next(n for n in (4, 5, 3, 7, 2, 1) if mr % n == 0)


def places(mr: int, nv: int, isa: Isa) -> int:
    """Columns in the ring of a kernel, in whose order the offsets of a tile begin; 1 where there is none."""
    return ring(mr, nv)[0] if isa.scalable else 1


def limited(mr: int, lmul: int, columns: int) -> bool:
    """Is a register group left, beside sums, columns and mask, for the limits that clear lanes which are no pixels?"""
    return (mr + columns + 2) * lmul <= 32


def sideways(mr: int, lmul: int, isa: Isa) -> bool:
    """Has a scalable kernel blocks with its rows in the lanes, for the last few lanes of a plane?"""
    return isa.scalable and isa.itemsize == 4 and (mr, lmul) == (8, 2)


def asks(mr: int, columns: int, itemsize: int) -> list[str]:
    """Statements of a scalable kernel that ask for the weights of ``columns`` columns by lines, 512 bytes ahead."""
    return [f"vec_touch((const char *)w0 + {512 + at});" for at in range(0, columns * mr * itemsize, LINE)]


def symbol(mr: int, nv: int, isa: Isa, kind: str = "spconv") -> str:
    """``f32_spconv_8x3v__avx512``"""
    return f"{isa.prefix}_{kind}_{mr}x{nv}v__{isa.name}"


def shapes(isa: Isa) -> list[tuple[int, int]]:
    """(MR, NV) by how many accumulators the registers hold; on a scalable ISA NV is LMUL."""
    if isa.scalable:
        shapes = [
            (12, 2),
            (10, 2),
            (8, 2),
            (4, 2),
            (6, 4),
            (5, 4),
            (4, 4),
            (2, 4),
            (2, 2),
            (1, 8),
            (20, 1),
            (16, 1),
            (8, 1),
        ]
    elif isa.registers >= 32:
        shapes = [(8, 3), (8, 2), (8, 1), (6, 4), (4, 6), (4, 4), (14, 2), (12, 2), (24, 1), (16, 1), (2, 8), (1, 8)]
    else:
        shapes = [(4, 3), (4, 2), (6, 2), (8, 1), (12, 1), (2, 4), (1, 6)]
    # gathering cuts a strip into at most three pieces a lane
    return [(mr, nv) for mr, nv in shapes if legal(mr, nv, isa) and (not isa.scalable or nv * isa.taken <= 64)]


def legal(mr: int, nv: int, isa: Isa) -> bool:
    """Do accumulators, the strip's vectors and one more register fit? It is for a weight, where that is broadcast to a
    vector first, or for the mask of pixels: a compiler that runs out of registers between instructions of ours resets
    the vector type to move them."""
    return (mr + 1) * nv + 1 <= isa.registers


def worth_trying(mr: int, tiled: TiledWeights, among: list[tuple[int, int]]) -> bool:
    """Is ``mr`` not taller than the tiles, or the smallest kernel ``among`` these shapes that is?"""
    tallest = max(len(tile.rows) for tile in tiled.tiles)
    return mr <= tallest or mr == min((m for m, _ in among if m >= tallest), default=mr)


def heights(rows: int, mr: int) -> list[int]:
    """How a kernel of ``mr`` rows cuts a tile: whole blocks, then what is left in powers of two."""
    heights, left = [mr] * (rows // mr), rows % mr
    for part in row_counts(mr)[1:]:
        if left >= part:
            heights.append(part)
            left -= part
    return heights
