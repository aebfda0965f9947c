"""Convolutions of float16 against their numpy definition: feeds, odd shapes, tails, poisoned memory, every VLEN."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from convolutions import convs, operands, patterns
from emulated import HALF
from half import MISSING, emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, machine_has, run
from test_kernel_packed import loose
from test_kernel_panels import case_of, pointwise, stored
from test_kernel_transposed import operands as transposed_operands
from test_kernel_transposed import transposed
from test_kernel_windows import windowed

from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import registers, then
from colonnade.kernels.registry import Candidate, candidates
from colonnade.layout import Layout, Panels, Planes, Rows
from colonnade.pattern import ColumnPattern
from colonnade.workload import (
    NONE,
    RELU,
    RELU6,
    Activation,
    Affine,
    Conv2d,
    Convert,
    Epilogue,
    Function,
    Interleave,
    Linear,
    Repeat,
    evaluate,
)

HERE = "rvv_emulated"
MACHINE = [
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not emulator(), reason=MISSING)) for row in HALF),
    pytest.param(isa_named(HERE), id=HERE, marks=pytest.mark.skipif(not machine_has(HERE), reason=f"no {HERE}")),
]
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
    shapes = {(int(mr), int(nv)) for mr, nv in (re.findall(r"(\d+)x(\d+)v__", kernel)[0] for kernel in tried)}
    assert shapes == {*registers.shapes(isa.of(2))} if not sparsity else len(shapes) > 3


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
    batch=st.integers(1, 3), channels=st.integers(1, 4), height=st.integers(1, 20), width=st.integers(1, 90),
    phases=st.tuples(st.integers(1, 3), st.integers(1, 3)), extra=st.integers(0, 3), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_users_numbers_are_rounded_as_they_come(isa, batch, channels, height, width, phases, extra, threads):
    """Into planes and phases; nothing behind the array is read, and NaN stays."""
    arranger, shape = Arranger(), (batch, channels, height, width)
    rows, columns = (-(-size // count) + extra for size, count in zip((height, width), phases, strict=True))
    y = arranger.put("y", shape, Planes(batch, height, width, columns, rows, lead=extra, phases=phases, itemsize=2))
    case = arranger.case(Convert("import", shape), [], y, external="input")
    (candidate,) = candidates(case, isa, threads)
    assert candidate.kernel.startswith("f16_import")
    values = np.random.default_rng(width).standard_normal(shape).astype(np.float32)
    values[0, 0, 0, 0], values[-1, -1, -1, -1] = 6e4, np.nan
    result = run(case, candidate, isa, [values], threads=threads, tolerance=ROUNDED, poison=POISON)
    np.testing.assert_array_equal(result, values.astype(np.float16).astype(np.float32))


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


@pytest.mark.parametrize("isa", MACHINE)
@given(
    n=st.integers(1, 6), ic=st.integers(1, 70), oc=st.integers(1, 150), residual=st.booleans(), maps=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]), tile=st.integers(1, 40), threads=st.integers(1, 3),
    seed=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_linear_layers_of_such_weights(isa, n, ic, oc, residual, maps, sparsity, tile, threads, seed, data):
    """Weights are float16, sums are float32: as exact as with weights of 32 bits."""
    rng, arranger = np.random.default_rng(seed), Arranger()
    weight = rng.standard_normal((oc, ic)).astype(np.float16).astype(np.float32)
    if sparsity:
        for rows in np.split(rng.permutation(oc), range(tile, oc, tile)):
            weight[np.ix_(rows, rng.permutation(ic)[ColumnPattern(sparsity, tile).kept(ic) :])] = 0
    shape = (n, ic, 1, 1) if maps else (n, ic)
    x = arranger.put("x", shape, Planes(n, 1, 1, 2, 2) if maps else Rows(n, ic))
    tensors = [x, arranger.put("r", (n, oc), Rows(n, oc))] if residual else [x]
    constants = {"weight": weight, "bias": rng.standard_normal(oc).astype(np.float32)}
    work = Linear(n, ic, oc, Epilogue(residual, RELU), dtype="f16")
    case = arranger.case(work, tensors, arranger.put("y", (n, oc), Rows(n, oc)), constants)
    candidate = data.draw(st.sampled_from(candidates(case, isa, threads)))
    assert candidate.kernel.startswith("f16_splinear")
    inputs = [rng.standard_normal(t.shape[:2]).astype(np.float32) for t in tensors]
    magnitude = float(np.abs(weight).max(initial=1.0)) * ic
    run(case, candidate, isa, inputs, threads=threads, tolerance=2e-6, poison=POISON, magnitude=magnitude)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 23), height=st.integers(1, 12), width=st.integers(1, 40),
    extra=st.integers(0, 2), vectors=st.sampled_from([0, 1, 2, 4]), limits=st.sampled_from([NONE, RELU, RELU6]),
    threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_scale_and_shift(isa, batch, channels, height, width, extra, vectors, limits, threads):
    """Into planes and panels, strips that are not whole, halos that a shift must not reach, NaN that must stay."""
    rng, shape, arranger = np.random.default_rng(0), (batch, channels, height, width), Arranger()
    grid = Planes(batch, height, width, width + extra, height + extra, itemsize=2)
    x, y = arranger.put("x", shape, grid), arranger.put("y", shape, stored(grid, vectors))
    constants = {role: rng.standard_normal(channels).astype(np.float32) for role in ("scale", "shift")}
    case = arranger.case(Affine(shape, limits), [x], y, constants)
    (candidate,) = candidates(case, isa, threads)
    assert candidate.kernel.startswith("f16_affine")
    values = (4 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
    values[0, 0, 0, 0] = np.nan
    result = run(case, candidate, isa, [values], threads=threads, tolerance=4 * ROUNDED, poison=POISON)
    assert np.isnan(result[0, 0, 0, 0]) and np.isnan(result).sum() == 1


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=transposed(), pattern=patterns, seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_transposed_convolution_equals_its_definition(isa, conv, pattern, seed, extra, data):
    function = conv.epilogue.activation.function
    if function is not None and function.name not in then.FUNCTIONS:
        conv = replace(conv, epilogue=Epilogue(False, RELU))
    case, x = transposed_operands(conv, pattern, seed, extra)
    case, inputs = halved(case, [x])
    threads = data.draw(st.sampled_from([1, 2, 3]))
    candidate = data.draw(st.sampled_from(candidates(case, isa, threads)))
    terms = conv.in_channels // conv.groups * conv.kernel[0] * conv.kernel[1]
    run(case, candidate, isa, inputs, threads, POISON, 2 * ROUNDED * (2 + np.sqrt(terms)), magnitude=np.sqrt(terms))


@pytest.mark.parametrize("isa", MACHINE)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 5), height=st.integers(1, 20), width=st.integers(1, 70),
    factors=st.tuples(st.integers(1, 4), st.integers(1, 4)), repeat=st.booleans(), extra=st.integers(0, 3),
    threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_phases_become_planes_and_pixels_are_repeated(
    isa, batch, channels, height, width, factors, repeat, extra, threads
):
    arranger, (fy, fx) = Arranger(), factors
    shape = (batch, channels, height, width)
    rows, columns = -(-height // fy), -(-width // fx)
    phases = {} if repeat else {"phases": factors}
    inside = (rows, columns) if repeat else (height, width)
    source = Planes(batch, *inside, columns + extra, rows + extra, itemsize=2, **phases)
    x = arranger.put("x", (batch, channels, *inside), source)
    y = arranger.put("y", shape, Planes(batch, height, width, width + extra, height + extra, lead=extra, itemsize=2))
    work = Repeat(shape, factors) if repeat else Interleave(shape, factors)
    case = arranger.case(work, [x], y)
    (candidate,) = candidates(case, isa, threads)
    assert candidate.kernel.startswith("f16_interleave")
    values = np.random.default_rng(0).standard_normal(x.shape).astype(np.float16).astype(np.float32)
    run(case, candidate, isa, [values], threads=threads, tolerance=0, poison=POISON)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=500_000, max_size=24), pattern=patterns, seed=st.integers(0, 2**31),
    more=st.tuples(*[st.integers(0, 3)] * 4), prologue=st.sampled_from([None, NONE, RELU, RELU6]), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_panels_are_gathered_scaled_or_as_they_are(isa, conv, pattern, seed, more, prologue, data):
    case, inputs = halved(*loose(replace(conv, prologue=prologue), pattern, seed, more, (1, 1)))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    check(case, inputs, data.draw(st.sampled_from(candidates(case, isa, threads))), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("name", ["silu", "hard_swish"])
def test_functions_of_every_number(isa, name):
    """What a convolution applies to its sums, in float16: four units of the last place, or what is lost near zero."""
    numbers = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    x = numbers[np.abs(numbers) < 32].reshape(1, 1, 160, -1)  # NaN is no less
    epilogue = Epilogue(False, Activation(function=Function.of(name)))
    conv = Conv2d(1, 1, 1, *x.shape[2:], (1, 1), epilogue=epilogue)
    case, _ = halved(*operands(conv, None, 0))
    case = replace(case, constants={"weight": np.ones((1, 1, 1, 1), np.float32)})
    result = run(case, candidates(case, isa, 1)[0], isa, [x], tolerance=ROUNDED, poison=POISON).astype(np.float64)
    exact = evaluate(conv, [x.astype(np.float64)], case.constants).astype(np.float64)
    units = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert (np.abs(result - exact) <= 4 * units + 1e-3 * (x < -1)).all()
    assert (np.abs(result - exact) / units)[x > -1].mean() < 0.5


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("limits", [RELU, RELU6, NONE])
def test_infinity_less_itself_is_no_number(isa, limits):
    """Behind limits too, which compare integers: an overflow is seen in the end."""
    conv = Conv2d(1, 2, 3, 5, 40, (1, 1), epilogue=Epilogue(False, limits))
    case, (x, *_) = halved(*operands(conv, None, 1))
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[:, 0], weight[:, 1] = 1, -1
    case = replace(case, constants={**case.constants, "weight": weight})
    x[0, :, 2, 7] = np.inf
    for candidate in candidates(case, isa, 1):
        found = run(case, candidate, isa, [x], tolerance=8 * ROUNDED, poison=POISON)
        assert np.isnan(found[0, :, 2, 7]).all() and np.isnan(found).sum() == 3
