"""3x3 convolutions at stride 1 with fewer multiplications: Winograd's minimal filtering F(m x m, 3 x 3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). A tile of m x m output pixels
takes (m + 2)^2 products instead of 9 m^2. Input tiles are transformed into (m + 2)^2 planes a channel, one lane a
tile; on these the product is a 1x1 convolution a plane, done by the same kernel as every other one; what comes out
is transformed back under the epilogue. Zeros of pruned weights do not survive the transform, so of a convolution this
is a dense candidate, worth it where little was pruned. A ``WinogradConv2d`` was pruned behind the transform.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Field, Scratch, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import filtering, pairs, products, registers, tables, vertical, winograd_rows
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, VECTOR_LANES, round_up
from colonnade.workload import Conv2d, WinogradConv2d
from colonnade.workload.winograd import SIZES, TAPS

SQUARE = tuple(m for m, n in SIZES.values() if m == n)  # tiles of m x m pixels

TILES = (
    Member("images", "u32"),
    Member("tile_rows", "u32"),
    Member("tile_columns", "u32"),
    Member("pitch", "u32", "lanes from row to row of the planes"),
    Member("image_rows", "u32", "rows from image to image of the planes"),
    Member("channels", "u32"),
    Member("tiles_plane", "u32", "lanes from one plane of tiles to the next"),
    Member("position", "u32", "lanes from one position in a tile to the next"),
    Member("band", "u32", "rows of tiles that pass through scratch together"),
    Member("scratch_bytes", "u32"),
)
INPUT = Struct(
    "cn_winograd_input",
    "Tiles of haloed planes, transformed: tiles[position][channel][lane], a lane a tile.",
    (
        Member("arena", "const char *", "base of planes"),
        Member("planes", "const uint32_t *", "offset of every channel's plane"),
        Member("tiles", "float *"),
        Member("scratch", "char *", "scratch_bytes a thread"),
        *TILES,
        Member("room", "u32", "lanes of a row of pixels in scratch"),
        Member("fold", "u32", "lanes of every Mth row in scratch"),
        Member("in_strips", "u32", "channels of all positions, where strips of tiles follow each other: a panel; or 0"),
        Member("strip_vectors", "u32", "registers of such a strip"),
        Member("top", "u32", "rows of padding above"),
        Member("left", "u32", "columns of padding on the left"),
    ),
)
OUTPUT = Struct(
    "cn_winograd_output",
    "Transformed tiles back into planes or panels: clip(residual + pixel).",
    (
        Member("tiles", "const float *"),
        Member("scratch", "char *", "scratch_bytes a thread"),
        *TILES,
        Member("together", "u32", "channels whose tiles are transformed at a time, where a band is all of a map"),
        Member("span", "u32", "lanes of these tiles in scratch"),
        Member("shown", "u32", "rows of tiles whose pixels stand in scratch together"),
        *products.PIXELS,
    ),
)
STRUCTS = (INPUT, OUTPUT, *winograd_rows.STRUCTS)
BAND = 64  # tiles, about, that the input transform makes at a time: 8 KB of scratch, and few pages of panels
RUN = 256  # lanes of a position, about, that the output transform reads in one go: 24 KB of scratch
PIXELS = 1024  # that it puts side by side at a time
VECTOR = 16  # lanes of the widest fixed vector: rows in scratch are written, read and split by whole ones


def variants(isa: Isa) -> Iterator[Variant]:
    """The transforms of both tile sizes; the product between them is the convolution's own kernel."""
    for m in SQUARE:
        if _by_rows(m, isa):
            yield from winograd_rows.variants(isa)
            continue
        same: dict[str, object] = {"M": m, "N": m + 2, "NV": 1, "lines": filtering.lines}
        into, back = {**same, "B": filtering.into(m, TAPS)}, {**same, "A": filtering.back(m, TAPS)}
        yield Variant(f"f32_winograd{m}_input_1v__{isa.name}", "winograd_input.c.in", into)
        yield Variant(f"f32_winograd{m}_output_1v__{isa.name}", "winograd_output.c.in", back)


def _by_rows(m: int, isa: Isa) -> bool:
    """Do rows of positions follow each other, or do all pass together? In-order cores with small caches are faster by
    the former, others are not."""
    return isa.scalable and m == winograd_rows.M


