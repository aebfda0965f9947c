"""The packed feed against its definition: planes of any pitch, halo and phases, with and without a prologue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from convolutions import convs, operands, patterns, weights
from emulated import INSTALLED, MISSING, RVV
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, machine_has, run

from colonnade.kernels.isa import ISAS, Isa
from colonnade.kernels.ops import packing
from colonnade.kernels.ops.tables import tiling
from colonnade.kernels.registry import Candidate, bind, candidates
from colonnade.layout import Planes
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Conv2d

TOLERANCE = 2e-5  # of the largest magnitude
MACHINE = [
    *(pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


def loose(
    conv: Conv2d, pattern: ColumnPattern | None, seed: int, more: tuple[int, int, int, int], phases: tuple[int, int]
) -> tuple[Case, list[np.ndarray]]:
    """``conv`` on planes without any halo, ``more`` = lanes and rows added to input and output; input in ``phases``."""
    rng = np.random.default_rng(seed)
    oh, ow = conv.out_height, conv.out_width
    columns, rows = -(-conv.width // phases[1]), -(-conv.height // phases[0])
    source = Planes(conv.batch, conv.height, conv.width, columns + more[0], rows + more[1], phases=phases)
    target = Planes(conv.batch, oh, ow, ow + more[2], oh + more[3])
    arranger = Arranger()
    shape = (conv.batch, conv.out_channels, oh, ow)
    inputs = [arranger.put("x", (conv.batch, conv.in_channels, conv.height, conv.width), source)]
    inputs += [arranger.put("r", shape, target)] if conv.epilogue.residual else []
    constants = {"weight": weights(conv, pattern, rng), "bias": rng.standard_normal(shape[1]).astype(np.float32)}
    if conv.prologue is not None:
        constants["before_scale"] = rng.standard_normal(conv.in_channels).astype(np.float32)
        constants["before_shift"] = rng.standard_normal(conv.in_channels).astype(np.float32)
    case = arranger.case(conv, inputs, arranger.put("y", shape, target), constants)
    return case, [rng.standard_normal(x.shape).astype(np.float32) for x in inputs]


def packed(case: Case, isa: Isa, threads: int = 1) -> list[Candidate]:
    return [c for c in candidates(case, isa, threads) if c.params.get("feed")]


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=1_000_000),
    pattern=patterns,
    seed=st.integers(0, 2**31),
    more=st.tuples(*[st.integers(0, 3)] * 4),
    whole=st.booleans(),
    prologue=st.sampled_from([None, None, NONE, RELU, RELU6]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_panels_from_any_planes(isa, conv, pattern, seed, more, whole, prologue, data):
    """Also where the whole stride, or a part of it, is already in the phases of the input."""
    parts = [[p for p in range(1, s + 1) if s % p == 0] for s in conv.stride]
    phases = (1, 1) if whole else (data.draw(st.sampled_from(parts[0])), data.draw(st.sampled_from(parts[1])))
    case, inputs = loose(replace(conv, prologue=prologue), pattern, seed, more, phases)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    # depthwise has kernels of its own where it can be read in place
    found = packed(case, isa, threads) or candidates(case, isa, threads)
    candidate = data.draw(st.sampled_from(found))
    run(case, candidate, isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=convs(max_macs=500_000), pattern=patterns, seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=30, deadline=None)
def test_panels_from_planes_that_could_be_read_in_place(isa, conv, pattern, seed, data):
    """There a row of a panel is one run of lanes."""
    case, inputs = operands(conv, pattern, seed)
    found = packed(case, isa)
    if found:
        candidate = data.draw(st.sampled_from(found))
        (call,) = bind(case, candidate)
        assert call.fields["contiguous"] == 1
        run(case, candidate, isa, inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
def test_every_kernel_reads_panels(isa):
    conv = Conv2d(1, 11, 53, 13, 17, (3, 3), (2, 2), (1, 1, 1, 1), prologue=RELU)
    case, inputs = loose(conv, ColumnPattern(0.75, tile=26), 3, (0, 0, 0, 0), (1, 1))
    tried = {c.kernel: c for c in packed(case, isa, 2)}
    for candidate in tried.values():
        run(case, candidate, isa, inputs, threads=2, tolerance=TOLERANCE)
    assert len(tried) > 3


@pytest.mark.parametrize("isa", MACHINE)
def test_padding_comes_after_the_prologue(isa):
    """relu(0 * scale + 5) is 5, but padding is 0."""
    conv = Conv2d(1, 2, 4, 5, 5, (3, 3), padding=(1, 1, 1, 1), prologue=RELU)
    case, (x,) = loose(conv, None, 0, (1, 1, 1, 1), (1, 1))
    case.constants["before_shift"][:] = 5
    case.constants["before_scale"][:] = 0
    for candidate in packed(case, isa)[:2]:
        run(case, candidate, isa, [x], tolerance=TOLERANCE)


def test_a_prologue_leaves_no_choice():
    conv = Conv2d(1, 16, 16, 9, 9, (1, 1), prologue=RELU)
    case, _ = loose(conv, None, 0, (0, 0, 0, 0), (1, 1))
    assert {c.params["feed"] for c in candidates(case, ISAS[0], 1)} == {1}
    (call,) = bind(case, candidates(case, ISAS[0], 1)[0])
    assert call.fields["contiguous"] == 1


def test_planes_of_equal_pitch_without_a_halo_are_not_read_in_place():
    conv = Conv2d(1, 8, 8, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    case, _ = loose(conv, None, 0, (0, 0, 0, 0), (1, 1))
    assert {c.params["feed"] for c in candidates(case, ISAS[0], 1)} == {1}


def test_a_panel_holds_only_what_some_tile_keeps():
    conv = Conv2d(1, 40, 8, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    case, _ = operands(conv, ColumnPattern(0.75, tile=8), 0)
    assert packing.Panel.of(conv, tiling(case, 0)).rows == 90
    candidate = next(c for c in packed(case, ISAS[0]) if not c.params["dense"])
    (call,) = bind(case, candidate)
    assert call.fields["panel_rows"] == 90
