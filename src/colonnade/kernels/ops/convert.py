"""Changes of layout: one copying kernel for every pair of places, and planes of zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, External, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops.shared import LEAD_MEMBERS, lead, masks, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed, Planes, Rows
from colonnade.workload import Convert, Zeros

COPY = Struct(
    "cn_copy",
    "Copies pixels: out[plane, image, y, first + x] = in[plane, image, y * in_row, x * in_column], zeros around them.",
    (
        Member("from", "const char *", "all source offsets are bytes from here"),
        Member("to", "char *", "all target offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of the first pixel of every target plane in the source"),
        Member("out", "const uint32_t *", "offset of lane 0 of every target plane"),
        Member("extent", "const uint32_t *", "rows, columns and the first of these, of every phase [phases][3]"),
        Member("mask", "const uint8_t *", "or null: a bit a lane of a row, phase by phase: is it a pixel?"),
        Member("mask_bytes", "u32", "of a phase. Then `in` is what lane 0 of a row would be copied from"),
        *LEAD_MEMBERS,
        Member("phases", "u32", "plane p is of phase p % phases"),
        Member("planes", "u32"),
        Member("images", "u32"),
        Member("in_image", "u32", "lanes from one image to the next"),
        Member("in_row", "u32"),
        Member("in_column", "u32"),
        Member("out_image", "u32"),
        Member("pitch", "u32", "lanes from one target row to the next; what is no pixel is zeroed"),
        Member("image_rows", "u32", "rows of a target image with those below its pixels"),
        Member("tail", "u32", "zero lanes after the last image of a plane"),
    ),
)
ZEROS = Struct(
    "cn_zeros",
    "Planes full of zeros.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("out", "const uint32_t *", "offset of every plane"),
        *LEAD_MEMBERS,
        Member("planes", "u32"),
        Member("plane", "u32", "lanes of a whole plane"),
    ),
)

PRECISION = Struct(
    "cn_precision",
    "Planes of float32 to planes of float16 on the same lanes, or back.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane"),
        Member("out", "const uint32_t *"),
        *LEAD_MEMBERS,
        Member("planes", "u32"),
        Member("lanes", "u32", "up to the last pixel"),
        Member("plane", "u32", "lanes of a whole plane of the output, all of them written"),
    ),
)

NO_MASK: dict[str, Field] = {"mask": None, "mask_bytes": 0}


def _convert_variants(isa: Isa) -> Iterator[Variant]:
    for each in isa.forms:
        params = {"half": each.itemsize == 2, "NARROW": False}
        yield Variant(symbol("copy", each, isa.group), "copy.c.in", {"NV": isa.group, **params})
    if isa.half:
        yield Variant(symbol("import", isa.of(2), 2), "copy.c.in", {"NV": 2, "half": True, "NARROW": True})


def _convert_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    workload = operands.workload
    assert isinstance(workload, Convert)
    narrow = workload.kind == "import" and isa.itemsize == 2
    yield Candidate(symbol("import", isa, 2) if narrow else symbol("copy", isa, isa.group))


def _convert_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    workload = operands.workload
    assert isinstance(workload, Convert)
    kinds = {"import": _import, "export": _export, "planes": _planes, "flatten": _flatten, "unflatten": _unflatten}
    bound = kinds[workload.kind](operands)
    if workload.kind == "planes" and not isa_named(candidate.kernel.rpartition("__")[2]).scalable:
        # a vector's bits are found where it begins at a multiple of eight lanes, so not where its length may be any
        bound |= _masked(operands, bound)
    return (Call(candidate.kernel, COPY.name, bound),)


def _import(operands: Operands) -> dict[str, Field]:
    """The user's dense array to planes or rows."""
    y = operands.output
    assert y is not None
    source = External(operands.external)
    if isinstance(y.layout, Rows):
        return _matrix(source, np.zeros(1, np.int64), Arena(), y.offsets, y.layout)
    channels, height, width = y.shape[1:]
    starts = np.arange(channels) * height * width
    return _to_planes(source, starts, y, channels * height * width, width, (1, 1), 4)


