"""RVV: the last lanes of a plane, computed with the rows of a tile in the lanes, and runs of one strip."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from emulated import VLENS
from kernel_harness import need, run
from test_kernel_panels import case_of

from colonnade.kernels.ops.tables import tiling
from colonnade.kernels.registry import Candidate, bind
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, Conv2d, Epilogue

TOLERANCE = 2e-5  # of the largest magnitude
PARAMS = {"prefetch": 0, "split_tiles": 0, "dense": 0, "fetch": 0, "tail": 0}
SHAPES = ["8x2v", "4x2v", "2x2v", "4x4v", "2x4v"]  # that have an inner function for one strip
SIDES = [v for v in VLENS if 128 <= v <= 512]


def kernel(feed: int, strip_block: int, shape: str = "8x2v") -> Candidate:
    return Candidate(f"f32_spconv_{shape}__rvv", {**PARAMS, "feed": feed, "strip_block": strip_block})


@pytest.mark.parametrize("vlen", SIDES)
@pytest.mark.parametrize("strips", [(0, 0, 0), (2, 2, 2)], ids=["planes", "panels"])
def test_every_number_of_lanes(vlen: int, strips: tuple[int, int, int]) -> None:
    """Behind no, one and two strips; with as many columns left over whole turns of the ring as there can be."""
    isa, strip = need(f"rvv-{vlen}"), vlen // 16
    for lanes in range(1, 10):
        columns = 24 + 4 * lanes  # half of them kept: 14 to 30
        for before in (0, 1, 2):
            conv = Conv2d(1, columns, 24, 1, before * strip + lanes, (1, 1), epilogue=Epilogue(lanes % 2 == 0, RELU))
            case, inputs = case_of(conv, ColumnPattern(0.5, tile=8), lanes, strips)
            for block in (0, 1):
                run(case, kernel(2 if strips[0] else 0, block), isa, inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("vlen", SIDES)
def test_lanes_that_are_no_pixels(vlen: int) -> None:
    """Of three lanes behind a strip, the one between two rows of one pixel; a strip alone has such lanes as well."""
    isa, strip = need(f"rvv-{vlen}"), vlen // 16
    for activation in (Epilogue(), Epilogue(False, RELU)):
        conv = Conv2d(1, 12, 16, strip // 2 + 2, 1, (1, 1), epilogue=activation)
        case, inputs = case_of(conv, ColumnPattern(0.5, tile=8), 1, (0, 2, 0), extra=1)
        (call,) = bind(case, kernel(0, 0))
        assert call.fields["lanes"] == strip + 3
        for block in (0, 1):
            run(case, kernel(0, block), isa, inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("vlen", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_columns(vlen: int, shape: str) -> None:
    """Fewer than the ring has places, as many, and some more, in turn."""
    isa, rows, vectors = need(f"rvv-{vlen}"), int(shape[0]), int(shape[2])
    strip, stored = vlen * vectors // 32, 2 * (vectors == 2)
    kept = [5, 6, 1, 7, 12, 2, 3, 8, 9, 13, 4, 6, 7, 18, 1, 11, 10, 12, 6]  # columns of every tile
    for seed, (lanes, residual) in enumerate(product((strip, strip + 2, 2 * strip + 5), (False, True))):
        rng = np.random.default_rng(seed)
        conv = Conv2d(1, 64, len(kept) * rows, 1, lanes, (1, 1), epilogue=Epilogue(residual, RELU))
        case, inputs = case_of(conv, None, seed, (stored, 0, 0))
        for tile, n in enumerate(kept):
            case.constants["weight"][rows * tile : rows * tile + rows, rng.permutation(64)[n:]] = 0
        found = tiling(case, 0).tiles
        assert sum(len(t.rows) == rows for t in found) > len(kept) / 2  # those of a column or two may be in others
        for block in (0, 1):
            run(case, kernel(stored, block, shape), isa, inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_that_share_their_columns(shape: str) -> None:
    """Of a dense layer: what comes next does not stand behind what is there."""
    isa, rows, stored = need("rvv-256"), int(shape[0]), 2 * (int(shape[2]) == 2)
    for columns in range(1, 20):
        conv = Conv2d(1, columns, 5 * rows, 1, 70, (1, 1), epilogue=Epilogue(False, RELU))
        case, inputs = case_of(conv, None, columns, (stored, 0, 0))
        dense = kernel(stored, 1, shape)
        run(case, replace(dense, params={**dense.params, "dense": 1}), isa, inputs, tolerance=TOLERANCE)
