"""Planes to planes: linear and cubic resizing; normalisation over neighbouring channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from colonnade.kernels.call import Arena, Call, Field, Scratch
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, masks, same_places, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, round_up
from colonnade.workload import Lrn, Resample

RESAMPLE = Struct(
    "cn_resample",
    "y[r, c] = sum of row_weight * column_weight * x[row, column] over taps.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every input plane"),
        Member("out", "const uint32_t *"),
        Member("row", "const uint32_t *", "[out_height][row_taps]"),
        Member("row_weight", "const float *"),
        Member("column", "const uint32_t *", "[out_width][column_taps]"),
        Member("column_weight", "const float *"),
        Member("scratch", "float *", "scratch_lanes for every thread"),
        *LEAD_MEMBERS,
        Member("scratch_lanes", "u32"),
        Member("row_taps", "u32"),
        Member("column_taps", "u32"),
        Member("planes", "u32"),
        Member("images", "u32"),
        Member("width", "u32", "of the input"),
        Member("in_pitch", "u32"),
        Member("in_image", "u32", "lanes from one image to the next"),
        Member("out_height", "u32"),
        Member("out_width", "u32"),
        Member("pitch", "u32", "of the output"),
        Member("image_rows", "u32", "of the output"),
        Member("tail", "u32", "zero lanes after the last image of a plane"),
    ),
)
LRN = Struct(
    "cn_lrn",
    "y = x * (bias + alpha * sum of squares over channels)^-beta.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x"),
        Member("out", "const uint32_t *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        *LEAD_MEMBERS,
        Member("planes", "u32"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("before", "u32", "channels that count before a channel"),
        Member("after", "u32"),
        Member("alpha", "f32", "over the number of channels"),
        Member("beta", "f32"),
        Member("bias", "f32"),
    ),
)


def _resample_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("resample", isa), "resample.c.in", {"NV": 1})


def _resample_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("resample", isa))


def _resample_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, Resample) and y is not None
    source, target, constants = x.planes, y.planes, operands.constants
    assert source.phases == target.phases == (1, 1), f"{work.key()}: phases cannot be resized"
    scratch_lanes = round_up(source.width, LINE // 4)
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(x.offsets),
        "out": u32(y.offsets),
        "row": u32(constants["row"]),
        "row_weight": f32(constants["row_weight"]),
        "column": u32(constants["column"]),
        "column_weight": f32(constants["column_weight"]),
        "scratch": Scratch(),
        **lead(y),
        "scratch_lanes": scratch_lanes,
        "row_taps": work.taps[0],
        "column_taps": work.taps[1],
        "planes": work.channels,
        "images": work.batch,
        "width": source.width,
        "in_pitch": source.pitch,
        "in_image": source.image_rows * source.pitch,
        "out_height": target.height,
        "out_width": target.width,
        "pitch": target.pitch,
        "image_rows": target.image_rows,
        "tail": target.plane - target.batch * target.image_rows * target.pitch,
    }
    return (Call(candidate.kernel, RESAMPLE.name, fields, scratch=scratch_lanes * 4),)


def _lrn_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("lrn", isa), "lrn.c.in", {"NV": 1})


def _lrn_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("lrn", isa))


def _lrn_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, Lrn) and y is not None
    assert same_places(x, y) and y.planes.phases == (1, 1), f"{x.name} and {y.name} must share one geometry"
    mask, _, _ = masks(y.planes)
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(x.offsets),
        "out": u32(y.offsets),
        "mask": mask,
        **lead(y),
        "planes": len(y.offsets),
        "plane": y.planes.plane,
        "before": (work.size - 1) // 2,
        "after": -(-(work.size - 1) // 2),
        "alpha": work.alpha / work.size,
        "beta": work.beta,
        "bias": work.bias,
    }
    return (Call(candidate.kernel, LRN.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("resample", (RESAMPLE,), _resample_variants, _resample_candidates, _resample_bind),
    Operator("lrn", (LRN,), _lrn_variants, _lrn_candidates, _lrn_bind),
)
