"""Two kept columns at a time: Winograd's inner product, for machines that add beside their multiply-adds.

    w1 x1 + w2 x2  =  (x1 + w2) (x2 + w1) - x1 x2 - w1 w2

S. Winograd, "A New Algorithm for Inner Product" (IEEE Transactions on Computers C-17, 1968). For one row that is a
multiply-add and two additions instead of two multiply-adds. x1 x2 is the same for all rows of a tile, so its sum is
made once for all of them; the sum of w1 w2 is known beforehand and goes into the bias. Where additions have pipes of
their own (``Isa.adders``), these are idle in a convolution: with two thirds of the rows computed this way and one third
as usual both kinds of pipes are busy, and 8 rows take 12 turns of a pipe where they took 16, 16 rows 22 for 32.

How a scalar comes to an addition depends on the machine. Where a broadcast takes a turn of the adders, it is an operand
in memory, once for every vector. Where the load ports broadcast (``Isa.broadcasts``) these are the ones to spare, since
pipes are as wide as vectors there: a register for each scalar, which all vectors of a block add if it has several.

What it costs is accuracy: x1 x2 cancels only up to rounding. The loss is least where x and w are of one size, so every
row of weights is multiplied by the power of two that makes them so (and its sum by the inverse at the end): the error
of a sum then grows by about the square root of its length. How large x is, a run of the model on sample inputs tells
(``Step.rms``); a step that lacks it has no candidates here. Inputs that turn out much larger, or in a whole block much
smaller, are noticed by the sum of x1 x2, and the block is computed again as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import registers, strips
from colonnade.kernels.registry import Operands, Variant
from colonnade.kernels.structs import Member
from colonnade.pattern import TiledWeights

KIND = "pairconv"
MEMBERS = (
    Member("start", "const float *", "pairs of columns: what the sums of every row begin with, else null"),
    Member("unscale", "const float *", "likewise: what they are multiplied by at the end, before the residual"),
    Member("limit", "const float *", "likewise: the largest sum of products of inputs that is accurate enough"),
)
NONE: dict[str, Field] = {member.name: None for member in MEMBERS}
UNPAIRED: dict[str, object] = {"pairs": {}}  # what bodies that take single columns are rendered with
LARGER = 16.0  # inputs this many times as large as the sample's are still accurate enough: 2e-5 of a sum of 1,000
SMALLER = 1 / 64  # likewise where all inputs of a block are so small
LEAST = (SMALLER / LARGER) ** 2  # the smallest sum of products over the largest


def applies(step: Operands, isa: Isa) -> bool:
    """Does the machine add beside its multiply-adds, and is it known how large the input is?"""
    return isa.adders and step.rms is not None


def shapes(isa: Isa) -> list[tuple[int, int]]:
    """(MR, NV) worth compiling; the primitives with an operand in memory exist for vectors of 16 lanes alone."""
    return [(8, 2), (16, 1), (12, 2), (10, 2)] if isa.lanes == 16 else []


def variants(isa: Isa) -> Iterator[Variant]:
    """The convolution's body, rendered for pairs."""
    from colonnade.kernels.ops import conv

    yield from (conv.variant(mr, nv, isa, KIND) for mr, nv in shapes(isa))


def rows(mr: int) -> list[bool]:
    """Which rows of a block of ``mr`` take their columns in pairs: as many as keep both kinds of pipes equally busy,
    spread evenly; none where that gains nothing."""
    taken = (2 * mr + 1) // 3 if mr >= 4 else 0
    return [r * taken // mr != (r + 1) * taken // mr for r in range(mr)]


def spreads(mr: int, isa: Isa) -> list[bool]:
    """Whose scalars are broadcast into registers that all vectors take, in blocks of several: where that costs no
    addition every row's, else of two plain rows, for which the adders have turns left; it spares the loads of each."""
    plain = [r for r, taken in enumerate(rows(mr)) if not taken][:2]
    return [isa.broadcasts or r in plain for r in range(mr)]


def params(counts: Sequence[int], isa: Isa) -> dict[str, object]:
    """What bodies with blocks of so many rows are rendered with."""
    return {"pairs": {mr: rows(mr) for mr in counts}, "spreads": {mr: spreads(mr, isa) for mr in counts}}


def work(mr: int) -> float:
    """Turns of the busier kind of pipe for a column of ``mr`` rows, in multiply-adds."""
    taken = sum(rows(mr))
    return max(2 * mr - taken + (taken > 0), 2 * taken) / 2


def scaled(tiled: TiledWeights, rms: float | npt.NDArray[np.float64]) -> tuple[TiledWeights, npt.NDArray[np.float32]]:
    """The tiles with every row multiplied by a power of two that makes it as large as inputs of ``rms`` (one number, or
    one a tile); and the factors, float32 [OC], by row."""
    factors = np.ones(tiled.shape[0], np.float32)
    tiles = []
    for tile, size in zip(tiled.tiles, np.broadcast_to(rms, len(tiled.tiles)), strict=True):
        factors[tile.rows] = powers(np.sqrt(np.square(tile.values, dtype=np.float64).mean(0)), size)
        tiles.append(replace(tile, values=np.ascontiguousarray(tile.values * factors[tile.rows])))
    return replace(tiled, tiles=tuple(tiles)), factors


def powers(weights: npt.NDArray[np.float64], size: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    """The powers of two that make weights of these root mean squares about as large as inputs of ``size``."""
    known = (weights > 0) & (np.asarray(size) > 0)
    ratio = np.divide(size, weights, out=np.ones_like(weights), where=known)
    found: npt.NDArray[np.float64] = np.exp2(np.round(np.log2(ratio)).clip(-60, 60))
    return found


def fields(
    tiled: TiledWeights,
    factors: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    mr: int,
    rms: float | npt.NDArray[np.float64],
) -> Mapping[str, Field]:
    """Of tiles that are ``scaled`` by ``factors``: ``bias`` (float32 [OC], of the unscaled ones) and all of
    ``MEMBERS``, in the order of rows, tile by tile."""
    starts, limits = [], []
    for tile, size in zip(tiled.tiles, np.broadcast_to(rms, len(tiled.tiles)), strict=True):
        values = tile.values.astype(np.float64)
        even = len(tile.columns) // 2 * 2
        known = (values[0:even:2] * values[1:even:2]).sum(0)
        taken = np.array([r for height in registers.heights(len(tile.rows), mr) for r in rows(height)], bool)
        starts.append(factors[tile.rows] * bias[tile.rows].astype(np.float64) - np.where(taken, known, 0))
        limits.append(np.full(len(tile.rows), max(even // 2, 1) * (LARGER * size) ** 2))
    order = np.concatenate([tile.rows for tile in tiled.tiles])
    # the rows of a tail are read by whole vectors
    spare = np.zeros(strips.VECTOR, np.float32)
    return {
        "bias": Const((bias * factors)[order].astype(np.float32)),
        "start": Const(np.concatenate(starts).astype(np.float32)),
        "unscale": Const(np.concatenate([1 / factors[order], spare]).astype(np.float32)),
        "limit": Const(np.concatenate(limits).astype(np.float32)),
    }
