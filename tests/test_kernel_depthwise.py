"""Depthwise kernels against their definition: any kernel, stride, dilation and multiplier, on every ISA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from convolutions import FUNCTIONS, LIMITS, operands
from emulated import INSTALLED, MISSING, RVV
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_harness import Case, machine_has, run

from colonnade.kernels.isa import ISAS
from colonnade.kernels.ops import depthwise
from colonnade.kernels.registry import Candidate, candidates
from colonnade.workload import NONE, RELU6, Activation, Conv2d, Epilogue

TOLERANCE = 2e-5  # of the largest magnitude
MACHINE = [
    *(pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


@st.composite
def depthwise_convs(draw: st.DrawFn) -> Conv2d:
    """Depthwise convolutions with one to three outputs a channel that have an output."""
    channels = draw(st.integers(2, 20))
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (draw(st.integers(1, 8)), draw(st.integers(1, 8)))]))
    pads = [draw(st.integers(0, kernel[i % 2])) for i in range(4)]
    conv = Conv2d(
        batch=draw(st.sampled_from([1, 1, 2, 3])),
        in_channels=channels,
        out_channels=channels * draw(st.sampled_from([1, 1, 2, 3])),
        height=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 70)),
        kernel=kernel,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=(pads[0], pads[1], pads[2], pads[3]),
        dilation=draw(st.sampled_from([(1, 1), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))])),
        groups=channels,
        epilogue=Epilogue(draw(st.booleans()), draw(st.sampled_from(LIMITS + FUNCTIONS))),
    )
    assume(conv.out_height > 0 and conv.out_width > 0 and conv.macs <= 1_000_000)
    return conv


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=depthwise_convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_depthwise_convolution_equals_its_definition(isa, conv, seed, extra, data):
    call, inputs = operands(conv, None, seed, extra)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(call, isa, threads) if "dwconv" in c.kernel]
    run(call, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=depthwise_convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_stride_of_two_reads_planes_as_they_stand(isa, conv, seed, extra, data):
    """Of any size; behind the slack that vectors may read lies a page nobody may touch."""
    conv = replace(conv, stride=(2, 2))
    assume(conv.out_height > 0 and conv.out_width > 0)
    call, inputs = operands(conv, None, seed, extra, plain=True)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(call, isa, threads) if depthwise.strided(c.kernel)]
    run(call, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize(
    "size, taps, stride",
    [
        (7, 3, 1),
        (23, 3, 1),
        (65, 3, 1),
        (15, 3, 2),
        (91, 3, 2),
        (130, 3, 2),
        (39, 5, 1),
        (29, 5, 2),
        (121, 5, 2),
        (126, 4, 2),
    ],
)
def test_every_depthwise_kernel_of_the_library(isa, size, taps, stride):
    """Each (R, NV), with blocks of rows and strips that do not come out even; windows where kernels know them."""
    pad = (taps // 2,) * 4
    conv = Conv2d(2, 5, 5, size, size, (taps,) * 2, (stride,) * 2, pad, groups=5, epilogue=Epilogue(True, RELU6))
    call, inputs = operands(conv, None, seed=3, plain=True)
    found = [c for c in candidates(call, isa, 2) if "dwconv" in c.kernel]
    known = [v for v in depthwise.variants(isa) if v.params["S"] == stride and v.symbol.startswith(isa.prefix)]
    window = max(v.params["WINDOW"] for v in known if v.params["WINDOW"] in (0, taps))
    assert {c.kernel for c in found} == {v.symbol for v in known if v.params["WINDOW"] == window}
    for candidate in found:
        run(call, candidate, isa, inputs, threads=2, tolerance=TOLERANCE)


def blocks(taps: int, stride: int) -> Iterator[tuple[Conv2d, int, int]]:
    """(layer, R, NV) for every kernel of windows of scalable vectors: one block and several, lower ones, some of each,
    functions for a few blocks at a time; limits of all kinds."""
    silu, bounds = FUNCTIONS[0], Activation(-0.75, -0.25)
    for rows, nv in depthwise._shapes(RVV[0], stride, taps):
        for height, width, residual, limits in [
            (rows, 7, True, silu), (2 * rows, 31, False, RELU6), (4 if rows > 4 else 2, 17, True, NONE),
            (rows + 3, 40, False, bounds), (rows + 3, 9, True, silu), (9 * rows + 1, 70, True, silu),
            (3 * rows, 100, False, NONE),
        ]:  # fmt: skip
            epilogue = Epilogue(residual, limits)
            size = (height * stride, width * stride - stride // 2)
            yield (
                Conv2d(1, 5, 5, *size, (taps,) * 2, (stride,) * 2, (taps // 2,) * 4, groups=5, epilogue=epilogue),
                rows,
                nv,
            )


def mine(case: Case, isa, rows: int, nv: int) -> Candidate:
    """The candidate with blocks of ``rows`` rows and groups of ``nv`` registers."""
    (found,) = [c for c in candidates(case, isa, 2) if depthwise.known(c.kernel) and f"_{rows}x{nv}v_" in c.kernel]
    return found


@pytest.mark.parametrize("isa", MACHINE[-len(RVV) :])
@pytest.mark.parametrize("taps", depthwise.WINDOWS)
@pytest.mark.parametrize("stride", [1, 2])
def test_windows_in_blocks_of_any_height(isa, taps, stride):
    for conv, rows, nv in blocks(taps, stride):
        case, inputs = operands(conv, None, seed=7, extra=rows % 2, plain=True)
        run(case, mine(case, isa, rows, nv), isa, inputs, threads=2, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", depthwise.WINDOWS)
def test_a_value_that_is_no_number_reaches_the_output_and_no_halo(isa, stride, taps):
    pads = (taps // 2,) * 4
    conv = Conv2d(1, 4, 4, 13, 29, (taps,) * 2, (stride,) * 2, pads, groups=4, epilogue=Epilogue(False, RELU6))
    case, (x,) = operands(conv, None, seed=5, plain=True)
    x[0, :, 2, 28], x[0, 1, 5, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        for candidate in candidates(case, isa, 1):
            if depthwise.known(candidate.kernel):
                assert np.isnan(run(case, candidate, isa, [x], tolerance=TOLERANCE)).any()


def test_lines_hold_every_tap_once():
    conv = Conv2d(1, 4, 4, 30, 30, (7, 5), (2, 3), (3, 2, 3, 2), (2, 1), groups=4)
    taps = [tap for line in depthwise._lines(conv, conv.stride) for tap in line.taps]
    assert sorted(taps) == [(i, j) for i in range(7) for j in range(5)]


def test_a_depthwise_layer_still_has_the_gathering_kernels_to_be_measured_against():
    conv = Conv2d(1, 4, 4, 9, 9, (3, 3), padding=(1, 1, 1, 1), groups=4)
    call, _ = operands(conv, None, seed=0)
    assert {c.kernel.split("_")[1] for c in candidates(call, ISAS[0], 1)} == {"dwconv", "spconv"}
    assert candidates(call, ISAS[0], 1)[0].kernel.startswith("f32_dwconv")
