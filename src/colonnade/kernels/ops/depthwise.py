"""Depthwise convolution: one input plane an output plane, so rows of pixels stand in registers, not rows of weights.

Its kernels are candidates of ``conv2d`` beside the offset-gather ones, which read every input row once a tap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import then
from colonnade.kernels.ops.shared import LEAD_MEMBERS, lead, slots, u32
from colonnade.kernels.registry import Candidate, Operands, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import ELEMENTS, Placed, Planes
from colonnade.workload import Conv2d, Reach, takes_every_second

DWCONV = Struct(
    "cn_dwconv",
    "Depthwise convolution: out[channel] = clip(bias + residual + sum over taps). A line is a run of taps in "
    "consecutive rows of a plane.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("offsets", "const uint32_t *", "of the first tap of every line at lane 0 [channels][lines]"),
        Member("taps", "const uint32_t *", "of every line"),
        Member("weights", "const float *", "[channels][weight_stride] in the order of lines; of float16 such numbers"),
        Member("bias", "const float *", "one a channel, of float16 in the first half of a place"),
        Member("rows", "const uint32_t *", "offset of every output plane"),
        Member("residual", "const uint32_t *", "offset of every plane to add, or null"),
        Member("mask", "const uint8_t *", "a bit a lane of one row: is it a pixel?"),
        *LEAD_MEMBERS,
        Member("channels", "u32", "of the output"),
        Member("lines", "u32"),
        Member("weight_stride", "u32", "taps of a channel"),
        Member("images", "u32"),
        Member("image", "u32", "lanes from one image to the next"),
        Member("in_image", "u32", "likewise of the input"),
        Member("height", "u32", "rows of an image"),
        Member("width", "u32", "lanes of a row to compute"),
        Member("pitch", "u32", "lanes from one row to the next, all of them written"),
        Member("step", "u32", "lanes between the taps of a line: the pitch of the planes"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("low", "f32"),
        Member("high", "f32"),
        *then.MEMBERS,
    ),
)
WINDOWS = (3, 5)  # rows and columns of taps that kernels know as a whole: those of stride 2, or of scalable vectors
TAP_COUNTS = (1, 2, 3, 5)  # lines that a kernel knows; a column of seven taps is one of five and one of two


# X60's cycles, modelled: until a load is there, that it takes a register, until a sum is there
LOADED, LOADING, SUMMED = 7, 2.3, 5


def symbol(rows: int, nv: int, isa: Isa, stride: int = 1, window: int = 0) -> str:
    """``f32_dwconv_4x2v__avx512``, with a stride ``f32_dwconv2_4x2v__avx512``, for 3x3 windows ``f32_dwconv3x3s2_…``"""
    what = (f"{window}x{window}" if window else "") + ("" if stride == 1 else "s2" if window else "2")
    return f"{isa.prefix}_dwconv{what}_{rows}x{nv}v__{isa.name}"


def known(kernel: str) -> bool:
    """Is it one of these?"""
    return kernel.split("_")[1].startswith("dwconv")


def strided(kernel: str) -> bool:
    """Does it take every second pixel of planes as they stand?"""
    return known(kernel) and kernel.split("_")[1].endswith("2")


@dataclass(frozen=True)
class _Op:
    """Part of a block: ``what`` with column of taps, row of the input and row of taps. ``reads`` vectors that others
    make; takes ``busy`` cycles a register of its unit and ``late`` ones until its result is there."""

    what: str
    k: int
    q: int
    t: int
    reads: tuple[tuple[str, int, int], ...]
    busy: float
    late: float

    @property
    def made(self) -> tuple[str, int, int]:
        """Its result: a vector of the input, or two registers as wide as that."""
        return ("wide" if self.what == "wide" else "", self.k, self.q)


@lru_cache
def order(
    rows: int, window: int, nv: int, registers: int, stride: int = 1
) -> tuple[tuple[tuple[str, int, int, int], ...], float]:
    """What a block of ``rows`` rows does, in the order in which a core that issues in order would begin it if it could
    choose: (what, column of taps, row of the input, row of taps) each; and cycles, as the X60 is modelled.

    At stride 1 every column of taps is loaded. At stride 2 a row is, as it stands: its even pixels are the first
    column, the odd ones the second, the others are neighbours of these.
    """
    reach = stride * (rows - 1) + window
    sums = [
        _Op("sum", k, q, t, (("", k, q),), 1, SUMMED)
        for k, q in (product(range(window), range(reach)) if stride == 1 else _by_rows(window, reach))
        for t in range(window)
        if (q - t) % stride == 0 and 0 <= q - t < stride * rows
    ]
    if stride == 1:
        queues = [[_Op("load", k, q, 0, (), LOADING, LOADED) for k, q in product(range(window), range(reach))]]
    else:
        taken = [
            _Op("take", k, q, 0, (("wide", 0, q),), 4, 4) if k < 2 else _Op("next", k, q, 0, (("", k - 2, q),), 2, 6)
            for k, q in _by_rows(window, reach)
        ]
        queues = [[_Op("wide", 0, q, 0, (), 2 * LOADING, LOADED) for q in range(reach)], taken]
    spare = 1 if stride == 1 else 6  # for masks; and wide ones begin at every second register
    room = (registers - spare) // nv - rows
    left = Counter(value for op in (*sums, *(op for queue in queues for op in queue)) for value in op.reads)
    there: dict[tuple[str, int, int], float] = {}
    summed = [0.0] * rows
    vector, memory = 0.0, 0.0  # when these units are free
    done: list[tuple[str, int, int, int]] = []
    while sums:
        ready = [queue[0] for queue in queues if queue] + sums
        best, begin = None, inf
        held = sum(2 if what else 1 for what, *_ in there)
        ahead = sum(("wide", 0, op.q) in there for op in queues[-1])  # places for what is still made of these
        for op in ready:
            if not all(value in there for value in op.reads):
                continue
            if op.what != "sum" and held + (2 + ahead if op.what == "wide" else 1) > room:
                continue
            at = max([memory if op.what in ("load", "wide") else vector, *(there[value] for value in op.reads)])
            if op.what == "sum":
                at = max(at, summed[(op.q - op.t) // stride])
            if at < begin:
                best, begin = op, at
        assert best is not None, f"{rows} rows of {nv} registers leave none for what they read"
        for value in best.reads:
            left[value] -= 1
            if not left[value]:
                del there[value]
        what = best.what
        if what == "sum":
            sums.remove(best)
            row = (best.q - best.t) // stride
            what = "sum" if summed[row] else "first"
            summed[row] = begin + max(best.late, nv)
        else:
            next(queue for queue in queues if queue and queue[0] is best).pop(0)
            there[best.made] = begin + best.late
            if what in ("load", "wide"):  # of a group, arithmetic takes all or nothing
                there[best.made] += best.busy * nv - LOADING
        if best.what in ("load", "wide"):
            memory = begin + best.busy * nv
        else:
            vector, memory = begin + best.busy * nv, max(memory, begin)
        done.append((what, best.k, best.q, best.t))
    return tuple(done), vector


def _halves(rows: int) -> list[int]:
    """Heights of the blocks for what blocks of ``rows`` rows leave."""
    return [p for p in (8, 4, 2, 1) if p < rows]


def _by_rows(window: int, reach: int) -> Iterator[tuple[int, int]]:
    """(column of taps, row of the input), row by row."""
    return ((k, q) for q, k in product(range(reach), range(window)))


def variants(isa: Isa) -> Iterator[Variant]:
    """Every (R, NV) worth compiling for ``isa``, for both strides, and others for ``WINDOWS``. Those of float16 beside
    them, where it knows that."""
    for each in isa.forms:
        for stride, window in ((1, 0), (2, 0), *product((1, 2), WINDOWS)):
            for rows, nv in _shapes(each, stride, window):
                counts = [rows, *_halves(rows)]
                params = {
                    "R": rows, "NV": nv, "S": stride, "WINDOW": window, "row_counts": counts, "tap_counts": TAP_COUNTS,
                    **then.PARAMS, **({"half": True} if each.itemsize == 2 else {}),
                }  # fmt: skip
                body = "dwconv.c.in"
                if window and each.scalable:
                    body = "dwwindow.c.in"
                    params["orders"] = {r: order(r, window, nv, each.registers, stride)[0] for r in counts}
                    # lines that a strip's share of the next block has with registers of 32 bytes
                    params["asks"] = max(stride * stride * rows * nv // 2, 1)
                    params["asks_out"] = max(rows * nv // 2, 1)
                yield Variant(symbol(rows, nv, each, stride, window), body, params)


def _shapes(isa: Isa, stride: int, window: int) -> list[tuple[int, int]]:
    """(R, NV); beside the sums, one row of the strip and (fixed vectors) five weights must find registers. In windows
    nine weights, or 15 of 5x5, and a few vectors of a row: wider strips spill some, and are measured all the same. Maps
    of images have 7, 14, 28 ... rows, or 5, 10, 20 ... For windows of scalable vectors see ``order``."""
    if window and isa.scalable:
        if stride == 2:
            return [(8, 1), (7, 1), (5, 1), (7, 2), (5, 2), (4, 2)]
        # with more columns, 7 rows of two registers leave too few for what is loaded ahead
        return [(8, 1), (7, 1), (5, 1), *([(7, 2)] if window == 3 else []), (5, 2), (4, 2), (4, 4)]
    if window and stride == 1:
        return []
    if window:
        shapes = [(7, 2), (6, 3), (4, 4), (2, 4), (8, 1), (7, 1), (4, 1)]
        if isa.registers < 32:  # there is no room for weights
            return []
        return [(rows, nv) for rows, nv in shapes if rows * nv + (14 if window == 3 else 18) <= isa.registers]
    if isa.scalable and stride == 2:  # a row of which every second lane is taken has twice as many registers
        return [(8, 2), (7, 2), (4, 2), (2, 4), (8, 1), (7, 1)]
    if isa.scalable:
        shapes = [(8, 2), (7, 2), (4, 4), (4, 2), (2, 4), (8, 1), (7, 1), (1, 8), (1, 2)]
        return [(rows, nv) for rows, nv in shapes if (rows + 1) * nv < isa.registers]
    shapes = [(14, 1), (8, 2), (7, 2), (6, 3), (4, 4), (4, 2), (2, 4), (8, 1), (7, 1), (4, 1), (1, 4), (1, 2)]
    return [(rows, nv) for rows, nv in shapes if (rows + 1) * nv + 5 <= isa.registers]


def second(conv: Conv2d, source: Planes) -> bool:
    """Can the kernels of stride 2 read ``source``: plain planes, with zeros wherever a tap of a pixel lies outside?"""
    (down, rows), (right, columns) = Reach.plain(conv, 0), Reach.plain(conv, 1)
    return (
        takes_every_second(conv)
        and source.phases == (1, 1)
        and not source.shifted
        and source.pitch >= max(source.columns + right.before, columns + right.after)
        and source.image_rows >= max(source.rows + down.before, rows + down.after)
        and source.lead >= down.before * source.pitch + right.before
    )


def candidates(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """R x NV over the rows of an image, and single rows over the plane as one long row (``flat``)."""
    conv = step.workload
    assert isinstance(conv, Conv2d) and step.output is not None
    layout = step.output.planes
    taps = conv.kernel[0] * conv.kernel[1]
    stride = 1 if step.inputs[0].planes.phases == conv.stride else 2
    lines = len(_lines(conv, (stride, stride)))
    lanes = isa.taken
    window = _window(_lines(conv, step.inputs[0].planes.phases))
    window = window if _shapes(isa, stride, window) else 0
    # of a vector, and of a row of them: taking every second lane, a core that issues in order waits for them first
    load, wait = (1, 0) if stride == 1 else (8, 5) if isa.scalable else (2, 0)
    for rows, nv in _shapes(isa, stride, window):
        for flat in (0, 1) if (rows, stride) == (1, 1) else (0,):
            height, width = (1, layout.lanes) if flat else (layout.batch * layout.rows, layout.columns)
            vectors = -(-width // (lanes * (nv if isa.scalable else 1))) * (nv if isa.scalable else 1)
            blocks = -(-height // rows)
            # rows of a block overlap in what they load; a strip costs its calls, weights and limits
            loads = lines * (stride * (rows - 1) + taps / lines)
            work = blocks * (vectors * (rows * taps + loads * load) + -(-vectors // nv) * loads * wait)
            overhead = blocks * -(-vectors // nv) * (20 + 2 * taps)
            if window and isa.scalable:
                work, overhead = _window_cycles(layout, rows, nv, window, isa, stride), 0
            name = symbol(rows, nv, isa, stride, window)
            yield Candidate(name, {"flat": flat}, conv.out_channels * (work + overhead) / 1e3)


def _window_cycles(layout: Planes, rows: int, nv: int, window: int, isa: Isa, stride: int) -> float:
    """What a channel takes in blocks of windows, as the X60 is modelled, from its first cache. Where blocks of several
    heights follow each other, or images, every one is a call of its own."""
    parts = [(rows, layout.rows // rows), *((part, 1) for part in _halves(rows) if layout.rows % rows & part)]
    parts = [(part, count) for part, count in parts if count]
    strips, work = -(-layout.columns // (isa.taken * nv)), 0.0
    for part, count in parts:
        strip = order(part, window, nv, isa.registers, stride)[1] + 5 * part * nv + 35
        work += layout.batch * count * (strips * strip + 15)
    calls = layout.batch * len(parts)
    return work + (60 if calls == 1 else 100 * calls)


@dataclass(frozen=True)
class _Line:
    """``taps`` weights (kh, kw) under each other, the first on pixel row ``row``, column ``column`` of the phase."""

    phase: tuple[int, int]
    row: int
    column: int
    taps: tuple[tuple[int, int], ...]


def _lines(conv: Conv2d, phases: tuple[int, int]) -> list[_Line]:
    """All taps, cut into lines of known lengths, of planes in that many phases."""
    (sy, sx), (dy, dx), (top, left) = phases, conv.dilation, conv.padding[:2]
    columns: dict[tuple[int, int, int], dict[int, tuple[int, int]]] = {}
    for kh, kw in product(range(conv.kernel[0]), range(conv.kernel[1])):
        (row, py), (column, px) = divmod(kh * dy - top, sy), divmod(kw * dx - left, sx)
        columns.setdefault((px, column, py), {})[row] = (kh, kw)
    lines = []
    for (px, column, py), taps in columns.items():
        while taps:
            first = min(taps)
            run = 1
            while first + run in taps:
                run += 1
            count = max(n for n in TAP_COUNTS if n <= run)
            lines.append(_Line((py, px), first, column, tuple(taps.pop(first + i) for i in range(count))))
    return lines


def _window(lines: list[_Line]) -> int:
    """Of so many by so many taps side by side in one plane, as kernels know them; 0: they are not."""
    first, count = lines[0], len(lines)
    wanted = [(first.phase, first.row, first.column + k, count) for k in range(count)]
    found = [(line.phase, line.row, line.column, len(line.taps)) for line in lines]
    return count if count in WINDOWS and found == wanted else 0


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """One ``cn_dwconv`` call."""
    conv, output = step.workload, step.output
    assert isinstance(conv, Conv2d) and output is not None
    layout, source = output.planes, step.inputs[0].planes
    flat = bool(candidate.params["flat"])
    lines = _lines(conv, source.phases)
    weight = step.constants["weight"].reshape(conv.out_channels, *conv.kernel)
    taps = [tap for line in lines for tap in line.taps]
    weights = np.stack([weight[:, kh, kw] for kh, kw in taps], axis=1)
    bias = step.constants.get("bias")
    mask = layout.mask()
    if not flat:
        row = np.zeros(layout.pitch + 512, bool)  # kernels look at whole vectors
        row[: layout.columns] = True
        mask = np.packbits(row, bitorder="little")
    fields: dict[str, Field] = {
        "arena": Arena(),
        "offsets": Const(_offsets(conv, step.inputs[0], lines)),
        "taps": u32([len(line.taps) for line in lines]),
        "weights": Const(weights.astype(ELEMENTS[layout.itemsize])),
        "bias": slots(np.zeros(conv.out_channels) if bias is None else bias, layout.itemsize),
        "rows": u32(output.offsets),
        "residual": u32(step.inputs[1].offsets) if conv.epilogue.residual else None,
        "mask": Const(mask),
        **lead(output),
        "channels": conv.out_channels,
        "lines": len(lines),
        "weight_stride": len(taps),
        "images": 1 if flat else layout.batch,
        "image": layout.plane if flat else layout.image_rows * layout.pitch,
        "in_image": source.image_rows * source.pitch,
        "height": 1 if flat else layout.rows,
        "width": layout.lanes if flat else layout.columns,
        "pitch": layout.plane if flat else layout.pitch,
        "step": source.pitch,
        "plane": layout.plane,
        "low": float(conv.epilogue.activation.low),
        "high": float(conv.epilogue.activation.high),
        **then.fields(conv.epilogue.activation.function),
    }
    return (Call(candidate.kernel, DWCONV.name, fields),)


def _offsets(conv: Conv2d, source: Placed, lines: list[_Line]) -> npt.NDArray[np.uint32]:
    """uint32 [OC, lines]: byte offset from the arena's base of every line's first tap at output lane 0."""
    layout = source.planes
    phases = layout.stored_phases
    planes = source.offsets.reshape(conv.in_channels, len(phases))
    planes = np.repeat(planes, conv.out_channels // conv.in_channels, axis=0)
    at = [
        planes[:, phases.index(line.phase)] + (line.row * layout.pitch + line.column) * layout.itemsize
        for line in lines
    ]
    offsets = np.stack(at, axis=1)
    if offsets.min() < 0 or offsets.max() >= 2**32:
        raise ValueError(f"{conv.key()}: an offset lies outside the arena ({offsets.min()} .. {offsets.max()})")
    return offsets.astype(np.uint32)
