"""The offset-gather convolution: strips of haloed planes times column-pruned (or dense) tiles of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from colonnade.kernels.call import Arena, Call, Const, Field, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import (
    blocks,
    depthwise,
    feeds,
    packing,
    pairs,
    panels,
    registers,
    strips,
    tables,
    then,
    vertical,
    windows,
    winograd,
)
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Struct
from colonnade.layout import VECTOR_LANES, Panels, Placed, Planes, fitting
from colonnade.workload import Conv2d

PACKED = Struct(
    "cn_packed_conv",
    "A cn_conv whose offsets count from a panel that is gathered for every strip: in bytes, or in rows where a strip's "
    "length is known at run time only. Input planes may have any pitch, halo and phases.",
    (*tables.CONV.members, *packing.MEMBERS),
)
PLANES_ASKED = 128  # input planes whose next lanes are asked for ahead; of more of them the caches lose them again


def variants(isa: Isa) -> Iterator[Variant]:
    """Every (MR, NV) worth compiling for ``isa``."""
    yield from (variant(mr, nv, each) for each in isa.forms for mr, nv in registers.shapes(each))
    yield from pairs.variants(isa)
    yield from depthwise.variants(isa)
    yield from winograd.variants(isa)
    yield from vertical.variants(isa)


def variant(mr: int, nv: int, isa: Isa, kind: str = "spconv") -> Variant:
    """The kernel of ``mr`` rows by ``nv`` vectors; ``kind`` is spconv or that of ``pairs``."""
    counts = registers.row_counts(mr)
    rings = {m: (registers.ring(mr, nv)[0], registers.ring(m, nv)[1]) for m in counts}  # one order of offsets for all
    paired = kind == pairs.KIND
    tails = strips.tails(mr, nv, isa, paired)
    params = {
        "MR": mr, "NV": nv, "row_counts": counts, "rings": rings,
        "limited": {m: registers.limited(m, nv, rings[m][0]) for m in counts},
        "sideways": registers.sideways(mr, nv, isa),
        "asks": {m: registers.asks(m, rings[m][0], isa.itemsize) for m in counts},
        "tails": tails if any(tails) else [], "width": strips.row_width(mr, isa),
        **(pairs.params(counts, isa) if paired else pairs.UNPAIRED), "least": f"{pairs.LEAST}f", **then.PARAMS,
        **({"half": True} if isa.itemsize == 2 else {}),
    }  # fmt: skip
    return Variant(registers.symbol(mr, nv, isa, kind), "spconv.c.in", params)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """Of a ``cn_conv``, a ``cn_packed_conv`` or a ``cn_dwconv``: one call, or one a block of K."""
    conv, output = step.workload, step.output
    assert isinstance(conv, Conv2d) and output is not None
    source, layout = step.inputs[0], output.grid
    feed = candidate.params.get("feed", 0)
    apart = feed in (1, 3, feeds.LEFT) or depthwise.strided(candidate.kernel)
    for tensor in step.inputs[1:] if apart else step.inputs:
        if (tensor.grid.pitch, tensor.grid.image_rows) != (layout.pitch, layout.image_rows):
            raise ValueError(f"{conv.key()}: lanes {tensor.grid.key()} do not match output {layout.key()}")
    if depthwise.known(candidate.kernel):
        return depthwise.bind(step, candidate)
    if "winograd" in candidate.params:
        return winograd.bind(step, candidate)
    params = candidate.params
    _, kind, shape = candidate.kernel.split("_")[:3]
    mr, nv = (int(part.removesuffix("v")) for part in shape.split("x"))
    tiled = tables.tiling(step, dense_tile=mr if params["dense"] else 0)
    isa = isa_named(candidate.kernel.rpartition("__")[2]).of(layout.itemsize)
    ring = registers.places(mr, nv, isa)
    panel = packing.Panel.of(conv, tiled) if feed == 1 else None
    cut = strips.taken(candidate, layout.lanes, mr, nv, isa)
    if (stored := panels.vectors(*step.inputs, output)) and (stored != {nv} or cut.tail):
        raise ValueError(f"{conv.key()}: {candidate.key()} does not have the strips of its panels")
    strip = 0 if isa.scalable else nv * isa.lanes
    per_group = conv.out_channels // conv.groups
    if panel is not None:
        full = panel.offsets(conv, 1 if isa.scalable else cut.lanes(isa) * layout.itemsize)
    elif feed not in (3, feeds.LEFT):
        full = [tables.column_offsets(conv, source, g, strip) for g in range(conv.groups)]
    if isa.scalable and panel is None:
        tiled = blocks.by_channel(tiled, conv)
    parts = blocks.cut(tiled, conv, params["blocks"]) if params.get("blocks", 1) > 1 else [tiled]
    order = np.concatenate([tile.rows for tile in tiled.tiles])
    bias = step.constants.get("bias", np.zeros(conv.out_channels, np.float32))
    begun: Mapping[str, Field] = pairs.NONE
    if kind == pairs.KIND:
        assert step.rms is not None, f"{conv.key()}: {candidate.key()} needs to know how large its inputs are"
        tiled, factors = pairs.scaled(tiled, step.rms)
        begun = pairs.fields(tiled, factors, bias, mr, step.rms)
        parts = [tiled]
    row = nv * fitting(VECTOR_LANES, layout.itemsize) if isa.scalable else cut.lanes(isa)
    gathered = packing.panel_bytes(panel, params["strip_block"], row, isa) if panel is not None else 0
    left = windows.Window.of(conv, tiled, layout) if feed == feeds.LEFT else None
    shared = left.left(layout.lanes, nv, layout.itemsize) if left is not None else 0
    calls: list[Call] = []
    for index, part in enumerate(parts):
        first = index == 0
        window = windows.Window.of(conv, part, layout) if feed == 3 else None
        if window is not None:
            full, gathered = list(window.rows), window.bytes(layout.lanes, nv, params["strip_block"], layout.itemsize)
        if left is not None:
            full = list(left.rows)
        filled = tables.tables(conv.key(), full, part, per_group, ring, layout.itemsize)
        # behind the first block of columns, sums go on from what stands in the output
        residual = output if not first else step.inputs[1] if conv.epilogue.residual else None
        in_place = panel is None and left is None and (window is None or isinstance(source.layout, Panels))
        places = (source if in_place else None, output, residual)
        through, scratch = panels.fields(*places, gathered, filled.offsets.size, window is not None, isa)
        starts, start_count = None, 0
        if isa.scalable and feed == 0 and len(source.offsets) <= PLANES_ASKED:
            starts = tables.furthest(source, filled.offsets)
            start_count = len(starts) - 1
        elif isa.scalable and feed in (2, feeds.LEFT):
            starts = filled.offsets.min(keepdims=True)
            start_count = int(np.ptp(filled.offsets)) + 1
        fields: dict[str, Field] = {
            "arena": Arena(),
            "offsets": Const(filled.offsets),
            "weights": Const(filled.weights),
            "weights_ahead": filled.ahead(layout.lanes),
            "rows": u32(tables.beyond(panels.offsets(output, strip)[order], ring)),
            "residual": None if residual is None else u32(panels.offsets(residual, strip)[order]),
            "tiles": Const(filled.tiles),
            "mask": Const(layout.mask()),
            "lead": Arena(output.lead_offset),
            "lead_bytes": output.lead_bytes,
            "starts": None if starts is None else Const(starts),
            "start_count": start_count,
            "tile_count": len(tiled.tiles),
            "row_count": len(order),
            "fetch": fetched(step) if params["fetch"] else 0,
            "packed": int(panel is not None or window is not None),
            **strips.fields(cut, layout.lanes, layout.plane, params),
            **blocks.ends(conv, bias[order], ring, index, len(parts), layout.itemsize),
            **through,
            **begun,
        }
        if left is not None:
            if first:
                calls.append(_leave(candidate.kernel, conv, source, layout, left, fields, isa, shared))
            fields |= {"source": Shared(), "in_panels": left.count}
            calls.append(Call(candidate.kernel, tables.CONV.name, fields, scratch, shared))
            continue
        if window is not None:
            shifts = tables.tables(conv.key(), list(window.shifts), part, per_group, ring, layout.itemsize).offsets
            fields |= windows.fields(conv, source, layout, window) | {"shifts": Const(shifts)}
            calls.append(Call(candidate.kernel, PACKED.name, fields, scratch))
            continue
        if panel is None:
            calls.append(Call(candidate.kernel, tables.CONV.name, fields, scratch))
            continue
        fields |= packing.fields(conv, source, layout, panel, step.constants)
        fields |= {"panel_lanes": row}
        calls.append(Call(candidate.kernel, PACKED.name, fields, scratch))
    return tuple(calls)


def _leave(
    kernel: str,
    conv: Conv2d,
    source: Placed,
    target: Planes,
    left: windows.Window,
    fields: Mapping[str, Field],
    isa: Isa,
    shared: int,
) -> Call:
    """The call that makes windows of all strips, by the fields of the convolution that will read them."""
    through, _ = panels.fields(source, None, None, 0, 0, False, isa)
    made = {**fields, **windows.fields(conv, source, target, left), **through}
    return Call(kernel, PACKED.name, made | {"packed": 1, "shifts": None, "made": Shared()}, 0, shared)


def fetched(step: Operands) -> int:
    """Which lines a convolution that asks for lines asks for: those of a residual only where it is not the output."""
    assert step.output is not None
    return 1 + 2 * any(not np.array_equal(x.offsets, step.output.offsets) for x in step.inputs[1:])


STRUCTS = (tables.TILE, tables.CONV, packing.TAP, PACKED, depthwise.DWCONV, *winograd.STRUCTS, vertical.VERTICAL)
ROWS = (Operator("conv2d", STRUCTS, variants, feeds.candidates, bind),)
