"""RVV: the last lanes of a plane, computed with the rows of a tile in the lanes, and runs of one strip."""

from __future__ import annotations

import pytest
from emulated import VLENS
from kernel_harness import need, run
from test_kernel_panels import case_of

from colonnade.kernels.registry import Candidate, bind
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, Conv2d, Epilogue

TOLERANCE = 2e-5  # of the largest magnitude
PARAMS = {"prefetch": 0, "split_tiles": 0, "dense": 0, "fetch": 0, "tail": 0}
SIDES = [v for v in VLENS if 128 <= v <= 512]


def kernel(feed: int, strip_block: int) -> Candidate:
    return Candidate("f32_spconv_8x2v__rvv", {**PARAMS, "feed": feed, "strip_block": strip_block})


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
def test_few_columns(vlen: int) -> None:
    """Fewer than the ring has places, and tiles that keep unlike many, in turn."""
    isa, strip = need(f"rvv-{vlen}"), vlen // 16
    for columns in (1, 2, 5, 6, 7, 11, 12, 13, 18):
        for lanes in (strip, strip + 2, 2 * strip + 5):
            conv = Conv2d(1, columns, 40, 1, lanes, (1, 1), epilogue=Epilogue(False, RELU))
            case, inputs = case_of(conv, None, columns, (2, 0, 0))
            weight = case.constants["weight"]
            for tile in range(5):  # all, none, one, half, all
                weight[8 * tile : 8 * tile + 8, (columns, 0, 1, columns // 2, columns)[tile] :] = 0
            for block in (0, 1):
                run(case, kernel(2, block), isa, inputs, tolerance=TOLERANCE)
