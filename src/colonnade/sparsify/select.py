"""Which rows form a tile and which columns a tile keeps: scores, row grouping, column choice. numpy only.

A tile keeps the columns with the largest summed score, so its retained score is the sum of the largest entries of
C = sum of its rows' scores: rows with similar columns belong together. Tiles have exactly `tile` rows but for the
last of a convolution group; which rows stand together costs nothing at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats, Ints, consecutive_rows, group_rows

Score = Literal["l1", "l2"]
SCORES: tuple[Score, ...] = ("l1", "l2")

# Rows that are grouped at once; more (a vocabulary) are grouped in blocks, as the search holds matrices of rows².
SEARCH_ROWS = 2048
BLOCK = 64  # rows of such a matrix that a second cache holds
# Limits of the search. They count work, not seconds, so that results do not depend on the machine.
PAIR_ROUNDS = 300
EXACT_ROUNDS = 30
EXACT_WORK = 1.5e11


@dataclass(frozen=True, eq=False)
class Selection:
    """rows: int32[T] of every tile; mask: bool [OC, K], True where a weight stays; retained: share of the score."""

    rows: tuple[Ints, ...]
    mask: npt.NDArray[np.bool_]
    retained: float


def score_weights(weights: npt.ArrayLike, score: str = "l1") -> Floats:
    """|w| or w² of every weight, scaled so that no square overflows. Raises UserError for another score."""
    if score not in SCORES:
        raise UserError(f"score is {score!r}: expected one of {', '.join(SCORES)}")
    size = np.abs(np.asarray(weights, np.float32))
    size = size / max(float(size.max(initial=0.0)), np.finfo(np.float32).tiny)
    return np.asarray(size if score == "l1" else size * size, np.float32)


def select(
    weights: npt.ArrayLike,
    pattern: ColumnPattern,
    *,
    groups: int = 1,
    score: str = "l1",
    similar_rows: bool = True,
) -> Selection:
    """Tiles and kept columns of a matrix [OC, K]; every tile keeps pattern.kept(K) columns, ties go to the left."""
    return select_by_score(score_weights(weights, score), pattern, groups=groups, similar_rows=similar_rows)


def select_by_score(scores: Floats, pattern: ColumnPattern, *, groups: int = 1, similar_rows: bool = True) -> Selection:
    """As `select`, from any score [OC, K] that is not negative."""
    rows = (
        similar_tiles(scores, pattern, groups) if similar_rows else consecutive_rows(len(scores), pattern.tile, groups)
    )
    mask = np.zeros(scores.shape, bool)
    for tile in rows:
        mask[tile] = select_columns(scores[tile].sum(axis=0), pattern)
    total = float(scores.sum(dtype=np.float64))
    retained = float(np.where(mask, scores, 0).sum(dtype=np.float64)) / total if total > 0 else 1.0
    return Selection(tuple(rows), mask, retained)


def prune_weight(
    weight: npt.NDArray[Any],
    pattern: ColumnPattern,
    groups: int = 1,
    score: str = "l1",
    group_rows: bool = True,
) -> tuple[npt.NDArray[Any], list[Ints]]:
    """Prune one weight [OC, IC/groups, KH, KW] (any number of kernel axes) or [OC, IC].

    Returns the weight with its dtype and exact zeros in place, and the rows of every tile.
    """
    selection = select(as_matrix(weight), pattern, groups=groups, score=score, similar_rows=group_rows)
    return np.where(from_matrix(selection.mask, weight.shape), weight, np.zeros((), weight.dtype)), list(selection.rows)


def as_matrix(weight: npt.NDArray[Any]) -> Floats:
    """A weight [OC, IC/groups, KH, KW] as float32 [OC, K], K in the order (kh, kw, ic)."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1).astype(np.float32)


