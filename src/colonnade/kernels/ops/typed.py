"""Numbers of other types than float32: the user's arrays in and out, and arithmetic in float64 and whole numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import numpy as np

from colonnade.kernels.call import Arena, Call, Const, External, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.dense import ELEMENTWISE, elementwise_bind
from colonnade.kernels.ops.shared import u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed, Rows
from colonnade.workload import Cast, MaxIndices, TypedElementwise, TypedMatMul, TypedReduce
from colonnade.workload.small import FLOATS, INTEGERS, POWERS, SmallFloat
from colonnade.workload.typed import DOUBLES, F32, FLOATING, REDUCED, TRUTHS, TYPED, WIDE

CAST = Struct(
    "cn_cast",
    "Numbers of one type as those of another.",
    (Member("x", "const void *"), Member("y", "void *"), Member("count", "u32")),
)
REDUCE = Struct(
    "cn_typed_reduce",
    "y[o, i] = reduction over n of x[o, n, i].",
    (
        Member("x", "const void *"),
        Member("y", "void *"),
        Member("outer", "u32"),
        Member("count", "u32"),
        Member("inner", "u32"),
    ),
)
MATMUL = Struct(
    "cn_typed_matmul",
    "y[n] = a[n] b[n]: [rows, inner] times [inner, columns].",
    (
        Member("a", "const void *"),
        Member("b", "const void *"),
        Member("y", "void *"),
        Member("a_batch", "const uint32_t *", "first element of every matrix"),
        Member("b_batch", "const uint32_t *"),
        Member("batch", "u32"),
        Member("rows", "u32"),
        Member("inner", "u32"),
        Member("columns", "u32"),
    ),
)
INDICES = Struct(
    "cn_max_indices",
    "Where the maximum of every window of every plane stands, counted from the first plane on.",
    (
        Member("x", "const float *", "[planes, height, width]"),
        Member("y", "int64_t *", "[planes, out_height, out_width]"),
        Member("planes", "u32"),
        Member("height", "u32"),
        Member("width", "u32"),
        Member("out_height", "u32"),
        Member("out_width", "u32"),
        Member("kernel_y", "u32"),
        Member("kernel_x", "u32"),
        Member("stride_y", "u32"),
        Member("stride_x", "u32"),
        Member("dilation_y", "u32"),
        Member("dilation_x", "u32"),
        Member("top", "u32"),
        Member("left", "u32"),
        Member("column_major", "u32"),
    ),
)
# of the arena, and of the user's arrays
HELD = {
    F32: "float", "float64": "double", "int32": "int32_t", "uint32": "uint32_t", "int64": "int64_t",
    "uint64": "uint64_t",
}  # fmt: skip
OUTSIDE = {
    "bool": "uint8_t", "int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "uint16": "uint16_t",
    "float16": "_Float16", "bfloat16": "uint16_t",
    **dict.fromkeys([*(name for name in FLOATS if name != "bfloat16"), POWERS, "uint4", "uint2"], "uint8_t"),
    "int4": "int8_t", "int2": "int8_t",
}  # fmt: skip
SHORT = {"float64": "f64", "int32": "i32", "uint32": "u32", "int64": "i64", "uint64": "u64"}
UNSIGNED = {"int32": "uint32_t", "uint32": "uint32_t", "int64": "uint64_t", "uint64": "uint64_t", "float64": "double"}
LEAST = {"int32": "INT32_MIN", "uint32": "0", "int64": "INT64_MIN", "uint64": "0"}
MOST = {"int32": "INT32_MAX", "uint32": "UINT32_MAX", "int64": "INT64_MAX", "uint64": "UINT64_MAX"}


def _codes(kind: SmallFloat) -> tuple[int, int]:
    """(bits of a NaN, of infinity; 0 for what the type has not)."""
    ones = (1 << (kind.bits - 1)) - 1
    if not kind.negative_zero:
        return ones + 1, 0
    infinity = ones >> kind.mantissa << kind.mantissa if kind.infinite else 0
    nan = infinity | 1 << (kind.mantissa - 1) if kind.infinite else ones
    return nan if kind.nan else 0, infinity


def _coded(name: str, direction: str) -> str:
    """C from x, a float that is a number of that type, to its bits, or back."""
    if name == POWERS:
        nan = 'x == 0xff ? __builtin_nanf("") : __builtin_ldexpf(1.0f, x - 127)'
        return nan if direction == "decode" else "x != x ? 0xff : (uint8_t)(__builtin_ilogbf(x) + 127)"
    kind = FLOATS[name]
    nan_bits, infinity = _codes(kind)
    call = f"cn_small_{direction}(x, {kind.bits}, {kind.mantissa}, {kind.least}, {nan_bits:#x}, {infinity:#x})"
    return call if direction == "decode" else f"({OUTSIDE[name]}){call}"


def expression(source: str, target: str) -> str:
    """C that turns x, a number of type ``source`` as it is stored, into one of type ``target``."""
    if source in FLOATS or source == POWERS:
        return _coded(source, "decode")
    if source in ("int4", "int2", "uint4", "uint2"):  # the higher bits may be anything
        bits, sign = INTEGERS[source], 1 << (INTEGERS[source] - 1)
        low = f"(x & {(1 << bits) - 1})"
        return f"(float)({low if source[0] == 'u' else f'({low} ^ {sign}) - {sign}'})"
    if target in FLOATS or target == POWERS:
        return _coded(target, "encode")
    if target == "bool":
        return "x != 0"
    if target in ("int4", "int2", "uint4", "uint2"):
        return f"({OUTSIDE[target]})((int)x & {(1 << INTEGERS[target]) - 1})"
    if source in (F32, "float64") and target in LEAST:
        low, high = (f"({HELD[source]}){limit}" for limit in (LEAST[target], MOST[target]))
        return f"x != x ? 0 : x <= {low} ? {LEAST[target]} : x >= {high} ? {MOST[target]} : ({HELD[target]})x"
    return f"({HELD.get(target) or OUTSIDE[target]})x"


CUT = "(int64_t)(x != x ? 0.0 : x > 0x1p62 ? 0x1p62 : x < -0x1p62 ? -0x1p62 : x)"


# (from, to) of every cast that there is, and what stands there; truths and small numbers within the arena are floats
def _casts() -> Iterator[tuple[str, str, str, str, str]]:
    for name, kind in OUTSIDE.items():
        yield "import", name, F32, kind, "float"
        yield "export", F32, name, "float", kind
    for name, kind in HELD.items():
        for other, target in HELD.items():
            if name != F32 or other != F32:
                yield "within", name, other, kind, target
        for small in ("bool", "int8", "uint8", "int16", "uint16", "float16") if name != F32 else ():
            yield "within", name, small, kind, "float"


def _cast_symbol(kind: str, source: str, target: str, isa: str) -> str:
    """What imports and exports as it is is the same kernel as within the arena."""
    route = "within" if source in HELD and target in HELD else kind
    how = {"import": f"from_{source}", "export": f"to_{target}", "within": f"{source}_as_{target}"}[route]
    return f"f32_{how}__{isa}"


def _cast_variants(isa: Isa) -> Iterator[Variant]:
    for kind, source, target, stored, written in _casts():
        made = expression(source, target)
        if kind == "within" and target not in HELD and target != "bool":
            number = CUT if source == "float64" and target != "float16" else "x"
            made = f"(float)({OUTSIDE[target]}){number}"
        params = {"NV": 1, "FROM": stored, "TO": written, "EXPRESSION": made}
        yield Variant(_cast_symbol(kind, source, target, isa.name), "cast.c.in", params)


def _cast_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    work = operands.workload
    assert isinstance(work, Cast)
    yield Candidate(_cast_symbol(work.kind, work.source, work.target, isa.name))


def _cast_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, y = operands.workload, operands.output
    assert isinstance(work, Cast)
    x: Field = _at(operands.inputs[0]) if work.kind != "import" else External(operands.external)
    fields: dict[str, Field] = {
        "x": x,
        "y": _at(y) if y is not None else External(operands.external),
        "count": prod(work.shape),
    }
    return (Call(candidate.kernel, CAST.name, fields),)


def _at(x: Placed) -> Arena:
    """The first element of a dense array."""
    assert isinstance(x.layout, Rows), f"{x.name} is not dense"
    return Arena(int(x.offsets[0]))


# --- arithmetic -------------------------------------------------------------------------------------------------------

DOUBLE_CALLS = {
    name: f"__builtin_{name}(a)" for name in ("ceil", "cos", "erf", "exp", "floor", "log", "sin", "sqrt", "tanh")
}
DOUBLE_CALLS |= {"reciprocal": "1.0 / a", "round": "__builtin_rint(a)", "sigmoid": "1.0 / (1.0 + __builtin_exp(-a))"}
COMPARE = {"equal": "==", "less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">="}


def _absolute(x: str, dtype: str) -> str:
    """C of |x|; the least of the signed numbers has none and stays."""
    if dtype == "float64":
        return f"__builtin_fabs({x})"
    return (
        x
        if dtype.startswith("u")
        else f"{x} < 0 ? ({HELD[dtype]})(({UNSIGNED[dtype]})0 - ({UNSIGNED[dtype]}){x}) : {x}"
    )


def _arithmetic(kind: str, dtype: str) -> str:
    """C of a, b (and c). Whole numbers go by their unsigned likes, which wrap around."""
    c, u = HELD[dtype], UNSIGNED[dtype]
    if kind in COMPARE:
        return f"a {COMPARE[kind]} b ? 1.0f : 0.0f"
    if kind in DOUBLE_CALLS:
        return DOUBLE_CALLS[kind]
    common = {
        "abs": _absolute("a", dtype), "where": "a != 0.0f ? b : c",
        "add": f"({c})(({u})a + ({u})b)", "sub": f"({c})(({u})a - ({u})b)", "mul": f"({c})(({u})a * ({u})b)",
        "neg": f"({c})(({u})0 - ({u})a)", "prelu": f"a < 0 ? ({c})(({u})a * ({u})b) : a",
    }  # fmt: skip
    if kind in common:
        return common[kind]
    if dtype == "float64":
        return {
            "div": "a / b", "max": "a > b || a != a ? a : b", "min": "a < b || a != a ? a : b",
            "pow": "__builtin_pow(a, b)", "fmod": "__builtin_fmod(a, b)",
            "mod": "__builtin_fmod(a, b) + (__builtin_fmod(a, b) * b < 0.0 ? b : 0.0)",
            "sign": "a > 0.0 ? 1.0 : a < 0.0 ? -1.0 : a",
        }[kind]  # fmt: skip
    signed = not dtype.startswith("u")
    rest = "b == 0 || b == -1 ? 0 : a % b" if signed else "b == 0 ? 0 : a % b"
    return {
        "div": f"b == 0 ? 0 : b == -1 ? ({c})(({u})0 - ({u})a) : a / b" if signed else "b == 0 ? 0 : a / b",
        "max": "a > b ? a : b", "min": "a < b ? a : b",
        "pow": f"({c})cn_power_{SHORT[dtype]}(a, b)",
        "fmod": rest,
        "mod": f"({rest}) && (({rest}) ^ b) < 0 ? ({rest}) + b : ({rest})" if signed else rest,
        "sign": "(a > 0) - (a < 0)" if signed else "a > 0",
    }[kind]  # fmt: skip


def _elementwise_symbol(kind: str, dtype: str, isa: str) -> str:
    return f"{SHORT[dtype]}_{kind}_dense__{isa}"


def _elementwise_variants(isa: Isa) -> Iterator[Variant]:
    for dtype in WIDE:
        for kind in TYPED:
            if kind in DOUBLES and dtype != "float64":
                continue
            count = 3 if kind == "where" else 1 if kind in (*DOUBLES, "abs", "neg", "sign") else 2
            kinds = ["float", HELD[dtype], HELD[dtype]] if kind == "where" else [HELD[dtype]] * count
            params = {
                "NV": 1, "EXPRESSION": _arithmetic(kind, dtype), "COUNT": count, "TYPES": kinds,
                "RESULT": "float" if kind in TRUTHS else HELD[dtype],
            }  # fmt: skip
            yield Variant(_elementwise_symbol(kind, dtype, isa.name), "elementwise.c.in", params)


def _elementwise_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    work = operands.workload
    assert isinstance(work, TypedElementwise)
    yield Candidate(_elementwise_symbol(work.kind, work.type, isa.name))


def _reduction(kind: str, dtype: str) -> dict[str, object]:
    """First value, what joins the next one v to ``total``, and what becomes of it."""
    c, u = HELD[dtype], UNSIGNED[dtype]
    plus, times = f"({c})(({u})total + ({u})v)", f"({c})(({u})total * ({u})v)"
    square = f"({c})(({u})total + ({u})v * ({u})v)"
    nan = " || v != v" if dtype == "float64" else ""
    first, following, last = {
        "sum": ("0", plus, "total"),
        "avg": ("0", plus, f"total / ({c})k->count"),
        "max": ("x[0]", f"v > total{nan} ? v : total", "total"),
        "min": ("x[0]", f"v < total{nan} ? v : total", "total"),
        "prod": ("1", times, "total"),
        "l1": ("0", f"({c})(({u})total + ({u})({_absolute('v', dtype)}))", "total"),
        "sumsq": ("0", square, "total"),
        "l2": ("0", square, "__builtin_sqrt(total)"),
        "logsum": ("0", plus, "__builtin_log(total)"),
        "logsumexp": ("0", "total + __builtin_exp(v - top)", "__builtin_log(total) + top"),
    }[kind]
    return {"T": c, "FIRST": first, "NEXT": following, "LAST": last, "TOP": kind == "logsumexp"}


def _reduce_symbol(kind: str, dtype: str, isa: str) -> str:
    return f"{SHORT[dtype]}_reduce_{kind}__{isa}"


def _reduce_variants(isa: Isa) -> Iterator[Variant]:
    for dtype in WIDE:
        for kind in REDUCED:
            if kind not in FLOATING or dtype == "float64":
                params = {"NV": 1, **_reduction(kind, dtype)}
                yield Variant(_reduce_symbol(kind, dtype, isa.name), "typed_reduce.c.in", params)


def _reduce_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    work = operands.workload
    assert isinstance(work, TypedReduce)
    yield Candidate(_reduce_symbol(work.kind, work.type, isa.name))


def _reduce_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, TypedReduce) and y is not None
    fields: dict[str, Field] = {
        "x": _at(x), "y": _at(y), "outer": work.outer, "count": work.count, "inner": work.inner,
    }  # fmt: skip
    return (Call(candidate.kernel, REDUCE.name, fields),)


def _matmul_variants(isa: Isa) -> Iterator[Variant]:
    for dtype in WIDE:
        params = {"NV": 1, "T": HELD[dtype], "SUM": UNSIGNED[dtype]}
        yield Variant(f"{SHORT[dtype]}_matmul__{isa.name}", "typed_matmul.c.in", params)


def _matmul_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    assert isinstance(operands.workload, TypedMatMul)
    yield Candidate(f"{SHORT[operands.workload.type]}_matmul__{isa.name}")


def _matmul_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (a, b), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, TypedMatMul) and y is not None

    def firsts(batch: tuple[int, ...], size: int) -> Const:
        numbers = np.arange(prod(batch), dtype=np.int64).reshape(batch) * size
        return u32(np.broadcast_to(numbers, work.batch).reshape(-1))

    fields: dict[str, Field] = {
        "a": _at(a), "b": _at(b), "y": _at(y),
        "a_batch": firsts(work.a_batch, work.rows * work.inner),
        "b_batch": firsts(work.b_batch, work.inner * work.columns),
        "batch": prod(work.batch), "rows": work.rows, "inner": work.inner, "columns": work.columns,
    }  # fmt: skip
    return (Call(candidate.kernel, MATMUL.name, fields),)


def _indices_variants(isa: Isa) -> Iterator[Variant]:
    yield Variant(f"i64_max_indices__{isa.name}", "max_indices.c.in", {"NV": 1})


def _indices_candidates(operands: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(f"i64_max_indices__{isa.name}")


def _indices_bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    work, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(work, MaxIndices) and y is not None
    pool = work.pool
    fields: dict[str, Field] = {
        "x": _at(x), "y": _at(y), "planes": pool.batch * pool.channels, "height": pool.height, "width": pool.width,
        "out_height": pool.out_height, "out_width": pool.out_width, "kernel_y": pool.kernel[0],
        "kernel_x": pool.kernel[1], "stride_y": pool.stride[0], "stride_x": pool.stride[1],
        "dilation_y": pool.dilation[0], "dilation_x": pool.dilation[1], "top": pool.padding[0],
        "left": pool.padding[1], "column_major": int(work.column_major),
    }  # fmt: skip
    return (Call(candidate.kernel, INDICES.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("cast", (CAST,), _cast_variants, _cast_candidates, _cast_bind),
    Operator("typed_elementwise", (ELEMENTWISE,), _elementwise_variants, _elementwise_candidates, elementwise_bind),
    Operator("typed_reduce", (REDUCE,), _reduce_variants, _reduce_candidates, _reduce_bind),
    Operator("typed_matmul", (MATMUL,), _matmul_variants, _matmul_candidates, _matmul_bind),
    Operator("max_indices", (INDICES,), _indices_variants, _indices_candidates, _indices_bind),
)
