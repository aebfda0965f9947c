"""Second-order column selection and the weights that make up for what was removed.

A layer is seen as a regression: from the inputs x̃ it gets once everything before it is pruned, reproduce the outputs
y that the dense model has there. With the covariances A = cov(x̃) and C = cov(y, x̃), the best dense weights are
W* = C A⁻¹, and a tile that loses the columns Q loses exactly

    Σ_rows w*_Q ([A⁻¹]_QQ)⁻¹ w*_Qᵀ

of its fit (the optimal brain surgeon, for all rows of a tile at once). All tiles start from one inverse; which columns
each keeps is found by exact losses (`columns`). At the end the weights are solved from A itself.

With y from dense and x̃ from pruned inputs this also makes up for the errors of earlier layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from colonnade.pattern import ColumnPattern, Floats, Ints, consecutive_rows
from colonnade.sparsify.arrays import Array, Arrays, NotPositive
from colonnade.sparsify.columns import EXCHANGES, Regression, keep
from colonnade.sparsify.moments import Damping, Moments
from colonnade.sparsify.select import select_columns, similar_tiles

# Chosen on training images (see docs/accuracy-probes.md).
ROUNDS = 16
# What a layer's damping is chosen from, first the plain part and then the other, and on how many of its tiles.
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
ALIKE = (0.3, 1.0, 3.0)
# The plain part beside the other, as a share of what would be best alone.
PLAIN = 0.1
# Of dampings whose errors differ by a smaller share, the one with the largest part `alike` is taken: it leaves smaller
# errors in the mean over an input's pixels, and those do not average out in the layers behind.
CLOSE = 0.01
TRIAL_TILES = 4
# What `Solution.spread` multiplies a row by, at most: one that gives almost nothing of what is wanted gives noise.
MOST_GAIN = 2.0
# Bytes of a layer's Cholesky factors of kept columns that wait for its refits; the others are computed anew.
FACTOR_BYTES = 384 << 20
# Up to here double precision costs little; past it single precision with damping is what the time allows.
DOUBLE_COLUMNS = 640


@dataclass(frozen=True, eq=False)
class Solution:
    """weights: float32 [OC, K] with exact zeros; bias: float32 [OC], what is to be added to the layer's output;
    rows, kept: rows and columns of every tile; mask: bool [OC, K]; explained: share of the outputs' variance that is
    reproduced; system: what the weights are the solution of."""

    weights: Floats
    bias: Floats
    rows: tuple[Ints, ...]
    kept: tuple[npt.NDArray[np.int64], ...]
    mask: npt.NDArray[np.bool_]
    explained: float
    system: _System

    def towards(self, cross: Array, outputs: Array) -> Solution:
        """The same columns, fitted to other outputs for the same inputs; cross, outputs: as in `Moments`."""
        self.system.aim(cross, outputs)
        solved = np.zeros_like(self.weights)
        for number, (members, kept) in enumerate(zip(self.rows, self.kept, strict=True)):
            solved[np.ix_(members, kept)] = self.system.fit(members, kept, number)
        return replace(self, weights=solved, bias=self.system.bias(solved))

    def spread(self, share: float) -> Solution:
        """Each row grown until its outputs are spread as the wanted ones (share 1), or only part of the way there. A
        fit gives less than what was wanted, the less the worse it is; its mean stays."""
        gain = self.system.lacking(self.weights) ** share
        grown = np.asarray(self.weights * gain[:, None], np.float32)
        moved = (self.weights - grown) @ self.system.arrays.host(self.system.mean_in)
        return replace(self, weights=grown, bias=np.asarray(self.bias + moved, np.float32))


def choose_damping(
    weights: Floats,
    known: Moments,
    fresh: Moments,
    pattern: ColumnPattern,
    arrays: Arrays,
    *,
    intercept: bool = True,
    taps: int = 1,
) -> Damping:
    """The damping with which a few tiles, fitted to `known` samples, give the wanted outputs of `fresh` ones best: the
    more of it, the fewer samples stand behind a column. The tiles keep the columns of the strongest contributions.

    taps: kernel positions, the columns of which follow one another; with one only there is no `alike`.
    """
    tiles = consecutive_rows(len(weights), pattern.tile)
    tiles = [tiles[at] for at in np.unique(np.linspace(0, len(tiles) - 1, TRIAL_TILES).astype(int))]
    system = _System(weights, known, arrays, intercept, taps)
    power = np.maximum(arrays.host(system.covariance.diagonal()), 0)
    keep = [np.flatnonzero(select_columns((weights[rows] ** 2).sum(0) * power, pattern)) for rows in tiles]
    tried = np.concatenate(tiles)
    wanted = fresh.of_rows(arrays.index(tried.astype(np.int64)))

    def error(damping: Damping) -> float:
        system.damp(damping)
        solved = np.zeros(weights.shape, np.float32)
        try:
            for rows, kept in zip(tiles, keep, strict=True):
                solved[np.ix_(rows, kept)] = system.fit(rows, kept)
        except NotPositive:
            return math.inf
        return unexplained(solved[tried], system.bias(solved)[tried], wanted, arrays)

    errors = {damping: error(damping) for damping in map(Damping, DAMPINGS)}
    chosen = min(errors, key=lambda damping: errors[damping])
    if taps > 1:
        errors.update({damping: error(damping) for damping in (Damping(PLAIN * chosen.plain, a) for a in ALIKE)})
        least = min(errors.values())
        close = [damping for damping, value in errors.items() if value <= least + CLOSE * abs(least)]
        chosen = max(close, key=lambda damping: (damping.alike, -errors[damping]))
    return chosen


def unexplained(weights: Floats, bias: Floats, moments: Moments, arrays: Arrays) -> float:
    """Share of the wanted outputs' variance that weights [OC, K] with this bias do not give on these samples."""
    n = max(moments.count, 1)
    w, b = arrays.load(weights), arrays.load(bias)
    error = float(((w @ moments.gram) * w).sum() - 2 * (w * moments.cross).sum() + moments.squares.sum()) / n
    error += float((b * (2 * (w @ moments.inputs) - 2 * moments.outputs)).sum()) / n + float((b * b).sum())
    mean = moments.outputs / n
    return error / max(float((moments.squares / n - mean * mean).sum()), 1e-30)


