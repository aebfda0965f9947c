"""Planes whose lanes are tokens: every kernel against its numpy definition, on every ISA of this machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import NAMES, Arranger, check, need, run, values

from colonnade.frontend.tokens import row_major
from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.layout import Placed, Planes, Rows
from colonnade.workload import ChannelNorm, ChannelSoftmax, Constant, PlaneProduct, Reorder, digest

FEW = settings(max_examples=25, deadline=None)
threads_ = st.integers(1, 3)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=NAMES)
def isa(request: pytest.FixtureRequest) -> Isa:
    return need(request.param)


def planes(arrange: Arranger, name: str, shape, halo=(2, 1, 5)) -> Placed:
    n, _, h, w = shape
    return arrange.put(name, shape, Planes(n, h, w, w + halo[0], h + halo[1], halo[2]))


halos = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 9))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 90))


@FEW
@given(shape=shapes, halo=halos, centred=st.booleans(), threads=threads_, seed=seeds)
def test_channel_norm(isa, shape, halo, centred, threads, seed):
    arrange = Arranger()
    x, y = planes(arrange, "x", shape, halo), planes(arrange, "y", shape, halo)
    constants = {"scale": values(shape[1], seed), "shift": values(shape[1], seed + 1)}
    # a mean far from zero, and channels that differ by more than their last digits
    data = values(shape, seed + 2) + 10 + 4 * (np.arange(shape[1]) % 2)[:, None, None].astype(np.float32)
    # where the channels of a token happen to lie close together, what is left of them has lost digits
    spread = np.sqrt(data.var(axis=1) + 1e-5).min() if centred else 1.0
    lost = 4 * np.finfo(np.float32).eps * np.abs(data).max() / spread
    check(arrange.case(ChannelNorm(shape, 1e-5, centred), [x], y, constants), isa, [data], threads, max(2e-5, lost))


@FEW
@given(shape=shapes, halo=halos, groups=st.integers(1, 3), threads=threads_, seed=seeds)
def test_channel_softmax(isa, shape, halo, groups, threads, seed):
    n, c, h, w = shape
    shape = (n, c * groups, h, w)
    arrange = Arranger()
    x, y = planes(arrange, "x", shape, halo), planes(arrange, "y", shape, halo)
    check(arrange.case(ChannelSoftmax(shape, groups), [x], y), isa, [values(shape, seed) * 20], threads, 5e-6)


def test_masked_tokens_weigh_nothing(isa):
    """What a mask adds (-inf, or the least number) leaves no weight and no NaN."""
    arrange = Arranger()
    shape = (1, 6, 1, 21)
    x, y = planes(arrange, "x", shape), planes(arrange, "y", shape)
    data = values(shape, 0)
    data[:, 1], data[:, 4] = -np.inf, np.finfo(np.float32).min
    case = arrange.case(ChannelSoftmax(shape, 1), [x], y)
    done = run(case, registry.candidates(case, isa, 1)[0], isa, [data], 1)
    assert not done[:, (1, 4)].any() and np.allclose(done.sum(1), 1)


@FEW
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), rows=st.integers(1, 14), inner=st.integers(1, 20),
    pixels=st.integers(1, 70), across=st.booleans(), halo=halos, threads=threads_, seed=seeds,
)  # fmt: skip
def test_plane_product(isa, batch, groups, rows, inner, pixels, across, halo, threads, seed):
    work = PlaneProduct(batch, groups, rows, inner, pixels, across, 0.5)
    arrange = Arranger()
    x = planes(arrange, "x", (batch, groups * inner, 1, pixels))
    given_by = (batch, groups * rows, 1, inner) if across else (batch, groups * inner, 1, rows)
    a = planes(arrange, "a", given_by, (1, 0, 0))
    y = planes(arrange, "y", (batch, groups * rows, 1, pixels), halo)
    check(arrange.case(work, [x, a], y), isa, [values(x.shape, seed), values(a.shape, seed + 1)], threads, 1e-5)


def test_planes_of_a_product_must_be_equally_far_apart(isa):
    arrange = Arranger()
    work = PlaneProduct(1, 1, 2, 3, 9, False)
    x, a = planes(arrange, "x", (1, 3, 1, 9)), planes(arrange, "a", (1, 3, 1, 2))
    y = planes(arrange, "y", (1, 2, 1, 9))
    odd = Placed(x.name, x.shape, x.layout, x.offsets[[0, 2, 1]])
    case = arrange.case(work, [odd, a], y)
    with pytest.raises(ValueError, match="equally far apart"):
        registry.bind(case, registry.candidates(case, isa, 1)[0])


@FEW
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 20)),
    order=st.permutations([0, 1, 2, 3]), halo=halos, mixed=st.booleans(), threads=threads_, seed=seeds,
)  # fmt: skip
def test_planes_to_rows_and_back_in_any_order(isa, shape, order, halo, mixed, threads, seed):
    tables = [np.arange(d) * s for d, s in zip(shape, row_major(shape), strict=True)]
    moved = [tables[i] for i in order]
    target = tuple(shape[i] for i in order)
    arrange = Arranger()
    x = planes(arrange, "x", shape, halo)
    if mixed:  # planes in another order than memory's
        x = Placed(x.name, x.shape, x.layout, np.random.default_rng(seed).permutation(x.offsets))
    y = arrange.put("y", (target[0], int(np.prod(target[1:]))), Rows(target[0], int(np.prod(target[1:]))))
    constants = {f"axis{i}": t for i, t in enumerate(moved)}
    case = arrange.case(Reorder(shape, target, digest(moved)), [x], y, constants)
    check(case, isa, [values(shape, seed)], threads)
    back = [np.arange(d) * row_major(target)[order.index(i)] for i, d in enumerate(shape)]
    arrange = Arranger()
    y = arrange.put("y", (target[0], int(np.prod(target[1:]))), Rows(target[0], int(np.prod(target[1:]))))
    z = planes(arrange, "z", shape, halo)
    constants = {f"axis{i}": t for i, t in enumerate(back)}
    case = arrange.case(Reorder(target, shape, digest(back)), [y], z, constants)
    check(case, isa, [values(y.shape, seed)], threads)


def test_constants_in_planes(isa):
    arrange = Arranger()
    shape = (2, 3, 2, 9)
    y = planes(arrange, "y", shape)
    case = arrange.case(Constant(shape), [], y, {"value": values(shape, 0)})
    run(case, registry.candidates(case, isa, 1)[0], isa, [], 2, slack=0)
