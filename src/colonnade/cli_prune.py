"""`colonnade prune`: ONNX in, ONNX with zeros out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from colonnade.pattern import ColumnPattern
    from colonnade.sparsify.onnx_file import PruneReport


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


def prune(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The trained model.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The pruned model to write.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of columns to remove, such as 0.75.")] = None,
    group: Annotated[
        int | None, typer.Option(help="M: consecutive columns chosen among; the whole row if left out.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(metavar="N:M", help="Keep N of every M columns, such as 1:4.")] = None,
    tile: Annotated[int, typer.Option(help="Rows that keep the same columns.")] = 8,
    score: Annotated[str, typer.Option(metavar="l1|l2", help="A column's score: sum of |w| or of w².")] = "l1",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Layers or weights to leave dense; may be repeated.")
    ] = None,
    group_rows: Annotated[
        bool, typer.Option("--group-rows/--no-group-rows", help="Put similar rows into one tile.")
    ] = True,
    method: Annotated[
        str, typer.Option(metavar="magnitude|obs", help="obs fits what is kept to calibration inputs; no labels.")
    ] = "magnitude",
    calibration: Annotated[
        Path | None, typer.Option(metavar="DIR|FILE.npz", help="Photos or arrays of inputs for --method obs.")
    ] = None,
    images: Annotated[int, typer.Option(help="Calibration inputs to use at most.", min=1)] = 512,
    preprocess: Annotated[
        str, typer.Option(metavar="imagenet|FILE.json", help="How calibration photos become inputs.")
    ] = "imagenet",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Prune an ONNX model column-wise, N of every M inside tiles of rows; the result is plain ONNX."""
    chosen = parse_pattern(sparsity, group, pattern, tile)

    from rich.console import Console
    from rich.progress import Progress

    from colonnade.errors import UserError
    from colonnade.sparsify.onnx_file import prune_file

    inputs = None
    if method == "obs":
        if calibration is None:
            raise UserError("--method obs needs --calibration: a folder of photos or an .npz of inputs, a few hundred")
        from colonnade.accuracy import calibration_inputs

        inputs = calibration_inputs(calibration, preprocess=preprocess, limit=images)
    elif calibration is not None:
        raise UserError("--calibration belongs to --method obs: magnitudes need no inputs")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pruning", total=None)
        report = prune_file(
            model,
            output,
            chosen,
            score=score,
            group_rows=group_rows,
            exclude=exclude or (),
            force=force,
            method=method,
            calibration=inputs,
            progress=lambda done, total, layer: bar.update(task, completed=done, total=total, description=layer),
        )
    _print(report, method)


def _print(report: PruneReport, method: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.source.name} → {report.destination.name}, {report.pattern}")
    table.add_column("layer", overflow="fold")
    table.add_column("weights", no_wrap=True)
    for heading in ("kept columns", "retained score" if method == "magnitude" else "retained output"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        shape = "×".join(map(str, layer.shape))
        if layer.reason is None:
            table.add_row(layer.name, shape, f"{layer.kept} of {layer.columns}", f"{100 * layer.retained:.1f} %")
        else:
            table.add_row(layer.name, shape, f"dense: {layer.reason}", "", style="dim")
    console = Console()
    console.print(table)
    weights = sum(layer.parameters for layer in report.layers)
    left = sum(
        layer.parameters if layer.reason else layer.parameters * layer.kept // layer.columns for layer in report.layers
    )
    share = f" ({100 * left / weights:.1f} %)" if weights else ""
    console.print(
        f"{len(report.pruned)} of {len(report.layers)} layers pruned; {left:,} of {weights:,} weights left{share}; "
        f"wrote {report.destination}",
        highlight=False,
        soft_wrap=True,
    )
    if not report.pruned:
        console.print("Nothing was pruned: every layer stays dense for the reason beside it.", style="yellow")
