"""Numbers of other types than float32: casts and arithmetic against numpy, on every ISA of this machine."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import NAMES, Arranger, need, run

from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.typed import OUTSIDE
from colonnade.layout import Placed, Rows
from colonnade.workload import (
    Cast,
    Function,
    MaxIndices,
    Pool2d,
    TypedElementwise,
    TypedMatMul,
    TypedReduce,
    Unary,
)
from colonnade.workload.small import FLOATS, INTEGERS, POWERS
from colonnade.workload.typed import DOUBLES, FLOATING, REDUCED, TYPED, WIDE, as_lanes, lanes

FEW = settings(max_examples=12, deadline=None)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
EDGES = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 448.0, 464.0, 480.0, 6e4, 1e6, 3e38, 1e-3, 2**-9, 1e-7, 1e-40, np.inf, np.nan]


@pytest.fixture(scope="module", params=NAMES)
def isa(request: pytest.FixtureRequest) -> Isa:
    return need(request.param)


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Small and large ones, with zeros among them."""
    if dtype.startswith("float"):
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 6, shape)).astype(dtype)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    large = rng.integers(least, most, shape, dtype, endpoint=True)
    tiny = rng.integers(max(least, -4), 5, shape).astype(dtype)
    return np.where(rng.random(shape) < 0.5, large, tiny)


def place(arranger: Arranger, shape: tuple[int, ...], dtype: str) -> Placed:
    rows = shape[0] if shape else 1
    width = prod(shape[1:]) * lanes(dtype)
    return arranger.put("tensor", (rows, width), Rows(rows, width))


def compute(
    target: Isa, work: Any, operands: list[tuple[Any, str]], shape: tuple[int, ...], result: str, threads: int = 1,
    tolerance: float = 0.0,
) -> Any:  # fmt: skip
    """The kernel's result as what it is, compared with the workload's reference."""
    arranger = Arranger()
    places = [place(arranger, array.shape, dtype) for array, dtype in operands]
    output = place(arranger, shape, result)
    case = arranger.case(work, places, output)
    given = [as_lanes(array, dtype).reshape(p.shape) for (array, dtype), p in zip(operands, places, strict=True)]
    (candidate, *_) = registry.candidates(case, target, threads)
    with np.errstate(all="ignore"):
        found = run(case, candidate, target, given, threads, tolerance=tolerance, view=result)
    return found.reshape(shape)


@FEW
@given(shape=SHAPES, seed=st.integers(0, 999), threads=st.integers(1, 3), data=st.data())
def test_elementwise(isa: Isa, shape: tuple[int, ...], seed: int, threads: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(WIDE))
    kinds = [k for k in TYPED if (k not in DOUBLES or dtype == "float64")]
    kind = data.draw(st.sampled_from(kinds))
    rng = np.random.default_rng(seed)
    count = 3 if kind == "where" else 1 if kind in (*DOUBLES, "abs", "neg", "sign") else 2
    shapes = [tuple(1 if rng.random() < 0.3 else d for d in shape) for _ in range(count)]
    operands = [(numbers(rng, dtype, s), dtype) for s in shapes]
    if kind == "where":
        operands[0] = ((rng.random(shapes[0]) < 0.5).astype(np.float32), "float32")
    if kind == "pow":
        operands[1] = ((operands[1][0].astype(np.float64) % 7 - 2).astype(dtype), dtype)
    work = TypedElementwise(kind, dtype, tuple(shapes))
    # float64 by another libm than numpy's
    compute(isa, work, operands, work.shape, work.result, threads, 1e-13 if dtype == "float64" else 0.0)


@FEW
@given(seed=st.integers(0, 999), threads=st.integers(1, 3), data=st.data())
def test_reduce_and_matmul(isa: Isa, seed: int, threads: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(WIDE))
    kind = data.draw(st.sampled_from([k for k in REDUCED if k not in FLOATING or dtype == "float64"]))
    rng = np.random.default_rng(seed)
    outer, count, inner = (int(n) for n in rng.integers(1, 6, 3))
    x = numbers(rng, dtype, (outer, count, inner))
    x = np.abs(x) / 1e4 if dtype == "float64" else x
    work = TypedReduce(kind, dtype, outer, count, inner)
    compute(isa, work, [(x, dtype)], (outer, inner), dtype, threads, 1e-12 if dtype == "float64" else 0.0)
    a, b = numbers(rng, dtype, (2, outer, count)), numbers(rng, dtype, (1, count, inner))
    product = TypedMatMul(dtype, (2,), (1,), outer, count, inner)
    found = compute(isa, product, [(a, dtype), (b, dtype)], (2, outer, inner), dtype, threads, 1e-12)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, a @ b, rtol=0, atol=1e-9 * np.abs(a @ b).max() if dtype == "float64" else 0)


