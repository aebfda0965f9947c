"""What column-wise N:M means: the pattern, its only rounding, tiles of rows, and tiles read off a matrix's zeros.

A weight matrix is [OC, K] with K in the order (kh, kw, ic). A tile is a set of rows that are computed together and
keep the same columns. The pattern is that of "Efficient Column-Wise N:M Pruning on RISC-V CPU" (arXiv 2507.17301);
here the rows of a tile need not be neighbours.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.workload.winograd import SIZES

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

# A discovered tile has at most so many rows: past it, reading a column once for more rows saves nothing.
MAX_TILE_ROWS = 64
# Reading one kept column (its offset, its vector, the latency of an irregular row) costs about as much as using it for
# so many rows, and it is read once for about so many rows, as registers allow. Both decide when rows with different
# supports are better off in one tile.
COLUMN_OVERHEAD = 2.0
ROWS_A_READ = 8
# Rounds of uniting tiles; a round mostly halves their number, so only odd matrices ever come here.
MAX_ROUNDS = 40


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
    return int(value)


@dataclass(frozen=True)
class ColumnPattern:
    """Which share of the columns a tile of rows loses.

    sparsity: share of columns removed, 0 <= sparsity < 1.
    tile:     rows that keep the same columns.
    group:    M, the consecutive columns among which N = ceil(M * (1 - sparsity)) are kept; None: M = K, the whole row.
    winograd: "2x2", "4x4" or "4x1", pixels that minimal filtering makes together: the columns are those of a 3x3
              convolution's transformed weights (`workload.winograd`); "": of the weights as they are.

    Raises UserError for values outside these limits.
    """

    sparsity: float
    tile: int = 8
    group: int | None = None
    winograd: str = ""

    def __post_init__(self) -> None:
        sparsity = self.sparsity
        number = isinstance(sparsity, int | float | np.floating | np.integer) and not isinstance(sparsity, bool)
        if not number or not 0 <= sparsity < 1:
            raise UserError(f"sparsity is {sparsity!r}: expected a share from 0 (dense) to less than 1, such as 0.75")
        object.__setattr__(self, "sparsity", float(sparsity))
        object.__setattr__(self, "tile", _whole("tile", self.tile, 1))
        if self.group is not None:
            object.__setattr__(self, "group", _whole("group", self.group, 1))
        if self.winograd not in ("", *SIZES):
            raise UserError(f"winograd is {self.winograd!r}: expected {', '.join(SIZES)}")

    @classmethod
    def nm(cls, n: int, m: int, tile: int = 8) -> "ColumnPattern":
        """Keep n of every m consecutive columns."""
        n, m = _whole("N of N:M", n, 1), _whole("M of N:M", m, 1)
        if n > m:
            raise UserError(f"pattern {n}:{m} keeps more columns than it has: expected N:M with N at most M, as in 1:4")
        return cls(1 - n / m, tile, m)

    def spans(self, columns: int) -> tuple[tuple[int, int, int], ...]:
        """(first, past the last, kept) of every group of columns of a row of `columns`. The only place that rounds.

        A last group of g < M columns keeps ceil(g * N / M), so never none.
        """
        share = 1 - self.sparsity
        if self.group is None:
            # 1e-9: 0.3 * 10 is 3.0000000000000004 and must stay 3.
            return ((0, columns, max(1, math.ceil(columns * share - 1e-9))),) if columns else ()
        m = self.group
        n = max(1, math.ceil(m * share - 1e-9))
        groups = ((first, min(first + m, columns)) for first in range(0, columns, m))
        return tuple((first, stop, -(-(stop - first) * n // m)) for first, stop in groups)

    def kept(self, columns: int) -> int:
        """Columns that every tile of a matrix with K = columns keeps."""
        return sum(kept for _, _, kept in self.spans(columns))

    def __str__(self) -> str:
        kind = f" F({self.winograd})" if self.winograd else ""
        if self.group is None:
            return f"{100 * self.sparsity:g} % T={self.tile}{kind}"
        return f"{self.kept(self.group)}:{self.group} T={self.tile}{kind}"


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows computed together over the columns they keep.

    rows:    int32[T], output channels.
    columns: int32[kept], ascending, at least one, so that no kernel needs a case for none. In a grouped convolution
             they count inside the group's own K.
    values:  float32[kept, T].
    """

    rows: Ints
    columns: Ints
    values: Floats


