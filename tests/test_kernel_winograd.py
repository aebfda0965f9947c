"""Winograd candidates: the transforms in exact numbers, and the three calls against the definition."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from convolutions import operands
from emulated import INSTALLED, MISSING, RVV
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_harness import label, machines, need, run
from test_kernel_panels import case_of

from colonnade.kernels.isa import ISAS, isa
from colonnade.kernels.ops import filtering, winograd, winograd_rows
from colonnade.kernels.registry import candidates
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, Epilogue, WinogradConv2d
from colonnade.workload.winograd import SIZES, matrices, transform

# as if every machine added beside its multiply-adds: products by pairs too, where there are kernels for them
MACHINE = machines()
NO_SHRINK = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_are_exact(m):
    """Aᵀ((G g) ∘ (B d)) is the correlation of d and g for every unit d and g, in fractions."""

    def exact(rows):
        return [[Fraction(x).limit_denominator(24) for x in row] for row in rows]

    a, b, g = (exact(matrices(m)[at]) for at in (2, 0, 1))
    for tap in range(3):
        for pixel in range(m + 2):
            products = [b[k][pixel] * g[k][tap] for k in range(m + 2)]
            outputs = [sum(a[i][k] * products[k] for k in range(m + 2)) for i in range(m)]
            assert outputs == [int(pixel == i + tap) for i in range(m)]


@pytest.mark.parametrize("m", [2, 4])
def test_sums_that_are_shared_are_those_of_the_transforms(m):
    """Every result of the programs that kernels are made of is its row of the matrix, for every unit vector."""
    for program, matrix in ((filtering.into(m, 3), matrices(m)[0]), (filtering.back(m, 3), matrices(m)[2])):
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


@st.composite
def pruned(draw: st.DrawFn) -> tuple[WinogradConv2d, ColumnPattern | None]:
    """Of any number of channels, with tiles of any height."""
    conv = draw(convs())
    fields = {field.name: getattr(conv, field.name) for field in dataclasses.fields(conv)}
    channels = {name: draw(st.integers(1, 40)) for name in ("in_channels", "out_channels")}
    patterns = [None, *(ColumnPattern(s, tile=t) for s, t in ((0.3, 8), (0.5, 2), (0.6, 4), (0.75, 8), (0.97, 16)))]
    return WinogradConv2d(**{**fields, **channels}, m=draw(st.sampled_from(list(SIZES.values())))), draw(
        st.sampled_from(patterns)
    )


EVERYWHERE = [
    *(pytest.param(row, id=label(row)) for row in MACHINE),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


@pytest.mark.parametrize("m", SIZES.values(), ids=SIZES)
def test_transformed_weights_give_the_convolution(m):
    """The definition by itself, on sizes that tiles do not divide, with every side padded differently."""
    rng = np.random.default_rng(m[1])
    plain = Conv2d(2, 3, 5, 7, 10, (3, 3), padding=(1, 0, 2, 1))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 7, 10), (5, 3, 3, 3)))
    found = WinogradConv2d(**fields, m=m).reference(x, transform(w, m))
    assert np.allclose(found, plain.reference(x, w), atol=1e-4)


@pytest.mark.parametrize("isa", EVERYWHERE)
@given(drawn=pruned(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=25, deadline=None, phases=NO_SHRINK)
def test_pruned_behind_the_transform(isa, drawn, seed, extra, data):
    """Every candidate equals the definition; planes and panels, residuals in either."""
    conv, pattern = drawn
    vectors, which = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([(0, 0), (1, 0), (1, 1), (0, 1)]))
    conv = replace(conv, epilogue=replace(conv.epilogue, residual=True)) if which[1] else conv
    case, inputs = case_of(conv, pattern, seed, (0, *(vectors * on for on in which)), extra)
    case = replace(case, rms=1.0)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    candidate = data.draw(st.sampled_from(candidates(case, isa, threads)))
    run(case, candidate, isa, inputs, threads=threads, tolerance=2e-4)


def in_bands(isa, drawn, m, tallest, params, seed, data):
    """A candidate of tiles ``m`` that has them, with these ``params``: over the ends of images, shared by threads."""
    conv, pattern = replace(drawn[0], m=m, height=data.draw(st.integers(1, tallest))), drawn[1]
    into = data.draw(st.sampled_from([0, 1, 2]))
    conv = replace(conv, epilogue=replace(conv.epilogue, residual=data.draw(st.booleans())))
    case, inputs = case_of(conv, pattern, seed, (0, into, into), data.draw(st.integers(0, 2)))
    case = replace(case, rms=1.0)
    found = data.draw(st.sampled_from([c for c in candidates(case, isa, 1) if params.keys() <= c.params.keys()]))
    candidate = replace(found, params={**found.params, **params})
    run(case, candidate, isa, inputs, threads=data.draw(st.sampled_from([1, 2, 3])), tolerance=2e-4)


@pytest.mark.parametrize("isa", EVERYWHERE)
@given(drawn=pruned(), rows=st.integers(0, 4), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=20, deadline=None, phases=NO_SHRINK)
def test_down_columns_in_bands(isa, drawn, rows, seed, data):
    """Any number of rows of tiles at a time, the last band shorter."""
    in_bands(isa, drawn, (4, 1), 60, {"rows": rows}, seed, data)


@pytest.mark.parametrize("isa", [row for row in EVERYWHERE if row.values[0].scalable])
@given(drawn=pruned(), band=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=20, deadline=None, phases=NO_SHRINK)
def test_row_by_row_of_positions(isa, drawn, band, seed, data):
    """Any number of rows of tiles at a time, rows longer than registers."""
    in_bands(isa, drawn, (2, 2), 24, {"band": band}, seed, data)


def test_what_stands_in_memory_between_calls():
    """A band's positions of one row, what is kept of the rows before, and no more, whatever the map's height."""
    row = isa("rvv")
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        conv = WinogradConv2d(1, channels, channels, size, size, (3, 3), padding=(1, 1, 1, 1), m=(2, 2))
        case, _ = operands(conv, ColumnPattern(0.75, 8), 0)
        found = [c for c in candidates(case, row, 1) if "band" in c.params and "8x2" in c.kernel]
        assert len(found) == 2
        for candidate, near in zip(sorted(found, key=lambda c: c.params["band"]), winograd_rows.NEAR, strict=True):
            band, calls = candidate.params["band"], winograd.bind(case, candidate)
            rows = (size + 1) // 2
            bands = -(-rows // band)
            assert len(calls) == 12 * bands and [c.fields["band"] for c in calls[::12]][:-1] == [band] * (bands - 1)
            assert band * rows * (4 + 4 + 4) * channels * 4 <= near
            assert {call.shared for call in calls} == {calls[0].shared}


def test_how_many_rows_pass_together():
    """Bands as even as can be within a room, and all of them at once between calls that share it."""
    conv = WinogradConv2d(1, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1), m=(4, 1))
    case, _ = operands(conv, ColumnPattern(0.75, 8), 0)
    found = candidates(case, ISAS[0], 1)
    assert {c.params["rows"] for c in found} == {0, 1, 2}
    for candidate in found:
        rows, calls = candidate.params["rows"], winograd.bind(case, candidate)
        assert len(calls) == (1 if rows else 3)
        assert calls[0].fields["band"] == (rows or 14)


def test_small_maps_pass_in_one_call():
    """On RISC-V all rows of a map at once where that is little, and by one thread: its weights come once."""
    row = isa("rvv")
    for size, channels, whole in ((56, 64, 0), (14, 256, 4), (7, 512, 2)):
        conv = WinogradConv2d(1, channels, channels, size, size, (3, 3), padding=(1, 1, 1, 1), m=(4, 1))
        case, _ = operands(conv, ColumnPattern(0.75, 8), 0)
        one, two = ({c.params["rows"]: c for c in candidates(case, row, threads)} for threads in (1, 2))
        rows = -(-size // 4)
        assert (rows in one) == bool(whole)
        if whole:
            assert rows == whole and len(winograd.bind(case, one[rows])) == 1
        if size == 14:
            assert rows not in two


def test_a_tile_computes_the_columns_that_it_keeps():
    """A quarter of the weights is a quarter of the products' work, and a position of which a tile keeps nothing costs
    one column."""
    conv = WinogradConv2d(1, 16, 16, 8, 8, (3, 3), padding=(1, 1, 1, 1), m=(2, 2))
    case, _ = operands(conv, None, 0)
    weight = np.array(case.constants["weight"])
    weight[:8, 4:], weight[8:, :, 0, 0] = 0, 0
    case = replace(case, constants={**case.constants, "weight": weight})
    candidate = next(c for c in candidates(case, ISAS[0], 1) if "8x" in c.kernel)
    tiles = winograd.bind(case, candidate)[1].fields["tiles"].data[: 2 * 16]
    assert tiles["columns"].tolist() == [4, 1] + [4, 16] * 15


@pytest.mark.parametrize("isa", MACHINE, ids=label)
@given(conv=convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=40, deadline=None, phases=NO_SHRINK)
def test_winograd_equals_the_definition(isa, conv, seed, extra, data):
    case, inputs = operands(conv, data.draw(st.sampled_from([None, ColumnPattern(0.25, 8)])), seed, extra)
    case = replace(case, rms=1.0)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(case, isa, threads) if "winograd" in c.params]
    run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=2e-4)


@pytest.mark.parametrize("isa", EVERYWHERE)
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
