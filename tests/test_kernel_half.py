"""Convolutions of float16 against their numpy definition: feeds, odd shapes, tails, poisoned memory, every VLEN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from convolutions import convs, operands, patterns
from emulated import HALF
from half import MISSING, emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, run
from test_kernel_panels import case_of, pointwise
from test_kernel_windows import windowed

from colonnade.kernels.ops import then
from colonnade.kernels.registry import Candidate, candidates
from colonnade.layout import Layout, Panels, Rows
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, Conv2d, Epilogue

MACHINE = [pytest.param(row, id=row.label, marks=pytest.mark.skipif(not emulator(), reason=MISSING)) for row in HALF]
POISON = float(np.array([0x7E00, 0x7E00], np.uint16).view(np.float32)[0])  # two NaN of 16 bits
ROUNDED = 2.0**-11  # relative error of a float16


def half(layout: Layout) -> Layout:
    """The same lanes in float16."""
    assert not isinstance(layout, Rows)
    return replace(layout, planes=half(layout.planes)) if isinstance(layout, Panels) else replace(layout, itemsize=2)


def halved(case: Case, inputs: list[np.ndarray]) -> tuple[Case, list[np.ndarray]]:
    """The case with all tensors and constants in float16."""
    arranger = Arranger()
    placed = [arranger.put(t.name, t.shape, half(t.layout)) for t in (*case.inputs, case.output)]
    constants = {role: array.astype(np.float16).astype(np.float32) for role, array in case.constants.items()}
    made = arranger.case(case.workload, placed[:-1], placed[-1], constants)
    return made, [x.astype(np.float16).astype(np.float32) for x in inputs]


def check(case: Case, inputs: list[np.ndarray], candidate: Candidate, isa, threads: int = 1) -> None:
    """Every one of K sums is rounded to 11 bits: such errors add up as a random walk does."""
    tolerance = 2 * ROUNDED * (2 + np.sqrt(case.workload.k))
    run(case, candidate, isa, inputs, threads=threads, tolerance=tolerance, poison=POISON)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(functions=True), pattern=patterns, seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_any_convolution_equals_its_definition(isa, conv, pattern, seed, extra, data):
    function = conv.epilogue.activation.function
    if function is not None and function.name not in then.FUNCTIONS:
        conv = replace(conv, epilogue=replace(conv.epilogue, activation=RELU))
    shifted = data.draw(st.sampled_from([False, False, True]))
    case, inputs = halved(*operands(conv, pattern, seed, extra, shifted=shifted))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    check(case, inputs, data.draw(st.sampled_from(candidates(case, isa, threads))), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("sparsity", [0, 0.75])
@pytest.mark.parametrize("limits", [RELU, replace(RELU, high=6.0)], ids=["relu", "relu6"])
def test_every_kernel_of_the_library(isa, sparsity, limits):
    """Each (MR, NV) with full and partial blocks of rows and a tail strip."""
    conv = Conv2d(1, 11, 53, 13, 17, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, limits))
    case, inputs = halved(*operands(conv, ColumnPattern(sparsity, tile=26) if sparsity else None, seed=3))
    tried: dict[str, Candidate] = {}
    for candidate in candidates(case, isa, 2):
        assert candidate.kernel.startswith("f16_")
        tried.setdefault(candidate.kernel, candidate)
    for candidate in tried.values():
        check(case, inputs, candidate, isa, threads=2)
    assert len(tried) > 3


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=1_000_000, max_size=24), pattern=patterns, seed=st.integers(0, 2**31),
    vectors=st.sampled_from([1, 2, 2, 4]), which=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    extra=st.integers(0, 2), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_convolution_through_panels(isa, conv, pattern, seed, vectors, which, extra, data):
    strips = tuple(vectors * on for on in which)
    conv = pointwise(conv) if strips[0] else conv
    case, inputs = halved(*case_of(conv, pattern, seed, strips, extra))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    check(case, inputs, data.draw(st.sampled_from(candidates(case, isa, threads))), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=500_000, max_size=24), pattern=patterns, seed=st.integers(0, 2**31),
    more=st.tuples(st.integers(0, 3), st.integers(0, 2)), which=st.tuples(*[st.booleans()] * 3), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_windows_of_any_convolution(isa, conv, pattern, seed, more, which, data):
    case, inputs = halved(*windowed(conv, pattern, seed, more, tuple(2 * on for on in which)))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(case, isa, threads) if c.params.get("feed") in (3, 4)]
    if found:
        check(case, inputs, data.draw(st.sampled_from(found)), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
def test_a_value_that_is_no_number_reaches_the_output_and_no_halo(isa):
    conv = Conv2d(1, 3, 9, 6, 7, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, RELU))
    case, (x,) = halved(*operands(conv, None, seed=5))
    x[0, :, 2, 6], x[0, 1, 5, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        for candidate in candidates(case, isa, 1)[::11]:
            assert np.isnan(run(case, candidate, isa, [x], tolerance=0.02, poison=POISON)).any()
