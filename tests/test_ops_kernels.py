"""Functions, dense arrays and resizing: every kernel against its numpy definition, on every ISA of this machine."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import NAMES, Arranger, check, need, run, values

from colonnade.frontend.context import counting
from colonnade.frontend.ops_resize import Axis, positions, taps
from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops.dense import EXPRESSIONS, REDUCTIONS, broadcast_tables
from colonnade.kernels.ops.unary import SCALAR, VECTOR
from colonnade.layout import Planes, Rows
from colonnade.workload import (
    FILL,
    FUNCTIONS,
    RELU,
    Activation,
    Constant,
    Conv2d,
    Convert,
    Elementwise,
    Epilogue,
    Function,
    Join,
    Linear,
    Lookup,
    Lrn,
    MatMul,
    Normalise,
    Reduce,
    Resample,
    Softmax,
    Take,
    Unary,
    digest,
)

FEW = settings(max_examples=25, deadline=None)
threads_ = st.integers(1, 3)
seeds = st.integers(0, 2**31)
widths = st.integers(1, 30)


@pytest.fixture(scope="module", params=NAMES)
def isa(request: pytest.FixtureRequest) -> Isa:
    return need(request.param)


def dense(arrange: Arranger, name: str, shape: tuple[int, ...]):
    placed = (shape[0] if shape else 1, prod(shape[1:]))
    return arrange.put(name, placed, Rows(*placed))


def planes(arrange: Arranger, name: str, shape: tuple[int, int, int, int], beside: int = 2, below: int = 1):
    n, _, h, w = shape
    return arrange.put(name, shape, Planes(n, h, w, w + beside, h + below, 5))


# where each function is defined, and what it does with the numbers at hand
DOMAIN = {
    "acos": (-1, 1), "asin": (-1, 1), "atanh": (-0.99, 0.99), "acosh": (1, 9), "log": (0.01, 9), "sqrt": (0, 9),
    "pow": (0.1, 3), "reciprocal": (0.2, 5), "tan": (-1.4, 1.4),
}  # fmt: skip


def test_every_function_has_a_kernel():
    assert set(FUNCTIONS) == set(VECTOR) | set(SCALAR) and not set(VECTOR) & set(SCALAR)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(isa, name):
    """On planes with halos, in place, and on dense arrays, over the whole domain."""
    low, high = DOMAIN.get(name, (-12, 12))
    shape = (2, 3, 5, 21)
    x = np.random.default_rng(3).uniform(low, high, shape).astype(np.float32)
    x[0, 0, 0, :5] = np.array([0, -0.5, 0.5, 1, -1e-3], np.float32).clip(low, high)
    work = Unary(Function.of(name), shape)
    arrange = Arranger()
    a, b = planes(arrange, "a", shape), planes(arrange, "b", shape)
    check(arrange.case(work, [a], b), isa, [x], 2, tolerance=1e-5)
    check(arrange.case(work, [a], a), isa, [x], 1, tolerance=1e-5)
    arrange = Arranger()
    a, b = dense(arrange, "a", shape), dense(arrange, "b", shape)
    check(arrange.case(Unary(Function.of(name), a.shape), [a], b), isa, [x.reshape(a.shape)], 3, tolerance=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "erf", "gelu", "silu", "exp", "hard_swish"])
def test_functions_far_out(isa, name):
    """Saturated, not NaN; and a NaN stays one."""
    arrange = Arranger()
    a, b = dense(arrange, "a", (1, 8)), dense(arrange, "b", (1, 8))
    x = np.array([[80, -80, 40, -40, np.nan, 1e-30, -1e-30, 0]], np.float32)
    check(arrange.case(Unary(Function.of(name), (1, 8)), [a], b), isa, [x], 1, tolerance=1e-5)


def test_acosh_below_its_domain(isa):
    """No C library is asked: one of them has numbers there."""
    arrange = Arranger()
    a, b = dense(arrange, "a", (1, 8)), dense(arrange, "b", (1, 8))
    x = np.array([[-1000, -104, -1, 0, 0.99, 1, 7, np.nan]], np.float32)
    with np.errstate(invalid="ignore"):
        check(arrange.case(Unary(Function.of("acosh"), (1, 8)), [a], b), isa, [x], 1, tolerance=1e-5)


@pytest.mark.parametrize("function", ["silu", "sigmoid"])
def test_function_behind_a_convolution_and_a_linear_layer(isa, function):
    act = Activation(function=Function.of(function))
    conv = Conv2d(2, 3, 4, 6, 7, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(activation=act))
    arrange = Arranger()
    layout = Planes(2, 6, 7, 8, 7, 9)
    x, y = arrange.put("x", (2, 3, 6, 7), layout), arrange.put("y", (2, 4, 6, 7), layout)
    constants = {"weight": values((4, 3, 3, 3), 1), "bias": values(4, 2)}
    case = arrange.case(conv, [x], y, constants)
    run(case, registry.candidates(case, isa, 1)[0], isa, [values(x.shape, 3)], 2, tolerance=1e-5)
    arrange = Arranger()
    x, y = dense(arrange, "x", (3, 9)), dense(arrange, "y", (3, 17))
    linear = Linear(3, 9, 17, Epilogue(activation=act))
    case = arrange.case(linear, [x], y, {"weight": values((17, 9), 1), "bias": values(17, 2)})
    run(case, registry.candidates(case, isa, 1)[0], isa, [values(x.shape, 3)], 2, tolerance=1e-5)


@st.composite
def moves(draw):
    """Tables over up to four axes: slices with any step, repeats, fills; and an order of the axes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    tables = []
    for axis in order:
        kind = draw(st.sampled_from(["all", "reverse", "some", "fill"]))
        table = counting(shape)[axis]
        if kind == "reverse":
            table = table[::-1]
        elif kind != "all":
            table = table[draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=9))]
        if kind == "fill":
            table = np.concatenate([[FILL], table, [FILL, FILL]])
        tables.append(np.ascontiguousarray(table, np.int64))
    return shape, tables


