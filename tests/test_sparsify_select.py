"""Row grouping and column choice."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, consecutive_rows
from colonnade.sparsify.select import as_matrix, from_matrix, prune_weight, score_weights, select

LOADERS = Path(__file__).parents[2] / "shared" / "data" / "loaders"


def check(selection, pattern, rows, columns, groups):
    np.testing.assert_array_equal(np.sort(np.concatenate(selection.rows)), np.arange(rows))
    span = rows // groups
    kept = pattern.kept(columns)
    for group in range(groups):
        sizes = sorted(len(tile) for tile in selection.rows if tile[0] // span == group)
        full, rest = divmod(span, pattern.tile)
        assert sizes == sorted([pattern.tile] * full + [rest] * (rest > 0)), "ragged tiles"
    for tile in selection.rows:
        assert len(set(tile // span)) == 1, "a tile crosses a convolution group"
        assert (selection.mask[tile] == selection.mask[tile[0]]).all(), "rows of a tile differ"
        assert selection.mask[tile[0]].sum() == kept
        for first, stop, n in pattern.spans(columns):
            assert selection.mask[tile[0], first:stop].sum() == n


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    span=st.integers(1, 45),
    groups=st.sampled_from([1, 1, 1, 2, 4]),
    columns=st.one_of(st.sampled_from([27, 147, 150, 320]), st.integers(1, 70)),
    tile=st.integers(1, 32),
    sparsity=st.floats(0, 0.95),
    group=st.one_of(st.none(), st.integers(1, 40)),
    score=st.sampled_from(["l1", "l2"]),
    levels=st.sampled_from([1, 2, 5, 10**6]),
)
def test_tiles_are_never_ragged(seed, span, groups, columns, tile, sparsity, group, score, levels):
    rows = span * groups
    # Few levels: most scores tie.
    weights = np.random.default_rng(seed).integers(-levels, levels + 1, (rows, columns)).astype(np.float32)
    pattern = ColumnPattern(sparsity, tile, group)
    grouped = select(weights, pattern, groups=groups, score=score)
    plain = select(weights, pattern, groups=groups, score=score, similar_rows=False)
    check(grouped, pattern, rows, columns, groups)
    check(plain, pattern, rows, columns, groups)
    for tile_rows, expected in zip(plain.rows, consecutive_rows(rows, tile, groups), strict=True):
        np.testing.assert_array_equal(tile_rows, expected)
    assert grouped.retained >= plain.retained - 1e-5
    again = select(weights, pattern, groups=groups, score=score)
    np.testing.assert_array_equal(grouped.mask, again.mask)


def test_ties_go_to_the_left():
    mask = select(np.ones((8, 12)), ColumnPattern(0.75, 8, 6)).mask
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), [0, 1, 6, 7])


def test_the_best_columns_are_kept_by_l1_and_l2():
    weights = np.zeros((2, 4), np.float32)
    weights[:, 1], weights[0, 2] = 3, 5  # sums 6 and 5, squares 18 and 25
    for score, column in (("l1", 1), ("l2", 2)):
        chosen = select(weights, ColumnPattern(0.75, 2), score=score)
        np.testing.assert_array_equal(np.flatnonzero(chosen.mask[0]), [column])


def test_unknown_score():
    with pytest.raises(UserError, match="score"):
        select(np.ones((2, 2)), ColumnPattern(0.5), score="l3")


def test_huge_and_tiny_weights_do_not_overflow_the_squares():
    assert np.isfinite(score_weights(np.array([[1e38, 1e-38]]), "l2")).all()
    assert np.isfinite(score_weights(np.zeros((2, 2)), "l2")).all()


def test_hidden_tiles_are_found():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((128, 96)) * 0.05
    order = rng.permutation(128).reshape(-1, 8)
    for rows in order:
        weights[np.ix_(rows, rng.permutation(96)[:24])] += 1
    grouped = select(weights, ColumnPattern(0.75, 8))
    assert {tuple(sorted(rows)) for rows in order.tolist()} == {tuple(sorted(rows.tolist())) for rows in grouped.rows}


def test_k_runs_in_the_order_kh_kw_ic():
    weight = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32)
    matrix = as_matrix(weight)
    assert matrix[1, (2 * 5 + 3) * 3 + 1] == weight[1, 1, 2, 3]
    np.testing.assert_array_equal(from_matrix(matrix, weight.shape), weight)


@pytest.mark.parametrize("shape", [(20, 6, 3, 3), (20, 12), (20, 6, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_prune_weight_zeroes_in_place_and_keeps_the_rest(shape, dtype):
    weight = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    weight[weight == 0] = 1
    before = weight.copy()
    pruned, tiles = prune_weight(weight, ColumnPattern(0.75, 8), groups=2)
    np.testing.assert_array_equal(weight, before)
    assert pruned.dtype == dtype and pruned.shape == shape
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])
    assert sorted(len(tile) for tile in tiles) == [2, 2, 8, 8]
    k = int(np.prod(shape[1:]))
    assert (as_matrix(pruned) != 0).sum(axis=1).tolist() == [ColumnPattern(0.75).kept(k)] * 20


@pytest.mark.skipif(not LOADERS.is_dir(), reason="real weights are not here")
def test_grouping_keeps_more_of_a_real_network(monkeypatch):
    monkeypatch.syspath_prepend(str(LOADERS))
    pytest.importorskip("torch")
    import weights as loaders

    network = loaders.resnet("pqf_resnet18")
    for name in ("layer1.0.conv1", "layer2.1.conv2", "layer3.0.downsample.0"):
        matrix = as_matrix(network.get_submodule(name).weight.detach().numpy())
        for sparsity in (0.5, 0.75):
            pattern = ColumnPattern(sparsity, 8)
            plain, grouped = (select(matrix, pattern, similar_rows=similar).retained for similar in (False, True))
            assert grouped > plain * 1.01, name
    sys.modules.pop("weights", None)
