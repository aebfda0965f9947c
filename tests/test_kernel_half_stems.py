"""Stems with their pool in float16: plain sums of rounded pixels, every VLEN, and which of them are so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, run
from models import Builder
from test_kernel_conv_pool import NO_SHRINK, STEMS, case_of, stems
from test_kernel_half import MACHINE, POISON, ROUNDED, half

from colonnade.frontend import imported
from colonnade.kernels.registry import candidates
from colonnade.plan import Step
from colonnade.workload import NONE, RELU, Conv2d, ConvPool, Pool2d, Precision
from colonnade.workload.conv_pool import joinable


def halved(case: Case, external: bool = False) -> Case:
    """The case with its output and constants in float16; ``external``: it reads the user's array."""
    arranger = Arranger()
    x, y = case.inputs[0], case.output
    assert y is not None
    inputs = [] if external else [arranger.put("x", x.shape, x.layout)]
    constants = {role: array.astype(np.float16).astype(np.float32) for role, array in case.constants.items()}
    y = arranger.put("y", y.shape, half(y.layout))
    return arranger.case(case.workload, inputs, y, constants, "x" if external else "")


def check(case: Case, isa, x: np.ndarray, threads: int) -> np.ndarray:
    """The kernel, whose sums are rounded at every step; ReLU may cut off all that could be compared with them."""
    (candidate,) = candidates(case, isa, threads)
    assert candidate.kernel.startswith("f16_convpool")
    work = case.workload
    tolerance = 2 * ROUNDED * (3 + np.sqrt(work.conv.k))
    return run(case, candidate, isa, [x], threads, POISON, tolerance, magnitude=3.0)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    work=stems(), seed=st.integers(0, 2**31), extra=st.integers(0, 3), external=st.booleans(), threads=st.integers(1, 3)
)
@settings(max_examples=60, deadline=None, phases=NO_SHRINK)
def test_it_equals_the_definitions(isa, work, seed, extra, external, threads):
    case, (x,) = case_of(work, seed, extra)
    check(halved(case, external), isa, x, threads)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("work", STEMS, ids=["7x7", "5x5"])
@pytest.mark.parametrize("activation", [None, NONE], ids=["limits", "none"])
def test_bands_and_blocks(isa, work, activation):
    """Several bands, the last one of fewer rows, whole and partial blocks; the same numbers for all threads."""
    if activation is not None:
        conv = replace(work.conv, epilogue=replace(work.conv.epilogue, activation=activation))
        work = replace(work, conv=conv)
    case, (x,) = case_of(work, 5, 1)
    case = halved(case, external=True)
    first = check(case, isa, x, 1)
    for threads in (2, 3):
        np.testing.assert_array_equal(check(case, isa, x, threads), first)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(2, 7, (2, 8)), (7, 3, (1, 8)), (1, 7, (2, 8))])
def test_columns_that_nobody_reads(isa, channels, kernel, stride):
    """A kernel of one column takes one phase of eight; the others stand where nothing else does."""
    conv = Conv2d(1, channels, 5, 60, 640, (kernel, 1), stride, (kernel // 2, 0, kernel // 2, 0))
    pool = Pool2d("max", 1, 5, conv.out_height, conv.out_width, (3, 3), (2, 2), (1, 1, 1, 1))
    assert joinable(conv, pool)
    case, (x,) = case_of(ConvPool(conv, pool), 2, 0)
    check(halved(case), isa, x, 2)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("work", STEMS, ids=["7x7", "5x5"])
def test_infinity_reaches_what_reads_it(isa, work):
    """And nothing else: no product has a lane between rows."""
    case, (x,) = case_of(work, 3, 0)
    x[0, 1, 20, 33], x[0, 0, -1, 0], x[0, 2, 0, -1] = np.inf, -np.inf, np.inf
    found = check(halved(case), isa, x, 1)
    if work.conv.epilogue.activation == RELU:
        assert 0 < np.isinf(found).mean() < 0.05


def plan_of(tmp_path, change: float = 1.0, before: bool = False) -> list[Step]:
    """Steps of a stem and a convolution; ``before``: a convolution stands in front, too."""
    made = Builder(7)
    x = made.input("x", (1, 3, 40, 48))
    if before:
        x = made.op("Relu", made.conv(x, 3, 3, 3, pads=(1, 1, 1, 1)))
    y = made.op("Conv", x, made.random(16, 3, 7, 7, scale=change), pads=[3] * 4, strides=[2, 2])
    y = made.op("MaxPool", made.op("Relu", y), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    onnx.save(made.build(made.conv(y, 16, 8, 3, pads=(1, 1, 1, 1))), tmp_path / "model.onnx")
    return list(imported(tmp_path / "model.onnx").arrange(half=()).plan().steps)


def sizes(steps: list[Step]) -> list[int]:
    """Bytes of an element of what stems write."""
    return [s.output.layout.itemsize for s in steps if isinstance(s.workload, ConvPool) and s.output is not None]


def test_stems_read_the_users_array(tmp_path):
    """And write float16, which nobody converts."""
    steps = plan_of(tmp_path)
    assert sizes(steps) == [2] and steps[0].external == "x" and isinstance(steps[0].workload, ConvPool)
    assert [s.workload.itemsize for s in steps if isinstance(s.workload, Precision)] in ([], [4])  # the answer


def test_stems_whose_weights_float16_cannot_hold_stay_as_they_are(tmp_path):
    assert sizes(plan_of(tmp_path, 1e-7)) == [4]


def test_stems_behind_a_convolution_read_float32(tmp_path):
    steps = plan_of(tmp_path, before=True)
    at = next(i for i, s in enumerate(steps) if isinstance(s.workload, ConvPool))
    assert sizes(steps) == [2] and steps[at].inputs[0].layout.itemsize == 4