def take_case(arrange, x, y, shape, tables, fill):
    work = Take(shape, tuple(len(t) for t in tables), digest(tables), fill)
    return arrange.case(work, [x], y, {f"axis{i}": t for i, t in enumerate(tables)})


@FEW
@given(move=moves(), fill=st.sampled_from([0.0, -2.5]), threads=threads_, seed=seeds)
def test_take_dense(isa, move, fill, threads, seed):
    shape, tables = move
    arrange = Arranger()
    x = dense(arrange, "x", shape)
    y = dense(arrange, "y", tuple(len(t) for t in tables))
    check(take_case(arrange, x, y, shape, tables, fill), isa, [values(x.shape, seed)], threads)


@FEW
@given(
    n=st.integers(1, 2), c=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 20),
    rows=st.lists(st.integers(-1, 8), min_size=1, max_size=9),
    columns=st.lists(st.integers(-1, 19), min_size=1, max_size=20),
    to_rows=st.booleans(), threads=threads_, seed=seeds,
)  # fmt: skip
def test_take_planes(isa, n, c, h, w, rows, columns, to_rows, threads, seed):
    """Rows and columns picked, repeated, padded with zeros: planes to planes, planes to dense."""
    tables = counting((n, c, h, w))
    for axis, picked, size in ((2, rows, h), (3, columns, w)):
        tables[axis] = np.array([FILL if i < 0 else tables[axis][i % size] for i in picked], np.int64)
    target = tuple(len(t) for t in tables)
    arrange = Arranger()
    x = planes(arrange, "x", (n, c, h, w))
    y = dense(arrange, "y", target) if to_rows else planes(arrange, "y", target, 3, 2)
    check(take_case(arrange, x, y, (n, c, h, w), tables, 0.0), isa, [values(x.shape, seed)], threads)


