"""Functions of one element, on planes (halos stay zero) or dense arrays: one body, a row a function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from colonnade.kernels.call import Arena, Call, Field
from colonnade.kernels.isa import Isa, isa
from colonnade.kernels.ops.shared import LEAD_MEMBERS, lead, masks, same_places, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed, Rows
from colonnade.workload import Function, Unary
from colonnade.workload.small import FLOATS, INTEGERS, POWERS, SmallFloat

UNARY = Struct(
    "cn_unary",
    "y = f(x; a, b) on planes, or on one dense array of `plane` elements when mask is null.",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every plane of x"),
        Member("out", "const uint32_t *"),
        Member("mask", "const uint8_t *", "a bit a lane: is it a pixel? [phases][mask_bytes]"),
        *LEAD_MEMBERS,
        Member("mask_bytes", "u32", "from one phase's mask to the next one's"),
        Member("phases", "u32", "plane p is of phase p % phases"),
        Member("planes", "u32"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("a", "f32"),
        Member("b", "f32"),
    ),
)

# vector expressions of x, a, b and vl; @ stands for the register group
VECTOR = {
    "abs": "vec@_abs(x, vl)",
    "celu": "vec@_fma(cn_rise@(x, vl), a, cn_fall@(vec@_div(x, vec@_splat(a, vl), vl), vl), vl)",
    "elu": "vec@_fma(cn_rise@(x, vl), a, cn_fall@(x, vl), vl)",
    "erf": "vec@_unless_nan(cn_erf@(x, vl), x, vl)",
    "exp": "cn_exp@(x, vl)",
    "gelu": "vec@_mul(vec@_scale(x, 0.5f, vl), vec@_plus(cn_erf@(vec@_scale(x, 0.707106781f, vl), vl), 1.0f, vl), vl)",
    "gelu_tanh": "vec@_mul(vec@_scale(x, 0.5f, vl), vec@_plus(cn_tanh@(vec@_mul(x, "
    "cn_ramp@(vec@_mul(x, x, vl), 0.0356774081f, 0.797884561f, vl), vl), vl), 1.0f, vl), vl)",
    "hard_sigmoid": "vec@_clip(cn_ramp@(x, a, b, vl), 0.0f, 1.0f, vl)",
    "hard_swish": "vec@_mul(x, vec@_within(cn_ramp@(x, 1.0f / 6, 0.5f, vl), 0.0f, 1.0f, vl), vl)",
    "leaky_relu": "vec@_below(x, vec@_scale(x, a, vl), x, vl)",
    "neg": "vec@_sub(vec@_splat(0.0f, vl), x, vl)",
    "reciprocal": "vec@_div(vec@_splat(1.0f, vl), x, vl)",
    "selu": "vec@_scale(vec@_fma(cn_rise@(x, vl), a, cn_fall@(x, vl), vl), b, vl)",
    "sigmoid": "vec@_unless_nan(cn_logistic@(x, vl), x, vl)",
    "silu": "vec@_mul(x, cn_logistic@(x, vl), vl)",
    "softsign": "vec@_div(x, vec@_plus(vec@_abs(x, vl), 1.0f, vl), vl)",
    "square": "vec@_mul(x, x, vl)",
    "tanh": "vec@_unless_nan(cn_tanh@(x, vl), x, vl)",
}
# of these 0 makes another number, so lanes that are no pixels have to be cleared behind them
OFF_ZERO = ("exp", "hard_sigmoid", "reciprocal", "sigmoid")


def _rounded(kind: SmallFloat) -> str:
    """To the nearest number of that type; without a NaN, -0 stands for none."""
    over = "__builtin_inff()" if kind.infinite else '__builtin_nanf("")'
    most = f"{kind.most.hex()}f"
    beyond = f"a != 0.0f ? {most} : {over}" if kind.nan else most
    call = f"cn_small_float(x, {kind.mantissa}, {kind.least}, {most}, {beyond})"
    if not kind.nan:
        call = f"x != x ? -0.0f : {call}"
    return call if kind.negative_zero else f"0.0f + {call}"


# C expressions of x, a and b, one element at a time
SCALAR = {
    **{name: f"__builtin_{name}f(x)" for name in (
        "acos", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "floor", "log", "sin", "sinh", "sqrt",
        "tan", "trunc",
    )},
    "acosh": '__builtin_acoshf(x < 1.0f ? __builtin_nanf("") : x)',  # musl's has numbers below -1
    "half": "(float)(_Float16)x",
    "round": "__builtin_rintf(x)",
    "pow": "__builtin_powf(x, a)",
    # tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2); beyond 20 that is 1
    "mish": "x > 20.0f ? x : x * (1.0f - 2.0f / (__builtin_expf(x) * (__builtin_expf(x) + 2.0f) + 2.0f))",
    "softplus": "(x > 0.0f ? x : 0.0f) + __builtin_log1pf(__builtin_expf(x > 0.0f ? -x : x))",
    "sign": "x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x",
    "shrink": "x < -a ? x + b : x > a ? x - b : 0.0f * x",
    "thresholded_relu": "x <= a ? 0.0f : x",
    "logical_not": "x == 0.0f ? 1.0f : 0.0f",
    "is_inf": "(x == __builtin_inff() && a != 0.0f) || (x == -__builtin_inff() && b != 0.0f) ? 1.0f : 0.0f",
    "is_nan": "x != x ? 1.0f : 0.0f",
    "to_bool": "x != 0.0f ? 1.0f : 0.0f",
    f"to_{POWERS}": "cn_small_power(x, a != 0.0f, (int)b)",
    **{f"to_{name}": _rounded(kind) for name, kind in FLOATS.items()},
    **{f"to_{n}": f"cn_small_integer(x, {bits}, {int(not n.startswith('u'))})" for n, bits in INTEGERS.items()},
}  # fmt: skip


def _group(name: str, known: Isa) -> int:
    return known.group if name in VECTOR else 1


def symbol(function: Function, known: Isa) -> str:
    """``f32_silu_1v__avx512``"""
    return f"f32_{function.name}_{_group(function.name, known)}v__{known.name}"


def call(x: Placed, y: Placed, function: Function, isa_name: str) -> Call:
    """``y = function(x)``; in place where both are one."""
    if isinstance(y.layout, Rows):
        fields: dict[str, Field] = {
            "mask": None, "lead": None, "lead_bytes": 0, "mask_bytes": 0, "phases": 1, "planes": 1,
            "plane": y.layout.batch * y.layout.width,
        }  # fmt: skip
    else:
        assert same_places(x, y), f"{x.name} and {y.name} must share one geometry"
        mask, mask_bytes, phases = masks(y.planes)
        fields = {
            "mask": mask, **lead(y), "mask_bytes": mask_bytes, "phases": phases, "planes": len(y.offsets),
            "plane": y.planes.plane,
        }  # fmt: skip
    fields |= {"arena": Arena(), "in": u32(x.offsets), "out": u32(y.offsets), "a": function.a, "b": function.b}
    return Call(symbol(function, isa(isa_name)), UNARY.name, fields)


def _variants(known: Isa) -> Iterator[Variant]:
    for name in sorted({*VECTOR, *SCALAR}):
        params = {
            "NV": _group(name, known), "NAME": name, "VECTOR": VECTOR.get(name, ""), "SCALAR": SCALAR.get(name, ""),
            "OFF_ZERO": name in OFF_ZERO,
        }  # fmt: skip
        yield Variant(symbol(Function(name), known), "unary.c.in", params)


def _candidates(operands: Operands, known: Isa, threads: int) -> Iterable[Candidate]:
    assert isinstance(operands.workload, Unary)
    yield Candidate(symbol(operands.workload.function, known))


def _bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    workload, (x,), y = operands.workload, operands.inputs, operands.output
    assert isinstance(workload, Unary) and y is not None
    return (call(x, y, workload.function, candidate.kernel.rpartition("__")[2]),)


ROWS: tuple[Operator, ...] = (Operator("unary", (UNARY,), _variants, _candidates, _bind),)