def applies(step: Operands) -> bool:
    """Is it a dense-able 3x3 convolution at stride 1 without dilation and groups, whose limits leave halos at zero,
    and whose input has its columns as they are, in float32?"""
    conv, source = step.workload, step.inputs[0].grid
    assert isinstance(conv, Conv2d)
    if source.shifted or source.itemsize != 4:
        return False
    if not conv.epilogue.activation.low <= 0 <= conv.epilogue.activation.high:
        return False
    shape = (conv.kernel, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    return shape and min(conv.in_channels, conv.out_channels) >= 8


def candidates(step: Operands, isa: Isa, shapes: list[tuple[int, int]]) -> Iterator[Candidate]:
    """Of a convolution: tile size x shape of the product's kernel, which may be one that takes columns in pairs."""
    kernels = [(mr, nv, 0) for mr, nv in shapes if mr >= 6] + products.paired(step, isa)
    for m in SQUARE:
        yield from _candidates(step, m, isa, kernels, 1.0, 1)


def own(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """Of a ``WinogradConv2d``: shapes of the product's kernel."""
    conv = step.workload
    assert isinstance(conv, WinogradConv2d)
    if conv.m[1] == 1:
        yield from vertical.own(step, isa, threads)
        return
    kept, dense = products.kept(step), int(tables.tiling(step, dense_tile=0).is_dense)
    found = list(_candidates(step, conv.m[0], isa, products.shapes(step, isa), kept, dense))
    # on few lanes or channels no shape promises much, and one must do
    yield from found or _candidates(step, conv.m[0], isa, [(*registers.shapes(isa)[0], 0)], kept, dense, anyhow=True)


def _candidates(
    step: Operands, m: int, isa: Isa, kernels: list[tuple[int, int, int]], kept: float, dense: int, anyhow: bool = False
) -> Iterator[Candidate]:
    """``kernels``: (MR, NV, in pairs?). ``kept``: share of the transformed weights. ``anyhow``: shapes that do not look
    worth it, too."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    if _by_rows(m, isa):
        yield from winograd_rows.candidates(step, isa, kernels, kept, dense)
        return
    for mr, nv, paired in kernels:
        params = {"winograd": m, "dense": dense, "pairs": paired}
        name = f"f32_winograd{m}_{mr}x{nv}v__{isa.name}"
        if isa.scalable:
            if nv == 2 or anyhow:  # wider groups walk more planes than an in-order core has misses for
                yield Candidate(name, params, _rank_in_order(conv, m, mr, nv, kept))
            continue
        cut = products.cut(_lanes(conv, m), mr, nv, isa, bool(paired))
        vectors = -(-_lanes(conv, m) // isa.lanes)
        if nv > vectors and not anyhow:
            continue  # every position has weights of its own: a short block would read them for too few lanes
        channels = conv.in_channels * conv.out_channels
        work = (m + 2) ** 2 * channels * kept * products.turns(cut, mr, nv, isa, bool(paired))
        moves = (m + 2) ** 2 * (conv.in_channels + conv.out_channels) * vectors * 3
        # Unmeasured, the direct convolution is the safer choice: it reads a quarter of the weights.
        yield Candidate(name, params, 6 * (work + moves))


def _rank_in_order(conv: Conv2d, m: int, mr: int, lmul: int, kept: float) -> float:
    """Cycles on a two-wide in-order core, as the direct convolution's rank counts them: the product a kept column a
    block and a fifth of that for what it waits for memory, 7 a transformed value (fitted to four modelled layers, 64
    channels at 56x56 to 512 at 7x7, to 8 %)."""
    lanes, positions = _lanes(conv, m), (m + 2) ** 2
    blocks = positions * -(-conv.out_channels // mr) * -(-lanes // (8 * lmul))
    return (
        1.19 * products.cycles(blocks, conv.in_channels * kept, mr, lmul)
        + 7 * positions * (conv.in_channels + conv.out_channels) * lanes
    )


def position(channels: int, plane: int) -> int:
    """Lanes from one position in a tile to the next: planes of all channels, and so much more that the positions of a
    tile, which the transforms touch together, lie in different sets of a cache."""
    return channels * plane + (LINE // 4 - channels * plane) % 1024


def _lanes(conv: Conv2d, m: int) -> int:
    return conv.batch * -(-conv.out_height // m) * -(-conv.out_width // m)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """Input transform, product, output transform."""
    if "rows" in candidate.params:
        return vertical.bind(step, candidate)
    if "band" in candidate.params:
        return winograd_rows.bind(step, candidate)
    conv, output, source = step.workload, step.output, step.inputs[0]
    assert isinstance(conv, Conv2d) and output is not None
    m, isa = candidate.params["winograd"], candidate.kernel.rsplit("__", 1)[1]
    mr, nv = (int(n) for n in candidate.kernel.split("_")[2].removesuffix("v").split("x"))
    paired = bool(candidate.params["pairs"])
    kernel = registers.symbol(mr, nv, isa_named(isa), pairs.KIND if paired else "spconv")
    layout, n2 = output.grid, (m + 2) ** 2
    tile_rows, tile_columns = -(-conv.out_height // m), -(-conv.out_width // m)
    plane = round_up(_lanes(conv, m), LINE // 4)
    plane += LINE // 4 if plane * 4 % 4096 == 0 else 0
    into_position, back_position = position(conv.in_channels, plane), position(conv.out_channels, plane)
    scalable = isa_named(isa).scalable  # then what is multiplied stands in panels: nobody follows plane after plane
    in_strips = round_up(_lanes(conv, m), nv * VECTOR_LANES)
    source_bytes = round_up(4 * n2 * (conv.in_channels * in_strips if scalable else into_position), LINE)
    shared = source_bytes + 4 * n2 * back_position + 4096
    tiles: dict[str, Field] = {
        "images": conv.batch, "tile_rows": tile_rows, "tile_columns": tile_columns, "pitch": layout.pitch,
        "image_rows": layout.image_rows, "tiles_plane": plane,
    }  # fmt: skip
    band = max(1, min(tile_rows, BAND // tile_columns))
    room = round_up((tile_columns + 1) * m + m * VECTOR, LINE // 4)
    fold = round_up((band + 1) * tile_columns + VECTOR, LINE // 4)
    scratch_in = 4 * (room + (m + 2) * m * fold)
    back_band = max(1, min(tile_rows, RUN // tile_columns))
    together = max(1, RUN // plane) if conv.batch == 1 and back_band == tile_rows else 1
    span = round_up((together - 1) * plane + back_band * tile_columns + VECTOR, LINE // 4)
    shown = max(1, min(back_band, PIXELS // (m * layout.pitch)))
    pixels = round_up(m * shown * layout.pitch + m * (tile_columns + VECTOR), LINE // 4)
    scratch_out = 4 * (m * (m + 2) * span + pixels)
    into = {
        **tiles, "arena": Arena(), "planes": u32(source.offsets), "tiles": Shared(0), "scratch": Scratch(),
        "channels": conv.in_channels, "position": into_position, "top": conv.padding[0], "left": conv.padding[1],
        "room": room, "scratch_bytes": scratch_in, "band": band, "fold": fold,
        "in_strips": n2 * conv.in_channels if scalable else 0, "strip_vectors": nv if scalable else 0,
    }  # fmt: skip
    back: dict[str, Field] = {
        **tiles, **products.pixels(step, isa_named(isa)), "tiles": Shared(source_bytes), "scratch": Scratch(),
        "channels": conv.out_channels, "position": back_position, "band": back_band, "together": together, "span": span,
        "shown": shown, "scratch_bytes": scratch_out,
    }  # fmt: skip
    return (
        Call(f"f32_winograd{m}_input_1v__{isa}", INPUT.name, into, scratch_in, shared),
        Call(kernel, "cn_conv", _product(step, m, (mr, nv), paired, isa_named(isa), plane, source_bytes), 0, shared),
        Call(f"f32_winograd{m}_output_1v__{isa}", OUTPUT.name, back, scratch_out, shared),
    )


def _product(
    step: Operands, m: int, shape: tuple[int, int], paired: bool, isa: Isa, plane: int, source_bytes: int
) -> dict[str, Field]:
    """(m + 2)^2 products of [OC, IC] by [IC, tiles]."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    ic, oc, n2 = conv.in_channels, conv.out_channels, (m + 2) ** 2
    gain = products.gains(m)

    def planes(count: int) -> npt.NDArray[np.int64]:
        return 4 * np.add.outer(np.arange(n2, dtype=np.int64) * position(count, plane), np.arange(count) * plane)

    # channels of a panel where that is what stands there; A e_1 = (1, ..., 1), so position (1, 1) is one of ones
    sources = np.arange(n2 * ic, dtype=np.int64).reshape(n2, ic) if isa.scalable else planes(ic)
    where = products.Planes(
        list(sources), source_bytes + planes(oc), m + 3, np.outer(gain, gain).reshape(-1), _lanes(conv, m), plane
    )
    return products.fields(step, (m, m), shape, paired, isa, where, n2 * ic if isa.scalable else 0)


ROWS = (Operator("winograd_conv2d", (), lambda isa: (), own, bind),)