def _planes(operands: Operands) -> dict[str, Field]:
    """Planes to planes of another pitch, of phases, shifted, or of every ``stride``-th pixel."""
    workload, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Convert) and y is not None
    layout = _whole(x)
    starts = x.offsets // layout.itemsize
    return _to_planes(Arena(), starts, y, layout.image_rows * layout.pitch, layout.pitch, workload.stride)


def _masked(operands: Operands, bound: Mapping[str, Field]) -> dict[str, Field]:
    """Fields for whole vectors: a row begins with what its lane 0 would be, pixel or not, and a mask has the last word.
    Where lanes are copied as they stand, a plane is one such row. Nothing where that reads below the arena, or far
    beyond a row."""
    workload, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Convert) and y is not None
    source, target, (sy, sx) = _whole(x), y.planes, workload.stride
    begins = np.array([py * sy * source.pitch + px * sx for py, px in target.stored_phases], np.int64)
    starts = x.offsets[:, None] + begins * source.itemsize
    if starts.min() < 0 or bound["in_column"] not in (1, 2):
        return {}
    alike = (source.pitch, source.image_rows, (1, 1)) == (target.pitch, target.image_rows, target.phases)
    if alike and (sy, sx) == (1, 1):
        bits, size, _ = masks(target)
        one: dict[str, Field] = {
            "extent": u32([(1, 0, 0)] * len(begins)),
            "images": 1,
            "pitch": target.plane,
            "image_rows": 1,
            "tail": 0,
        }
        return {"in": u32(starts.reshape(-1)), "mask": bits, "mask_bytes": size, **one}
    columns = [target.held(phase)[1] for phase in target.stored_phases]
    size = -(-target.pitch // 8) + 8  # vectors find their bits beyond the row as well
    row = np.zeros((len(columns), 8 * size), bool)
    for lanes, held in zip(row, columns, strict=True):
        lanes[held] = True
    return {"in": u32(starts.reshape(-1)), "mask": Const(np.packbits(row, bitorder="little")), "mask_bytes": size}


def _export(operands: Operands) -> dict[str, Field]:
    """Planes or rows to the user's dense array."""
    (x,) = operands.inputs
    target = External(operands.external)
    if isinstance(x.layout, Rows):
        return _matrix(Arena(), x.offsets, target, np.zeros(1, np.int64), x.layout)
    return _to_dense(x, target, 0)


def _flatten(operands: Operands) -> dict[str, Field]:
    """Planes to rows in (channel, row, column) order."""
    (x,), y = operands.inputs, operands.output
    assert y is not None
    return _to_dense(x, Arena(), int(y.offsets[0]))


def _unflatten(operands: Operands) -> dict[str, Field]:
    """Rows in (channel, row, column) order to planes."""
    (x,), y = operands.inputs, operands.output
    assert y is not None and isinstance(x.layout, Rows)
    channels, height, width = y.shape[1:]
    starts = int(x.offsets[0]) // x.layout.itemsize + np.arange(channels, dtype=np.int64) * height * width
    return _to_planes(Arena(), starts, y, channels * height * width, width, (1, 1))


def _whole(x: Placed) -> Planes:
    """The layout of ``x``, whose channels must be one plane each."""
    assert x.planes.phases == (1, 1), f"{x.name}: a source in phases cannot be converted"
    return x.planes


def _to_planes(
    source: Field, starts: npt.NDArray[np.int64], y: Placed, image: int, pitch: int, stride: tuple[int, int],
    itemsize: int = 0,
) -> dict[str, Field]:  # fmt: skip
    """``starts``: element of pixel (0, 0) of every channel; ``image`` and ``pitch`` of the source in elements, of
    ``itemsize`` bytes (0: of the output's)."""
    layout = y.planes
    (oy, ox), (sy, sx) = layout.phases, stride
    held = [layout.held(phase) for phase in layout.stored_phases]
    shifts = np.array(
        [py * sy * pitch + (columns.start * ox + px) * sx if columns.stop > columns.start else 0
         for (py, px), (_, columns) in zip(layout.stored_phases, held, strict=True)], np.int64,
    )  # fmt: skip
    return {
        "from": source,
        "to": Arena(),
        "in": u32((starts[:, None] + shifts).reshape(-1) * (itemsize or layout.itemsize)),
        "out": u32(y.offsets),
        "extent": u32([(rows.stop, columns.stop - columns.start, columns.start) for rows, columns in held]),
        **NO_MASK,
        **lead(y),
        "phases": len(shifts),
        "planes": len(y.offsets),
        "images": layout.batch,
        "in_image": image,
        "in_row": oy * sy * pitch,
        "in_column": ox * sx,
        "out_image": layout.image_rows * layout.pitch,
        "pitch": layout.pitch,
        "image_rows": layout.image_rows,
        "tail": layout.plane - layout.batch * layout.image_rows * layout.pitch,
    }


def _to_dense(x: Placed, target: Field, start: int) -> dict[str, Field]:
    """``start``: byte offset of the dense array from ``target``."""
    layout = _whole(x)
    channels, height, width = x.shape[1:]
    return {
        "from": Arena(),
        "to": target,
        "in": u32(x.offsets),
        "out": u32(start + np.arange(channels) * height * width * layout.itemsize),
        "extent": u32([(height, width, 0)]),
        **NO_MASK,
        "lead": None,
        "lead_bytes": 0,
        "phases": 1,
        "planes": channels,
        "images": layout.batch,
        "in_image": layout.image_rows * layout.pitch,
        "in_row": layout.pitch,
        "in_column": 1,
        "out_image": channels * height * width,
        "pitch": width,
        "image_rows": height,
        "tail": 0,
    }


def _matrix(
    source: Field, start: npt.NDArray[np.int64], target: Field, end: npt.NDArray[np.int64], layout: Rows
) -> dict[str, Field]:
    """A dense matrix to another: every sample is an image of one row."""
    return {
        "from": source,
        "to": target,
        "in": u32(start),
        "out": u32(end),
        "extent": u32([(1, layout.width, 0)]),
        **NO_MASK,
        "lead": None,
        "lead_bytes": 0,
        "phases": 1,
        "planes": 1,
        "images": layout.batch,
        "in_image": layout.width,
        "in_row": layout.width,
        "in_column": 1,
        "out_image": layout.width,
        "pitch": layout.width,
        "image_rows": 1,
        "tail": 0,
    }


def _zeros_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(f"f32_zeros__{isa.name}", "zeros.c.in", {})


def _zeros_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(f"f32_zeros__{isa.name}")


def _zeros_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    y = operands.output
    assert isinstance(operands.workload, Zeros) and y is not None
    fields: dict[str, Field] = {
        "arena": Arena(),
        "out": u32(y.offsets),
        **lead(y),
        "planes": len(y.offsets),
        "plane": y.planes.plane,
    }
    return (Call(candidate.kernel, ZEROS.name, fields),)


def _precision_variants(isa: Isa) -> Iterator[Variant]:
    for each in isa.forms if isa.half else ():
        yield Variant(symbol("precision", each, 4), "precision.c.in", {"NV": 4, "NARROW": each.itemsize == 2})


def _precision_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("precision", isa, 4))


def _precision_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    (x,), y = operands.inputs, operands.output
    assert y is not None and x.planes.phases == y.planes.phases == (1, 1)
    assert (x.planes.pitch, x.planes.image_rows) == (y.planes.pitch, y.planes.image_rows), f"{x.name}: {y.name}"
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(x.offsets),
        "out": u32(y.offsets),
        **lead(y),
        "planes": len(y.offsets),
        "lanes": y.planes.lanes,
        "plane": y.planes.plane,
    }
    return (Call(candidate.kernel, PRECISION.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("convert", (COPY,), _convert_variants, _convert_candidates, _convert_bind),
    Operator("precision", (PRECISION,), _precision_variants, _precision_candidates, _precision_bind),
    Operator("zeros", (ZEROS,), _zeros_variants, _zeros_candidates, _zeros_bind),
)
