"""The pattern's rounding and the tiling read off a matrix's zeros."""

import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colonnade.errors import UserError
from colonnade.pattern import MAX_TILE_ROWS, ColumnPattern, TiledWeights, _cost, discover
from colonnade.sparsify.select import select


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, "0.5", None, True])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(UserError, match="sparsity"):
        ColumnPattern(sparsity)


@pytest.mark.parametrize(("tile", "group"), [(0, None), (-8, None), (1.5, None), (8, 0), (8, -4), (8, 2.0)])
def test_bad_tile_or_group(tile, group):
    with pytest.raises(UserError, match=r"tile|group"):
        ColumnPattern(0.5, tile, group)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_bad_nm(n, m):
    with pytest.raises(UserError):
        ColumnPattern.nm(n, m)


@pytest.mark.parametrize(
    ("columns", "sparsity", "kept"),
    [
        (27, 0.75, 7), (147, 0.75, 37), (150, 0.75, 38), (320, 0.75, 80), (27, 0.5, 14), (147, 0.5, 74), (150, 0.9, 15),
        (320, 0.9, 32), (10, 0.7, 3), (10, 0.0, 10), (1, 0.99, 1), (4608, 0.875, 576), (70000, 0.5, 35000),
    ],
)  # fmt: skip
def test_whole_row_rounding(columns, sparsity, kept):
    assert ColumnPattern(sparsity).kept(columns) == kept


@pytest.mark.parametrize(
    ("n", "m", "columns", "kept"),
    [(1, 4, 27, 7), (1, 4, 147, 37), (2, 4, 150, 75), (1, 3, 7, 3), (2, 5, 13, 6), (1, 4, 3, 1), (4, 4, 9, 9)],
)
def test_nm_rounding(n, m, columns, kept):
    assert ColumnPattern.nm(n, m).kept(columns) == kept


def test_nm_says_the_same_as_sparsity_and_group():
    assert ColumnPattern.nm(1, 4, tile=8) == ColumnPattern(0.75, 8, 4)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 500))
def test_spans_tile_the_row(n, m, columns):
    pattern = ColumnPattern.nm(min(n, m), m)
    spans = pattern.spans(columns)
    assert [first for first, _, _ in spans] == [0, *(stop for _, stop, _ in spans[:-1])]
    assert spans[-1][1] == columns
    assert all(kept == math.ceil((stop - first) * min(n, m) / m - 1e-9) for first, stop, kept in spans)
    assert pattern.kept(columns) == sum(kept for _, _, kept in spans) >= 1


def check(tiled: TiledWeights, weights: np.ndarray) -> None:
    np.testing.assert_array_equal(tiled.dense(), weights)
    np.testing.assert_array_equal(np.sort(np.concatenate([tile.rows for tile in tiled.tiles])), np.arange(len(weights)))
    span = len(weights) // tiled.groups
    for tile in tiled.tiles:
        assert len(set(tile.rows // span)) == 1, "a tile crosses a convolution group"
        assert 1 <= len(tile.rows) <= MAX_TILE_ROWS
        assert len(tile.columns) and (np.diff(tile.columns) > 0).all()
        assert tile.values.shape == (len(tile.columns), len(tile.rows))
        assert (tile.rows.dtype, tile.columns.dtype, tile.values.dtype) == (np.int32, np.int32, np.float32)


def supports(tiled: TiledWeights) -> set[tuple[bytes, bytes]]:
    return {(np.sort(tile.rows).tobytes(), tile.columns.tobytes()) for tile in tiled.tiles}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    groups=st.sampled_from([1, 1, 2, 3]),
    columns=st.integers(1, 60),
    density=st.floats(0, 1),
)
def test_any_matrix_survives(seed, rows, groups, columns, density):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows * groups, columns)).astype(np.float32)
    weights[rng.random(weights.shape) > density] = 0
    check(discover(weights, groups), weights)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(4, 40),
    groups=st.sampled_from([1, 1, 2, 3]),
    columns=st.integers(40, 160),
    tile=st.integers(2, 16),
    sparsity=st.sampled_from([0.5, 0.75, 0.9]),
)
@example(seed=5, rows=5, groups=1, columns=40, tile=4, sparsity=0.5)
def test_the_tiling_is_recovered(seed, rows, groups, columns, tile, sparsity):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows * groups, columns)).astype(np.float32) + 3
    pattern = ColumnPattern(sparsity, tile)
    chosen = select(weights, pattern, groups=groups)
    pruned = np.where(chosen.mask, weights, 0).astype(np.float32)
    found = discover(pruned, groups)
    check(found, pruned)
    known = TiledWeights.from_rows(pruned, chosen.rows, groups)
    assert _cost(found.tiles) <= _cost(known.tiles) * (1 + 1e-6)
    # a tile and the few rows that were left over may come out as one, whose columns are fewer than those of both
    assert rows % tile or found.kept <= known.kept


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_low_tiles_that_lose_half_of_their_columns_are_no_dense_layer(tile):
    rng = np.random.default_rng(tile)
    weights = rng.standard_normal((24, 96)).astype(np.float32)
    tiles = rng.permutation(24).reshape(-1, tile)
    for rows in tiles:
        weights[np.ix_(rows, rng.permutation(96)[:48])] = 0
    assert supports(discover(weights)) == supports(TiledWeights.from_rows(weights, tiles))