@pytest.mark.parametrize("source", ["float32", *WIDE])
def test_casts_within(isa: Isa, source: str) -> None:
    rng = np.random.default_rng(0)
    x = numbers(rng, source, (3, 40))
    if source.startswith("float"):
        x.reshape(-1)[: len(EDGES)] = EDGES
    for target in (*(["float32"] if source != "float32" else []), *WIDE, "bool", "int8", "uint16", "float16"):
        if source == "float32" and target not in WIDE:
            continue  # functions, below
        work = Cast("within", x.shape, source, target)
        held = target if target in WIDE else "float32"
        found = compute(isa, work, [(x, source)], x.shape, held, 2)
        with np.errstate(all="ignore"):
            inside = np.isfinite(x) & (np.abs(x) < 2.0**31) & (x >= 0)  # all others are no number of some type
            wanted = x.astype(target).astype(held)
        if target not in ("int8", "uint16") or not source.startswith("float"):
            np.testing.assert_array_equal(found[inside], wanted[inside])


@pytest.mark.parametrize("name", [*FLOATS, POWERS, *INTEGERS])
def test_rounding_to_small_types(isa: Isa, name: str) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((7, 33)) * 10.0 ** rng.integers(-6, 6, (7, 33))).astype(np.float32)
    x.reshape(-1)[: len(EDGES)] = EDGES
    x.reshape(-1)[50 : 50 + len(EDGES)] = -np.array(EDGES, np.float32)
    kind = np.dtype(getattr(ml_dtypes, name, name))
    if name in INTEGERS:  # what ml_dtypes and numpy leave open is left out
        x = np.where(np.abs(x) < 2**20, x, 3)
    for saturate in (0.0, 1.0) if name in FLOATS else (0.0,):
        arranger = Arranger()
        places = [place(arranger, x.shape, "float32") for _ in range(2)]
        case = arranger.case(Unary(Function(f"to_{name}", saturate), x.shape), places[:1], places[1])
        (candidate, *_) = registry.candidates(case, isa, 1)
        found = run(case, candidate, isa, [x], tolerance=0.0)
        with np.errstate(all="ignore"):
            if name in FLOATS:
                most = float(ml_dtypes.finfo(kind).max)
                wanted = (np.clip(x, -most, most) if saturate and name != "bfloat16" else x).astype(kind)
            elif name == POWERS:
                continue
            else:
                wanted = np.trunc(x).astype(np.int64).astype(kind)
        if name != "bfloat16" or not saturate:
            np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_the_users_arrays(isa: Isa, name: str) -> None:
    """Every number of a type of one byte, and many of two, in and out again."""
    kind = np.dtype(getattr(ml_dtypes, name, name))
    if kind.itemsize == 2:
        bits = np.random.default_rng(0).integers(0, 65536, (3, 999)).astype(np.uint16)
        bits[0, :40] = [*range(20), *range(65516, 65536)]
    else:
        room = {"bool": 2, "float4_e2m1fn": 16, "int4": 16, "uint4": 16, "int2": 4, "uint2": 4}.get(name, 256)
        bits = (np.arange(256).reshape(4, 64) % room).astype(np.uint8)
    x = bits.view(kind)
    arranger = Arranger()
    at = place(arranger, x.shape, "float32")
    case = arranger.case(Cast("import", x.shape, name, "float32"), [], at, external="x")
    (candidate, *_) = registry.candidates(case, isa, 1)
    found = run(case, candidate, isa, [x], tolerance=0.0).reshape(x.shape)
    np.testing.assert_array_equal(found, x.astype(np.float32))
    back = arranger.case(Cast("export", x.shape, "float32", name), [at], None, external="x")
    (candidate, *_) = registry.candidates(back, isa, 1)
    again = run(back, candidate, isa, [found], threads=2)
    np.testing.assert_array_equal(again.astype(np.float32), x.astype(np.float32))


@FEW
@given(seed=st.integers(0, 999), threads=st.integers(1, 3), column_major=st.booleans())
def test_where_maxima_stand(isa: Isa, seed: int, threads: int, column_major: bool) -> None:
    rng = np.random.default_rng(seed)
    n, c, h, w, kh, kw, sh, sw = (int(k) for k in rng.integers(1, 4, 8))
    pool = Pool2d("max", n, c, h + kh, w + kw, (kh, kw), (sh, sw), (kh // 2, kw // 2, kh // 2, 0))
    x = rng.integers(0, 4, (n, c, pool.height, pool.width)).astype(np.float32)  # many are equal
    shape = (n, c, pool.out_height, pool.out_width)
    found = compute(isa, MaxIndices(pool, column_major), [(x, "float32")], shape, "int64", threads)
    order = x.transpose(0, 1, 3, 2) if column_major else x
    np.testing.assert_array_equal(order.reshape(-1)[found], pool.reference(x))