@FEW
@given(
    outer=st.lists(st.integers(1, 4), max_size=2), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    inner=st.integers(1, 20), threads=threads_, seed=seeds,
)  # fmt: skip
def test_join(isa, outer, sizes, inner, threads, seed):
    shapes = tuple((*outer, size, inner) for size in sizes)
    arrange = Arranger()
    parts = [dense(arrange, f"x{i}", shape) for i, shape in enumerate(shapes)]
    y = dense(arrange, "y", (*outer, sum(sizes), inner))
    inputs = [values(part.shape, seed + i) for i, part in enumerate(parts)]
    work = Join(shapes, len(outer))
    case = arrange.case(work, parts, y)
    for candidate in registry.candidates(case, isa, threads):
        run(case, candidate, isa, inputs, threads, slack=0)


def test_constant(isa):
    arrange = Arranger()
    y = dense(arrange, "y", (3, 21))
    case = arrange.case(Constant((3, 21)), [], y, {"value": values((3, 21), 0)})
    run(case, registry.candidates(case, isa, 1)[0], isa, [], 2, slack=0)


@pytest.mark.parametrize("kind", sorted(EXPRESSIONS))
def test_elementwise(isa, kind):
    shapes = [((2, 3, 17), (3, 1)), ((1,), (5, 21)), ((2, 1, 19), (1, 4, 19)), ((3, 33), (3, 33)), ((), (2, 3))]
    for number, pair in enumerate(shapes):
        triple = (pair[0], pair[1], (1,)) if kind == "where" else pair
        arrange = Arranger()
        operands = [dense(arrange, f"x{i}", shape) for i, shape in enumerate(triple)]
        y = dense(arrange, "y", np.broadcast_shapes(*triple))
        inputs = [np.rint(values(x.shape, number + i) * 2) + (kind == "pow") * 3 for i, x in enumerate(operands)]
        if kind in ("div", "mod", "fmod", "int_div", "pow"):
            inputs[1] = np.abs(inputs[1]) + 1
            inputs[0] = np.abs(inputs[0]) if kind == "pow" else inputs[0]
        case = arrange.case(Elementwise(kind, triple), operands, y)
        check(case, isa, inputs, 2, tolerance=1e-5)


def test_rows_of_a_broadcast_are_as_long_as_they_can_be():
    starts, steps, width = broadcast_tables([(2, 3, 4), (4,)])
    assert width == 4 and steps == [1, 1] and starts[1].tolist() == [0] * 6
    assert broadcast_tables([(2, 3, 4), (2, 3, 4)])[2] == 24
    assert broadcast_tables([(2, 3, 4), (1, 1, 1)])[1:] == ([1, 0], 24)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduce(isa, kind):
    for outer, count, inner in ((3, 21, 1), (2, 5, 7), (1, 40, 1), (4, 1, 1), (2, 3, 20)):
        arrange = Arranger()
        x, y = dense(arrange, "x", (outer, count * inner)), dense(arrange, "y", (outer, inner))
        data = values(x.shape, count) + (4 if kind == "logsum" else 0)
        check(arrange.case(Reduce(kind, outer, count, inner), [x], y), isa, [data], 2, tolerance=1e-5)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("kind", ["max", "min", "logsumexp"])
def test_reductions_of_what_is_no_number(isa, kind, inner):
    """A NaN stays, whatever follows it; infinities are numbers."""
    x = np.zeros((6, 70, inner), np.float32)
    x[:, 1], x[:, 2] = 9, -9
    x[0, 17], x[1, 69], x[2, 0] = np.nan, np.nan, np.nan
    x[3, 5] = np.inf
    x[4, 5], x[4, 40] = np.inf, -np.inf
    x[5] = -np.inf
    arrange = Arranger()
    a, b = dense(arrange, "x", (6, 70 * inner)), dense(arrange, "y", (6, inner))
    with np.errstate(divide="ignore", invalid="ignore"):
        check(arrange.case(Reduce(kind, 6, 70, inner), [a], b), isa, [x.reshape(6, -1)], 2, tolerance=1e-5)


