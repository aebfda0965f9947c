"""Operators on dense arrays (``Rows``): moves by tables, elementwise with broadcasting, reductions, products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, symbol, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed, Planes, Rows
from colonnade.workload import (
    Constant,
    Elementwise,
    Join,
    Lookup,
    MatMul,
    Normalise,
    Reduce,
    Take,
    TypedElementwise,
    spread,
)

Table = npt.NDArray[np.int64]
TAKE = Struct(
    "cn_take",
    "Rows of `width` elements from anywhere: out[j] = in[inner[j]]; ~0 is `fill`, a source row of ~1 is zero.",
    (
        Member("from", "const char *", "source offsets are bytes from here"),
        Member("to", "char *", "target offsets are bytes from here"),
        Member("source", "const uint32_t *", "offset of every row"),
        Member("target", "const uint32_t *"),
        Member("inner", "const uint32_t *", "element of every column, from that of its row; null: one after the other"),
        *LEAD_MEMBERS,
        Member("rows", "u32"),
        Member("width", "u32"),
        Member("room", "u32", "lanes of a target row; those behind `width` are zeroed"),
        Member("plane_rows", "u32", "rows of a target plane with those below its pixels"),
        Member("tail", "u32", "zero lanes after the last row of a plane"),
        Member("fill", "f32"),
    ),
)
ELEMENTWISE = Struct(
    "cn_elementwise",
    "y[r, j] = f(a, b, c), each from its row's start on with a step of 1 or 0.",
    (
        Member("a", "const float *"),
        Member("b", "const float *"),
        Member("c", "const float *"),
        Member("y", "float *"),
        Member("a_rows", "const uint32_t *", "first element of every row"),
        Member("b_rows", "const uint32_t *"),
        Member("c_rows", "const uint32_t *"),
        Member("rows", "u32"),
        Member("width", "u32"),
        Member("a_step", "u32"),
        Member("b_step", "u32"),
        Member("c_step", "u32"),
    ),
)
REDUCE = Struct(
    "cn_reduce",
    "y[o, i] = reduction over n of x[o, n, i].",
    (
        Member("x", "const float *"),
        Member("y", "float *"),
        Member("outer", "u32"),
        Member("count", "u32"),
        Member("inner", "u32"),
        Member("factor", "f32", "1 / count"),
    ),
)
MATMUL = Struct(
    "cn_matmul",
    "y[n] = factor * a[n] b[n]: [rows, inner] times [inner, columns]. Distances in elements.",
    (
        Member("a", "const float *"),
        Member("b", "const float *"),
        Member("y", "float *"),
        Member("a_batch", "const uint32_t *", "first element of every matrix"),
        Member("b_batch", "const uint32_t *"),
        Member("y_batch", "const uint32_t *"),
        Member("room", "const uint32_t *", "of every product: lanes of a row of y; those behind `columns` are zeroed"),
        *LEAD_MEMBERS,
        Member("batch", "u32"),
        Member("rows", "u32"),
        Member("inner", "u32"),
        Member("columns", "u32"),
        Member("a_row", "u32", "from one row of a to the next"),
        Member("a_step", "u32", "from one element of a row of a to the next"),
        Member("b_row", "u32"),
        Member("y_row", "u32"),
        Member("factor", "f32"),
    ),
)
NORMALISE = Struct(
    "cn_normalise",
    "y = (x - mean) / sqrt(variance + epsilon) * scale + shift, row by row.",
    (
        Member("x", "const float *"),
        Member("y", "float *"),
        Member("scale", "const float *"),
        Member("shift", "const float *"),
        Member("rows", "u32"),
        Member("width", "u32"),
        Member("centred", "u32", "0: the mean is left in"),
        Member("epsilon", "f32"),
    ),
)
LOOKUP = Struct(
    "cn_lookup",
    "y[o, j, :] = x[o, index[j], :].",
    (
        Member("x", "const float *"),
        Member("index", "const float *"),
        Member("y", "float *"),
        Member("outer", "u32"),
        Member("size", "u32"),
        Member("inner", "u32"),
        Member("count", "u32"),
    ),
)
EXPRESSIONS = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "div": "a / b",
    "max": "a > b || a != a ? a : b",
    "min": "a < b || a != a ? a : b",
    "pow": "__builtin_powf(a, b)",
    "prelu": "a < 0.0f ? a * b : a",
    "fmod": "__builtin_fmodf(a, b)",
    "mod": "__builtin_fmodf(a, b) + (__builtin_fmodf(a, b) * b < 0.0f ? b : 0.0f)",
    "div_or_zero": "b == 0.0f ? 0.0f : a / b",
    "equal": "a == b ? 1.0f : 0.0f",
    "less": "a < b ? 1.0f : 0.0f",
    "less_equal": "a <= b ? 1.0f : 0.0f",
    "greater": "a > b ? 1.0f : 0.0f",
    "greater_equal": "a >= b ? 1.0f : 0.0f",
    "and": "a != 0.0f && b != 0.0f ? 1.0f : 0.0f",
    "or": "a != 0.0f || b != 0.0f ? 1.0f : 0.0f",
    "xor": "(a != 0.0f) != (b != 0.0f) ? 1.0f : 0.0f",
    "where": "a != 0.0f ? b : c",
}
REDUCTIONS = ("sum", "avg", "max", "min", "prod", "l1", "l2", "sumsq", "logsum", "logsumexp")
MATMUL_SHAPES = ((4, 2), (6, 2), (8, 1), (1, 4), (6, 4))  # (rows, vectors); the last one where there are 32 registers


def _at(x: Placed) -> Arena:
    """The first element of a dense array."""
    assert isinstance(x.layout, Rows), f"{x.name} is not dense"
    return Arena(int(x.offsets[0]))


# --- moves ------------------------------------------------------------------------------------------------------------


def addresses(x: Placed, elements: Table) -> Table:
    """Byte offset in the arena of elements of ``x``, counted in row-major order of its shape."""
    if isinstance(x.layout, Rows):
        return np.asarray(x.offsets[0] + elements * x.layout.itemsize, np.int64)
    layout = x.planes
    assert layout.phases == (1, 1), f"{x.name}: phases cannot be gathered from"
    # flat: numpy 2 gives wrong coordinates of more than 8,192 elements whose last axis is 1
    places = np.unravel_index(elements.reshape(-1), x.shape)
    n, c, row, column = (place.reshape(elements.shape) for place in places)
    lanes = (n * layout.image_rows + row) * layout.pitch + column
    return np.asarray(x.offsets[c] + lanes * layout.itemsize, np.int64)


def _columns(inner: Table) -> tuple[Table, int, Field]:
    """(the table, its least entry, what the kernel gets): entries from the least one on; null when they just count."""
    used = inner[inner >= 0]
    base = int(used.min()) if used.size else 0
    if np.array_equal(inner, base + np.arange(len(inner))):
        return inner, base, None
    relative = np.where(inner < 0, 0xFFFFFFFF, inner - base)
    return inner, base, u32(relative)


def _take(
    source: Field, starts: Table, y: Placed, targets: Table, inner: Field, width: int, fill: float
) -> dict[str, Field]:
    return {
        "from": source, "to": Arena(), "source": u32(starts), "target": u32(targets), "inner": inner,
        "lead": None, "lead_bytes": 0, "rows": len(starts), "width": width, "room": width,
        "plane_rows": 1, "tail": 0, "fill": fill,
    }  # fmt: skip


def merged(tables: Sequence[Table]) -> list[Table]:
    """The same move with fewer axes where neighbours go on in one line, so that rows are long."""
    result = [tables[-1]]
    for table in reversed(tables[:-1]):
        inner = result[0]
        whole = spread([table, inner]).reshape(-1)
        steady = len(inner) == 1 or len(table) == 1 or (
            (inner >= 0).all() and (table >= 0).all() and len(result) == 1
            and np.array_equal(whole, whole[0] + np.arange(whole.size))
        )  # fmt: skip
        if len(result) == 1 and steady:
            result[0] = whole
        else:
            result.insert(0, table)
    return result


def _within_rows(starts: Table, inner: Table, width: int) -> bool:
    """Does every row of the result come from one row of ``width`` pixels?"""
    return bool((inner < width).all() and not (starts[starts >= 0] % width).any())


def _across_planes(x: Placed, starts: Table, inner: Table) -> tuple[Table, Field, int]:
    """(place of every row, what the kernel gets for its columns, width) of rows that cross planes or rows of pixels."""
    assert (starts >= 0).all(), f"{x.name}: only moves without rows of fill values cross planes"
    filled = inner < 0
    places = addresses(x, starts[:, None] + np.where(filled, inner.max(), inner))
    first = places.min(axis=1)
    apart = places - first[:, None]
    if (apart == apart[0]).all():
        return first, u32(np.where(filled, 0xFFFFFFFF, apart[0] // x.planes.itemsize)), len(inner)
    assert not filled.any(), f"{x.name}: planes of several buffers and fill values at once"
    return places.reshape(-1), None, 1  # element by element


def take_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    take, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(take, Take) and y is not None
    tables = [np.asarray(operands.constants[f"axis{i}"], np.int64) for i in range(len(take.target))] or [
        np.zeros(1, np.int64)
    ]
    dense = isinstance(x.layout, Rows) and isinstance(y.layout, Rows)
    tables = merged(tables) if dense else tables
    inner, base, columns = _columns(tables[-1])
    starts = spread(tables[:-1]).reshape(-1)
    if isinstance(x.layout, Planes) and (inner >= 0).any() and not _within_rows(starts, inner, x.planes.width):
        places, columns, width = _across_planes(x, starts, inner)
    else:
        places = np.where(starts < 0, 0xFFFFFFFF, addresses(x, np.where(starts < 0, 0, starts + base)))
        width = len(inner)
    if isinstance(y.layout, Rows):
        targets = y.offsets[0] + np.arange(len(places), dtype=np.int64) * width * y.layout.itemsize
        fields = _take(Arena(), places, y, targets, columns, width, take.fill)
        return (Call(candidate.kernel, TAKE.name, fields),)
    fields = _to_planes(Arena(), places.reshape(take.target[:3]), y, columns, take.fill)
    return (Call(candidate.kernel, TAKE.name, fields),)


def _to_planes(source: Field, places: Table, y: Placed, columns: Field, fill: float) -> dict[str, Field]:
    """``places`` [N, C, H]: where every row of pixels comes from."""
    layout = y.planes
    n, c, h = places.shape
    # every row of every plane, those below the pixels too: [C, N, image_rows]
    rows = np.full((c, n, layout.image_rows), 0xFFFFFFFE, np.int64)
    rows[:, :, :h] = places.transpose(1, 0, 2)
    each = np.arange(n * layout.image_rows, dtype=np.int64) * layout.pitch * layout.itemsize
    fields = _take(source, rows.reshape(-1), y, (y.offsets[:, None] + each).reshape(-1), columns, layout.width, fill)
    return fields | {
        **lead(y),
        "room": layout.pitch,
        "plane_rows": n * layout.image_rows,
        "tail": layout.plane - n * layout.image_rows * layout.pitch,
    }


def _join_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    join, y = operands.workload, operands.output
    assert isinstance(join, Join) and y is not None and isinstance(y.layout, Rows)
    outer = prod(join.shapes[0][: join.axis])
    widths = [prod(shape[join.axis :]) for shape in join.shapes]
    calls, before, size = [], 0, y.layout.itemsize
    for x, width in zip(operands.inputs, widths, strict=True):
        rows = np.arange(outer, dtype=np.int64)
        starts, targets = rows * width * size, y.offsets[0] + (rows * sum(widths) + before) * size
        before += width
        if not width:
            continue
        if x.offsets.size:
            starts = starts + x.offsets[0]
        calls.append(Call(candidate.kernel, TAKE.name, _take(Arena(), starts, y, targets, None, width, 0.0)))
    return tuple(calls)


def _constant_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    constant, y = operands.workload, operands.output
    assert isinstance(constant, Constant) and y is not None
    value = np.ascontiguousarray(operands.constants["value"], np.float32).reshape(-1)
    if isinstance(y.layout, Planes):
        rows = np.arange(prod(y.shape[:3]), dtype=np.int64).reshape(y.shape[:3]) * y.shape[3] * y.layout.itemsize
        return (Call(candidate.kernel, TAKE.name, _to_planes(Const(value), rows, y, None, 0.0)),)
    fields = _take(Const(value), np.zeros(1, np.int64), y, y.offsets, None, value.size, 0.0)
    return (Call(candidate.kernel, TAKE.name, fields),)


def take_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("take", isa), "take.c.in", {"NV": 1})


def take_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("take", isa))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def broadcast_tables(shapes: Sequence[tuple[int, ...]]) -> tuple[list[Table], list[int], int]:
    """(first element of every row of every operand, step of every operand in a row, width of a row)."""
    full = np.broadcast_shapes(*shapes)
    padded = [(1,) * (len(full) - len(shape)) + tuple(shape) for shape in shapes]
    # trailing axes over which every operand either moves on or stands still make one row
    split, width = len(full), 1
    modes: list[int | None] = [None] * len(shapes)
    while split > 0:
        d = full[split - 1]
        now = [None if d == 1 else int(shape[split - 1] != 1) for shape in padded]
        if any(a is not None and b is not None and a != b for a, b in zip(modes, now, strict=True)):
            break
        modes = [b if a is None else a for a, b in zip(modes, now, strict=True)]
        split, width = split - 1, width * d
    steps = [m or 0 for m in modes]
    starts = []
    for shape in padded:
        strides = np.array([prod(shape[i + 1 :]) if d > 1 else 0 for i, d in enumerate(shape)], np.int64)
        starts.append(spread([np.arange(full[i]) * strides[i] for i in range(split)]).reshape(-1))
    return starts, steps, width


def _elementwise_variants(isa: Isa) -> Iterator[Variant]:
    for kind, expression in EXPRESSIONS.items():
        params = {"NV": 1, "EXPRESSION": expression, "COUNT": 3 if kind == "where" else 2}
        yield Variant(symbol(f"{kind}_dense", isa), "elementwise.c.in", params)


def _elementwise_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    assert isinstance(operands.workload, Elementwise)
    yield Candidate(symbol(f"{operands.workload.kind}_dense", isa))


def elementwise_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """The call of an operator with ``shapes`` that are broadcast, whatever the type of its numbers."""
    work, y = operands.workload, operands.output
    assert isinstance(work, (Elementwise, TypedElementwise)) and y is not None
    starts, steps, width = broadcast_tables(work.shapes)
    fields: dict[str, Field] = {"y": _at(y), "rows": len(starts[0]), "width": width}
    for i, name in enumerate("abc"):
        given = i < len(work.shapes)
        fields[name] = _at(operands.inputs[i]) if given else None
        fields[f"{name}_rows"] = u32(starts[i]) if given else None
        fields[f"{name}_step"] = steps[i] if given else 0
    return (Call(candidate.kernel, ELEMENTWISE.name, fields),)


def _reduce_variants(isa: Isa) -> Iterator[Variant]:
    for kind in REDUCTIONS:
        yield Variant(symbol(f"reduce_{kind}", isa), "reduce.c.in", {"NV": 1, "KIND": kind})


def _reduce_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    assert isinstance(operands.workload, Reduce)
    yield Candidate(symbol(f"reduce_{operands.workload.kind}", isa))


def _reduce_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, Reduce) and y is not None
    fields: dict[str, Field] = {
        "x": _at(x), "y": _at(y), "outer": work.outer, "count": work.count, "inner": work.inner,
        "factor": 1.0 / max(work.count, 1),
    }  # fmt: skip
    return (Call(candidate.kernel, REDUCE.name, fields),)


def matmul_shapes(isa: Isa) -> Iterable[tuple[int, int]]:
    """Those whose sums, a row of b and one factor fit the registers."""
    return (shape for shape in MATMUL_SHAPES if (shape[0] + 1) * shape[1] + 1 <= isa.registers)


def matmul_variants(isa: Isa) -> Iterator[Variant]:
    for mr, nv in matmul_shapes(isa):
        yield Variant(f"f32_matmul_{mr}x{nv}v__{isa.name}", "matmul.c.in", {"MR": mr, "NV": nv})


def _matmul_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    work = operands.workload
    assert isinstance(work, MatMul)
    return product_candidates(work.rows, work.columns, isa)


def product_candidates(rows: int, columns: int, isa: Isa) -> Iterator[Candidate]:
    """The shape that wastes the least on the edges; ties by the order of the table."""
    lanes = isa.lanes or 8
    for order, (mr, nv) in enumerate(matmul_shapes(isa)):
        if mr > 1 and mr >= 2 * rows:
            continue
        # vectors are shared out evenly among strips, so that the last one is no narrower than it must be
        blocks, vectors = -(-rows // mr), -(-columns // lanes)
        strips = -(-vectors // nv)
        waiting = max(1.0, 8 * strips / (mr * vectors))
        rank = blocks * (vectors * mr + strips * mr + vectors) * waiting + order
        yield Candidate(f"f32_matmul_{mr}x{nv}v__{isa.name}", {}, rank)


def _matmul_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (a, b), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, MatMul) and y is not None

    def firsts(batch: tuple[int, ...], size: int) -> Const:
        numbers = np.arange(prod(batch), dtype=np.int64).reshape(batch) * size
        return u32(np.broadcast_to(numbers, work.batch).reshape(-1))

    count = prod(work.batch)
    fields: dict[str, Field] = {
        "a": _at(a), "b": _at(b), "y": _at(y),
        "a_batch": firsts(work.a_batch, work.rows * work.inner),
        "b_batch": firsts(work.b_batch, work.inner * work.columns),
        "y_batch": firsts(work.batch, work.rows * work.columns), "room": u32(np.full(count, work.columns)),
        "lead": None, "lead_bytes": 0,
        "batch": count, "rows": work.rows, "inner": work.inner, "columns": work.columns,
        "a_row": work.inner, "a_step": 1, "b_row": work.columns, "y_row": work.columns, "factor": work.factor,
    }  # fmt: skip
    return (Call(candidate.kernel, MATMUL.name, fields),)


def _normalise_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("normalise", isa, isa.group), "normalise.c.in", {"NV": isa.group})


def _normalise_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("normalise", isa, isa.group))


def _normalise_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, Normalise) and y is not None
    fields: dict[str, Field] = {
        "x": _at(x), "y": _at(y), "scale": f32(operands.constants["scale"]), "shift": f32(operands.constants["shift"]),
        "rows": work.rows, "width": work.width, "centred": int(work.centred), "epsilon": work.epsilon,
    }  # fmt: skip
    return (Call(candidate.kernel, NORMALISE.name, fields),)


def _lookup_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(symbol("lookup", isa), "lookup.c.in", {"NV": 1})


def _lookup_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(symbol("lookup", isa))


def _lookup_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, y = operands.workload, operands.output
    assert isinstance(work, Lookup) and y is not None
    fields: dict[str, Field] = {
        "x": f32(operands.constants["table"]) if work.constant else _at(operands.inputs[1]),
        "index": _at(operands.inputs[0]), "y": _at(y),
        "outer": work.outer, "size": work.size, "inner": work.inner, "count": work.count,
    }  # fmt: skip
    return (Call(candidate.kernel, LOOKUP.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("take", (TAKE,), take_variants, take_candidates, take_bind),
    Operator("join", (TAKE,), take_variants, take_candidates, _join_bind),
    Operator("constant", (TAKE,), take_variants, take_candidates, _constant_bind),
    Operator("elementwise", (ELEMENTWISE,), _elementwise_variants, _elementwise_candidates, elementwise_bind),
    Operator("reduce", (REDUCE,), _reduce_variants, _reduce_candidates, _reduce_bind),
    Operator("matmul", (MATMUL,), matmul_variants, _matmul_candidates, _matmul_bind),
    Operator("normalise", (NORMALISE,), _normalise_variants, _normalise_candidates, _normalise_bind),
    Operator("lookup", (LOOKUP,), _lookup_variants, _lookup_candidates, _lookup_bind),
)
