"""Which columns a tile keeps: against exact least squares, column by column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade.pattern import ColumnPattern
from colonnade.sparsify import columns
from colonnade.sparsify.arrays import NumpyArrays, host_arrays
from colonnade.sparsify.columns import Regression, keep

ARRAYS = [NumpyArrays(), host_arrays()]


def regression(rows: int, size: int, seed: int = 0) -> Regression:
    """Correlated inputs, so that a column can stand for others."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((4 * size, size)) @ (np.eye(size) + 0.6 * random.standard_normal((size, size)))
    covariance = x.T @ x / len(x) + 0.01 * np.eye(size)
    best = random.standard_normal((rows, size))
    return Regression(covariance, np.linalg.inv(covariance), best @ covariance, best)


def loss(layer: Regression, kept: list[int]) -> float:
    """What the best weights on these columns do not give."""
    part = layer.covariance[np.ix_(kept, kept)]
    given = np.trace(layer.wanted[:, kept] @ np.linalg.solve(part, layer.wanted[:, kept].T)) if kept else 0.0
    return float(np.trace(layer.wanted @ layer.best.T) - given)


@pytest.mark.parametrize("arrays", ARRAYS)
def test_one_column_at_a_time_is_the_surgeon_s_greedy_choice(arrays):
    layer = regression(4, 12)
    left = list(range(12))
    while len(left) > 7:
        left.remove(min(left, key=lambda column: loss(layer, [other for other in left if other != column])))
    assert keep(layer, np.arange(4), [ColumnPattern(5 / 12, 4)], 5, 0, arrays)[0].tolist() == left
    chosen: list[int] = []
    while len(chosen) < 4:
        chosen.append(min(set(range(12)) - set(chosen), key=lambda column: loss(layer, [*chosen, column])))
    assert keep(layer, np.arange(4), [ColumnPattern(8 / 12, 4)], 4, 0, arrays)[0].tolist() == sorted(chosen)


@given(
    rows=st.integers(1, 9), size=st.integers(2, 40), sparsity=st.floats(0, 0.95), group=st.sampled_from([None, 4, 7]),
    rounds=st.integers(1, 6), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_exchanges_keep_the_pattern_and_never_lose(rows, size, sparsity, group, rounds, seed):
    layer = regression(rows, size, seed)
    pattern = ColumnPattern(sparsity, rows, group)
    before, after = (keep(layer, np.arange(rows), [pattern], rounds, most, ARRAYS[0])[0] for most in (0, 20))
    for kept in (before, after):
        assert len(np.unique(kept)) == len(kept) and (np.diff(kept) > 0).all()
        for first, stop, count in pattern.spans(size):
            assert ((kept >= first) & (kept < stop)).sum() == count
    assert loss(layer, list(after)) <= loss(layer, list(before)) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("sparsity", [0.4, 0.7])
@pytest.mark.parametrize("arrays", ARRAYS)
def test_in_the_end_no_exchange_of_two_columns_is_better(sparsity, arrays, monkeypatch):
    monkeypatch.setattr(columns, "FIRM", 0.0)
    monkeypatch.setattr(columns, "BESIDE", 100.0)
    gained = 0
    for seed in range(5):
        layer, pattern = regression(3, 20, seed), ColumnPattern(sparsity, 3)
        kept = keep(layer, np.arange(3), [pattern], 1, 1000, arrays)[0].tolist()
        gained += kept != keep(layer, np.arange(3), [pattern], 1, 0, arrays)[0].tolist()
        now = loss(layer, kept)
        for out in kept:
            for into in set(range(20)) - set(kept):
                assert loss(layer, [into if column == out else column for column in kept]) >= now * (1 - 1e-5)
    assert gained >= 3


def test_several_patterns_at_once_are_what_each_is_alone():
    """Where every round takes one column, nothing depends on the patterns before."""
    layer = regression(4, 24)
    patterns = [ColumnPattern(sparsity, 4) for sparsity in (0.0, 0.25, 0.5, 0.75, 0.875)]
    found = keep(layer, np.arange(4), patterns, 24, 8, ARRAYS[0])
    for pattern, kept in zip(patterns, found, strict=True):
        assert kept.tolist() == keep(layer, np.arange(4), [pattern], 24, 8, ARRAYS[0])[0].tolist()


def test_in_single_precision_and_on_torch_the_losses_are_the_same():
    torch = pytest.importorskip("torch")
    from colonnade.sparsify.arrays import TorchArrays

    layer = regression(8, 150)
    single = Regression(
        *(np.asarray(x, np.float32) for x in (layer.covariance, layer.inverse, layer.wanted, layer.best))
    )
    on_torch = Regression(*map(torch.from_numpy, (single.covariance, single.inverse, single.wanted, single.best)))
    for sparsity in (0.3, 0.8):
        patterns, rows = [ColumnPattern(sparsity, 8)], np.arange(8)
        exact = loss(layer, list(keep(layer, rows, patterns, 16, 12, ARRAYS[0])[0]))
        for known, arrays in ((single, ARRAYS[1]), (on_torch, TorchArrays(torch.device("cpu")))):
            found = keep(known, arrays.index(rows), patterns, 16, 12, arrays)[0]
            assert loss(layer, list(found)) == pytest.approx(exact, rel=0.03)
