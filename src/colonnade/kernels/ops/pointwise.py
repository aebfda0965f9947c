"""Operators that touch each element once, on planes (halos stay zero by select) or rows; softmax of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import LEAD_MEMBERS, extents, f32, lead, masks, same_places, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Panels, Placed, Rows
from colonnade.workload import Affine, Binary, Softmax

PLANE_MEMBERS = (
    Member("mask", "const uint8_t *", "a bit a lane: is it a pixel? [phases][mask_bytes]"),
    *LEAD_MEMBERS,
    Member("mask_bytes", "u32", "from one phase's mask to the next one's"),
    Member("phases", "u32", "plane p is of phase p % phases"),
    Member("planes", "u32"),
    Member("plane", "u32", "lanes of a whole plane, all of them written"),
)
VECTORS = (1, 2, 4)  # registers of a strip of panels
LIMITS = (Member("low", "f32"), Member("high", "f32"))
AFFINE = Struct(
    "cn_affine",
    "Planes: y = clip(x * scale + shift), one scale and shift a plane.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x"),
        Member("out", "const uint32_t *"),
        Member("scale", "const float *"),
        Member("shift", "const float *"),
        *PLANE_MEMBERS,
        *LIMITS,
    ),
)
AFFINE_PANELS = Struct(
    "cn_affine_panels",
    "Planes to panels: y = clip(x * scale + shift), one scale and shift a channel.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x"),
        Member("scale", "const float *"),
        Member("shift", "const float *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel?"),
        Member("out", "u32", "where the panels begin"),
        Member("channels", "u32"),
        Member("lanes", "u32", "up to the last pixel"),
        *LIMITS,
    ),
)
AFFINE_ROWS = Struct(
    "cn_affine_rows",
    "Rows: y[n, c] = clip(x[n, c] * scale[c] + shift[c]).",
    (
        Member("x", "const float *"),
        Member("y", "float *"),
        Member("scale", "const float *"),
        Member("shift", "const float *"),
        Member("batch", "u32"),
        Member("width", "u32"),
        *LIMITS,
    ),
)
BINARY = Struct(
    "cn_binary",
    "Planes: y = clip(a <op> b), b in planes like a, or (broadcast) one number a channel and image.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("a", "const uint32_t *", "offset of every plane of a"),
        Member("b", "const uint32_t *", "likewise, or of the number for image 0"),
        Member("out", "const uint32_t *"),
        *PLANE_MEMBERS,
        Member("extent", "const uint32_t *", "rows and columns of every phase [phases][2]"),
        Member("images", "u32"),
        Member("pitch", "u32"),
        Member("image_rows", "u32"),
        Member("b_image", "u32", "elements of b from one image to the next (broadcast)"),
        *LIMITS,
    ),
)
BINARY_ROWS = Struct(
    "cn_binary_rows",
    "Rows: y = clip(a <op> b) over `count` elements.",
    (
        Member("a", "const float *"),
        Member("b", "const float *"),
        Member("y", "float *"),
        Member("count", "u32"),
        *LIMITS,
    ),
)
SOFTMAX = Struct(
    "cn_softmax",
    "Rows: y[n, :] = exp(x[n, :] - max) / sum of them.",
    (
        Member("x", "const float *"),
        Member("y", "float *"),
        Member("batch", "u32"),
        Member("width", "u32"),
    ),
)
KINDS = ("add", "sub", "mul", "div", "max", "min")


def _planes(output: Placed) -> dict[str, Field]:
    mask, mask_bytes, phases = masks(output.planes)
    return {
        "arena": Arena(),
        "mask": mask,
        "mask_bytes": mask_bytes,
        "phases": phases,
        "planes": len(output.offsets),
        "plane": output.planes.plane,
        **lead(output),
    }


def _affine_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("affine_rows", isa, isa.group), "affine_rows.c.in", {"NV": isa.group})
    for each in isa.forms:
        half = {"half": each.itemsize == 2}
        yield Variant(symbol("affine", each, isa.group), "affine.c.in", {"NV": isa.group, **half})
        for nv in VECTORS:
            yield Variant(symbol("affine_panels", each, nv), "affine_panels.c.in", {"NV": nv, **half})


def _affine_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    output = operands.output
    if output is not None and isinstance(output.layout, Panels):
        return [Candidate(symbol("affine_panels", isa, output.layout.vectors))]
    name = "affine_rows" if isinstance(operands.inputs[0].layout, Rows) else "affine"
    return [Candidate(symbol(name, isa, isa.group))]


def _affine_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    workload, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Affine) and y is not None
    scale, shift = operands.constants["scale"], operands.constants["shift"]
    limits = {"low": workload.activation.low, "high": workload.activation.high}
    if isinstance(x.layout, Rows):
        fields: dict[str, Field] = {
            "x": Arena(int(x.offsets[0])),
            "y": Arena(int(y.offsets[0])),
            "scale": f32(scale),
            "shift": f32(shift),
            "batch": x.layout.batch,
            "width": x.layout.width,
        }
        return (Call(candidate.kernel, AFFINE_ROWS.name, {**fields, **limits}),)
    if isinstance(y.layout, Panels):
        grid = y.layout.planes
        assert (x.planes.pitch, x.planes.image_rows) == (grid.pitch, grid.image_rows) and x.planes.phases == (1, 1)
        fields = {
            "arena": Arena(),
            "in": u32(x.offsets),
            "scale": f32(scale),
            "shift": f32(shift),
            "mask": Const(grid.mask()),
            "out": int(y.offsets[0]),
            "channels": y.shape[1],
            "lanes": grid.lanes,
        }
        return (Call(candidate.kernel, AFFINE_PANELS.name, {**fields, **limits}),)
    assert same_places(x, y), f"{x.name} and {y.name} must share one geometry"
    phases = len(y.planes.stored_phases)
    fields = {
        "in": u32(x.offsets),
        "out": u32(y.offsets),
        "scale": f32(np.repeat(scale, phases)),
        "shift": f32(np.repeat(shift, phases)),
    }
    return (Call(candidate.kernel, AFFINE.name, {**fields, **_planes(y), **limits}),)


def _binary_variants(isa: Isa) -> Iterator[Variant]:
    for kind in KINDS:
        for form, params in (("", {"BROADCAST": 0}), ("_broadcast", {"BROADCAST": 1}), ("_rows", {})):
            body = "binary_rows.c.in" if form == "_rows" else "binary.c.in"
            single = form == "_rows" or kind == "div"  # rows are of float32, and quotients
            for each in isa.forms[:1] if single else isa.forms:
                known = {"NV": isa.group, "KIND": kind, "half": each.itemsize == 2}
                yield Variant(symbol(kind + form, each, isa.group), body, {**known, **params})


def _binary_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    workload = operands.workload
    assert isinstance(workload, Binary)
    form = "_rows" if isinstance(operands.inputs[0].layout, Rows) else "_broadcast" if workload.broadcast else ""
    return [Candidate(symbol(workload.kind + form, isa, isa.group))]


def _binary_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    workload, (a, b), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Binary) and y is not None
    limits = {"low": workload.activation.low, "high": workload.activation.high}
    if isinstance(a.layout, Rows):
        fields: dict[str, Field] = {
            "a": Arena(int(a.offsets[0])),
            "b": Arena(int(b.offsets[0])),
            "y": Arena(int(y.offsets[0])),
            "count": a.layout.batch * a.layout.width,
        }
        return (Call(candidate.kernel, BINARY_ROWS.name, {**fields, **limits}),)
    if workload.broadcast:
        assert same_places(a, y), f"{a.name} and {y.name} must share one geometry"
        channels = np.arange(b.rows.width).repeat(len(y.planes.stored_phases))
        b_offsets, b_image = int(b.offsets[0]) + channels * b.rows.itemsize, b.rows.width
    else:
        assert same_places(a, b, y), f"{a.name}, {b.name} and {y.name} must share one geometry"
        b_offsets, b_image = b.offsets, 0
    fields = {
        "a": u32(a.offsets),
        "b": u32(b_offsets),
        "out": u32(y.offsets),
        "extent": extents(y.planes),
        "images": y.planes.batch,
        "pitch": y.planes.pitch,
        "image_rows": y.planes.image_rows,
        "b_image": b_image,
    }
    return (Call(candidate.kernel, BINARY.name, {**fields, **_planes(y), **limits}),)


def _softmax_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("softmax", isa, isa.group), "softmax.c.in", {"NV": isa.group})


def _softmax_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    return [Candidate(symbol("softmax", isa, isa.group))]


def _softmax_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    workload, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Softmax) and y is not None
    fields: dict[str, Field] = {
        "x": Arena(int(x.offsets[0])),
        "y": Arena(int(y.offsets[0])),
        "batch": x.rows.batch,
        "width": x.rows.width,
    }
    return (Call(candidate.kernel, SOFTMAX.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("affine", (AFFINE, AFFINE_PANELS, AFFINE_ROWS), _affine_variants, _affine_candidates, _affine_bind),
    Operator("binary", (BINARY, BINARY_ROWS), _binary_variants, _binary_candidates, _binary_bind),
    Operator("softmax", (SOFTMAX,), _softmax_variants, _softmax_candidates, _softmax_bind),
)