@dataclass(frozen=True, eq=False)
class TiledWeights:
    """A weight matrix as tiles. Every row stands in exactly one tile, and no tile crosses a convolution group.

    shape: (OC, K); groups: convolution groups, each of OC / groups consecutive rows.
    """

    shape: tuple[int, int]
    tiles: tuple[Tile, ...]
    groups: int = 1

    @classmethod
    def from_rows(cls, weights: Floats, rows: Iterable[npt.ArrayLike], groups: int = 1) -> "TiledWeights":
        """Tiles of the given rows, each keeping every column in which one of its rows is not zero."""
        weights = _matrix(weights)
        tiles = []
        for members in rows:
            index = np.asarray(members, np.int32)
            columns = np.flatnonzero((weights[index] != 0).any(axis=0))
            tiles.append(_tile(weights, index, columns if len(columns) else np.zeros(1, np.int64)))
        return cls(_shape(weights), tuple(tiles), groups)

    @classmethod
    def dense_tiles(cls, weights: Floats, tile: int, groups: int = 1) -> "TiledWeights":
        """Tiles of `tile` consecutive rows that keep all columns; the last one of a group may be smaller."""
        weights = _matrix(weights)
        every = np.arange(weights.shape[1])
        rows = consecutive_rows(weights.shape[0], tile, groups)
        return cls(_shape(weights), tuple(_tile(weights, index, every) for index in rows), groups)

    def dense(self) -> Floats:
        """The matrix, float32 [OC, K]."""
        matrix = np.zeros(self.shape, np.float32)
        for tile in self.tiles:
            matrix[np.ix_(tile.rows, tile.columns)] = tile.values.T
        return matrix

    @property
    def is_dense(self) -> bool:
        """Whether every tile keeps all columns."""
        return all(len(tile.columns) == self.shape[1] for tile in self.tiles)

    @property
    def kept(self) -> int:
        """Weights that take part in the computation: rows times columns, summed over the tiles."""
        return sum(len(tile.rows) * len(tile.columns) for tile in self.tiles)


def _shape(weights: Floats) -> tuple[int, int]:
    return int(weights.shape[0]), int(weights.shape[1])


def _matrix(weights: npt.ArrayLike) -> Floats:
    matrix = np.asarray(weights, np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"weights of shape {matrix.shape}: expected [OC, K]")
    return matrix