def solve(
    weights: Floats,
    moments: Moments,
    pattern: ColumnPattern,
    arrays: Arrays,
    *,
    similar_rows: bool = True,
    tiles: Sequence[Ints] | None = None,
    intercept: bool = True,
    damping: Damping | float | None = None,
    taps: int = 1,
    rounds: int = ROUNDS,
    exchanges: int = EXCHANGES,
    refits: bool = False,
) -> Solution:
    """Prune one layer's matrix [OC, K] (of one convolution group) and fit what is kept.

    weights:   the dense weights; where inputs say nothing, the solution stays with them.
    tiles:     rows of every tile; found by the columns' importance when left out (neighbours without `similar_rows`).
    intercept: whether a bias may be added to the outputs.
    damping:   of the covariance; a number is a plain one.
    taps:      kernel positions, the columns of which follow one another.
    rounds, exchanges: see `columns.keep`.
    refits:    whether `Solution.towards` is to follow: it is quicker then, and takes memory (FACTOR_BYTES).
    """
    return solve_each(
        weights, moments, [pattern], arrays, grouped_for=pattern if similar_rows else None, tiles=tiles,
        intercept=intercept, damping=damping, taps=taps, rounds=rounds, exchanges=exchanges, refits=refits,
    )[0]  # fmt: skip


