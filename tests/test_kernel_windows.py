"""The windowed feed and blocks of K against their definition: strides, halos, batches, from planes and from panels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from convolutions import convs, operands, patterns, weights
from emulated import INSTALLED, MISSING, RVV
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, run
from test_kernel_panels import stored

from colonnade.kernels.ops import blocks
from colonnade.kernels.ops.tables import tiling
from colonnade.kernels.registry import Candidate, bind, candidates
from colonnade.layout import Planes
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, Conv2d, Epilogue, Reach

TOLERANCE = 2e-5  # of the largest magnitude
MACHINE = [pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV]


def windowed(
    conv: Conv2d, pattern: ColumnPattern | None, seed: int, more: tuple[int, int], strips: tuple[int, int, int]
) -> tuple[Case, list[np.ndarray]]:
    """``conv`` from planes without halo, ``more`` lanes and rows added to them; in panels where ``strips`` says so."""
    rng = np.random.default_rng(seed)
    down, right = Reach.of(conv, 0), Reach.of(conv, 1)
    oh, ow, (sy, sx) = conv.out_height, conv.out_width, conv.stride
    source = Planes(conv.batch, conv.height, conv.width, conv.width + more[0], conv.height + more[1])
    pitch = max(-(-conv.width // sx) + right.before, ow + right.after)
    rows = max(-(-conv.height // sy) + down.before, oh + down.after)
    target = Planes(conv.batch, oh, ow, pitch, rows)
    arranger, shape = Arranger(), (conv.batch, conv.out_channels, oh, ow)
    x = arranger.put("x", (conv.batch, conv.in_channels, conv.height, conv.width), stored(source, strips[0]))
    y = arranger.put("y", shape, stored(target, strips[1]))
    inputs = [x, arranger.put("r", shape, stored(target, strips[2]))] if conv.epilogue.residual else [x]
    constants = {"weight": weights(conv, pattern, rng), "bias": rng.standard_normal(shape[1]).astype(np.float32)}
    case = arranger.case(conv, inputs, y, constants)
    return case, [rng.standard_normal(t.shape).astype(np.float32) for t in inputs]


@pytest.mark.parametrize("isa", MACHINE)
@given(
    conv=convs(max_macs=500_000, max_size=24),
    pattern=patterns,
    seed=st.integers(0, 2**31),
    more=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    which=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_windows_of_any_convolution(isa, conv, pattern, seed, more, which, data):
    case, inputs = windowed(conv, pattern, seed, more, tuple(2 * on for on in which))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in candidates(case, isa, threads) if c.params.get("feed") in (3, 4)]
    if found:
        run(case, data.draw(st.sampled_from(found)), isa, inputs, threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("strips", [(0, 2, 2), (2, 2, 2), (2, 0, 0)])
def test_windows_without_a_halo_are_made_once_for_all_threads_and_blocks(isa, strips):
    """From planes and from panels, with channels that no tile keeps, a residual, and blocks of K."""
    conv = Conv2d(2, 40, 19, 17, 15, (1, 1), (2, 2), epilogue=Epilogue(True, RELU))
    case, inputs = windowed(conv, ColumnPattern(0.8, tile=8), 3, (2, 1), strips)
    found = list(candidates(case, isa, 3))
    if strips[0]:
        assert {c.params["feed"] for c in found} == {3, 4}
    first = next(c for c in found if c.params["feed"] == 4 and not c.params["dense"])
    for split, count, strip_block in ((0, 1, 1), (1, 1, 0), (1, 3, 2)):
        params = {**first.params, "split_tiles": split, "blocks": count, "strip_block": strip_block}
        candidate = Candidate(first.kernel, params)
        assert len(bind(case, candidate)) == 1 + count
        run(case, candidate, isa, inputs, threads=3, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_go_on_from_block_to_block(isa, kernel):
    """With a residual, limits at the end alone, tiles that keep nothing of a block, and a residual in panels."""
    pad = kernel // 2
    conv = Conv2d(2, 24, 29, 9, 7, (kernel, kernel), padding=(pad,) * 4, epilogue=Epilogue(True, RELU))
    case, inputs = operands(conv, ColumnPattern(0.9, tile=8), 4)
    first = next(c for c in candidates(case, isa, 1) if c.params.get("feed") == 0 and not c.params["dense"])
    whole = tiling(case, 0)
    parts = blocks.cut(whole, conv, 12)
    assert kernel == 3 or min(len(tile.columns) for part in parts for tile in part.tiles) == 0
    np.testing.assert_array_equal(sum(part.dense() for part in parts), whole.dense())
    for count, strips in ((2, 1), (12, 0)):
        candidate = Candidate(first.kernel, {**first.params, "blocks": count, "strip_block": strips})
        assert len(bind(case, candidate)) == count
        run(case, candidate, isa, inputs, threads=2, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
def test_strips_pass_over_as_many_tiles_as_weights_stay_near(isa):
    """Of every kernel with an inner function for one strip: more weights than are taken at once."""
    conv = Conv2d(1, 700, 96, 7, 7, (1, 1), epilogue=Epilogue(False, RELU))
    case, inputs = operands(conv, None, 5)
    found = [c for c in candidates(case, isa, 1) if c.params.get("feed") == 0 and c.params.get("blocks", 1) == 1]
    kernels = {c.kernel: c for c in found if "x2v" in c.kernel}
    assert len(kernels) >= 3
    for kernel, c in kernels.items():
        run(case, Candidate(kernel, {**c.params, "strip_block": 0}), isa, inputs, threads=1, tolerance=TOLERANCE)


def test_blocks_where_the_input_outgrows_the_cache():
    """Of a large input with few strips; never so many that a tile keeps next to nothing of one."""
    tiled = tiling(operands(Conv2d(1, 512, 16, 7, 7, (3, 3), padding=(1,) * 4), None, 0)[0], 8)
    assert blocks.orders([tiled], 4, 0, 1 << 20, threads=4)[0] == (0, 8)
    assert blocks.orders([tiled], 4, 0, 1 << 20)[0] == (0, 8)
    assert blocks.orders([tiled], 4, 2, 1 << 20)[0] == (1, 8)  # a strip in a panel comes while the one before is used
    assert blocks.orders([tiled], 4, 0, 1 << 16)[0] == (0, 1)
    thin = replace(tiled, tiles=tuple(replace(t, columns=t.columns[:80], values=t.values[:80]) for t in tiled.tiles))
    assert blocks.orders([thin], 4, 0, 1 << 20)[0] == (0, 2)


def test_cores_of_a_cluster_go_from_strip_to_strip_side_by_side():
    """Tiles are shared out where strips are many, and K is cut by what a strip of the input takes."""
    tiled = tiling(operands(Conv2d(1, 64, 16, 14, 14, (3, 3), padding=(1,) * 4), None, 0)[0], 8)
    assert [blocks.split([tiled], count, feed, 4) for count, feed in ((16, 0), (16, 2), (4, 0))] == [1, 1, 0]
    assert blocks.split([tiled], 16, 0, 1) == 0
    assert blocks.orders([tiled], 16, 0, 16 * blocks.STRIP, 4)[0] == (4, 2)
    assert blocks.orders([tiled], 16, 0, 8 * blocks.STRIP, 4)[0] == (4, 1)
    assert blocks.orders([tiled], 16, 0, 16 * blocks.STRIP, 1)[0] == (1, 2)
