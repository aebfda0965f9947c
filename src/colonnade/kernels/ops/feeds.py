"""Which ways a convolution may be fed and run: the candidates of ``ops.conv``, the most promising of each ranked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import (
    blocks,
    costs,
    depthwise,
    packing,
    pairs,
    panels,
    registers,
    tables,
    then,
    windows,
    winograd,
)
from colonnade.kernels.registry import Candidate, Operands
from colonnade.layout import Panels, Planes
from colonnade.pattern import TiledWeights
from colonnade.workload import Conv2d, is_depthwise

PACKED_SHAPES = 2
LEFT = 4  # the feed of windows that are left as panels


def candidates(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """MR x NV, strips in a block, prefetch distance, split over threads, feed; for pruned weights also the dense self.

    ``feed`` 0 reads the input in place, 1 gathers panels, 2 reads panels that the step in front wrote, 3 makes windows
    (``ops.windows``), 4 makes them by a call of their own. ``blocks``: of K, each a call of its own (``ops.blocks``).
    Where the input stands as it should, panels are tried with the few shapes that promise most. A tensor in panels
    fixes NV.
    """
    conv = step.workload
    assert isinstance(conv, Conv2d) and step.output is not None
    if fixed := panels.vectors(*step.inputs, step.output):
        yield from _through_panels(step, fixed, isa, threads)
        return
    source, layout = step.inputs[0].planes, step.output.planes
    readable = packing.direct(conv, source, layout)
    if (readable and is_depthwise(conv) and not source.shifted) or depthwise.second(conv, source):
        yield from depthwise.candidates(step, isa, threads)
    if readable and winograd.applies(step):
        yield from winograd.candidates(step, isa, registers.shapes(isa))
    lanes = layout.lanes
    pruned = not tables.tiling(step, dense_tile=0).is_dense
    for dense in (0, 1) if pruned else (1,):
        packed: list[Candidate] = []
        for mr, nv in registers.shapes(isa):
            tiled = tables.tiling(step, dense_tile=mr if dense else 0)
            if not registers.worth_trying(mr, tiled, registers.shapes(isa)):
                continue
            if readable:
                yield from in_place(
                    [tiled], lanes, mr, nv, dense, isa, threads, held=read_bytes(step),
                    reached=blocks.reach(conv, nv, isa.itemsize), together=then.strips(conv, nv),
                )  # fmt: skip
            packed += _packed(conv, tiled, lanes, mr, nv, dense, isa, threads)
            if not readable and isa.scalable and windows.readable(conv, step.inputs[0], layout):
                yield from _windowed(conv, tiled, layout, mr, nv, dense, isa, threads)
        for mr, nv in pairs.shapes(isa) if readable and pairs.applies(step, isa) else ():
            tiled = tables.tiling(step, dense_tile=mr if dense else 0)
            if registers.worth_trying(mr, tiled, pairs.shapes(isa)):
                yield from in_place([tiled], lanes, mr, nv, dense, isa, threads, kind=pairs.KIND)
        best = sorted({c.rank for c in packed})[: 2 * PACKED_SHAPES]
        if packing.packable(conv, source) and not (readable and is_depthwise(conv)):
            yield from (c for c in packed if not readable or c.rank in best)


def _through_panels(step: Operands, fixed: set[int], isa: Isa, threads: int) -> Iterator[Candidate]:
    """The kernels whose strips are those of the panels that the step reads or writes; none where these disagree. What
    Winograd's convolution writes last has the strips of any panel."""
    conv, output, source = step.workload, step.output, step.inputs[0]
    assert isinstance(conv, Conv2d) and output is not None
    stored, lanes = isinstance(source.layout, Panels), output.grid.lanes
    direct = panels.readable(conv, source, output.grid) if stored else packing.direct(conv, source.planes, output.grid)
    if direct and not stored and len(fixed) == 1 and winograd.applies(step):
        yield from winograd.candidates(step, isa, registers.shapes(isa))
    pruned = not tables.tiling(step, dense_tile=0).is_dense
    own = [(mr, nv) for mr, nv in registers.shapes(isa) if {nv} == fixed]
    for dense, (mr, nv) in product((0, 1) if pruned else (1,), own):
        tiled = tables.tiling(step, dense_tile=mr if dense else 0)
        if not registers.worth_trying(mr, tiled, own):
            continue
        feed, held = (2 if stored else 0), read_bytes(step)
        reached = 0 if stored else blocks.reach(conv, nv, isa.itemsize)
        together = then.strips(conv, nv)
        ways = in_place([tiled], lanes, mr, nv, dense, isa, threads, feed, held, reached, together=together)
        found = list(ways) if direct else []
        if not stored and packing.packable(conv, source.planes):
            found += _packed(conv, tiled, lanes, mr, nv, dense, isa, threads)
        if not direct and isa.scalable and windows.readable(conv, source, output.grid):
            found += _windowed(conv, tiled, output.grid, mr, nv, dense, isa, threads)
        yield from (c for c in found if not c.params["tail"])  # a tail belongs to no strip


def read_bytes(step: Operands) -> int:
    """Bytes of the input."""
    source = step.inputs[0]
    if isinstance(source.layout, Panels):
        return source.layout.itemsize * source.shape[1] * source.grid.lanes
    return source.layout.itemsize * len(source.offsets) * source.planes.plane


