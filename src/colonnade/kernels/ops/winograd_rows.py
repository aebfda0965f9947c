"""Minimal filtering F(2 x 2, 3 x 3), row by row of the positions in a tile: for machines whose caches are small.

Of F(2, 3) down the columns of a map every row of positions is one row of pixels plus or minus another one, and gives to
both rows of a tile's output by a sum. So rows of positions pass through transform, product and the way back one after
the other, a band of a map at a time: of what is transformed no more than one row's stands in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from colonnade.kernels.call import Arena, Call, Field, Scratch, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import filtering, panels, products, registers, tables
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.registry import Candidate, Operands, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, VECTOR_LANES, round_up
from colonnade.workload import Conv2d
from colonnade.workload.filtering import ONE, inputs
from colonnade.workload.winograd import TAPS

M = 2  # rows and columns of pixels of a tile
N = M + TAPS - 1  # of its positions
BAND = (
    Member("scratch", "char *", "scratch_bytes a thread"),
    Member("scratch_bytes", "u32"),
    Member("images", "u32"),
    Member("tile_rows", "u32", "of an image"),
    Member("tile_columns", "u32"),
    Member("begin", "u32", "the band's first row of tiles, of those of all images"),
    Member("band", "u32", "rows of tiles"),
    Member("pitch", "u32", "lanes from row to row of the planes"),
    Member("image_rows", "u32", "rows from image to image of the planes"),
    Member("channels", "u32"),
    Member("tiles_plane", "u32", "lanes from one plane of tiles to the next; of the input in scratch"),
)
INPUT = Struct(
    "cn_winograd_row_input",
    "A band of haloed planes, transformed to a row of positions: tiles[strip][position][channel][lane], a lane a tile.",
    (
        Member("arena", "const char *", "base of planes"),
        Member("planes", "const uint32_t *", "offset of every channel's plane"),
        Member("tiles", "float *"),
        *BAND,
        Member("runs", "u32", "room for so many runs of tiles in scratch"),
        Member("first", "u32", "the rows of pixels in a tile's window whose sum is transformed: this one"),
        Member("second", "u32", "and factor times this one"),
        Member("factor", "f32"),
        Member("top", "u32", "rows of padding above"),
        Member("left", "u32", "columns of padding on the left"),
    ),
)
OUTPUT = Struct(
    "cn_winograd_row_output",
    "Sums of one row of positions, transformed back; behind the last row clip(residual + pixel) into planes or panels.",
    (
        Member("tiles", "const float *", "[position][channel][lane]"),
        Member("kept", "float *", "from row to row of positions: [2 rows][2 columns of pixels][channel][lane]"),
        *BAND,
        Member("position", "u32", "lanes from one position or column to the next"),
        Member("row", "u32", "of positions"),
        Member("pixel_lanes", "u32", "of a channel's pixels in scratch"),
        Member("pixel_channels", "u32", "whose pixels are made before they are written"),
        *products.PIXELS,
    ),
)
STRUCTS = (INPUT, OUTPUT)
LMUL = 2  # of the product; wider groups walk more lines than an in-order core has misses for
TOGETHER = 16  # channels that are transformed before they are written
RUN = 40  # bytes of one in scratch
LEAST = 7  # tiles of a run with registers of four lanes, but for the last one of a row
AHEAD = 4096  # bytes by which kernels look ahead of what they multiply
HELD = 400 << 10  # bytes of these, or of weights, that a second cache of 512 KB holds
NEAR = (192 << 10, 640 << 10)  # bytes that stand in memory between calls, for which bands are tried


def variants(isa: Isa) -> Iterator[Variant]:
    """The transforms of one row of positions."""
    same: dict[str, object] = {"NV": 1, "lines": filtering.lines}
    into, back = {**same, "TOGETHER": TOGETHER, "B": filtering.into(M, TAPS)}, {**same, "A": filtering.back(M, TAPS)}
    yield Variant(f"f32_winograd{M}_row_input_1v__{isa.name}", "winograd_row_input.c.in", into)
    yield Variant(f"f32_winograd{M}_row_output_1v__{isa.name}", "winograd_row_output.c.in", back)


def candidates(
    step: Operands, isa: Isa, kernels: list[tuple[int, int, int]], kept: float, dense: int
) -> Iterator[Candidate]:
    """Heights of the product's kernel, of ``kernels`` as `winograd` has them, x rows of tiles in a band."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    bands = sorted({_band(conv, near) for near in NEAR})
    for (mr, nv, _), band in product(kernels, bands):
        if nv == LMUL:
            params = {"winograd": M, "band": band, "dense": dense, "pairs": 0}
            yield Candidate(f"f32_winograd{M}_{mr}x{nv}v__{isa.name}", params, _rank(conv, band, mr, kept))


