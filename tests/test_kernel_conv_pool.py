"""A convolution and the max pool behind it in one kernel: the filters in exact numbers, and the call against both
definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated import INSTALLED, MISSING, RVV
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, label, machine_has, machines, need, run

from colonnade.kernels.ops import filtering
from colonnade.kernels.registry import candidates
from colonnade.layout import Planes
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, ConvPool, Epilogue, Pool2d
from colonnade.workload import filtering as minimal
from colonnade.workload.conv_pool import joinable

# as if every machine added beside its multiply-adds: products by pairs too, where there are kernels for them
MACHINE = machines()
NO_SHRINK = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]


@pytest.mark.parametrize(("m", "r"), minimal.POINTS)
def test_the_filters_are_exact(m, r):
    """A [(G w) * (B d)] is the correlation of d and w for every unit d and w."""
    a, b, g = minimal.outputs(m, r), minimal.inputs(m, r), minimal.weights(m, r)
    for tap in range(r):
        for pixel in range(minimal.size(m, r)):
            found = a @ (g[:, tap] * b[:, pixel])
            assert np.allclose(found, [pixel == i + tap for i in range(m)], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("m", "r"), minimal.POINTS)
def test_sums_that_are_shared_are_those_of_the_filters(m, r):
    """Every result of the programs that kernels are made of is its row of the matrix, for every unit vector."""
    for program, matrix in (
        (filtering.into(m, r), minimal.inputs(m, r)),
        (filtering.back(m, r), minimal.outputs(m, r)),
    ):
        for unit in range(minimal.size(m, r)):
            known = {f"x{i}": float(i == unit) for i in range(minimal.size(m, r))}
            for name, first, factor, second in program:
                known[name] = known[first] + factor * known[second]
            assert [known[f"y{i}"] for i in range(len(matrix))] == [row[unit] for row in matrix]


@st.composite
def stems(draw: st.DrawFn) -> ConvPool:
    stride = draw(st.sampled_from([(2, 2), (2, 2), (2, 1), (1, 1), (1, 2), (4, 4)]))
    r = draw(st.sampled_from([3, 4]))
    kernel = (draw(st.integers((r - 1) * stride[0] + 1, r * stride[0])), draw(st.integers(1, 8)))
    conv = Conv2d(
        batch=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 21)),
        height=draw(st.integers(1, 50)),
        width=draw(st.integers(1, 90)),
        kernel=kernel,
        stride=stride,
        padding=tuple(draw(st.integers(0, 3)) for _ in range(4)),
        epilogue=Epilogue(False, draw(st.sampled_from([NONE, RELU, RELU6, Activation(-0.5, 0.75)]))),
    )
    assume(conv.out_height > 0 and conv.out_width > 0)
    padding = tuple(draw(st.integers(0, 1)) for _ in range(4))
    shape = (conv.batch, conv.out_channels, conv.out_height, conv.out_width)
    pool = Pool2d("max", *shape, (3, 3), (2, 2), padding, ceil_mode=draw(st.booleans()))
    assume(pool.out_height > 0 and pool.out_width > 0)
    # as the importer leaves them: every window begins on the map, or in padding in front of it
    assume(all(pool.window(i, 0, conv.out_height)[0] for i in range(pool.out_height)))
    assume(all(pool.window(i, 1, conv.out_width)[0] for i in range(pool.out_width)))
    return ConvPool(conv, pool)


def case_of(work: ConvPool, seed: int, extra: int) -> tuple[Case, list[np.ndarray]]:
    """Planes with ``extra`` lanes and rows around them, on poisoned memory, and what is in the first."""
    conv, pool, place = work.conv, work.pool, Arranger()
    rng = np.random.default_rng(seed)
    read = Planes(conv.batch, conv.height, conv.width, conv.width + extra, conv.height + extra, extra)
    written = Planes(
        conv.batch, pool.out_height, pool.out_width, pool.out_width + extra, pool.out_height + extra, extra
    )
    x = place.put("x", (conv.batch, conv.in_channels, conv.height, conv.width), read)
    y = place.put("y", (conv.batch, conv.out_channels, pool.out_height, pool.out_width), written)
    weight = rng.standard_normal((conv.out_channels, conv.in_channels, *conv.kernel), np.float32) / np.sqrt(conv.k)
    constants = {"weight": weight.astype(np.float32), "bias": rng.standard_normal(conv.out_channels, np.float32)}
    return place.case(work, [x], y, constants), [rng.standard_normal(x.shape, np.float32)]


@pytest.mark.parametrize("isa", MACHINE, ids=label)
@given(work=stems(), seed=st.integers(0, 2**31), extra=st.integers(0, 3), data=st.data())
@settings(max_examples=30, deadline=None, phases=NO_SHRINK)
def test_it_equals_the_definitions(isa, work, seed, extra, data):
    case, inputs = case_of(work, seed, extra)
    case = replace(case, rms=1.0)
    assert joinable(work.conv, work.pool)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = candidates(case, isa, threads)
    run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=2e-4)


STEMS = [
    ConvPool(
        Conv2d(1, 3, 64, 64, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=Epilogue(False, RELU)),
        Pool2d("max", 1, 64, 32, 32, (3, 3), (2, 2), (1, 1, 1, 1)),
    ),
    ConvPool(
        Conv2d(2, 3, 10, 43, 75, (5, 5), (2, 2), (2, 1, 0, 2), epilogue=Epilogue(False, RELU6)),
        Pool2d("max", 2, 10, 21, 37, (3, 3), (2, 2), ceil_mode=True),
    ),
]


@pytest.mark.skipif(not INSTALLED, reason=MISSING)
@pytest.mark.parametrize("name", [row.label for row in RVV])
@pytest.mark.parametrize("work", STEMS, ids=["7x7", "5x5"])
def test_it_equals_the_definitions_on_rvv(name, work):
    isa = need(name)
    case, inputs = case_of(work, 5, 1)
    for candidate in candidates(case, isa, 1):
        run(case, candidate, isa, inputs, threads=2, tolerance=2e-4)


@pytest.mark.skipif(not machine_has("avx512"), reason="pairs of columns need vectors of 16 lanes")
@pytest.mark.parametrize("broadcasts", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1 / 32, 1.0, 8.0, 1e3])
def test_pairs_of_columns_stay_accurate(size, broadcasts):
    """Inputs larger and smaller than the sample that the kernel was bound for: as usual, or as accurate."""
    isa = replace(need("avx512"), adders=True, broadcasts=broadcasts)
    case, inputs = case_of(STEMS[0], 3, 0)
    case = replace(case, rms=1.0, constants={**case.constants, "bias": np.zeros(64, np.float32)})
    found = [c for c in candidates(case, isa, 1) if "pairpool" in c.kernel]
    assert found
    for candidate in found:
        run(case, candidate, isa, [inputs[0] * np.float32(size)], tolerance=5e-5)
