"""Planes whose lanes are tokens: normalisation and softmax over channels, products, conversions from and to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import dense
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, masks, same_places, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed
from colonnade.workload import ChannelNorm, ChannelSoftmax, PlaneProduct

CHANNEL_NORM = Struct(
    "cn_channel_norm",
    "y = (x - mean) / sqrt(variance + epsilon) * scale + shift over the planes, lane by lane.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x"),
        Member("out", "const uint32_t *"),
        Member("scale", "const float *"),
        Member("shift", "const float *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        *LEAD_MEMBERS,
        Member("planes", "u32"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("centred", "u32", "0: the mean is left in"),
        Member("epsilon", "f32"),
    ),
)
CHANNEL_SOFTMAX = Struct(
    "cn_channel_softmax",
    "y = exp(x - max) / sum of them over the planes of every group, lane by lane.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x, group by group"),
        Member("out", "const uint32_t *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        *LEAD_MEMBERS,
        Member("groups", "u32"),
        Member("count", "u32", "planes of a group"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
    ),
)
# (NV on fixed vectors, LMUL on scalable ones): loads of several vectors of a plane share one look at its offset
WIDTH = 4


def _norm_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("channel_norm", isa, WIDTH), "channel_norm.c.in", {"NV": WIDTH})


def _softmax_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("channel_softmax", isa, WIDTH), "channel_softmax.c.in", {"NV": WIDTH})


def _norm_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("channel_norm", isa, WIDTH))


def _softmax_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("channel_softmax", isa, WIDTH))


def _planes(x: Placed, y: Placed) -> dict[str, Field]:
    assert same_places(x, y) and y.planes.phases == (1, 1), f"{x.name} and {y.name} must share one geometry"
    mask, _, _ = masks(y.planes)
    return {
        "arena": Arena(), "in": u32(x.offsets), "out": u32(y.offsets), "mask": mask, **lead(y), "plane": y.planes.plane,
    }  # fmt: skip


def _norm_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, ChannelNorm) and y is not None
    fields = _planes(x, y) | {
        "scale": f32(operands.constants["scale"]), "shift": f32(operands.constants["shift"]),
        "planes": len(y.offsets), "centred": int(work.centred), "epsilon": work.epsilon,
    }  # fmt: skip
    return (Call(candidate.kernel, CHANNEL_NORM.name, fields),)


def _softmax_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, ChannelSoftmax) and y is not None
    fields = _planes(x, y) | {"groups": work.groups, "count": len(y.offsets) // work.groups}
    return (Call(candidate.kernel, CHANNEL_SOFTMAX.name, fields),)


# --- products ---------------------------------------------------------------------------------------------------------


def _product_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    work = operands.workload
    assert isinstance(work, PlaneProduct)
    return dense.product_candidates(work.rows, work.pixels, isa)


def _product_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """One product a group and image, images inner; all planes of a tensor must be equally far apart."""
    work, (x, a), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, PlaneProduct) and y is not None
    x_at, x_row = _images(x, work.groups)
    a_at, a_plane = _images(a, work.groups)
    y_at, y_row = _images(y, work.groups)
    layout = y.planes
    image = layout.image_rows * layout.pitch
    rooms = np.full((work.groups, work.batch), image, np.int64)
    rooms[:, -1] = layout.plane - (work.batch - 1) * image  # the last image is followed by what rounds a plane up
    fields: dict[str, Field] = {
        "a": Arena(), "b": Arena(), "y": Arena(),
        "a_batch": u32(a_at), "b_batch": u32(x_at), "y_batch": u32(y_at), "room": u32(rooms.reshape(-1)),
        **lead(y),
        "batch": work.groups * work.batch, "rows": work.rows, "inner": work.inner, "columns": work.pixels,
        "a_row": a_plane if work.across else 1, "a_step": 1 if work.across else a_plane,
        "b_row": x_row, "y_row": y_row, "factor": work.factor,
    }  # fmt: skip
    return (Call(candidate.kernel, dense.MATMUL.name, fields),)


def _images(x: Placed, groups: int) -> tuple[npt.NDArray[np.int64], int]:
    """(element of lane 0 of every group's first plane, image by image; elements from one plane to the next)."""
    layout = x.planes
    assert layout.height == 1 and layout.phases == (1, 1), f"{x.name}: tokens are one row of pixels"
    size = layout.itemsize
    planes = x.offsets.reshape(groups, -1)
    steps = np.diff(planes, axis=1)
    step = int(steps[0, 0]) if steps.size else 0
    if (steps != step).any():
        raise ValueError(f"{x.name}: the planes of a product must be equally far apart")
    images = np.arange(layout.batch, dtype=np.int64) * layout.image_rows * layout.pitch
    return (planes[:, :1] // size + images).reshape(-1), step // size


ROWS: tuple[Operator, ...] = (
    Operator("channel_norm", (CHANNEL_NORM,), _norm_variants, _norm_candidates, _norm_bind),
    Operator("channel_softmax", (CHANNEL_SOFTMAX,), _softmax_variants, _softmax_candidates, _softmax_bind),
    Operator("plane_product", (dense.MATMUL,), dense.matmul_variants, _product_candidates, _product_bind),
    Operator("reorder", (dense.TAKE,), dense.take_variants, dense.take_candidates, dense.take_bind),
)
