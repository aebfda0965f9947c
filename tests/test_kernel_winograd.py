"""Winograd candidates: the transforms in exact numbers, and the three calls against the definition."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from convolutions import operands
from emulated import INSTALLED, MISSING, RVV
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_harness import machine_has, need, run
from test_kernel_panels import case_of

from colonnade.kernels.isa import ISAS
from colonnade.kernels.ops import winograd
from colonnade.kernels.registry import candidates
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, Epilogue

# as if every machine added beside its multiply-adds: products by pairs too, where there are kernels for them
MACHINE = [replace(row, adders=True) for row in ISAS if machine_has(row.name)]
NO_SHRINK = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_are_exact(m):
    """Aᵀ((G g) ∘ (B d)) is the correlation of d and g for every unit d and g, in fractions."""

    def exact(rows):
        return [[Fraction(x).limit_denominator(24) for x in row] for row in rows]

    a, b, g = exact(winograd.A[m]), exact(winograd.B[m]), exact(winograd.G[m])
    for tap in range(3):
        for pixel in range(m + 2):
            products = [b[k][pixel] * g[k][tap] for k in range(m + 2)]
            outputs = [sum(a[i][k] * products[k] for k in range(m + 2)) for i in range(m)]
            assert outputs == [int(pixel == i + tap) for i in range(m)]


@pytest.mark.parametrize("m", [2, 4])
def test_sums_that_are_shared_are_those_of_the_transforms(m):
    """Every result of the programs that kernels are made of is its row of the matrix, for every unit vector."""
    for program, matrix in ((winograd.INTO[m], winograd.B[m]), (winograd.BACK[m], winograd.A[m])):
        for unit in range(m + 2):
            known = {f"x{i}": int(i == unit) for i in range(m + 2)}
            for name, first, factor, second in program:
                known[name] = known[first] + factor * known[second]
            assert [known[f"y{i}"] for i in range(len(matrix))] == [row[unit] for row in matrix]


@st.composite
def convs(draw: st.DrawFn) -> Conv2d:
    return Conv2d(
        batch=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(8, 24)),
        out_channels=draw(st.integers(8, 40)),
        height=draw(st.integers(1, 30)),
        width=draw(st.integers(2, 40)),
        kernel=(3, 3),
        padding=tuple(draw(st.integers(1, 2)) for _ in range(4)),
        epilogue=Epilogue(draw(st.booleans()), draw(st.sampled_from([NONE, RELU, RELU6]))),
    )


@pytest.mark.parametrize("isa", MACHINE, ids=lambda i: i.name)
@given(conv=convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=40, deadline=None, phases=NO_SHRINK)
def test_winograd_equals_the_definition(isa, conv, seed, extra, data):
    case, inputs = operands(conv, data.draw(st.sampled_from([None, ColumnPattern(0.25, 8)])), seed, extra)
    case = replace(case, rms=1.0)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(case, isa, threads) if "winograd" in c.params]
    run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=2e-4)


@pytest.mark.parametrize(
    "isa",
    [
        *(pytest.param(row, id=row.name) for row in MACHINE),
        *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
    ],
)
@given(conv=convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=12, deadline=None, phases=NO_SHRINK)
def test_into_panels(isa, conv, seed, extra, data):
    """The output in panels, the residual in panels or planes, and the other way round."""
    vectors, which = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([(1, 0), (1, 1), (0, 1)]))
    conv = replace(conv, epilogue=replace(conv.epilogue, residual=True)) if which[1] else conv
    case, inputs = case_of(conv, None, seed, (0, *(vectors * on for on in which)), extra)
    case = replace(case, rms=1.0)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(case, isa, threads) if "winograd" in c.params]
    run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=2e-4)


def test_only_where_it_fits():
    yes = Conv2d(1, 16, 16, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    assert any("winograd" in c.params for c in candidates(operands(yes, None, 0)[0], ISAS[0], 1))
    for no in (
        Conv2d(1, 16, 16, 9, 9, (1, 1)),
        Conv2d(1, 16, 16, 9, 9, (3, 3), stride=(2, 2)),
        Conv2d(1, 16, 16, 9, 9, (3, 3), dilation=(2, 2)),
        Conv2d(1, 16, 16, 9, 9, (3, 3), groups=2),
        replace(yes, epilogue=Epilogue(False, Activation(low=0.5, high=2.0))),  # halos would not stay zero
    ):
        assert not any("winograd" in c.params for c in candidates(operands(no, None, 0)[0], ISAS[0], 1))


def test_without_records_the_direct_convolution_is_chosen():
    conv = Conv2d(1, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))
    assert "winograd" not in candidates(operands(conv, None, 0)[0], ISAS[0], 1)[0].params


@pytest.mark.parametrize("name", ["rvv-128", "rvv-512"])
def test_on_vectors_of_any_length(name):
    """Rows of tiles shorter and longer than a vector, several images, bands of several rows, both sizes of tiles."""
    isa = need(name)
    for index, (batch, height, width) in enumerate([(2, 9, 13), (1, 5, 70), (1, 31, 17)]):
        conv = Conv2d(
            batch,
            8,
            9,
            height,
            width,
            (3, 3),
            padding=(1, 1, 1, 1),
            epilogue=Epilogue(index == 1, (NONE, RELU6)[index % 2]),
        )
        case, inputs = operands(conv, None, seed=index, extra=index)
        found = [c for c in candidates(case, isa, 1) if "winograd" in c.params]
        for m in (2, 4):
            run(case, next(c for c in found if c.params["winograd"] == m), isa, inputs, tolerance=2e-4)