def solve_each(
    weights: Floats,
    moments: Moments,
    patterns: Sequence[ColumnPattern],
    arrays: Arrays,
    *,
    grouped_for: ColumnPattern | None,
    tiles: Sequence[Ints] | None = None,
    intercept: bool = True,
    damping: Damping | float | None = None,
    taps: int = 1,
    rounds: int = ROUNDS,
    exchanges: int = EXCHANGES,
    refits: bool = False,
    every: int = 1,
) -> list[Solution]:
    """`solve` for several patterns of one tile and one M, each sparser than the one before, in one go.

    grouped_for: the pattern that rows are grouped for; None: neighbours share a tile. rounds: of every pattern. refits:
    with one pattern only, as tiles' factors are kept. every: only every so many tiles are pruned, the other rows stay.
    """
    system = _System(weights, moments, arrays, intercept, taps)
    system.room = FACTOR_BYTES if refits else 0
    damping = Damping() if damping is None else damping
    system.invert(damping if isinstance(damping, Damping) else Damping(damping))
    if tiles is None:
        tiles = _tiles(system, grouped_for or patterns[0], grouped_for is not None)
    tiles = tiles[::every]
    known = Regression(system.damped, system.inverse, system.target, system.best)
    members = [arrays.index(rows.astype(np.int64)) for rows in tiles]
    kept = [keep(known, rows, patterns, rounds, exchanges, arrays) for rows in members]
    del known
    system.forget()
    return [_fitted(system, tiles, [steps[at] for steps in kept]) for at in range(len(patterns))]


def _fitted(system: _System, rows: Sequence[Ints], kept: Sequence[npt.NDArray[np.int64]]) -> Solution:
    """The weights for these columns of every tile; rows of none are as they were."""
    solved = np.array(system.arrays.host(system.weights), np.float32)
    mask = np.ones(solved.shape, bool)
    untouched = np.ones(len(solved), bool)
    for number, (members, columns) in enumerate(zip(rows, kept, strict=True)):
        mask[members], solved[members], untouched[members] = False, 0, False
        mask[np.ix_(members, columns)] = True
        solved[np.ix_(members, columns)] = system.fit(members, columns, number)
    bias = np.where(untouched, np.float32(0), system.bias(solved))
    return Solution(solved, bias, tuple(rows), tuple(kept), mask, system.explained(solved), system)


