"""Static ranking of the offset-gather convolution: what a candidate costs where nothing was measured."""

from __future__ import annotations

from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import pairs, registers, strips
from colonnade.pattern import TiledWeights

FAR = 1 << 20  # bytes of an output from which on its lines are taken to be in no near cache when they are stored to
PAIR_ENDS = 100.0  # multiply-adds that a block by pairs of columns takes beside them: 8 rows gain from some 30 on
LOAD = 0.25  # a load or broadcast over a multiply-add, behind which most of it is hidden: measured on 7x7 .. 56x56


def cuts(
    tiled: list[TiledWeights], lanes: int, mr: int, nv: int, isa: Isa, paired: bool = False
) -> list[tuple[float, strips.Strips]]:
    """(static cost, strips) of the ways to cut the lanes, the better one first: whole vectors, or with a tail."""
    ways = [strips.whole(lanes, nv, isa), strips.tailed(lanes, mr, nv, isa, paired)]
    found = [(sum(cost(t, cut, lanes, mr, nv, isa, paired) for t in tiled), cut) for cut in ways if cut is not None]
    return sorted(found, key=lambda way: way[0])


def far(tiled: list[TiledWeights], lanes: int, isa: Isa) -> int:
    """Is the output so large that its lines should be asked for? Kernels of scalable ISAs do so in their own way."""
    return int(not isa.scalable and 4 * lanes * sum(t.shape[0] for t in tiled) > FAR)


def idle(shares: int, threads: int) -> float:
    """By how much the busiest thread has more than an even part."""
    return -(-shares // threads) * threads / shares


def cost(
    tiled: TiledWeights, cut: strips.Strips, lanes: int, mr: int, nv: int, isa: Isa, paired: bool = False
) -> float:
    """Static ranking. Fixed vectors: multiply-adds (or loads, where these are more and do the broadcasting), loads and
    broadcasts at a part of their price, and the ends of blocks by pairs."""
    if isa.scalable:
        return cost_in_order(tiled, lanes, mr, nv, isa)
    widths = cut.widths
    total = 0.0
    for tile in tiled.tiles:
        column = ends = 0.0
        for rows in registers.heights(len(tile.rows), mr):
            ends += PAIR_ENDS * len(widths) * (paired and any(pairs.rows(rows)))
            turns = pairs.work(rows) if paired else rows
            # load ports that do all of the broadcasting are as many as those that multiply
            least = [rows + v if isa.broadcasts else 0 for v in widths]
            column += sum(max(turns * v, m) + LOAD * (rows + v) + 1 for v, m in zip(widths, least, strict=True))
            if not cut.tail:
                continue
            if rows == mr:
                column += cut.done * strips.lane_cost(mr, isa) * (1 + LOAD) + LOAD
            else:  # a vector of its own
                column += rows + LOAD * (rows + 1) + 1
        total += len(tile.columns) * column + ends
    return total


def cost_in_order(tiled: TiledWeights, lanes: int, mr: int, lmul: int, isa: Isa) -> float:
    """Cycles a kept column costs a two-wide in-order core with one vector-arithmetic and one vector-memory pipe: the
    busiest of arithmetic (LMUL a multiply-add), load (2.2 LMUL) and issue (a multiply-add and its weight a row, seven
    more), its way through the caches, and the wait for a load where few columns have a register. VLEN is taken as
    256; a strip costs the same however few lanes it has."""
    whole, rest = divmod(lanes, isa.taken * lmul)
    total = 0.0
    for tile in tiled.tiles:
        for rows in registers.heights(len(tile.rows), mr):
            by_rows = rows == mr and registers.sideways(mr, lmul, isa) and rest <= 8
            strips = whole + ((rest + 3) / 17 if by_rows and rest else rest > 0)
            late = {1: 7 + 2.2 * lmul, 2: 1.5, 4: 0.8}.get(registers.ring(mr, lmul)[0], 0.0)
            column = max(rows * lmul, 2.2 * lmul, rows + 3.5) + 1 + 0.2 * lmul + late
            total += strips * (len(tile.columns) * column + 5 * rows * lmul)  # limits, holes, store, bias
    return total