@FEW
@given(
    batches=st.sampled_from([((), ()), ((2,), (2,)), ((2, 3), (1, 3)), ((), (4,))]), m=st.integers(1, 14),
    k=st.integers(1, 20), n=st.integers(1, 70), threads=threads_, seed=seeds,
)  # fmt: skip
def test_matmul(isa, batches, m, k, n, threads, seed):
    work = MatMul(*batches, m, k, n, 0.5)
    arrange = Arranger()
    a, b = dense(arrange, "a", (*work.a_batch, m, k)), dense(arrange, "b", (*work.b_batch, k, n))
    y = dense(arrange, "y", (*work.batch, m, n))
    check(arrange.case(work, [a, b], y), isa, [values(a.shape, seed), values(b.shape, seed + 1)], threads, 1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [1, 7, 16, 100])
def test_normalise(isa, centred, width):
    arrange = Arranger()
    x, y = dense(arrange, "x", (5, width)), dense(arrange, "y", (5, width))
    constants = {"scale": values(width, 1), "shift": values(width, 2)}
    data = values((5, width), 3) + 10  # a mean far from zero
    check(arrange.case(Normalise(5, width, 1e-5, centred), [x], y, constants), isa, [data], 2, 2e-5)


@pytest.mark.parametrize("constant", [True, False])
def test_lookup(isa, constant):
    arrange = Arranger()
    index, y = dense(arrange, "i", (2, 3)), dense(arrange, "y", (2, 6 * 5))
    data = values((2, 7, 5), 0)
    where = np.array([[0, 6, -1], [3, -7, 2]], np.float32)
    work = Lookup(2, 7, 5, 6, constant)
    if constant:
        check(arrange.case(work, [index], y, {"table": data}), isa, [where], 2)
    else:
        x = dense(arrange, "x", (2, 35))
        check(arrange.case(work, [index, x], y), isa, [where, data.reshape(2, 35)], 2)


@FEW
@given(n=st.integers(1, 2), c=st.integers(1, 4), h=st.integers(1, 9), w=widths, threads=threads_, seed=seeds)
def test_unflatten(isa, n, c, h, w, threads, seed):
    shape, arrange = (n, c, h, w), Arranger()
    x, y = dense(arrange, "x", shape), planes(arrange, "y", shape)
    check(arrange.case(Convert("unflatten", shape), [x], y), isa, [values(x.shape, seed)], threads)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(1, 1, 9, 9), (5, 7, 10, 14), (6, 33, 3, 20), (4, 5, 4, 11)])
def test_resample(isa, mode, size):
    h, w, oh, ow = size
    rows, columns = Axis(h, oh, oh / h), Axis(w, ow, ow / w)
    (row, row_weight), (column, column_weight) = (
        taps(axis, positions(axis, "half_pixel"), mode, -0.75, False, False) for axis in (rows, columns)
    )
    arrange = Arranger()
    x, y = planes(arrange, "x", (2, 3, h, w)), planes(arrange, "y", (2, 3, oh, ow), 1, 3)
    work = Resample(2, 3, (h, w), (oh, ow), (row.shape[1], column.shape[1]), digest([row, column]))
    constants = {"row": row, "row_weight": row_weight, "column": column, "column_weight": column_weight}
    check(arrange.case(work, [x], y, constants), isa, [values(x.shape, 0)], 2, 1e-5)


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_lrn(isa, size):
    shape, arrange = (2, 6, 4, 9), Arranger()
    x, y = planes(arrange, "x", shape), planes(arrange, "y", shape)
    check(arrange.case(Lrn(shape, size, 0.3, 0.75, 1.5), [x], y), isa, [values(shape, 0)], 2, 1e-5)


def test_softmax_of_long_rows(isa):
    arrange = Arranger()
    x, y = dense(arrange, "x", (4, 197)), dense(arrange, "y", (4, 197))
    check(arrange.case(Softmax((4, 197)), [x], y), isa, [values((4, 197), 0) * 20], 2, 1e-5)


def test_two_functions_are_one_activation_after_limits():
    act = Activation(0.0, 6.0, Function.of("silu"))
    assert str(act) == "relu6+silu" and str(RELU) == "relu"
    x = np.array([-1.0, 3.0, 9.0], np.float32)
    np.testing.assert_allclose(act(x), [0.0, 3 / (1 + np.exp(-3)), 6 / (1 + np.exp(-6))], rtol=1e-6)