def _tile(weights: Floats, rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> Tile:
    values = np.ascontiguousarray(weights[np.ix_(rows, columns)].T)
    return Tile(rows.astype(np.int32), columns.astype(np.int32), values)


def group_rows(rows: int, groups: int) -> int:
    """Rows of one convolution group. Raises ValueError if they cannot be shared out evenly."""
    if groups < 1 or rows % groups:
        raise ValueError(f"{rows} rows do not divide into {groups} groups")
    return rows // groups


def consecutive_rows(rows: int, tile: int, groups: int = 1) -> list[Ints]:
    """Row indices of tiles of `tile` neighbours; the last tile of every group takes what is left."""
    span = group_rows(rows, groups)
    return [
        np.arange(first, min(first + tile, base + span), dtype=np.int32)
        for base in range(0, rows, span)
        for first in range(base, base + span, tile)
    ]


def discover(weights: npt.ArrayLike, groups: int = 1) -> TiledWeights:
    """The tiling of a matrix [OC, K], read off its zeros.

    Rows with the same support form a tile; then rows whose support is a subset join the tile that holds it (zeros
    also happen by accident); then, where supports still differ from row to row, tiles are united as long as that
    makes the product cheaper. Rows of zeros fit any tile: they complete tiles that miss a row, the others stand by
    themselves. If all columns of every row come out cheaper than what was found, the tiles are dense.
    """
    matrix = _matrix(weights)
    span = group_rows(matrix.shape[0], groups)
    support = matrix != 0
    rows: list[Ints] = []
    for base in range(0, matrix.shape[0], span):
        rows += [members + np.int32(base) for members in _discover_group(support[base : base + span])]
    tiled = TiledWeights.from_rows(matrix, rows, groups)
    dense = TiledWeights.dense_tiles(matrix, MAX_TILE_ROWS, groups)
    return tiled if _cost(tiled.tiles) < 0.99 * _cost(dense.tiles) else dense


def _cost(tiles: Sequence[Tile]) -> float:
    rows = np.array([len(tile.rows) for tile in tiles], np.float32)
    return float(_row_cost(rows) @ np.array([len(tile.columns) for tile in tiles], np.float32))


def _row_cost(rows: Floats) -> Floats:
    """Cost of one kept column in tiles of so many rows."""
    return np.asarray(rows + COLUMN_OVERHEAD * np.ceil(rows / ROWS_A_READ), np.float32)


def _discover_group(support: npt.NDArray[np.bool_]) -> list[Ints]:
    """Tiles (row indices) of one convolution group with the support [rows, K]."""
    alive = support.any(axis=1)
    live, dead = np.flatnonzero(alive), np.flatnonzero(~alive).astype(np.int32)
    if not len(live):
        return [np.asarray(part, np.int32) for part in _split(dead)]
    classes, labels = _distinct(support[live])
    if len(classes) > 1:
        classes, labels = _join_subsets(classes, labels)
        # Tiles of a pruned matrix are all there by now. Supports that differ from row to row are not a tiling yet.
        if len(live) < 2 * len(classes):
            classes, labels = _unite(classes, labels)
    order = np.argsort(labels, kind="stable")
    members = np.split(live[order].astype(np.int32), np.cumsum(np.bincount(labels, minlength=len(classes)))[:-1])
    tiles = _complete(members, dead)
    return sorted((part for tile in tiles for part in _split(np.sort(tile))), key=lambda tile: int(tile[0]))


def _distinct(support: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """The distinct rows of a support, and which of them every row is."""
    packed = np.ascontiguousarray(np.packbits(support, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, labels = np.unique(keys, return_index=True, return_inverse=True)
    return support[first], labels.reshape(-1).astype(np.int64)


def _join_subsets(
    classes: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Move every class into the smallest class that holds its support, where that makes the product cheaper."""
    count = classes.sum(axis=1).astype(np.float32)
    rows = np.bincount(labels, minlength=len(classes)).astype(np.float32)
    shared = classes.astype(np.float32) @ classes.astype(np.float32).T
    pays = count[None, :] * rows[:, None] <= (count * _row_cost(rows))[:, None]
    holds = (shared >= count[:, None]) & (count[None, :] > count[:, None]) & pays
    into = np.where(holds.any(axis=1), np.argmin(np.where(holds, count[None, :], np.inf), axis=1), -1)
    final = np.arange(len(classes))
    for index in np.argsort(-count, kind="stable"):  # larger supports first, so that chains end where they lead
        if into[index] >= 0:
            final[index] = final[into[index]]
    used, renumbered = np.unique(final[labels], return_inverse=True)
    return classes[used], renumbered.reshape(-1).astype(np.int64)


def _unite(
    classes: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Unite pairs of classes, round after round, each with the partner that saves most, until no union saves work."""
    for _ in range(MAX_ROUNDS):
        count = classes.sum(axis=1).astype(np.float32)
        rows = np.bincount(labels, minlength=len(classes)).astype(np.float32)
        cost = count * _row_cost(rows)
        shared = classes.astype(np.float32) @ classes.astype(np.float32).T
        union = count[:, None] + count[None, :] - shared
        saving = cost[:, None] + cost[None, :] - union * _row_cost(rows[:, None] + rows[None, :])
        np.fill_diagonal(saving, -np.inf)
        best = saving.max(axis=1)
        free = np.ones(len(classes), bool)
        final = np.arange(len(classes))
        for index in np.argsort(-best, kind="stable"):
            if best[index] <= 0:
                break
            if not free[index]:
                continue
            free[index] = False
            other = int(np.argmax(np.where(free, saving[index], -np.inf)))
            # A class whose partners are taken waits for the next round rather than spoil a tile.
            if free[other] and saving[index, other] >= 0.8 * best[index]:
                free[other] = False
                final[index] = other
        kept, labels = np.unique(final[labels], return_inverse=True)
        if len(kept) == len(classes):
            break
        moved = np.flatnonzero(final != np.arange(len(classes)))
        united = classes.copy()
        united[final[moved]] |= classes[moved]
        classes, same = _distinct(united[kept])
        labels = same[labels.reshape(-1)]
    return classes, labels


def _complete(members: list[Ints], dead: Ints) -> list[Ints]:
    """Tiles with rows of zeros added to those that are smaller than the usual tile; the rest makes one of its own."""
    sizes = np.array([len(tile) for tile in members])
    usual = int(np.bincount(sizes).argmax())
    tiles = []
    for tile in members:
        missing = max(0, usual - len(tile))
        tiles.append(np.concatenate([tile, dead[:missing]]))
        dead = dead[missing:]
    return [*tiles, dead] if len(dead) else tiles


def _split(rows: Ints) -> list[Ints]:
    """Rows in tiles of at most MAX_TILE_ROWS of about the same size, whole multiples of 8 where possible."""
    parts = -(-len(rows) // MAX_TILE_ROWS)
    size = -(-len(rows) // parts)
    size = size if parts == 1 else -(-size // 8) * 8
    return [rows[first : first + size] for first in range(0, len(rows), size)]
