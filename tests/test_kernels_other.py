"""Every operator but convolution against its numpy definition, over odd shapes and on every ISA of this machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated import RVV
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import SLACK, Arranger, Case, check, need, run, values

from colonnade.kernels import registry
from colonnade.kernels.isa import ISAS, Isa
from colonnade.kernels.ops.pool import SQUARES
from colonnade.kernels.ops.shared import u32
from colonnade.layout import Placed, Planes, Rows
from colonnade.pattern import ColumnPattern
from colonnade.workload import (
    NONE,
    RELU,
    RELU6,
    Activation,
    Affine,
    Binary,
    Convert,
    Epilogue,
    GlobalPool,
    Linear,
    Pool2d,
    Softmax,
    Zeros,
)

QUICK = settings(max_examples=150, deadline=None)
sizes = st.integers(1, 40)
channels = st.integers(1, 9)
batches = st.integers(1, 3)
threads_ = st.integers(1, 3)
halos = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20))  # beside, below, lead
activations = st.sampled_from([NONE, RELU, RELU6, Activation(-0.5, 0.25)])
seeds = st.integers(0, 2**31)


NAMES = [*(i.name for i in ISAS if i.arch in ("any", "x86_64")), *(row.label for row in RVV)]


@pytest.fixture(scope="module", params=NAMES)
def isa(request: pytest.FixtureRequest) -> Isa:
    return need(request.param)


def planes(shape, halo=(1, 1, 3), phases=(1, 1), kept=None) -> Planes:
    n, _, h, w = shape
    rows, columns = -(-h // phases[0]), -(-w // phases[1])
    return Planes(n, h, w, columns + halo[0], rows + halo[1], halo[2], phases, kept)


@QUICK
@given(
    n=batches,
    c=channels,
    h=sizes,
    w=sizes,
    halo=halos,
    act=activations,
    threads=threads_,
    seed=seeds,
    split=st.booleans(),
)
def test_affine_planes(isa, n, c, h, w, halo, act, threads, seed, split):
    shape, arrange = (n, c, h, w), Arranger()
    phases = (2, 2) if split else (1, 1)
    x = arrange.put("x", shape, planes(shape, halo, phases))
    y = arrange.put("y", shape, planes(shape, halo, phases))
    constants = {"scale": values(c, seed + 1), "shift": values(c, seed + 2)}
    check(arrange.case(Affine(shape, act), [x], y, constants), isa, [values(shape, seed)], threads)


def test_affine_in_place(isa):
    shape, arrange = (2, 3, 5, 7), Arranger()
    x = arrange.put("x", shape, planes(shape))
    constants = {"scale": values(3, 1), "shift": values(3, 2)}
    check(arrange.case(Affine(shape), [x], x, constants), isa, [values(shape, 0)], 2)


@QUICK
@given(n=batches, c=st.integers(1, 70), act=activations, threads=threads_, seed=seeds)
def test_affine_rows(isa, n, c, act, threads, seed):
    shape, arrange = (n, c), Arranger()
    x, y = arrange.put("x", shape, Rows(n, c)), arrange.put("y", shape, Rows(n, c))
    constants = {"scale": values(c, seed + 1), "shift": values(c, seed + 2)}
    check(arrange.case(Affine(shape, act), [x], y, constants), isa, [values(shape, seed)], threads)


kinds = st.sampled_from(["add", "sub", "mul", "div"])


@QUICK
@given(
    kind=kinds,
    n=batches,
    c=channels,
    h=sizes,
    w=sizes,
    halo=halos,
    act=activations,
    threads=threads_,
    seed=seeds,
    broadcast=st.booleans(),
    split=st.booleans(),
)
def test_binary_planes(isa, kind, n, c, h, w, halo, act, threads, seed, broadcast, split):
    shape, arrange = (n, c, h, w), Arranger()
    layout = planes(shape, halo, (2, 3) if split else (1, 1))
    a = arrange.put("a", shape, layout)
    b = arrange.put("b", shape[:2], Rows(n, c)) if broadcast else arrange.put("b", shape, layout)
    y = arrange.put("y", shape, layout)
    inputs = [values(shape, seed), values(b.shape, seed + 1)]
    check(arrange.case(Binary(kind, shape, broadcast, act), [a, b], y), isa, inputs, threads)


@QUICK
@given(kind=kinds, n=batches, c=st.integers(1, 70), act=activations, threads=threads_, seed=seeds)
def test_binary_rows(isa, kind, n, c, act, threads, seed):
    shape, arrange = (n, c), Arranger()
    a, b, y = (arrange.put(name, shape, Rows(n, c)) for name in "aby")
    inputs = [values(shape, seed), values(shape, seed + 1)]
    check(arrange.case(Binary(kind, shape, False, act), [a, b], y), isa, inputs, threads)


@QUICK
@given(n=batches, c=st.integers(1, 100), scale=st.sampled_from([1e-3, 1.0, 30.0, 200.0]), threads=threads_, seed=seeds)
def test_softmax(isa, n, c, scale, threads, seed):
    shape, arrange = (n, c), Arranger()
    x, y = arrange.put("x", shape, Rows(n, c)), arrange.put("y", shape, Rows(n, c))
    check(arrange.case(Softmax(shape), [x], y), isa, [values(shape, seed) * np.float32(scale)], threads)


def test_softmax_is_accurate_to_the_last_bits(isa):
    """exp over its whole range, by softmax of pairs (0, -t): the ratio of the two results is exp(-t)."""
    t = np.concatenate([np.linspace(0, 110, 4001), [np.inf]]).astype(np.float32)
    shape, arrange = (len(t), 2), Arranger()
    x, y = arrange.put("x", shape, Rows(*shape)), arrange.put("y", shape, Rows(*shape))
    case = arrange.case(Softmax(shape), [x], y)
    result = run(case, registry.candidates(case, isa, 1)[0], isa, [np.stack([np.zeros_like(t), -t], axis=1)])
    wanted = np.exp(-t.astype(np.float64)) / (1 + np.exp(-t.astype(np.float64)))
    unit = np.spacing(np.maximum(wanted, 2.0**-126).astype(np.float32))
    assert (np.abs(result[:, 1] - wanted) / unit).max() <= 4  # exp, sum and quotient


@st.composite
def pools(draw) -> Pool2d:
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = [draw(st.integers(0, k // 2)) for k in (*kernel, *kernel)]
    least = [
        max(1, d * (k - 1) + 1 - padding[i] - padding[i + 2])
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    ]
    return Pool2d(
        draw(st.sampled_from(["max", "avg"])),
        draw(batches),
        draw(channels),
        draw(st.integers(least[0], max(least[0], 40))),
        draw(st.integers(least[1], max(least[1], 40))),
        kernel,
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        (padding[0], padding[1], padding[2], padding[3]),
        dilation,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def stems(draw) -> Pool2d:
    """Windows of three columns, two apart, as behind a stem: a row of them has a way of its own."""
    top, left, below, right = (draw(st.integers(0, 1)) for _ in range(4))
    return Pool2d(
        "max", draw(batches), draw(channels), draw(st.integers(7, 12)), draw(st.integers(3, 90)),
        (draw(st.integers(2, 4)), 3), (draw(st.integers(1, 3)), 2), (top, left, below, right),
        (draw(st.integers(1, 2)), 1), draw(st.booleans()),
    )  # fmt: skip


@st.composite
def squares(draw) -> Pool2d:
    """Windows that have kernels of their own on scalable ISAs, where rows are not too close to each other."""
    size, stride = draw(st.sampled_from(SQUARES))
    padding = tuple(draw(st.integers(0, size // 2)) for _ in range(4))
    least = [max(1, size - padding[i] - padding[i + 2]) for i in range(2)]
    height, width = (draw(st.integers(first, last)) for first, last in zip(least, (20, 150), strict=True))
    return Pool2d(
        "max", draw(batches), draw(channels), height, width, (size, size), (stride, stride), padding,
        ceil_mode=draw(st.booleans()),
    )  # fmt: skip


def pooling(pool: Pool2d, before=(1, 1, 3), after=(1, 1, 3), itemsize: int = 4) -> Case:
    arrange = Arranger()
    x_shape = (pool.batch, pool.channels, pool.height, pool.width)
    y_shape = (pool.batch, pool.channels, pool.out_height, pool.out_width)
    x = arrange.put("x", x_shape, replace(planes(x_shape, before), itemsize=itemsize))
    return arrange.case(pool, [x], arrange.put("y", y_shape, replace(planes(y_shape, after), itemsize=itemsize)))


ANY_POOL = given(
    pool=pools() | stems() | squares(), before=halos, after=halos, threads=threads_, seed=seeds,
    shift=st.sampled_from([0, -5]),
)  # fmt: skip


@QUICK
@ANY_POOL
def test_pool(isa, pool, before, after, threads, seed, shift):
    """``shift`` makes all pixels negative: a zero halo read as data would win every maximum."""
    case = pooling(pool, before, after)
    check(case, isa, [values(case.inputs[0].shape, seed) + np.float32(shift)], threads, 4e-6, 1)


@pytest.mark.parametrize(("size", "stride"), SQUARES)
def test_pools_of_maps_larger_than_scratch(isa, size, stride):
    """Some rows after the other, and the last ones less than there is room for."""
    case = pooling(Pool2d("max", 1, 2, 133, 171, (size, size), (stride, stride), (size // 2,) * 4))
    check(case, isa, [values(case.inputs[0].shape, 3)], 2, 0)


@QUICK
@given(
    kind=st.sampled_from(["avg", "sum", "max"]),
    n=batches,
    c=channels,
    h=sizes,
    w=sizes,
    halo=halos,
    threads=threads_,
    seed=seeds,
    shift=st.sampled_from([0, -5]),
)
def test_global_pool(isa, kind, n, c, h, w, halo, threads, seed, shift):
    shape, arrange = (n, c, h, w), Arranger()
    x, y = arrange.put("x", shape, planes(shape, halo)), arrange.put("y", (n, c), Rows(n, c))
    inputs = [values(shape, seed) + np.float32(shift)]
    check(arrange.case(GlobalPool(kind, *shape), [x], y), isa, inputs, threads, 4e-6, h * w if kind == "sum" else 1)


@QUICK
@given(
    n=st.integers(1, 6),
    ic=st.integers(1, 70),
    oc=st.integers(1, 150),
    act=activations,
    residual=st.booleans(),
    bias=st.booleans(),
    maps=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    tile=st.integers(1, 40),
    threads=threads_,
    seed=seeds,
)
def test_linear(isa, n, ic, oc, act, residual, bias, maps, sparsity, tile, threads, seed):
    rng, arrange = np.random.default_rng(seed), Arranger()
    weight = values((oc, ic), seed)
    if sparsity:
        kept = ColumnPattern(sparsity, tile).kept(ic)
        order = rng.permutation(oc)
        for first in range(0, oc, tile):
            gone = rng.permutation(ic)[kept:]
            weight[np.ix_(order[first : first + tile], gone)] = 0
    constants = {"weight": weight, **({"bias": values(oc, seed + 1)} if bias else {})}
    x = arrange.put("x", (n, ic, 1, 1), planes((n, ic, 1, 1))) if maps else arrange.put("x", (n, ic), Rows(n, ic))
    r = arrange.put("r", (n, oc), Rows(n, oc))
    y = arrange.put("y", (n, oc), Rows(n, oc))
    case = arrange.case(Linear(n, ic, oc, Epilogue(residual, act)), [x, r] if residual else [x], y, constants)
    data = values((n, ic), seed + 2)
    inputs = [data, values((n, oc), seed + 3)] if residual else [data]
    check(case, isa, inputs, threads, 2e-6, ic)


def phases_(draw) -> tuple[tuple[int, int], tuple[tuple[int, int], ...] | None]:
    phases = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 4), (2, 1), (1, 2)]))
    outside = draw(st.sampled_from([0, 0, 1, 3]))  # columns that shifted planes begin before and behind
    every = [(py, px) for py in range(phases[0]) for px in range(-outside, phases[1] + outside)]
    some = st.lists(st.sampled_from(every), min_size=1, unique=True).map(lambda k: tuple(sorted(k)))
    return phases, draw(some if outside else st.none() | some)


def stored(reference: np.ndarray, layout: Planes) -> np.ndarray:
    """``reference`` with zeros for the pixels of phases that are not stored."""
    result = np.zeros_like(reference)
    for image, whole in zip(result, reference, strict=True):
        for phase in layout.stored_phases:
            layout.picked(image, phase)[...] = layout.picked(whole, phase)
    return result


class Partial(Convert):
    """A conversion whose reference knows which phases are kept."""

    layout: Planes

    def reference(self, x, *_):
        return stored(super().reference(x), self.layout)


def conversion(kind: str, shape, layout: Planes, stride=(1, 1)) -> Convert:
    workload = Partial(kind, shape, stride)
    object.__setattr__(workload, "layout", layout)
    return workload


@QUICK
@given(n=batches, c=channels, h=sizes, w=sizes, halo=halos, threads=threads_, seed=seeds, data=st.data())
def test_import_to_planes(isa, n, c, h, w, halo, threads, seed, data):
    shape, arrange = (n, c, h, w), Arranger()
    layout = planes(shape, halo, *phases_(data.draw))
    y = arrange.put("y", shape, layout)
    case = arrange.case(conversion("import", shape, layout), [], y, external="input")
    check(case, isa, [values(shape, seed)], threads)


@QUICK
@given(
    n=batches,
    c=channels,
    h=sizes,
    w=sizes,
    before=halos,
    after=halos,
    threads=threads_,
    seed=seeds,
    data=st.data(),
    stride=st.sampled_from([(1, 1), (2, 2), (3, 2)]),
)
def test_planes_to_planes(isa, n, c, h, w, before, after, threads, seed, data, stride):
    shape, arrange = (n, c, h, w), Arranger()
    small = (n, c, -(-h // stride[0]), -(-w // stride[1]))
    layout = planes(small, after, *phases_(data.draw))
    x, y = arrange.put("x", shape, planes(shape, before)), arrange.put("y", small, layout)
    case = arrange.case(conversion("planes", shape, layout, stride), [x], y)
    check(case, isa, [values(shape, seed)], threads, slack=SLACK)  # whole vectors are read from the last row too


def test_shifted_planes_of_the_same_lanes(isa):
    """Each is one run of lanes, what stands between the rows of the source is left behind."""
    for shift in range(-4, 5):
        for n, h, w, halo in (
            (1, 7, 7, (0, 1, 4)),
            (2, 5, 11, (2, 0, 4)),
            (3, 1, 1, (0, 0, 0)),
            (1, 9, 33, (1, 3, 40)),
        ):
            shape, arrange = (n, 5, h, w), Arranger()
            layout = planes(shape, halo, (1, 1), ((0, shift),))
            x, y = arrange.put("x", shape, planes(shape, halo)), arrange.put("y", shape, layout)
            case = arrange.case(conversion("planes", shape, layout), [x], y)
            check(case, isa, [values(shape, shift + 9)], 1 + n % 2, slack=SLACK)


@QUICK
@given(n=batches, c=channels, h=sizes, w=sizes, halo=halos, threads=threads_, seed=seeds)
def test_export_and_flatten_of_planes(isa, n, c, h, w, halo, threads, seed):
    shape, arrange = (n, c, h, w), Arranger()
    x = arrange.put("x", shape, planes(shape, halo))
    check(arrange.case(Convert("export", shape), [x], None, external="output"), isa, [values(shape, seed)], threads)
    y = arrange.put("y", (n, c * h * w), Rows(n, c * h * w))
    check(arrange.case(Convert("flatten", shape), [x], y), isa, [values(shape, seed)], threads)


@QUICK
@given(n=batches, c=st.integers(1, 70), threads=threads_, seed=seeds)
def test_import_and_export_of_rows(isa, n, c, threads, seed):
    shape, arrange = (n, c), Arranger()
    x = arrange.put("x", shape, Rows(n, c))
    check(arrange.case(Convert("import", shape), [], x, external="input"), isa, [values(shape, seed)], threads)
    check(arrange.case(Convert("export", shape), [x], None, external="output"), isa, [values(shape, seed)], threads)


@QUICK
@given(n=batches, c=channels, h=sizes, w=sizes, halo=halos, threads=threads_)
def test_zeros(isa, n, c, h, w, halo, threads):
    shape, arrange = (n, c, h, w), Arranger()
    y = arrange.put("y", shape, planes(shape, halo, (2, 2)))
    check(arrange.case(Zeros(shape), [], y), isa, [], threads)


def test_values_that_are_not_numbers_pass_through_and_stay_out_of_halos(isa):
    shape, arrange = (1, 2, 5, 7), Arranger()
    x, y = arrange.put("x", shape, planes(shape)), arrange.put("y", shape, planes(shape))
    data = values(shape, 0)
    data[0, 0, 2, 3], data[0, 1, 4, 6] = np.nan, np.inf
    constants = {"scale": values(2, 1), "shift": values(2, 2)}
    check(arrange.case(Affine(shape, RELU6), [x], y, constants), isa, [data], 1)


def test_channels_of_several_buffers(isa):
    """The planes of a concatenation, in another order, as one operand."""
    shape, arrange = (1, 6, 4, 5), Arranger()
    layout = planes(shape)
    parts = [arrange.put(name, (1, 3, 4, 5), layout) for name in "ab"]
    offsets = np.concatenate([p.offsets for p in parts])[[4, 0, 2, 5, 1, 3]]
    x, y = Placed("x", shape, layout, offsets), arrange.put("y", shape, layout)
    constants = {"scale": values(6, 1), "shift": values(6, 2)}
    check(arrange.case(Affine(shape), [x], y, constants), isa, [values(shape, 0)], 2)
    z = arrange.put("z", (1, 6), Rows(1, 6))
    check(arrange.case(GlobalPool("max", *shape), [x], z), isa, [values(shape, 0)], 2)


def test_offsets_never_wrap():
    with pytest.raises(OverflowError):
        u32([2**32])
