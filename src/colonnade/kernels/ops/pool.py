"""Pools: windows over planes, and whole planes to one number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from colonnade.kernels.call import Arena, Call, Field, Scratch
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, round_up
from colonnade.workload import GlobalPool, Pool2d

MAX_LANES = 256  # more than a vector of fixed length has
# for scalable ISAs
TOGETHER = 8  # registers of maps that are joined at a time, each a row of the output or a part of one
GROUPS = {4: (1, 2, 4), 2: (1, 2)}  # by bytes of an element, registers of such a part: rows of small maps fill few
SQUARES = ((2, 2), (3, 1), (3, 2))  # windows and strides whose maxima have kernels of their own
SQUARES_ROOM = 8192  # bytes of scratch that should be enough for theirs: an L1 cache holds them beside all else
POOL = Struct(
    "cn_pool",
    "Pool over windows: planes to planes. A row of vertical results stands in scratch between its paddings.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every input plane"),
        Member("out", "const uint32_t *"),
        Member("row_factor", "const float *", "1 / rows counted in a window of every output row (avg)"),
        Member("column_factor", "const float *", "likewise of every output column, padded with zeros to whole vectors"),
        Member("scratch", "float *", "scratch_lanes for every thread; on a scalable ISA as its kernels share it out"),
        *LEAD_MEMBERS,
        Member("scratch_lanes", "u32", "those of one row where scratch has several"),
        Member("planes", "u32"),
        Member("images", "u32"),
        Member("height", "u32"),
        Member("width", "u32"),
        Member("in_pitch", "u32"),
        Member("in_image", "u32", "lanes from one image to the next"),
        Member("out_height", "u32"),
        Member("out_width", "u32"),
        Member("pitch", "u32", "of the output"),
        Member("image_rows", "u32", "of the output"),
        Member("tail", "u32", "zero lanes after the last image of a plane"),
        Member("kernel_y", "u32"),
        Member("kernel_x", "u32"),
        Member("stride_y", "u32"),
        Member("stride_x", "u32"),
        Member("dilation_y", "u32"),
        Member("dilation_x", "u32"),
        Member("top", "u32"),
        Member("left", "u32"),
    ),
)
GLOBAL = Struct(
    "cn_global_pool",
    "Mean, sum or maximum of every plane and image: y[n, c].",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane"),
        Member("y", "float *"),
        Member("planes", "u32"),
        Member("images", "u32"),
        Member("height", "u32"),
        Member("width", "u32"),
        Member("pitch", "u32"),
        Member("image", "u32", "lanes from one image to the next"),
        Member("factor", "f32", "the sum is multiplied by this"),
    ),
)


def _group(isa: Isa) -> int:
    """Registers at a time: half of what arrays take, for rows of small maps do not fill more."""
    return max(isa.group // 2, 1)


def _pool_variants(isa: Isa) -> Iterator[Variant]:
    if not isa.scalable:
        for kind in ("max", "avg"):
            yield Variant(symbol(f"{kind}pool", isa), "pool.c.in", {"KIND": kind, "MAX_LANES": MAX_LANES})
        return
    for each in isa.forms:
        known = {"TOGETHER": TOGETHER, "half": each.itemsize == 2}
        for kind in ("max", "avg"):
            for nv in GROUPS[each.itemsize]:
                yield Variant(symbol(f"{kind}pool", each, nv), "pool_rows.c.in", {"NV": nv, "KIND": kind, **known})
        for size, stride in SQUARES:
            yield Variant(_square(size, stride, each), "pool_square.c.in", {"SIZE": size, "STRIDE": stride, **known})


def _square(size: int, stride: int, isa: Isa) -> str:
    """``f32_maxpool3s2__rvv``"""
    return f"{isa.prefix}_maxpool{size}s{stride}__{isa.name}"


def _is_square(pool: Pool2d, pitch: int) -> bool:
    """Is there a kernel for this window, and do rows ``pitch`` apart leave enough of nothing between them?"""
    (size, _), (stride, _), (top, left, _, _) = pool.kernel, pool.stride, pool.padding
    square = pool.kernel == (size, size) and pool.stride == (stride, stride) and pool.dilation == (1, 1)
    if pool.kind != "max" or not square or (size, stride) not in SQUARES or max(top, left) >= size:
        return False
    reach = (pool.out_width - 1) * stride + size - left
    seen = all(pool.window(row, 0, pool.height)[0] for row in (0, pool.out_height - 1))
    return seen and max(reach, min(reach, pool.width) + left) <= stride * pitch


def _pool_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    pool = operands.workload
    assert isinstance(pool, Pool2d)
    if not isa.scalable:
        yield Candidate(symbol(f"{pool.kind}pool", isa))
        return
    assert operands.output is not None
    if _is_square(pool, operands.output.planes.pitch):
        yield Candidate(_square(pool.kernel[0], pool.stride[0], isa))
        return
    for nv in GROUPS[isa.itemsize]:  # vectors end with a row, and each takes as long as some registers by itself
        vectors = sum(-(-width // (nv * isa.taken)) for width in (pool.width, pool.out_width))
        yield Candidate(symbol(f"{pool.kind}pool", isa, nv), rank=vectors * (nv + 3))


def _pool_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    pool, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(pool, Pool2d) and y is not None
    source, target = x.planes, y.planes
    assert source.phases == target.phases == (1, 1), f"{pool.key()}: pools neither read nor write phases"
    (kh, kw), (sy, sx), (dy, dx) = pool.kernel, pool.stride, pool.dilation
    item = source.itemsize
    if not isa_named(candidate.kernel.rpartition("__")[2]).scalable:
        # a step of 2 loads two whole vectors; the last window may reach past padding (ceil_mode)
        reach = (round_up(pool.out_width, MAX_LANES) + MAX_LANES) * sx + (kw - 1) * dx
        written = pool.padding[1] + round_up(pool.width, MAX_LANES)
        scratch_lanes = round_up(max(reach, written), LINE // item)
        scratch = item * scratch_lanes
    elif _is_square(pool, target.pitch):
        row = sx * target.pitch
        rows = min(round_up(pool.out_height, TOGETHER), max(SQUARES_ROOM // (item * row) // TOGETHER, 1) * TOGETHER)
        scratch_lanes = round_up(rows * row, LINE // item) + LINE // item
        scratch = item * scratch_lanes
    else:  # rows, as many as any kernel takes, one more that is none, and where each row of a window stands
        item = 4 if pool.kind == "avg" else item  # sums are of float32
        reach = (pool.out_width - 1) * sx + (kw - 1) * dx + 1
        scratch_lanes = round_up(max(reach, pool.padding[1] + pool.width), LINE // item)
        scratch = (TOGETHER + 1) * item * scratch_lanes + round_up(4 * pool.out_height * kh, LINE)
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(x.offsets),
        "out": u32(y.offsets),
        "row_factor": f32(_factors(pool, 0)),
        "column_factor": f32(np.pad(_factors(pool, 1), (0, MAX_LANES))),
        "scratch": Scratch(),
        **lead(y),
        "scratch_lanes": scratch_lanes,
        "planes": pool.channels,
        "images": pool.batch,
        "height": pool.height,
        "width": pool.width,
        "in_pitch": source.pitch,
        "in_image": source.image_rows * source.pitch,
        "out_height": pool.out_height,
        "out_width": pool.out_width,
        "pitch": target.pitch,
        "image_rows": target.image_rows,
        "tail": target.plane - target.batch * target.image_rows * target.pitch,
        "kernel_y": kh,
        "kernel_x": kw,
        "stride_y": sy,
        "stride_x": sx,
        "dilation_y": dy,
        "dilation_x": dx,
        "top": pool.padding[0],
        "left": pool.padding[1],
    }
    return (Call(candidate.kernel, POOL.name, fields, scratch=scratch),)


def _factors(pool: Pool2d, axis: int) -> list[float]:
    """1 / how many positions along ``axis`` count in the mean of every window."""
    size, before, after = (pool.height, pool.width)[axis], pool.padding[axis], pool.padding[axis + 2]
    factors = []
    for index in range((pool.out_height, pool.out_width)[axis]):
        start = index * pool.stride[axis] - before
        taps = [start + t * pool.dilation[axis] for t in range(pool.kernel[axis])]
        counted = sum(t < size + after if pool.count_include_pad else 0 <= t < size for t in taps)
        factors.append(1 / max(counted, 1))
    return factors


def _global_variants(isa: Isa) -> Iterator[Variant]:
    for each in isa.forms:
        for kind in ("max", "sum"):
            params = {"NV": _group(isa), "KIND": kind, "half": each.itemsize == 2}
            yield Variant(symbol(f"global{kind}", each, _group(isa)), "pool_global.c.in", params)


def _global_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    pool = operands.workload
    assert isinstance(pool, GlobalPool)
    reads = isa.of(operands.inputs[0].layout.itemsize)  # what it writes is float32 in any case
    yield Candidate(symbol(f"global{'max' if pool.kind == 'max' else 'sum'}", reads, _group(isa)))


def _global_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    pool, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(pool, GlobalPool) and y is not None
    source = x.planes
    assert source.phases == (1, 1), f"{pool.key()}: pools do not read phases"
    assert y.rows.width == pool.channels
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(x.offsets),
        "y": Arena(int(y.offsets[0])),
        "planes": pool.channels,
        "images": pool.batch,
        "height": pool.height,
        "width": pool.width,
        "pitch": source.pitch,
        "image": source.image_rows * source.pitch,
        "factor": 1 / (pool.height * pool.width) if pool.kind == "avg" else 1.0,
    }
    return (Call(candidate.kernel, GLOBAL.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("pool2d", (POOL,), _pool_variants, _pool_candidates, _pool_bind),
    Operator("global_pool", (GLOBAL,), _global_variants, _global_candidates, _global_bind),
)
