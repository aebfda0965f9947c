"""The offset-gather convolution against its numpy definition: odd shapes, tails, poisoned memory, every ISA."""

from __future__ import annotations

import numpy as np
import pytest
from convolutions import FUNCTIONS, convs, operands, patterns, places, weights
from emulated import INSTALLED, MISSING, RVV
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Case, machine_has, run

from colonnade.kernels.isa import ISAS
from colonnade.kernels.ops import tables, then
from colonnade.kernels.registry import Candidate, bind, candidates
from colonnade.layout import write_planes
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, Conv2d, Epilogue, im2col

TOLERANCE = 2e-5  # of the largest magnitude; sums of up to K terms in float32


MACHINE = [
    *(pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


ANY = convs(functions=True)


def check(case: Case, inputs: list[np.ndarray], candidate: Candidate, isa, threads: int = 1) -> None:
    run(case, candidate, isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(functions=True), pattern=patterns, seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_any_convolution_equals_its_definition(isa, conv, pattern, seed, extra, data):
    call, inputs = operands(conv, pattern, seed, extra, shifted=data.draw(st.sampled_from([False, False, True])))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    candidate = data.draw(st.sampled_from(candidates(call, isa, threads)))
    check(call, inputs, candidate, isa, threads)


@pytest.mark.slow
@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(functions=True), pattern=patterns, seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data()
)
@settings(max_examples=600, deadline=None)
def test_any_convolution_equals_its_definition_at_length(isa, conv, pattern, seed, extra, data):
    call, inputs = operands(conv, pattern, seed, extra, shifted=data.draw(st.sampled_from([False, False, True])))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    candidate = data.draw(st.sampled_from(candidates(call, isa, threads)))
    check(call, inputs, candidate, isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_functions_are_applied_by_the_kernels_that_know_them(isa, function):
    """To every pixel once, whoever shares out what: tiles or strips, one or many at a time, blocks of columns."""
    conv = Conv2d(1, 96, 40, 19, 23, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, function))
    call, inputs = operands(conv, ColumnPattern(0.5, tile=8), seed=5)
    found = [c for c in candidates(call, isa, 3) if "winograd" not in c.params]
    for candidate in found[:40:3]:
        apart = bind(call, candidate)[-1].struct == "cn_unary"
        assert apart == (function.function.name not in then.FUNCTIONS)
        check(call, inputs, candidate, isa, threads=3)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("sparsity", [0, 0.75])
def test_every_kernel_of_the_library(isa, sparsity):
    """Each (MR, NV) with full and partial blocks of rows and a tail strip."""
    conv = Conv2d(1, 11, 53, 13, 17, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, RELU))
    call, inputs = operands(conv, ColumnPattern(sparsity, tile=26) if sparsity else None, seed=3)
    tried = {}
    for candidate in candidates(call, isa, 2):
        tried.setdefault(candidate.kernel, candidate)
    for candidate in tried.values():
        check(call, inputs, candidate, isa, threads=2)
    assert len(tried) > 3


# Where the published code, packed for 56/28/14/7 at VLEN 256, goes wrong (DESIGN §7).
TRAPS = [
    *(dict(height=w, width=w, kernel=(3, 3), padding=(1, 1, 1, 1)) for w in (9, 10, 16, 20, 27, 32, 35, 64)),
    *(dict(height=w, width=w, kernel=(3, 3), padding=(1, 1, 1, 1), stride=(2, 2)) for w in (7, 13, 27, 112)),
    dict(height=14, width=14, kernel=(5, 5), padding=(2, 2, 2, 2)),
    dict(height=14, width=14, kernel=(3, 3)),
    dict(height=14, width=14, kernel=(2, 2), stride=(2, 2)),
    dict(height=17, width=23, kernel=(3, 3), padding=(1, 1, 1, 1), stride=(3, 3)),
    dict(height=20, width=20, kernel=(3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    dict(height=15, width=15, kernel=(1, 1), stride=(2, 2)),
    dict(height=6, width=8, kernel=(3, 3), padding=(0, 0, 1, 1), stride=(2, 2)),  # TensorFlow's SAME
    dict(height=3, width=5, kernel=(7, 7), padding=(3, 3, 3, 3)),
    dict(height=1, width=1, kernel=(3, 3), padding=(1, 1, 1, 1)),
    dict(height=5, width=5, kernel=(1, 1), padding=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("shape", TRAPS, ids=lambda s: "-".join(f"{v}" for v in s.values()).replace(" ", ""))
def test_shapes_that_others_got_wrong(isa, shape):
    conv = Conv2d(2, 6, 10, epilogue=Epilogue(False, RELU), **shape)
    call, inputs = operands(conv, ColumnPattern(0.5, tile=4), seed=1)
    for candidate in candidates(call, isa, 1)[::7]:
        check(call, inputs, candidate, isa)


@pytest.mark.parametrize("isa", MACHINE)
def test_activation_comes_after_the_residual_and_only_there(isa):
    conv = Conv2d(1, 3, 8, 9, 9, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, RELU))
    call, (x, _) = operands(conv, None, seed=2)
    call.constants["bias"] = np.full(8, -100, np.float32)  # every sum is negative, so an early ReLU would give 0
    residual = np.full((1, 8, 9, 9), 200, np.float32)
    for candidate in candidates(call, isa, 1)[::11]:
        check(call, [x, residual], candidate, isa)
        assert run(call, candidate, isa, [x, residual]).min() > 50


@pytest.mark.parametrize("isa", MACHINE)
def test_a_value_that_is_no_number_reaches_the_output_and_no_halo(isa):
    conv = Conv2d(1, 3, 9, 6, 7, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, RELU))
    call, (x,) = operands(conv, None, seed=5)  # a pruned weight times NaN is 0 here, NaN by definition
    x[0, :, 2, 6], x[0, 1, 5, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        for candidate in candidates(call, isa, 1)[::11]:
            assert np.isnan(run(call, candidate, isa, [x], tolerance=TOLERANCE)).any()


@pytest.mark.parametrize("isa", MACHINE)
def test_more_than_65535_columns(isa):
    conv = Conv2d(1, 7300, 2, 2, 2, (3, 3), padding=(1, 1, 1, 1))
    assert conv.k > 65535
    call, inputs = operands(conv, None, seed=4)
    run(call, candidates(call, isa, 1)[0], isa, inputs, tolerance=1e-4)


@given(conv=convs(max_channels=9, max_size=12), extra=st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_offsets_are_im2col(conv, extra):
    """arena + offset[k] + lane is A[k, p] for every pixel p: the formula alone, in numpy."""
    x, y, _, size = places(conv, extra)
    values = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    arena = np.full((size + 8192) // 4, np.nan, np.float32).view(np.uint8)
    write_planes(arena, x, values)
    floats = arena.view(np.float32)
    pixels = np.flatnonzero(y.planes.valid())
    expected = im2col(values, conv)
    for group in range(conv.groups):
        offsets = tables.column_offsets(conv, x, group)
        assert offsets.min() >= 0
        gathered = floats[offsets[:, None] // 4 + pixels]
        wanted = expected[:, group].transpose(1, 0, 2).reshape(conv.k, -1)
        np.testing.assert_array_equal(gathered, wanted)


def test_tiles_of_equal_support_share_their_offsets():
    conv = Conv2d(1, 16, 64, 8, 8, (3, 3), padding=(1, 1, 1, 1))
    call, _ = operands(conv, None, seed=0)
    dense = next(c for c in candidates(call, ISAS[0], 1) if c.params["dense"] and c.params.get("feed") == 0)
    (bound,) = bind(call, dense)
    assert bound.fields["offsets"].data.size == conv.k + tables.OFFSETS_AHEAD


def test_a_pruned_layer_has_its_dense_self_among_the_candidates():
    conv = Conv2d(1, 16, 32, 8, 8, (3, 3), padding=(1, 1, 1, 1))
    call, _ = operands(conv, ColumnPattern(0.75, tile=8), seed=0)
    assert {c.params["dense"] for c in candidates(call, ISAS[0], 1)} == {0, 1}


def test_planes_that_do_not_match_are_refused():
    conv = Conv2d(1, 4, 8, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    x, _, _, _ = places(conv)
    _, y, _, _ = places(conv, extra=1)
    call = Case(conv, (x,), y, 0, {"weight": weights(conv, None, rng)})
    in_place = next(c for c in candidates(operands(conv, None, 0)[0], ISAS[0], 1) if c.params.get("feed") == 0)
    assert all(c.params.get("feed") for c in candidates(call, ISAS[0], 1))
    with pytest.raises(ValueError, match="do not match"):
        bind(call, in_place)
