"""Depthwise convolution: one input plane an output plane, so rows of pixels stand in registers, not rows of weights.

Its kernels are candidates of ``conv2d`` beside the offset-gather ones, which read every input row once a tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import then
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, u32
from colonnade.kernels.registry import Candidate, Operands, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed, Planes
from colonnade.workload import Conv2d, Reach, takes_every_second

DWCONV = Struct(
    "cn_dwconv",
    "Depthwise convolution: out[channel] = clip(bias + residual + sum over taps). A line is a run of taps in "
    "consecutive rows of a plane.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("offsets", "const uint32_t *", "of the first tap of every line at lane 0 [channels][lines]"),
        Member("taps", "const uint32_t *", "of every line"),
        Member("weights", "const float *", "[channels][weight_stride], in the order of lines"),
        Member("bias", "const float *"),
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
WINDOWS = (3, 5)  # rows and columns of taps that kernels of stride 2 know as a whole
TAP_COUNTS = (1, 2, 3, 5)  # lines that a kernel knows; a column of seven taps is one of five and one of two


def symbol(rows: int, nv: int, isa: Isa, stride: int = 1, window: int = 0) -> str:
    """``f32_dwconv_4x2v__avx512``, with a stride ``f32_dwconv2_4x2v__avx512``, for 3x3 windows ``f32_dwconv3x3s2_…``"""
    what = f"{window}x{window}s2" if window else "" if stride == 1 else "2"
    return f"f32_dwconv{what}_{rows}x{nv}v__{isa.name}"


def strided(kernel: str) -> bool:
    """Does it take every second pixel of planes as they stand?"""
    return kernel.startswith("f32_dwconv") and kernel.split("_")[1].endswith("2")


def variants(isa: Isa) -> Iterator[Variant]:
    """Every (R, NV) worth compiling for ``isa``, for both strides; for stride 2 and ``WINDOWS`` others."""
    for stride, window in ((1, 0), (2, 0), *((2, taps) for taps in WINDOWS)):
        for rows, nv in _shapes(isa, stride, window):
            counts = [rows, *(p for p in (8, 4, 2, 1) if p < rows)]
            params = {
                "R": rows, "NV": nv, "S": stride, "WINDOW": window, "row_counts": counts, "tap_counts": TAP_COUNTS,
                **then.PARAMS,
            }  # fmt: skip
            yield Variant(symbol(rows, nv, isa, stride, window), "dwconv.c.in", params)


def _shapes(isa: Isa, stride: int, window: int) -> list[tuple[int, int]]:
    """(R, NV); beside the sums, one row of the strip and (fixed vectors) five weights must find registers. In windows
    nine weights, or 15 of 5x5, and a few vectors of a row: wider strips spill some, and are measured all the same. Maps
    of images have 7, 14, 28 ... rows."""
    if window:
        shapes = [(7, 2), (6, 3), (4, 4), (2, 4), (8, 1), (7, 1), (4, 1)]
        if isa.scalable or isa.registers < 32:  # every second pixel is one load; or there is no room for weights
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
    lanes = isa.lanes or 8
    window = _window(_lines(conv, step.inputs[0].planes.phases)) if stride == 2 else 0
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
            name = symbol(rows, nv, isa, stride, window)
            yield Candidate(name, {"flat": flat}, conv.out_channels * (work + overhead) / 1e3)


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
        "weights": f32(np.stack([weight[:, kh, kw] for kh, kw in taps], axis=1)),
        "bias": f32(np.zeros(conv.out_channels) if bias is None else bias),
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
