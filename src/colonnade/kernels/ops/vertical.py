"""3x3 convolutions by minimal filtering down the columns of a map alone, F(m, 3), with weights pruned behind it.

Winograd, "Arithmetic Complexity of Computations" (1980). m rows of pixels take m + 2 products of one row of three taps,
so 3 (m + 2) / m multiply-adds a pixel where the plain convolution takes nine and F(m x m, 3 x 3) takes (m + 2)² / m².
What is transformed is (m + 2) / m values a pixel, not that squared, rows stay whole, and all of it, for some rows of a
map at a time, passes through a memory of its own that stays in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from colonnade.kernels.call import Arena, Call, Const, Field, Scratch, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import filtering, pairs, panels, products, registers, tables
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.registry import Candidate, Operands, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, VECTOR_LANES, round_up
from colonnade.workload import Conv2d, WinogradConv2d
from colonnade.workload.filtering import ONE
from colonnade.workload.winograd import SIZES, TAPS

VERTICAL = Struct(
    "cn_vertical",
    "A cn_conv that multiplies between the transforms of minimal filtering down columns, in a thread's room.",
    (
        *tables.CONV.members,
        Member("base", "char *", "all of sources, targets and adds are bytes from here"),
        Member("sources", "const uint32_t *", "of every input channel"),
        Member("targets", "const uint32_t *", "of every output channel; null: it is in panels"),
        Member("adds", "const uint32_t *", "likewise of what is added"),
        Member("zeros", "const float *", "a row of the input outside of it"),
        Member("room", "char *", "room_bytes a thread: planes of transformed rows, from `sums` bytes on their sums"),
        Member("lines", "char *", "line_bytes a thread: from `pixels` bytes on, pixels of a band and some channels"),
        Member("halo", "char *", "zero lanes in front of the output's first plane"),
        Member("halo_bytes", "u32"),
        Member("room_bytes", "u32"),
        Member("line_bytes", "u32"),
        Member("sums", "u32"),
        Member("pixels", "u32"),
        Member("pixel_bytes", "u32"),
        Member("pixel_lanes", "u32", "from one channel's to the next one's"),
        Member("pixel_channels", "u32", "whose pixels are made before they are written"),
        Member("part", "u32", "0: all of it; 1: the transform of the input alone, of all rows; 2: that of the sums"),
        Member("images", "u32"),
        Member("tile_rows", "u32", "of an image"),
        Member("band", "u32", "rows of tiles, of all images, that pass through a thread's room together"),
        Member("last_strips", "u32", "strips and tail of the last band"),
        Member("last_tail", "u32"),
        Member("span", "u32", "lanes from one row of tiles to the next"),
        Member("top", "u32", "rows of padding above"),
        Member("left", "u32", "columns of padding on the left"),
        Member("in_channels", "u32"),
        Member("in_height", "u32"),
        Member("in_width", "u32"),
        Member("in_pitch", "u32"),
        Member("in_image_rows", "u32", "rows from image to image of a plane"),
        Member("in_plane", "u32", "lanes from one transformed plane to the next"),
        Member("in_position", "u32", "lanes from one position to the next"),
        Member("out_channels", "u32"),
        Member("out_height", "u32"),
        Member("out_width", "u32"),
        Member("out_pitch", "u32"),
        Member("out_image_rows", "u32"),
        Member("out_lanes", "u32", "up to the last pixel"),
        Member("out_plane", "u32", "lanes of a whole plane, all of them written"),
        Member("sums_plane", "u32"),
        Member("sums_position", "u32"),
        Member("strip_vectors", "u32", "registers of a strip of the panels"),
        Member("added", "u32", "is there a residual?"),
        Member("to_panels", "u32", "channels of an output in panels"),
        Member("to_base", "u32", "where it begins"),
        Member("plus_panels", "u32", "likewise of the residual"),
        Member("plus_base", "u32"),
        Member("least", "f32"),
        Member("most", "f32"),
    ),
)
VECTOR = 16  # lanes of the widest fixed vector
CHANNELS_AHEAD = 1  # whose rows an in-order core asks for
AHEAD = 4096  # bytes by which kernels look ahead of what they multiply
HELD = 450 << 10  # bytes of transformed values that a second cache of 512 KB holds
FAR = 512 << 10  # bytes of weights that do not stay near between two bands
WEIGHTS = 8  # multiply-adds of a vector in whose time one vector of these weights comes
WHOLE = 1 << 20  # bytes of a map's transformed values, at most, that pass in one call
NEAR = (96 << 10, 256 << 10, 512 << 10)  # bytes of a thread's room that bands are tried for


def variants(isa: Isa) -> Iterator[Variant]:
    """A kernel for every kernel that multiplies."""
    from colonnade.kernels.ops import conv

    shapes = [(mr, nv, "spconv") for mr, nv in registers.shapes(isa)]
    shapes += [(mr, nv, pairs.KIND) for mr, nv in pairs.shapes(isa)]
    for m in (m for m, n in SIZES.values() if n == 1):
        for mr, nv, kind in shapes:
            needed = conv.variant(mr, nv, isa, kind)
            params = {
                "M": m, "N": m + 2, "NV": 1, "lines": filtering.lines, "B": filtering.into(m, TAPS),
                "A": filtering.back(m, TAPS), "product": needed.symbol, "AHEAD": CHANNELS_AHEAD,
            }  # fmt: skip
            yield Variant(_symbol(m, mr, nv, kind == pairs.KIND, isa.name), "vertical.c.in", params, (needed,))


def _symbol(m: int, mr: int, nv: int, paired: bool, isa: str) -> str:
    """``f32_vertical4_8x2v__avx512``; of a kernel that takes columns in pairs ``f32_vertical4p_8x2v__avx512``"""
    return f"f32_vertical{m}{'p' if paired else ''}_{mr}x{nv}v__{isa}"


def own(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """Of a ``WinogradConv2d`` with tiles of one column."""
    conv = step.workload
    assert isinstance(conv, WinogradConv2d)
    m, kept, dense = conv.m[0], products.kept(step), int(tables.tiling(step, dense_tile=0).is_dense)
    bands = {_band(conv, m, near) for near in NEAR} | {0}
    if isa.scalable and threads == 1 and _bytes(conv, m, _rows(conv, m)) <= WHOLE:
        bands.add(_rows(conv, m))  # weights pass once, and nobody waits between the calls
    for (mr, nv, paired), band in product(products.shapes(step, isa), sorted(bands)):
        params = {"winograd": m, "rows": band, "dense": dense, "pairs": paired}
        name = _symbol(m, mr, nv, bool(paired), isa.name)
        if isa.scalable:
            if nv != 2:
                continue  # wider groups walk more planes than an in-order core has misses for
            yield Candidate(name, params, _rank_in_order(conv, m, band, mr, nv, kept, threads))
            continue
        rows = _rows(conv, m)
        parts = -(-rows // (band or rows))
        cut = products.cut(_lanes(conv, band or rows), mr, nv, isa, bool(paired))
        weights = _weights(conv, m, kept)
        work = weights * products.turns(cut, mr, nv, isa, bool(paired)) * parts
        moves = (m + 2) * (conv.in_channels + conv.out_channels) * (cut.vectors + (cut.tail > 0)) * parts * 4
        again = WEIGHTS * weights / isa.lanes * parts if 4 * weights > FAR else 0
        yield Candidate(name, params, (work + moves + again) * _idle(parts if band else 0, threads))


def _idle(bands: int, threads: int) -> float:
    """Time of some bands over what it would be if threads shared them evenly; none: they share channels."""
    return -(-bands // threads) * threads / bands if bands else 1.0


def _weights(conv: Conv2d, m: int, kept: float) -> float:
    return (m + 2) * TAPS * conv.in_channels * conv.out_channels * kept


def _rank_in_order(conv: Conv2d, m: int, band: int, mr: int, lmul: int, kept: float, threads: int) -> float:
    """Cycles on a two-wide in-order core: the product; a transformed value 3.5 to 4.5, the more of them there are at a
    time, or 7 where they do not stay in a cache of 512 KB; and 0.15 for every byte of weights that passes (fitted to 17
    modelled runs of four layers, 64 channels at 56x56 to 512 at 7x7, to 12 %). Three calls take longer than one."""
    rows = _rows(conv, m)
    count = -(-rows // (band or rows))
    blocks = count * (m + 2) * -(-conv.out_channels // mr) * -(-_lanes(conv, band or rows) // (8 * lmul))
    product_ = products.cycles(blocks, TAPS * conv.in_channels * kept, mr, lmul)
    values = (m + 2) * (conv.in_channels + conv.out_channels) * rows * _span(conv)
    held = 4 * values / count / HELD
    total = 1.1 * product_ + (7 if held > 1 else 3.5 + held) * values + 0.15 * 4 * _weights(conv, m, kept) * count
    return total * (_idle(count, threads) if band else 1.01)


def _rows(conv: Conv2d, m: int) -> int:
    """Rows of tiles of all images."""
    return conv.batch * -(-conv.out_height // m)


def _span(conv: Conv2d) -> int:
    """Lanes from one row of tiles to the next: of taps, which reach beyond both ends."""
    return conv.out_width + TAPS - 1


def _lanes(conv: Conv2d, rows: int) -> int:
    """Of a product over so many rows of tiles."""
    return rows * _span(conv) - (TAPS - 1)


def _band(conv: Conv2d, m: int, near: int) -> int:
    """Rows of tiles in bands as even as can be, of which what is transformed takes about ``near`` bytes."""
    rows = _rows(conv, m)
    return -(-rows // -(-rows // max(near // _bytes(conv, m, 1), 1)))


def _bytes(conv: Conv2d, m: int, rows: int) -> int:
    """Of what is transformed of so many rows of tiles, on both sides."""
    return 4 * (m + 2) * (conv.in_channels + conv.out_channels) * rows * _span(conv)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """One call, or both transforms and a call between them that multiplies."""
    conv, output, source = step.workload, step.output, step.inputs[0]
    assert isinstance(conv, Conv2d) and output is not None
    m, band, name = candidate.params["winograd"], candidate.params["rows"], candidate.kernel.rsplit("__", 1)[1]
    mr, nv = (int(n) for n in candidate.kernel.split("_")[2].removesuffix("v").split("x"))
    paired, isa, layout, positions = bool(candidate.params["pairs"]), isa_named(name), output.grid, m + 2
    rows = _rows(conv, m)
    most = band or rows
    lanes = _lanes(conv, most)
    in_plane = round_up(most * _span(conv), 4)
    sums_plane = round_up(lanes, LINE // 4)
    sums_plane += LINE // 4 if sums_plane % 1024 == 0 else 0
    in_plane += LINE // 4 if in_plane % 1024 == 0 else 0
    in_position, read = products.places(conv.in_channels, in_plane, positions)
    sums_position, written = products.places(conv.out_channels, sums_plane, positions)
    sums = round_up(4 * (positions * in_position + VECTOR_LANES), LINE)
    room = round_up(sums + 4 * positions * sums_position, LINE) + AHEAD
    per_image = -(-conv.out_height // m)
    pixels = round_up(min(most, per_image) * m * layout.pitch + VECTOR, LINE // 4)
    together = panels.together(output, 4 * pixels, isa)
    line = 4 * pixels * together
    taps = [np.concatenate([read[p] + 4 * x for x in range(TAPS)]) for p in range(positions)]
    where = products.Planes(taps, sums + written, ONE, products.gains(m), lanes, sums_plane)
    multiplied = products.fields(step, (m, 1), (mr, nv), paired, isa, where)
    last = products.cut(_lanes(conv, (rows - 1) % most + 1), mr, nv, isa, paired)
    residual = step.inputs[1] if conv.epilogue.residual else None
    through, _ = panels.fields(None, output, residual, 0, 0, False, isa)
    fields: dict[str, Field] = {
        **multiplied, "row_count": 0,  # these sums are no map: nothing behind their last lane is read
        "base": Arena(), "sources": u32(source.offsets), "targets": panels.planes(output),
        "adds": panels.planes(residual),
        "zeros": Const(np.zeros(conv.width + VECTOR_LANES, np.float32)), "room": Scratch(), "lines": Scratch(),
        "halo": Arena(output.lead_offset), "halo_bytes": output.lead_bytes, "room_bytes": room + line,
        "line_bytes": room + line, "sums": sums, "pixels": room, "pixel_bytes": line, "pixel_lanes": pixels,
        "pixel_channels": together, "part": 0, "images": conv.batch,
        "tile_rows": per_image, "band": most, "last_strips": last.count, "last_tail": last.tail, "span": _span(conv),
        "top": conv.padding[0], "left": conv.padding[1], "in_channels": conv.in_channels, "in_height": conv.height,
        "in_width": conv.width, "in_pitch": source.grid.pitch, "in_image_rows": source.grid.image_rows,
        "in_plane": in_plane, "in_position": in_position, "out_channels": conv.out_channels,
        "out_height": conv.out_height, "out_width": conv.out_width, "out_pitch": layout.pitch,
        "out_image_rows": layout.image_rows, "out_lanes": layout.lanes, "out_plane": layout.plane,
        "sums_plane": sums_plane, "sums_position": sums_position,
        "strip_vectors": max(panels.vectors(output, *step.inputs), default=0), "added": int(residual is not None),
        "to_panels": through["out_panels"], "to_base": through["out_base"], "plus_panels": through["add_panels"],
        "plus_base": through["add_base"], "least": float(conv.epilogue.activation.low),
        "most": float(conv.epilogue.activation.high),
    }  # fmt: skip
    if band:
        return (Call(candidate.kernel, VERTICAL.name, fields, room + line),)
    apart = {**fields, "room": Shared(), "room_bytes": 0, "line_bytes": line, "pixels": 0}
    kernel = registers.symbol(mr, nv, isa, pairs.KIND if paired else "spconv")
    return (
        Call(candidate.kernel, VERTICAL.name, {**apart, "part": 1}, line, room),
        Call(kernel, tables.CONV.name, multiplied, 0, room),
        Call(candidate.kernel, VERTICAL.name, {**apart, "part": 2}, line, room),
    )