class _System:
    """The regression of one layer, scaled so that the mean diagonal of A is one."""

    def __init__(self, weights: Floats, moments: Moments, arrays: Arrays, intercept: bool, taps: int = 1) -> None:
        self.arrays, self.taps = arrays, taps
        n = self.count = max(moments.count, 1)
        self.mean_in = moments.inputs / n
        self.mean_out = moments.outputs / n
        covariance = moments.gram / n
        cross = moments.cross / n
        power = moments.squares / n
        if intercept:
            covariance = covariance - self.mean_in[:, None] * self.mean_in[None, :]
            cross = cross - self.mean_out[:, None] * self.mean_in[None, :]
            power = power - self.mean_out * self.mean_out
        self.intercept = intercept
        size = covariance.shape[0]
        precise = arrays.double if size <= DOUBLE_COLUMNS else arrays.single
        mean = float(covariance.diagonal().sum()) / size
        scale = self.scale = mean if np.isfinite(mean) and mean > 1e-30 else 1.0
        self.covariance = precise(covariance) / scale
        self.cross = precise(cross) / scale
        self.power = arrays.host(power) / scale
        self.weights = precise(arrays.load(np.asarray(weights, np.float32)))
        self.size, self.precise = size, precise
        self.factors: dict[int, Array] = {}
        self.room = 0  # bytes, for factors

    def damp(self, damping: Damping) -> None:
        """A with damping. What the inputs leave open is decided by the dense weights."""
        self.damped = self.covariance + 0
        self.damped.reshape(-1)[:: self.size + 1] += damping.plain  # its diagonal; no other matrix of A's size is made
        self.pull = damping.plain * self.weights  # what the damping adds to the wanted outputs' covariance
        if damping.alike > 0 and self.taps > 1:
            self._add_alike(damping.alike)
        self.target = self.cross + self.pull

    def _add_alike(self, share: float) -> None:
        """The damping that treats kernel positions alike, block by block for the same reason."""
        taps, size = self.taps, self.size // self.taps
        parts = [slice(tap * size, (tap + 1) * size) for tap in range(taps)]
        channels = sum(self.covariance[part, part] for part in parts) / taps
        channels = channels * (share / max(float(channels.diagonal().sum()) / size, 1e-30))
        blocks = [self.weights[:, part] @ channels for part in parts]
        for one in parts:
            for other, block in zip(parts, blocks, strict=True):
                together = float(self.covariance[one, other].diagonal().sum()) / size
                self.damped[one, other] += together * channels
                self.pull[:, one] += together * block

    def invert(self, damping: Damping) -> None:
        """A with damping, its inverse and the best dense weights; more damping where rounding makes A indefinite."""
        for _ in range(8):
            self.damp(damping)
            try:
                lower = self.arrays.factor(self.damped)
            except NotPositive:
                damping = replace(damping, plain=max(10 * damping.plain, 1e-6))
                continue
            self.inverse = self.arrays.inverse(lower)
            del lower
            self.best = self.target @ self.inverse
            return
        raise NotPositive("the inputs' covariance is not positive however much damping it gets")

    def forget(self) -> None:
        """Free what only the choice of columns needs."""
        del self.inverse, self.best

    def aim(self, cross: Array, outputs: Array) -> None:
        """Fit to other outputs from now on, with their sums as in `Moments`."""
        self.mean_out = outputs / self.count
        cross = cross / self.count
        if self.intercept:
            cross = cross - self.mean_out[:, None] * self.mean_in[None, :]
        self.target = self.precise(cross) / self.scale + self.pull

    def importance(self) -> Floats:
        """What removing one column alone costs each row, [OC, K]."""
        return np.asarray(self.arrays.host(self.best * self.best / self.inverse.diagonal()[None, :]), np.float32)

    def fit(self, rows: Ints, kept: npt.NDArray[np.int64], number: int | None = None) -> Floats:
        """The best weights [rows, kept] on the kept columns. number: of a tile that always has these rows, columns and
        damping."""
        at, members = self.arrays.index(kept), self.arrays.index(rows.astype(np.int64))
        lower = None if number is None else self.factors.get(number)
        if lower is None:
            lower = self.arrays.factor(self.damped[at][:, at])
            if number is not None and int(lower.nbytes) <= self.room:
                self.room -= int(lower.nbytes)
                self.factors[number] = lower
        right = self.target[members][:, at].T
        solved = self.arrays.backward(lower, self.arrays.forward(lower, right)).T
        return np.asarray(self.arrays.host(solved), np.float32)

    def bias(self, solved: Floats) -> Floats:
        """Mean of the wanted outputs that the weights leave out."""
        if not self.intercept:
            return np.zeros(len(solved), np.float32)
        return np.asarray(self.arrays.host(self.mean_out) - solved @ self.arrays.host(self.mean_in), np.float32)

    def lacking(self, solved: Floats) -> Floats:
        """By how much the spread of every row's outputs falls short of the wanted one's: 1 to MOST_GAIN."""
        weights = self.precise(self.arrays.load(solved))
        given = self.arrays.host(((weights @ self.covariance) * weights).sum(1))
        ratio = np.sqrt(np.maximum(self.power, 0) / np.maximum(given, 1e-30))
        return np.asarray(np.clip(ratio, 1, MOST_GAIN), np.float32)

    def explained(self, solved: Floats) -> float:
        weights = self.precise(self.arrays.load(solved))
        error = (weights @ self.covariance * weights).sum() - 2 * (weights * self.cross).sum()
        total = float(self.power.sum())
        return -float(error) / total if total > 0 else 1.0


def _tiles(system: _System, pattern: ColumnPattern, similar_rows: bool) -> list[Ints]:
    count = len(system.weights)
    if not similar_rows:
        return consecutive_rows(count, pattern.tile)
    # The search compares sums of scores; their scale is free.
    scores = system.importance()
    return similar_tiles(scores / max(float(scores.max(initial=0.0)), 1e-30), pattern)
