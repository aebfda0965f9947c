"""Which columns a tile keeps by the second-order method: chosen some at a time, then exchanged.

With the damped covariance A of a layer's inputs and the wanted outputs' covariance B with them, a tile that keeps the
columns P gives Σ_rows b_P (A_PP)⁻¹ b_Pᵀ of what is wanted. With A⁻¹ in the place of A and the best dense weights B A⁻¹
in that of B, the same expression is what a tile loses with the columns Q. So what to keep and what to remove are one
question: of all sets S of n columns, which makes

    f(S) = Σ_rows v_S (M_SS)⁻¹ v_Sᵀ

large, or small? Whichever set is the smaller one is looked for.

1. S grows by some columns at a time, those that change f best, with a Cholesky factor of M_SS: n²K / 2 multiply-adds.
2. Columns of S are exchanged for others as long as f gains. The swept matrix (J. H. Goodnight, "A Tutorial on the SWEEP
   Operator", The American Statistician 33, 1979) tells what every column is worth where S is what it is, and what an
   exchange will bring, exactly. Half of S is not exchanged, and of the columns beside it the best are tried.

On what comes of the second step see docs/accuracy-probes.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colonnade.pattern import ColumnPattern
from colonnade.sparsify.arrays import Array, Arrays, NotPositive

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

# Chosen on photos that were not used to calibrate (docs/accuracy-probes.md).
FIRM = 0.5  # of S, that is not exchanged: what was removed first, or what is worth most of what is kept
BESIDE = 0.25  # columns beside S that may come into it, over n
AT_ONCE = 0.2  # exchanges at a time, at most, over what may be exchanged
LEAST = 1e-6  # what an exchange has to bring, over f
EXCHANGES = 16  # rounds of them, at most


@dataclass(frozen=True, eq=False)
class Regression:
    """Of a layer: covariance [K, K] with damping, and its inverse; wanted [OC, K]: the outputs' covariance with the
    inputs, damping included; best [OC, K]: wanted @ inverse, the best dense weights."""

    covariance: Array
    inverse: Array
    wanted: Array
    best: Array


def keep(
    layer: Regression, rows: Array, patterns: Sequence[ColumnPattern], rounds: int, exchanges: int, arrays: Arrays
) -> list[Longs]:
    """The columns that a tile of these rows keeps, ascending, by each of ``patterns``: of one M, each sparser than the
    one before.

    rounds: in which columns are removed from pattern to pattern; where S is what is kept it grows in twice as many.
    exchanges: rounds of these, at most.
    """
    size = layer.covariance.shape[0]
    spans = patterns[0].spans(size)
    widths = np.array([stop - first for first, stop, _ in spans])
    span_of = np.repeat(np.arange(len(spans)), widths)
    kept = [np.array([count for _, _, count in pattern.spans(size)]) for pattern in patterns]
    low = [index for index, counts in enumerate(kept) if 2 * counts.sum() >= size]
    high = [index for index in range(len(kept)) if index not in low][::-1]
    found: dict[int, Longs] = {}
    if low:
        most = int((widths - kept[low[-1]]).sum())
        removed = _Set(layer.inverse, layer.best[rows], False, span_of, most, arrays)
        for index in low:
            removed.grow(widths - kept[index], rounds)
            found[index] = np.setdiff1d(np.arange(size), removed.exchanged(exchanges), assume_unique=True)
    if high:
        most = int(kept[high[-1]].sum())
        stays = _Set(layer.covariance, layer.wanted[rows], True, span_of, most, arrays)
        for index in high:
            stays.grow(kept[index], 2 * rounds)
            found[index] = np.sort(stays.exchanged(exchanges))
    return [found[index] for index in range(len(patterns))]


class _Set:
    """S while it grows: its columns in order, L⁻¹ M_S [n, K] with L the factor of M_SS, L⁻¹ v_Sᵀ [n, rows], and what is
    left of v and of M's diagonal once S is known."""

    def __init__(self, matrix: Array, values: Array, large: bool, spans: Longs, most: int, arrays: Arrays) -> None:
        self.matrix, self.values, self.spans, self.arrays = matrix, values, spans, arrays
        self.sign = 1.0 if large else -1.0
        self.order = np.zeros(0, np.int64)
        self.beside = np.ones(len(spans), bool)
        self.factor = matrix[:most] + 0  # room for all that will come
        self.moved = values.T[:0]
        self.rest, self.power = values + 0, matrix.diagonal() + 0

    def grow(self, counts: Longs, rounds: int) -> None:
        """Up to so many columns of every span."""
        quota = counts - np.bincount(self.spans[self.order], minlength=len(counts))
        rounds = max(1, min(rounds, int(quota.sum())))
        for done in range(rounds):
            left = int(quota.sum())
            if not left:
                return
            new = self._best(quota, -(-left // (rounds - done)))
            quota = quota - np.bincount(self.spans[new], minlength=len(quota))
            self._take(new)

    def worth(self) -> Doubles:
        """What every column beside S would change, the more the better."""
        return np.asarray(self.sign * self.arrays.host((self.rest * self.rest).sum(0) / self.power), np.float64)

    def _best(self, quota: Longs, count: int) -> Longs:
        """The best columns beside S, from no span more than its quota; what is kept of equal ones is on the left."""
        columns = np.flatnonzero(self.beside)
        order = columns[np.lexsort((self.sign * columns, -self.worth()[columns]))]
        order = order[_rank(self.spans[order]) < quota[self.spans[order]]]
        return order[:count]

    def _take(self, new: Longs) -> None:
        arrays, at, n = self.arrays, self.arrays.index(new), len(self.order)
        before = self.factor[:n]
        rows = self.matrix[at] - arrays.inner(before[:, at], before)
        lower = arrays.factor(rows[:, at])
        fresh = arrays.forward(lower, rows)
        move = arrays.forward(lower, self.rest[:, at].T)
        self.rest = self.rest - arrays.inner(move, fresh)
        # Rounding may eat a diagonal that is almost used up: nothing can be told about such a column.
        self.power = (self.power - (fresh * fresh).sum(0)).clip(1e-12)
        self.factor[n : n + len(new)] = fresh
        self.moved = arrays.join([self.moved, move], 0)
        self.order = np.concatenate([self.order, new])
        self.beside[new] = False

    def exchanged(self, most: int) -> Longs:
        """S after exchanges, `most` times at most; it grows on as if there had been none."""
        n = len(self.order)
        firm = int(FIRM * n) if self.sign < 0 else 0
        loose, beside = self.order[firm:], np.flatnonzero(self.beside)
        tried = beside[np.argsort(-self.worth()[beside], kind="stable")[: math.ceil(BESIDE * n)]]
        if not most or not len(loose) or not len(tried):
            return self.order
        arrays, columns = self.arrays, np.concatenate([loose, tried])
        at = arrays.index(columns)
        part, moved = self.factor[:firm][:, at], self.moved[:firm]
        matrix = self.matrix[at][:, at] - arrays.inner(part, part)
        values = self.values[:, at] - arrays.inner(moved, part)
        swept = _Swept(columns, matrix, values, self.sign, self.spans[columns], arrays)
        least = LEAST * float((self.moved * self.moved).sum())
        step = math.ceil(AT_ONCE * len(loose))
        try:
            swept.begin(len(loose))
            for _ in range(most):
                step = swept.exchange(step, least)
                if not step:
                    break
        except NotPositive:  # rounding: S is as good as it is
            pass
        return np.concatenate([self.order[:firm], swept.chosen()])


class _Swept:
    """[[M, vᵀ], [v, 0]] of some columns, swept by those that are inside S: beside S what is left of M and v, inside it
    -(M_SS)⁻¹ and the weights."""

    def __init__(self, columns: Longs, matrix: Array, values: Array, sign: float, spans: Longs, arrays: Arrays) -> None:
        self.arrays, self.sign, self.columns, self.spans = arrays, sign, columns, spans
        corner = values @ values.T * 0
        upper, below = arrays.join([matrix, values.T], 1), arrays.join([values, corner], 1)
        self.all = arrays.join([upper, below], 0)
        self.inside = np.zeros(len(columns), bool)
        self.firm = columns[:0]

    @property
    def size(self) -> int:
        """Columns."""
        return len(self.columns)

    def chosen(self) -> Longs:
        """Those inside S."""
        return np.concatenate([self.firm, self.columns[self.inside]])

    def begin(self, n: int) -> None:
        """The first n columns come into S, where it is what is kept some to stay."""
        self.inside[:n] = True
        self.sweep(np.arange(n), 1.0)
        if self.sign < 0:
            return
        weights = self.arrays.host(self.all[self.size :, :n])
        worth = (weights * weights).sum(0) / -self.arrays.host(self.all.diagonal())[:n]
        order = np.argsort(-worth, kind="stable")[: int(FIRM * n)]
        self.firm = self.columns[order]
        left = np.setdiff1d(np.arange(self.size), order, assume_unique=True)
        at = self.arrays.index(np.concatenate([left, np.arange(self.size, len(self.all))]))
        self.all = self.all[at][:, at]
        self.columns, self.spans, self.inside = self.columns[left], self.spans[left], self.inside[left]

    def sweep(self, columns: Longs, sign: float) -> None:
        """These columns come into S (1), or go (-1)."""
        arrays, at = self.arrays, self.arrays.index(columns)
        rows = self.all[at]
        lower = arrays.factor(sign * rows[:, at])
        half = arrays.forward(lower, rows)
        solved = arrays.backward(lower, half)
        inverse = arrays.backward(lower, arrays.forward(lower, self._eye(len(columns))))
        self.all -= sign * arrays.inner(half, half)
        self.all[at] = solved
        self.all[:, at] = solved.T
        self.all[at[:, None], at[None, :]] = -sign * inverse

    def _eye(self, size: int) -> Array:
        return self.arrays.eye(size) + self.all[:1, :1] * 0  # of the same kind of floats

    def exchange(self, step: int, least: float) -> int:
        """Exchange up to `step` pairs of columns, fewer where these would spoil each other; how many may be tried next,
        0 where nothing is left to gain."""
        out, into = self._pairs()
        while step := min(step, len(out)):
            some, others = out[:step], into[:step]
            if self.sign * self._brings(some, others) > least:
                self.sweep(others, 1.0)
                self.sweep(some, -1.0)
                self.inside[others], self.inside[some] = True, False
                return step
            step //= 2
        return 0

    def _pairs(self) -> tuple[Longs, Longs]:
        """Columns that had better go and those of their spans that had better come in their places, the best exchange
        first: each in one only, with whom it gains most."""
        host, size = self.arrays.host, self.size
        inside, beside = np.flatnonzero(self.inside), np.flatnonzero(~self.inside)
        here, there = self.arrays.index(inside), self.arrays.index(beside)
        rows = self.all[here]
        both, left = host(rows[:, there]), host(rows[:, size:])  # S's inverse times what is beside it, and its weights
        right = host(self.all[size:][:, there])
        diagonal = host(self.all.diagonal())
        mine, theirs = diagonal[inside][:, None], diagonal[beside]
        # u H⁻¹ uᵀ with H and u what stands in the matrix for the two
        gain = (left * left).sum(1)[:, None] * theirs + (right * right).sum(0) * mine - 2 * both * (left @ right)
        gain = self.sign * gain / np.minimum(mine * theirs - both * both, -1e-30)
        gain[self.spans[inside][:, None] != self.spans[beside]] = 0
        best = gain.argmax(1)
        most = gain[np.arange(len(inside)), best]
        order = np.argsort(-most, kind="stable")
        order = order[most[order] > 0]
        order = order[np.sort(np.unique(best[order], return_index=True)[1])]
        return inside[order], beside[best[order]]

    def _brings(self, out: Longs, into: Longs) -> float:
        """What f changes by when the columns `out` go and `into` come."""
        arrays, size, n = self.arrays, self.size, len(out)
        gone, come = arrays.index(out), arrays.index(into)
        rows = self.all[come]
        right = arrays.join([rows[:, gone], rows[:, size:]], 1)
        half = arrays.forward(arrays.factor(rows[:, come]), right)
        inner = arrays.inner(half, half)
        rows = self.all[gone]
        lost = arrays.forward(arrays.factor(inner[:n, :n] - rows[:, gone]), rows[:, size:] - inner[:n, n:])
        return float(inner[n:, n:].diagonal().sum()) - float((lost * lost).sum())


def _rank(groups: Longs) -> Longs:
    """Of every element, how many of its group stand before it."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=1)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank
