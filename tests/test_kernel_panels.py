"""Tensors in panels, written by convolutions and read by pointwise ones: every ISA and vector length, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from convolutions import convs, places, weights
from emulated import INSTALLED, MISSING, RVV
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, machine_has, run

from colonnade.kernels.isa import ISAS
from colonnade.kernels.registry import Candidate, bind, candidates
from colonnade.layout import Layout, Panels, Placed, Planes, place
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Affine, Conv2d, Epilogue

TOLERANCE = 2e-5  # of the largest magnitude
MACHINE = [
    *(pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


def stored(planes: Planes, vectors: int) -> Layout:
    """The same lanes in panels of strips of ``vectors`` registers, or as they are."""
    return Panels(replace(planes, lead=0), vectors) if vectors else planes


def case_of(
    conv: Conv2d, pattern: ColumnPattern | None, seed: int, strips: tuple[int, int, int], extra: int = 0
) -> tuple[Case, list[np.ndarray]]:
    """``conv`` with input, output and residual in panels of these ``strips`` (0: planes)."""
    rng = np.random.default_rng(seed)
    arranger = Arranger()
    placed: list[Placed] = []
    for tensor, vectors in zip(places(conv, extra)[:3], strips, strict=True):
        placed.append(arranger.put(tensor.name, tensor.shape, stored(tensor.planes, vectors)))
    x, y, r = placed
    constants = {
        "weight": weights(conv, pattern, rng),
        "bias": rng.standard_normal(conv.out_channels).astype(np.float32),
    }
    inputs = [x, r] if conv.epilogue.residual else [x]
    case = arranger.case(conv, inputs, y, constants)
    return case, [rng.standard_normal(t.shape).astype(np.float32) for t in inputs]


def pointwise(conv: Conv2d) -> Conv2d:
    return replace(conv, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1))


patterns = st.sampled_from([None, *(ColumnPattern(s, tile=t) for s, t in ((0.5, 4), (0.75, 8), (0.9, 27), (0.6, 2)))])


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=1_000_000, max_size=24),
    pattern=patterns,
    seed=st.integers(0, 2**31),
    vectors=st.sampled_from([1, 2, 2, 4]),
    which=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    extra=st.integers(0, 2),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_convolution_through_panels(isa, conv, pattern, seed, vectors, which, extra, data):
    """Any mix of planes and panels; a convolution that is not pointwise can only write them and add them."""
    vectors = vectors if isa.scalable else min(vectors, 2)
    strips = tuple(vectors * on for on in which)
    conv = pointwise(conv) if strips[0] else conv
    case, inputs = case_of(conv, pattern, seed, strips, extra)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = list(candidates(case, isa, threads))
    run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 14])
def test_every_kernel_of_some_vectors(isa, batch, size):
    """All of them from panels to panels, adding panels: the last strip partial, several tiles, batches."""
    conv = Conv2d(batch, 37, 53, size, size, (1, 1), epilogue=Epilogue(True, RELU))
    for vectors in (2, 4) if isa.scalable else (2,):  # four make strips of one width where a length is asked for
        case, inputs = case_of(conv, ColumnPattern(0.75, tile=26), 5, (vectors, vectors, vectors), extra=1)
        tried: dict[str, Candidate] = {}
        for candidate in candidates(case, isa, 2):
            key = f"{candidate.kernel} {candidate.params['dense']} {candidate.params['split_tiles']}"
            tried.setdefault(key, candidate)
        for candidate in tried.values():
            assert candidate.params["feed"] == 2
            run(case, candidate, isa, inputs, threads=2, tolerance=TOLERANCE)
        assert len({c.kernel for c in tried.values()}) > 1


@pytest.mark.parametrize("isa", MACHINE)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 23), height=st.integers(1, 12), width=st.integers(1, 40),
    extra=st.integers(0, 2), vectors=st.sampled_from([1, 2, 4]), limits=st.sampled_from([NONE, RELU, RELU6]),
    threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_scale_and_shift_writes_panels(isa, batch, channels, height, width, extra, vectors, limits, threads):
    """Any number of channels, strips that are not whole, halos that a shift must not reach, NaN that must stay."""
    rng, shape, arranger = np.random.default_rng(0), (batch, channels, height, width), Arranger()
    grid = Planes(batch, height, width, width + extra, height + extra)
    x, y = arranger.put("x", shape, grid), arranger.put("y", shape, stored(grid, vectors))
    constants = {role: rng.standard_normal(channels).astype(np.float32) for role in ("scale", "shift")}
    case = arranger.case(Affine(shape, limits), [x], y, constants)
    (candidate,) = candidates(case, isa, threads)
    values = rng.standard_normal(shape).astype(np.float32) * 4
    values[0, 0, 0, 0] = np.nan
    result = run(case, candidate, isa, [values], threads=threads, tolerance=TOLERANCE)
    assert np.isnan(result[0, 0, 0, 0]) and np.isnan(result).sum() == 1


def test_strips_must_agree():
    """A kernel whose strips are not those of the panels is refused, and none is offered for panels that differ."""
    conv = Conv2d(1, 8, 8, 5, 5, (1, 1))
    case, _ = case_of(conv, None, 0, (2, 2, 0))
    (isa,) = [row for row in ISAS if row.name == "portable"]
    narrow = next(c for c in candidates(case_of(conv, None, 0, (1, 1, 0))[0], isa, 1))
    with pytest.raises(ValueError, match="strips"):
        bind(case, narrow)
    with pytest.raises(AssertionError, match="no kernel"):
        candidates(case_of(conv, None, 0, (2, 1, 0))[0], isa, 1)


def test_room_for_every_vector_length():
    """One size for all machines: whole strips of the longest registers."""
    layout = Panels(Planes(1, 14, 14, 15, 15), 2)
    assert layout.buffer_bytes(10) == 10 * 256 * 4
    with pytest.raises(ValueError, match="lead"):
        Panels(Planes(1, 14, 14, 15, 15, lead=1), 2)
    assert place("x", (1, 10, 14, 14), layout, 128).offsets.tolist() == [128]