def in_place(
    tiled: list[TiledWeights],
    lanes: int,
    mr: int,
    nv: int,
    dense: int,
    isa: Isa,
    threads: int,
    feed: int = 0,
    held: int = 0,
    reached: int = 0,
    kind: str = "spconv",
    together: int = 1,
) -> Iterator[Candidate]:
    """The run-time dimensions of one kernel that reads its input in place; ``tiled`` of all its calls. ``held``: bytes
    of the input, where the columns may be cut into blocks; ``reached`` and ``together``: see
    ``blocks.orders``."""
    distances = (0,) if isa.scalable else (0, 4, 8, 16)  # scalable kernels ask for lines in ways of their own
    tiles = min((len(t.tiles) for t in tiled), default=1)
    far = costs.far(tiled, lanes, isa)
    for index, (work, cut) in enumerate(costs.cuts(tiled, lanes, mr, nv, isa, kind == pairs.KIND)):
        orders = [(b, 1) for b in ((1, 4, 0) if cut.count > 4 else (0, 1) if cut.count > 1 else (0,))]
        if isa.scalable:
            orders = blocks.orders(tiled, cut.count, feed, held, threads, reached, together, isa.itemsize)
        fetches = (0,) if isa.scalable else (far, 1 - far)
        for order, ahead, split, fetch in product(orders, distances, (0, 1) if threads > 1 else (0,), fetches):
            block, parts = order
            if (index or fetch != far) and (order != orders[0] or ahead not in (0, 8)):
                continue  # what promises less is tried with what usually is best
            # measured habits: prefetch eight ahead; few strips at a time, or of a small plane all, whose weights are
            # then read once; strips shared out among threads
            habit = 1 + 0.02 * (ahead != 8) + 0.01 * (order != orders[0]) + 0.01 * (fetch != far)
            habit += 0.01 * (isa.scalable and split != blocks.split(tiled, cut.count, feed, threads))
            params = {"strip_block": block, "prefetch": ahead, "split_tiles": split, "dense": dense, "feed": feed}
            params |= {"tail": int(cut.tail > 0), "fetch": fetch} | ({"blocks": parts} if parts > 1 else {})
            yield Candidate(
                registers.symbol(mr, nv, isa, kind),
                params,
                work * habit * costs.idle(tiles if split else tiles * cut.count, threads),
            )


def _packed(
    conv: Conv2d, tiled: TiledWeights, lanes: int, mr: int, nv: int, dense: int, isa: Isa, threads: int
) -> Iterator[Candidate]:
    """Likewise of one that reads panels. Threads that share out tiles gather the same panels each."""
    needed = np.zeros((conv.groups, tiled.shape[1]), bool)
    for tile in tiled.tiles:
        needed[int(tile.rows[0]) * conv.groups // conv.out_channels, tile.columns] = True
    rows = int(needed.sum())
    for work, cut in costs.cuts([tiled], lanes, mr, nv, isa):
        gather = rows * sum(2.0 * width + 1 for width in cut.widths)
        if isa.scalable:  # a load waits for its line, and a store follows it
            gather = rows * cut.count * (20.0 + 9 * nv)
        for block, split in product((1, 4) if cut.count > 4 else (1,), (0, 1) if threads > 1 else (0,)):
            idle = costs.idle(len(tiled.tiles) * (1 if split else cut.count), threads)
            params = {"strip_block": block, "prefetch": 0, "split_tiles": split, "dense": dense, "feed": 1}
            params |= {"tail": int(cut.tail > 0), "fetch": costs.far([tiled], lanes, isa)}
            rank = (work * idle + gather * (threads if split else idle)) * (1 + 0.01 * (block > 1))
            yield Candidate(registers.symbol(mr, nv, isa), params, rank)


def _windowed(
    conv: Conv2d, tiled: TiledWeights, target: Planes, mr: int, nv: int, dense: int, isa: Isa, threads: int
) -> Iterator[Candidate]:
    """Likewise of one that reads windows, made anew for every block of strips; or, without halos, made once and left as
    panels for all threads and blocks of K."""
    lanes = target.lanes
    window = windows.Window.of(conv, tiled, target)
    work, count = costs.cost_in_order(tiled, lanes, mr, nv, isa), -(-lanes // (isa.taken * nv))
    if window.around == 0:
        moved = window.count * count * 90.0 * costs.idle(count, threads)
        held = isa.itemsize * window.count * lanes
        for c in in_place([tiled], lanes, mr, nv, dense, isa, threads, feed=LEFT, held=held):
            yield Candidate(c.kernel, c.params, c.rank + moved)
    blocks_tried = [b for b in ((1, 4, 0) if window.around == 0 else (4, 1, 0)) if b < count] or [0]
    for block, split in product(blocks_tried, (0, 1) if threads > 1 else (0,)):
        held, each = isa.taken * nv * (block or count) + window.around, 40.0 if conv.stride[1] == 1 else 90.0
        moved = -(-count // (block or count)) * window.count * held / (isa.taken * nv) * each
        idle = costs.idle(len(tiled.tiles) * (1 if split else count), threads)
        params = {"strip_block": block, "prefetch": 0, "split_tiles": split, "dense": dense, "feed": 3, "tail": 0}
        rank = (work * idle + moved * (threads if split else idle)) * (1 + 0.1 * (block != blocks_tried[0]))
        rank *= 1 + 0.1 * (window.around == 0)  # those that are left as panels serve whoever comes next
        yield Candidate(registers.symbol(mr, nv, isa), {**params, "fetch": 0}, rank)