def _rank(conv: Conv2d, band: int, mr: int, kept: float) -> float:
    """Cycles on a two-wide in-order core: the product; a transformed value 3.5, or 5.5 where a band's do not stay in a
    cache of 512 KB; and for every byte of weights that passes 0.15, or 0.35 where these do not stay there (fitted to 16
    modelled runs of four layers, 64 channels at 56x56 to 512 at 7x7, to 20 %)."""
    count = -(-_rows(conv) // band)
    blocks = count * N * N * -(-conv.out_channels // mr) * -(-band * _columns(conv) // (8 * LMUL))
    values = N * N * (conv.in_channels + conv.out_channels) * _rows(conv) * _columns(conv)
    weights = 4 * N * N * conv.in_channels * conv.out_channels * kept
    a_value = 3.5 if band * _row(conv) <= HELD else 5.5
    return (
        1.1 * products.cycles(blocks, conv.in_channels * kept, mr, LMUL)
        + a_value * values
        + (0.15 if weights <= HELD else 0.35) * weights * count
    )


def _rows(conv: Conv2d) -> int:
    """Rows of tiles of all images."""
    return conv.batch * -(-conv.out_height // M)


def _columns(conv: Conv2d) -> int:
    """Tiles in a row."""
    return -(-conv.out_width // M)


def _band(conv: Conv2d, near: int) -> int:
    """Rows of tiles in bands as even as can be, for which ``near`` bytes hold what stands in memory between calls."""
    rows = _rows(conv)
    return -(-rows // -(-rows // max(near // _row(conv), 1)))


def _row(conv: Conv2d) -> int:
    """Bytes that a row of tiles takes in a band: transformed, its sums, and what is kept."""
    return 4 * _columns(conv) * (N * conv.in_channels + (N + 2 * M) * conv.out_channels)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """For every band and row of positions: input transform, product, the way back."""
    conv, output, source = step.workload, step.output, step.inputs[0]
    assert isinstance(conv, Conv2d) and output is not None
    most, name = candidate.params["band"], candidate.kernel.rsplit("__", 1)[1]
    isa = isa_named(name)
    mr = int(candidate.kernel.split("_")[2].split("x")[0])
    rows, columns, layout, ic = _rows(conv), _columns(conv), output.grid, conv.in_channels
    per_image = rows // conv.batch
    plane = round_up(most * columns, 4)
    plane += LINE // 4 if plane % 1024 == 0 else 0
    position, written = products.places(conv.out_channels, plane, N)
    sums = round_up(4 * N * ic * round_up(most * columns, LMUL * VECTOR_LANES), LINE)
    kept = sums + round_up(4 * N * position, LINE)
    shared = kept + round_up(4 * 2 * M * position, LINE) + AHEAD
    runs = most * -(-columns // LEAST)
    scratch_in = round_up(RUN * runs + 4 * (N * TOGETHER * plane + LMUL * VECTOR_LANES), LINE)
    pixels = round_up(min(most, per_image) * M * layout.pitch + M * VECTOR_LANES, LINE // 4)
    together = panels.together(output, 4 * pixels, isa)
    line = 4 * pixels * together
    sources = list(np.arange(N * ic, dtype=np.int64).reshape(N, ic))
    gain = np.outer(products.gains(M), products.gains(M))
    back: dict[str, Field] = {
        **products.pixels(step, isa), "tiles": Shared(sums), "kept": Shared(kept), "position": position,
        "scratch_bytes": line, "pixel_lanes": pixels, "pixel_channels": together, "channels": conv.out_channels,
    }  # fmt: skip
    into: dict[str, Field] = {
        "arena": Arena(), "planes": u32(source.offsets), "tiles": Shared(0), "scratch_bytes": scratch_in, "runs": runs,
        "channels": ic, "top": conv.padding[0], "left": conv.padding[1],
    }  # fmt: skip
    known: dict[tuple[int, int], dict[str, Field]] = {}  # bands of one size multiply the same
    calls: list[Call] = []
    for begin in range(0, rows, most):
        count = min(most, rows - begin)
        tiles: dict[str, Field] = {
            "images": conv.batch, "tile_rows": per_image, "tile_columns": columns, "begin": begin,
            "band": count, "pitch": layout.pitch, "image_rows": layout.image_rows, "tiles_plane": plane,
            "scratch": Scratch(),
        }  # fmt: skip
        for row, factors in enumerate(inputs(M, TAPS)):
            second, first = map(int, np.flatnonzero(factors))
            seen = {"first": first, "second": second, "factor": float(factors[second])}
            if (row, count) not in known:
                ones = ONE if row == ONE else None
                where = products.Planes(
                    sources, sums + written, ones, gain[row], count * columns, plane, row * N, N * N
                )
                multiplied = products.fields(step, (M, M), (mr, LMUL), False, isa, where, N * ic)
                # sums are no map: nothing behind their last lane is read
                known[row, count] = {**multiplied, "row_count": 0}
            calls += [
                Call(f"f32_winograd{M}_row_input_1v__{name}", INPUT.name, into | tiles | seen, scratch_in, shared),
                Call(registers.symbol(mr, LMUL, isa), tables.CONV.name, known[row, count], 0, shared),
                Call(f"f32_winograd{M}_row_output_1v__{name}", OUTPUT.name, back | tiles | {"row": row}, line, shared),
            ]
    return tuple(calls)