def pruned_layer(rng, oc=256, k=576, sparsity=0.75):
    weights = (rng.standard_normal((oc, k)) + 4).astype(np.float32)
    tiles = rng.permutation(oc).reshape(-1, 8)
    for rows in tiles:
        weights[np.ix_(rows, rng.permutation(k)[: int(k * sparsity)])] = 0
    return weights, TiledWeights.from_rows(weights, tiles)


def test_accidental_zeros_and_a_dead_row_do_not_break_tiles():
    rng = np.random.default_rng(0)
    weights, tiled = pruned_layer(rng)
    weights[rng.random(weights.shape) < 0.002] = 0  # in most tiles some rows are whole, some miss a column
    weights[tiled.tiles[3].rows[2]] = 0
    found = discover(weights)
    check(found, weights)
    assert supports(found) == supports(tiled)


def test_accidental_zeros_in_every_row():
    rng = np.random.default_rng(1)
    weights, tiled = pruned_layer(rng)
    weights[rng.random(weights.shape) < 0.03] = 0  # no row shows its tile's support any more
    found = discover(weights)
    check(found, weights)
    assert {np.sort(tile.rows).tobytes() for tile in found.tiles} == {
        np.sort(tile.rows).tobytes() for tile in tiled.tiles
    }


def test_rows_of_one_support_make_one_tile_up_to_the_limit():
    weights = np.zeros((100, 10), np.float32)
    weights[:16, :3] = 1
    weights[16:, 5:] = 1
    found = discover(weights)
    check(found, weights)
    assert [len(tile.rows) for tile in found.tiles] == [16, 48, 36]


def test_groups_are_not_crossed_even_if_supports_agree():
    weights = np.zeros((16, 12), np.float32)
    weights[:, ::3] = 1
    found = discover(weights, 4)
    check(found, weights)
    assert len(found.tiles) == 4


def test_dense_and_almost_dense_matrices_are_dense():
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((96, 300)).astype(np.float32)
    assert discover(weights).is_dense
    weights[rng.random(weights.shape) < 0.03] = 0
    found = discover(weights)
    check(found, weights)
    assert found.is_dense


def test_unstructured_zeros_cost_no_more_than_dense():
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((128, 512)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.5] = 0
    found = discover(weights)
    check(found, weights)
    assert found.is_dense
    weights[rng.random(weights.shape) < 0.95] = 0
    found = discover(weights)
    check(found, weights)
    assert found.kept < 0.2 * weights.size


def test_a_matrix_of_zeros():
    weights = np.zeros((12, 9), np.float32)
    found = discover(weights)
    check(found, weights)
    assert found.kept == 12


def test_dense_tiles():
    weights = np.arange(40, dtype=np.float32).reshape(10, 4) + 1
    tiled = TiledWeights.dense_tiles(weights, 3, groups=2)
    check(tiled, weights)
    assert [len(tile.rows) for tile in tiled.tiles] == [3, 2, 3, 2]
    assert tiled.is_dense and tiled.kept == 40


def test_the_largest_layers_take_seconds():
    rng = np.random.default_rng(4)
    weights, tiled = pruned_layer(rng, 2048, 4608)
    start = time.process_time()
    found = discover(weights)
    assert supports(found) == supports(tiled)
    weights[rng.random(weights.shape) < 0.5] = 0
    check(discover(weights), weights)
    assert time.process_time() - start < 30
