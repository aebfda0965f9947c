"""A stem: a convolution of few channels whose output a max pool alone reads, in one kernel.

Along the columns of the kernel, minimal filtering takes half of the multiply-adds (``filtering``): a 7x7 at stride 2 is
four and three taps on rows of either parity, and F(4, 4) makes 4 rows from 14 products a tap along the row where the
sum takes 28, F(6, 4) 6 rows from 18 where it takes 42. With few channels the transform of the input is small beside the
products, and the products' sums go back into rows while they are still near. The pool takes them from there, so
what lies between both layers, the largest map of most networks, is never written.

In float16 sums are plain, for a filter multiplies what rounding costs. What is read is float32 (most often it is the
user's array) and rounded on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, External, Field, Scratch
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import filtering, pairs, registers
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, VECTOR_LANES, fitting, round_up
from colonnade.workload import Conv2d, ConvPool
from colonnade.workload import filtering as minimal
from colonnade.workload.conv_pool import BEFORE, FILTERS, taps

LINE_STRUCT = Struct(
    "cn_line",
    "Rows of one parity (stride) of an input channel.",
    (
        Member("plane", "u32", "its offset"),
        Member("first", "i32", "the first row that row 0 of the convolution reads"),
    ),
)
LINE_DTYPE = np.dtype([("plane", "<u4"), ("first", "<i4")])
STRUCT = Struct(
    "cn_conv_pool",
    "Max pool (3x3 at stride 2) of clip(bias + convolution), planes to planes.",
    (
        Member("source", "const char *", "what planes of the input are offsets from"),
        Member("arena", "char *", "the same for the output"),
        Member("lines", "const cn_line *"),
        Member("offsets", "const uint32_t *", "bytes from a position to what each column reads at lane 0 [columns]"),
        Member("weights", "const float *", "transformed, block by block: [positions][columns][rows of the block]"),
        Member("start", "const float *", "what sums begin with, block by block: [positions][rows of the block]"),
        Member("start_pairs", "const float *", "likewise those of pairs of columns, else null"),
        Member("unscale", "const float *", "likewise what these are multiplied by at the end, else null"),
        Member("blocks", "const uint32_t *", "first output channel of every block, and the end"),
        Member("rows", "const uint32_t *", "offset of every output plane"),
        Member("scratch", "char *", "scratch_bytes a thread"),
        *LEAD_MEMBERS,
        Member("scratch_bytes", "u32"),
        Member("line_count", "u32"),
        Member("columns", "u32"),
        Member("block_count", "u32"),
        Member("position", "u32", "bytes from a position (of plain sums: a row) to the next"),
        Member("wide", "u32", "lanes of a row of it (of all its rows); each line has one a phase"),
        Member("transformed", "u32", "lanes of all of it"),
        Member("sum_lanes", "u32", "of scratch, for the sums of a block"),
        Member("room", "u32", "lanes of a row to be pooled, with those around it"),
        Member("images", "u32"),
        Member("height", "u32", "of the input"),
        Member("width", "u32"),
        Member("in_pitch", "u32"),
        Member("in_image", "u32", "lanes from one image to the next"),
        Member("stride_y", "u32", "of the convolution"),
        Member("stride_x", "u32"),
        Member("conv_height", "u32", "rows and columns of what is pooled"),
        Member("conv_width", "u32"),
        Member("top", "u32", "padding of the pool, 0 or 1"),
        Member("left", "u32"),
        Member("out_height", "u32"),
        Member("out_width", "u32"),
        Member("pitch", "u32", "of the output"),
        Member("image_rows", "u32", "of the output"),
        Member("tail", "u32", "zero lanes after the last image of a plane"),
        Member("least", "f32", "the least mean square of inputs that pairs are accurate for"),
        Member("most", "f32", "and the largest"),
        Member("low", "f32"),
        Member("high", "f32"),
        Member("band", "u32", "of plain sums: rows of the convolution at a time"),
        Member("window", "u32", "and those that such rows read of a line"),
        Member("parities", "u32", "lines of a channel"),
    ),
)
PLAIN, PAIRED = "convpool", "pairpool"
HALF_SHAPE = 8, 2  # (MR, NV) in float16
HALF_RING = 7  # columns held ahead there: a row of a 7x7 kernel, and all registers that sums leave
AGAIN = 8  # of a block's weights, those that follow it once more
BANDS = range(2, 17)  # rows of the convolution at a time
BAND_ROOM = 64 << 10  # bytes that what is read and written for them should not exceed, if two rows do not
SHARED_CACHE = 512 << 10  # bytes of the second cache of cores in order (SpacemiT K1)
MARGIN = BEFORE  # zero lanes in front of a row of transformed inputs, and of -inf in front of a row to be pooled


FILTERED = [(m, r) for m, r in minimal.POINTS if r in FILTERS and m > 2]  # F(2, 3) saves too little


def shapes(isa: Isa, paired: bool) -> list[tuple[str, int, int]]:
    """(kind, MR, NV) to choose from; ``paired``: those that take columns in pairs too."""
    wanted = [(8, 2)] if isa.scalable else [(8, 3), (6, 4), (4, 3), (6, 2)]
    plain = [(PLAIN, mr, nv) for mr, nv in wanted if registers.legal(mr, nv, isa)][:2]
    return plain + [(PAIRED, mr, nv) for mr, nv in pairs.shapes(isa)[:2] if paired]


def symbol(m: int, r: int, mr: int, nv: int, isa: Isa, kind: str = PLAIN) -> str:
    """``f32_convpool4x4_8x3v__avx512``"""
    return f"f32_{kind}{m}x{r}_{mr}x{nv}v__{isa.name}"


def half_symbol(isa: Isa) -> str:
    """``f16_convpool_8x2v__rvv_zvfh``"""
    return registers.symbol(*HALF_SHAPE, isa, PLAIN)


def variants(isa: Isa) -> Iterator[Variant]:
    """Every filter by every (MR, NV), and the plain sum in float16."""
    for (m, r), (kind, mr, nv) in product(FILTERED, shapes(isa, paired=True)):
        counts = registers.row_counts(mr)
        params = {
            "M": m, "N": minimal.size(m, r), "MR": mr, "NV": nv, "row_counts": counts,
            "rings": {c: (registers.ring(mr, nv)[0], registers.ring(c, nv)[1]) for c in counts},
            "lines": filtering.lines, "INTO": filtering.into(m, r), "BACK": filtering.back(m, r), "MARGIN": MARGIN,
            **(pairs.params(counts, isa) if kind == PAIRED else pairs.UNPAIRED), "W": 2 if isa.scalable else 1,
        }  # fmt: skip
        yield Variant(symbol(m, r, mr, nv, isa, kind), "conv_pool.c.in", params)
    if isa.half:
        mr, nv = HALF_SHAPE
        counts = registers.row_counts(mr)
        params = {
            "half": True, "MR": mr, "NV": nv, "row_counts": counts, "rings": {c: registers.ring(c, nv) for c in counts},
            "RING": HALF_RING, "AGAIN": AGAIN, "MARGIN": MARGIN, "MOST": BANDS[-1] // 2 + 3,
        }  # fmt: skip
        yield Variant(half_symbol(isa.of(2)), "conv_pool_half.c.in", params)


def candidates(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """The plain sum in float16; filters and shapes by multiply-adds, loads and broadcasts of a column and the filter's
    sums."""
    work = step.workload
    assert isinstance(work, ConvPool)
    if isa.itemsize == 2:
        yield Candidate(half_symbol(isa))
        return
    conv = work.conv
    line_count = conv.in_channels * len(_Columns.of(conv).first)
    columns = line_count * conv.kernel[1]
    for (m, r), (kind, mr, nv) in product(FILTERED, shapes(isa, pairs.applies(step, isa))):
        if r != taps(conv):
            continue
        n, vectors = minimal.size(m, r), -(-conv.out_width // (isa.lanes or 8 * nv))
        strips = vectors if isa.scalable else -(-vectors // nv)
        column = sum(
            (pairs.work(rows) if kind == PAIRED else rows) * vectors + 0.25 * (rows * strips + vectors) + strips
            for rows in registers.heights(conv.out_channels, mr)
        )
        back = conv.out_channels * vectors * (2 * n + len(filtering.back(m, r)) / 2 + m)
        bands = -(-conv.out_height // m)
        rank = bands * (n * columns * column + back) * (nv if isa.scalable else 1)
        # cores that share a second cache have transformed inputs of their own in it
        held = threads * 4 * n * (line_count * conv.stride[1] + 1) * (conv.out_width + 2 * MARGIN)
        rank *= 1.3 if isa.scalable and threads > 1 and held > SHARED_CACHE // 2 else 1
        yield Candidate(symbol(m, r, mr, nv, isa, kind), {}, rank)


@dataclass(frozen=True, eq=False)
class _Columns:
    """What one position's product sums over: [line, tap along the row]; ``taken[p]`` the kernel's rows of parity ``p``
    in the window's order, ``first[p]`` the input row that the window of row 0 begins at."""

    first: list[int]
    taken: list[list[int | None]]
    shifts: npt.NDArray[np.int64]  # of every tap along the row: columns of its phase
    phases: npt.NDArray[np.int64]

    @staticmethod
    def of(conv: Conv2d) -> _Columns:
        """Tap ``t`` of row ``o`` reads input row ``o*s + t - pad``: row ``o + q // s`` of parity ``q % s``."""
        (sy, sx), (top, left) = conv.stride, conv.padding[:2]
        first, taken = [], []
        for parity in range(sy):
            at = {(t - top) // sy: t for t in range(conv.kernel[0]) if (t - top) % sy == parity}
            if at:
                begin = min(at)
                first.append(begin * sy + parity)
                taken.append([at.get(begin + i) for i in range(taps(conv))])
        q = np.arange(conv.kernel[1]) - left
        return _Columns(first, taken, q // sx, q % sx)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """One ``cn_conv_pool`` call."""
    work, output = step.workload, step.output
    assert isinstance(work, ConvPool) and output is not None
    conv, pool, target = work.conv, work.pool, output.planes
    assert target.phases == (1, 1), f"{work.key()}: not written in phases"
    base: Field = Arena()
    if step.inputs:
        layout, planes = step.inputs[0].planes, step.inputs[0].offsets
        assert layout.phases == (1, 1), f"{work.key()}: not read in phases"
        pitch, image = layout.pitch, layout.image_rows * layout.pitch
    else:  # the user's array
        base, pitch, image = External(step.external), conv.width, conv.in_channels * conv.height * conv.width
        planes = 4 * conv.height * conv.width * np.arange(conv.in_channels, dtype=np.int64)
    common: dict[str, Field] = {
        "source": base,
        "arena": Arena(),
        "rows": u32(output.offsets),
        "scratch": Scratch(),
        **lead(output),
        "images": conv.batch,
        "height": conv.height,
        "width": conv.width,
        "in_pitch": pitch,
        "in_image": image,
        "stride_y": conv.stride[0],
        "stride_x": conv.stride[1],
        "conv_height": conv.out_height,
        "conv_width": conv.out_width,
        "top": pool.padding[0],
        "left": pool.padding[1],
        "out_height": pool.out_height,
        "out_width": pool.out_width,
        "pitch": target.pitch,
        "image_rows": target.image_rows,
        "tail": target.plane - target.batch * target.image_rows * target.pitch,
        "low": float(conv.epilogue.activation.low),
        "high": float(conv.epilogue.activation.high),
    }
    columns = _Columns.of(conv)
    found = np.zeros(conv.in_channels * len(columns.first), LINE_DTYPE)
    found["plane"] = np.repeat(planes, len(columns.first))
    found["first"] = np.tile(columns.first, conv.in_channels)
    common |= {"lines": Const(found), "line_count": len(found), "parities": len(columns.first)}
    bound = _bind_half if target.itemsize == 2 else _bind
    fields, scratch = bound(step, candidate, columns)
    return (Call(candidate.kernel, STRUCT.name, {**common, **fields, "scratch_bytes": scratch}, scratch),)


def _bind(step: Operands, candidate: Candidate, columns: _Columns) -> tuple[dict[str, Field], int]:
    """The fields that differ, and bytes of scratch a thread, of a kernel with a filter."""
    work = step.workload
    assert isinstance(work, ConvPool)
    conv, pool = work.conv, work.pool
    isa = isa_named(candidate.kernel.rpartition("__")[2])
    (m, r), (mr, nv) = (
        (int(n) for n in part.strip(ascii_lowercase).split("x")) for part in candidate.kernel.split("_")[1:3]
    )
    n, ring = minimal.size(m, r), registers.places(mr, nv, isa)
    parities, kw, sx = len(columns.first), conv.kernel[1], conv.stride[1]
    reach = max(0, int(columns.shifts.max()))
    # whole vectors are read and written, but where a vector is as long as it should be
    lanes = 0 if isa.scalable else isa.lanes
    most = max(-(-conv.width // sx), conv.out_width + reach)
    wide = round_up(MARGIN + most + 2 * lanes, LINE // 4)
    room = round_up(MARGIN + max(conv.out_width, 2 * round_up(pool.out_width, lanes or 1)) + 2, LINE // 4)
    line_count, k = conv.in_channels * parities, conv.in_channels * parities * kw
    position = (line_count * sx + 1) * wide
    at = (np.arange(line_count)[:, None] * sx + columns.phases) * wide + MARGIN + columns.shifts
    # up to whole turns of the ring by columns of zeros, then what the next position begins with
    padded = round_up(k, ring)
    offsets = np.concatenate([at.reshape(-1), np.full(padded - k, line_count * sx * wide + MARGIN)])
    offsets = 4 * np.concatenate([offsets, offsets[:ring] + position])
    blocks = np.cumsum([0, *registers.heights(conv.out_channels, mr)])
    wanted = _transformed(step.constants["weight"], columns, minimal.weights(m, r), padded)
    start = np.zeros((n, conv.out_channels))
    start[minimal.ONE] = step.constants.get("bias", 0)
    paired: dict[str, Field] = {"start_pairs": None, "unscale": None, "least": 0.0, "most": 0.0}
    if PAIRED in candidate.kernel:
        assert step.rms is not None, f"{work.key()}: {candidate.key()} needs to know how large its inputs are"
        # inputs of a position as large as those of a transform of independent pixels
        size = step.rms * np.sqrt(np.square(minimal.inputs(m, r)).sum(1))
        factors = pairs.powers(np.sqrt(np.square(wanted[:, :k]).mean(1)), size[:, None])
        wanted, start = wanted * factors[:, None], start * factors
        known = (wanted[:, 0 : k // 2 * 2 : 2] * wanted[:, 1 : k // 2 * 2 : 2]).sum(1)
        taken = np.concatenate([pairs.rows(b - a) for a, b in pairwise(blocks)])
        paired = {
            "start_pairs": f32(_by_block(start - np.where(taken, known, 0), blocks)),
            "unscale": f32(_by_block(1 / factors, blocks)),
            "least": (pairs.SMALLER * step.rms) ** 2,
            "most": (pairs.LARGER * step.rms) ** 2,
        }
    sums = n * mr * nv * (VECTOR_LANES if isa.scalable else isa.lanes)
    transformed = (n - 1) * position + round_up(int(offsets.max()) // 4 + conv.out_width + 2 * lanes, LINE // 4)
    scratch = 4 * (transformed + sums + (mr * (m - 2) + conv.out_channels * 4 + 1) * room)
    fields: dict[str, Field] = {
        "offsets": u32(offsets),
        "weights": f32(np.append(_by_block(wanted, blocks), np.zeros(8))),  # a core in order reads a few ahead
        "start": f32(_by_block(start, blocks)),
        **paired,
        "blocks": u32(blocks),
        "columns": padded,
        "block_count": len(blocks) - 1,
        "position": 4 * position,
        "wide": wide,
        "transformed": transformed,
        "sum_lanes": sums,
        "room": room,
        "band": m,
        "window": n,
    }
    return fields, scratch


def _band(conv: Conv2d, lines: int, pitch: int, strip: int) -> int:
    """Rows of the convolution at a time, ``pitch`` lanes apart: those with the fewest strips (of ``strip`` lanes), of
    bands whose rows are near, be they read or written. ``lines``: rows of what is read that every one more takes."""

    def strips(rows: int) -> int:
        return -(-((rows - 1) * pitch + conv.out_width) // strip) if rows else 0

    def cost(rows: int) -> float:
        whole, rest = divmod(conv.out_height, rows)
        return (whole * strips(rows) + strips(rest)) * (1 + 0.01 / rows)  # rows between bands are read twice

    near = [n for n in BANDS if 2 * n * pitch * (HALF_SHAPE[0] + lines) <= BAND_ROOM and n <= conv.out_height]
    return min(near, key=cost, default=BANDS[0])


def _bind_half(step: Operands, candidate: Candidate, columns: _Columns) -> tuple[dict[str, Field], int]:
    """The fields that differ, and bytes of scratch a thread, of the kernel for float16."""
    work = step.workload
    assert isinstance(work, ConvPool)
    assert not step.inputs or step.inputs[0].layout.itemsize == 4, f"{work.key()}: reads float32"
    conv, (mr, nv) = work.conv, HALF_SHAPE
    sx = conv.stride[1]
    before, behind = max(0, -int(columns.shifts.min())), max(0, int(columns.shifts.max()))
    # lanes from a row to the next: zeros between what is read serve both rows, the pool needs two of its own
    pitch = max(-(-conv.width // sx) + before, conv.out_width + max(behind, 2))
    parities = len(columns.first)
    phases = conv.in_channels * parities * sx
    band = _band(conv, phases, pitch, nv * isa_named(candidate.kernel.rpartition("__")[2]).of(2).taken)
    window = band + taps(conv) - 1
    wide = window * pitch
    at, rows = [], []  # of every column, by channel, row and column of the kernel: where it stands, a weight a channel
    for channel, parity in product(range(conv.in_channels), range(parities)):
        planes = ((channel * parities + parity) * sx + columns.phases) * wide + MARGIN + columns.shifts
        for row, tap in enumerate(columns.taken[parity]):
            if tap is not None:
                at.append(planes + row * pitch)
                rows.append(step.constants["weight"][:, channel, tap].T)
    offsets, weights = np.concatenate(at), np.concatenate(rows)
    # small weights first: what rounding loses grows with what has been summed so far
    order = np.argsort(np.square(weights, dtype=np.float64).sum(1), kind="stable")
    offsets, weights = offsets[order], weights[order]
    zeros = -len(offsets) % HALF_RING  # up to whole turns of the ring
    offsets = np.append(offsets, np.full(zeros, phases * wide + MARGIN))
    weights = np.pad(weights, ((0, zeros), (0, 0)))
    blocks = np.cumsum([0, *registers.heights(conv.out_channels, mr)])
    by_block = [weights[:, a:b].reshape(-1) for a, b in pairwise(blocks)]
    # the next strip is loaded before it is known that there is none
    strip = nv * fitting(VECTOR_LANES, 2)
    read, written = int(offsets.max()) + band * pitch + 2 * strip, phases * wide + MARGIN  # not all phases need be read
    transformed = round_up(max(read, written), LINE // 2)
    room = round_up(conv.out_width + 3, LINE // 2)
    fields: dict[str, Field] = {
        "offsets": u32(2 * offsets),
        "weights": Const(np.concatenate([np.append(w, np.resize(w, AGAIN)) for w in by_block]).astype(np.float16)),
        "start": Const(step.constants.get("bias", np.zeros(conv.out_channels)).astype(np.float16)),
        "start_pairs": None,
        "unscale": None,
        "blocks": u32(blocks),
        "columns": len(offsets),
        "block_count": len(blocks) - 1,
        "position": 2 * pitch,
        "wide": wide,
        "transformed": transformed,
        "sum_lanes": mr * band * pitch,
        "room": room,
        "band": band,
        "window": window,
        "least": 0.0,
        "most": 0.0,
    }
    return fields, 2 * round_up(transformed + MARGIN + mr * band * pitch + 2 * conv.out_channels * room, LINE // 2)


def _by_block(table: npt.NDArray[np.float64], blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[.., OC] with the channels of a block side by side, block by block."""
    return np.concatenate([table[..., a:b].reshape(-1) for a, b in pairwise(blocks)])


def _transformed(
    weight: npt.NDArray[np.float32], columns: _Columns, g: npt.NDArray[np.float64], padded: int
) -> npt.NDArray[np.float64]:
    """[OC, IC, KH, KW] → [positions, (IC, parity, KW) and zeros up to ``padded``, OC] by ``g`` [positions, r]."""
    oc, ic, _, kw = weight.shape
    n, r = g.shape
    windows = np.zeros((oc, ic, len(columns.taken), r, kw))
    for parity, taken in enumerate(columns.taken):
        for i, tap in enumerate(taken):
            if tap is not None:
                windows[:, :, parity, i] = weight[:, :, tap]
    found = np.einsum("jr,ocprw->jcpwo", g, windows, optimize=True).reshape(n, -1, oc)
    return np.pad(found, ((0, 0), (0, padded - found.shape[1]), (0, 0)))


ROWS = (Operator("conv_pool", (LINE_STRUCT, STRUCT), variants, candidates, bind),)