def from_matrix(matrix: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The inverse of `as_matrix`, for a weight of this shape."""
    return np.moveaxis(matrix.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def select_columns(column_scores: Floats, pattern: ColumnPattern) -> npt.NDArray[np.bool_]:
    """Columns that a tile with these scores [K] keeps."""
    keep = np.zeros(len(column_scores), bool)
    for first, stop, kept in pattern.spans(len(column_scores)):
        keep[first + np.argsort(-column_scores[first:stop], kind="stable")[:kept]] = True
    return keep


def similar_tiles(scores: Floats, pattern: ColumnPattern, groups: int = 1) -> list[Ints]:
    """Tiles of rows with similar scores [OC, K]; never worse than consecutive rows, never across groups."""
    span = group_rows(len(scores), groups)
    block = max(SEARCH_ROWS // pattern.tile, 1) * pattern.tile
    tiles: list[Ints] = []
    for base in range(0, len(scores), span):
        for first in range(base, base + span, block):
            part = scores[first : min(first + block, base + span)]
            tiles += [tile + np.int32(first) for tile in _group(part, pattern)]
    return sorted(tiles, key=lambda tile: int(tile[0]))


def _group(scores: Floats, pattern: ColumnPattern) -> list[Ints]:
    """Tiles of one block of rows."""
    count, tile = len(scores), pattern.tile
    consecutive = np.arange(count) // tile
    kept = pattern.kept(scores.shape[1])
    if tile == 1 or count <= tile or kept == scores.shape[1]:
        return _members(consecutive)
    labels = _pair_up(_affinity(scores, kept), consecutive.copy())
    rounds = min(EXACT_ROUNDS, int(EXACT_WORK / (count * count * scores.shape[1])))
    labels = _refine(scores, pattern, labels, rounds)
    before, after = (_largest(_tile_scores(scores, assigned), pattern)[1].sum() for assigned in (consecutive, labels))
    return _members(labels if after > before else consecutive)


def _members(labels: npt.NDArray[Any]) -> list[Ints]:
    order = np.argsort(labels, kind="stable").astype(np.int32)
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


def _tile_scores(scores: Floats, labels: npt.NDArray[Any]) -> Floats:
    """Summed scores [tiles, K]."""
    return np.stack([scores[rows].sum(axis=0) for rows in _members(labels)])


def _largest(columns: Floats, pattern: ColumnPattern) -> tuple[Floats, Floats]:
    """The kept columns of every row of [n, K] as 0 and 1, and their sums [n]. Fast; ties fall anywhere."""
    spans = pattern.spans(columns.shape[1])
    first, stop, kept = spans[0]
    width = stop - first
    full = sum(1 for begin, end, _ in spans if end - begin == width)
    mask = np.zeros(columns.shape, np.float32)
    parts = [(columns[:, : full * width].reshape(len(columns), full, width), slice(0, full * width), kept)]
    parts += [(columns[:, None, begin:end], slice(begin, end), n) for begin, end, n in spans[full:]]
    for part, where, n in parts:
        chosen = np.argpartition(part, part.shape[2] - n, axis=2)[:, :, part.shape[2] - n :]
        ones = np.zeros(part.shape, np.float32)
        np.put_along_axis(ones, chosen, 1.0, axis=2)
        mask[:, where] = ones.reshape(len(columns), -1)
    return mask, np.asarray((mask * columns).sum(axis=1), np.float32)


def _affinity(scores: Floats, kept: int) -> Floats:
    """How much two rows gain by sharing a tile, [rows, rows].

    The sum of the largest entries of C grows with the spread of C, and its variance is the sum of the rows'
    covariances. Scores are clipped at twice the row's threshold: past it a column is kept anyway.
    """
    threshold = np.partition(scores, scores.shape[1] - kept, axis=1)[:, scores.shape[1] - kept]
    clipped = np.minimum(scores, 2 * threshold[:, None])
    centred = clipped - clipped.mean(axis=1, keepdims=True)
    affinity: Floats = centred @ centred.T
    np.fill_diagonal(affinity, 0)
    return affinity


def _disjoint(
    gains: Callable[[slice], Floats], labels: npt.NDArray[Any], least: float
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Swaps of two rows, each row with its best partner, largest gain first, no tile in two of them. ``gains`` gives
    some rows of the matrix [rows, rows] to change: as a whole it would pass through memory several times."""
    count = len(labels)
    partner, best = np.empty(count, np.int64), np.empty(count, np.float32)
    for first in range(0, count, BLOCK):
        some = slice(first, min(first + BLOCK, count))
        gain = gains(some)
        gain[labels[some, None] == labels[None, :]] = -np.inf
        best[some] = gain.max(axis=1)
        partner[some] = (gain == best[some, None]).argmax(axis=1)  # much faster than that of floats
    free = np.ones(int(labels.max()) + 1, bool)
    left = []
    for row in np.argsort(-best, kind="stable"):
        if not best[row] > least:
            break
        if free[labels[row]] and free[labels[partner[row]]]:
            free[labels[row]] = free[labels[partner[row]]] = False
            left.append(row)
    chosen = np.array(left, np.int64)
    return chosen, partner[chosen]


def _pair_up(affinity: Floats, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Swap rows between tiles while that raises the affinity within tiles. Swaps of disjoint tiles add up exactly."""
    every, twice = np.arange(len(labels)), 2 * affinity
    least = 1e-6 * float(np.abs(affinity).mean())
    to_tile = np.stack([affinity[rows].sum(axis=0) for rows in _members(labels)])  # [tiles, rows]
    for _ in range(PAIR_ROUNDS):
        from_row, own = np.ascontiguousarray(to_tile.T), to_tile[labels, every]

        def gains(some: slice, from_row: Floats = from_row, own: Floats = own) -> Floats:
            """What row i gains in j's tile, and j in i's, where they do not meet each other."""
            gain: Floats = np.take(from_row[some], labels, axis=1)
            gain -= own[some, None]
            back = to_tile[labels[some]]
            back -= own
            gain += back
            gain -= twice[some]
            return gain

        left, right = _disjoint(gains, labels, least)
        if not len(left):
            break
        labels[left], labels[right] = labels[right], labels[left]
        members = _members(labels)
        for tile in np.concatenate([labels[left], labels[right]]):
            to_tile[tile] = affinity[members[tile]].sum(axis=0)
    return labels


def _refine(scores: Floats, pattern: ColumnPattern, labels: npt.NDArray[Any], rounds: int) -> npt.NDArray[Any]:
    """Swap rows while that raises the retained score itself.

    The retained score of a tile is convex in its summed scores, so with row r gone and row q come it is at least
    what the columns chosen without r give. The swaps for which this bound is best are tried exactly.
    """
    columns = _tile_scores(scores, labels)
    value = _largest(columns, pattern)[1]
    bound = np.empty((len(scores), len(scores)), np.float32)
    stale = np.arange(len(scores))
    failed = np.zeros(bound.shape, bool)

    def gains(some: slice) -> Floats:
        gain = bound[some] + bound[:, some].T
        gain[failed[some]] = -np.inf
        return gain

    for _ in range(rounds):
        if len(stale):
            mask, without = _largest(columns[labels[stale]] - scores[stale], pattern)
            bound[stale] = mask @ scores.T + (without - value[labels[stale]])[:, None]
        left, right = _disjoint(gains, labels, -np.inf)
        if not len(left):
            break
        a, b = labels[left], labels[right]
        new_a, new_b = columns[a] - scores[left] + scores[right], columns[b] - scores[right] + scores[left]
        value_a, value_b = _largest(new_a, pattern)[1], _largest(new_b, pattern)[1]
        better = value_a + value_b > (value[a] + value[b]) * (1 + 1e-6)
        failed[left[~better], right[~better]] = failed[right[~better], left[~better]] = True
        left, right, a, b = left[better], right[better], a[better], b[better]
        labels[left], labels[right] = b, a
        columns[a], columns[b], value[a], value[b] = new_a[better], new_b[better], value_a[better], value_b[better]
        stale = np.flatnonzero(np.isin(labels, np.concatenate([a, b])))
        failed[stale] = failed[:, stale] = False
    return labels
