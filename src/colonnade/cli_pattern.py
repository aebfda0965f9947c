"""The options of every verb that prunes: which share of the columns a tile of rows loses, and in which layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from colonnade.pattern import ColumnPattern

Sparsity = Annotated[float | None, typer.Option("--sparsity", help="Share of columns to remove, such as 0.75.")]
Group = Annotated[
    int | None, typer.Option("--group", help="M: consecutive columns chosen among; the whole row if left out.")
]
Pattern = Annotated[
    str | None, typer.Option("--pattern", metavar="N:M", help="Keep N of every M columns, such as 1:4.")
]
Tile = Annotated[int, typer.Option("--tile", help="Rows that keep the same columns.")]
Score = Annotated[str, typer.Option("--score", metavar="l1|l2", help="A column's score: sum of |w| or of w².")]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="REGEX", help="Layers or weights to leave dense; may be repeated."),
]
GroupRows = Annotated[bool, typer.Option("--group-rows/--no-group-rows", help="Put similar rows into one tile.")]


def parse_pattern(sparsity: float | None, group: int | None, nm: str | None, tile: int) -> ColumnPattern:
    """The pattern of `--sparsity` (with `--group`) or of `--pattern N:M`. Raises UserError unless it is exactly one."""
    import re

    from colonnade.errors import UserError
    from colonnade.pattern import ColumnPattern

    if (sparsity is None) == (nm is None):
        raise UserError("give either --sparsity (such as 0.75) or --pattern (such as 1:4)")
    if nm is None:
        assert sparsity is not None
        return ColumnPattern(sparsity, tile, group)
    if group is not None:
        raise UserError("--group belongs to --sparsity: --pattern N:M says its M itself")
    match = re.fullmatch(r"(\d+):(\d+)", nm.strip())
    if not match:
        raise UserError(f"--pattern is {nm!r}: expected N:M with whole numbers, such as 1:4")
    return ColumnPattern.nm(int(match[1]), int(match[2]), tile)
