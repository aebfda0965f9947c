"""`colonnade prune`: ONNX in, ONNX with zeros out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colonnade.cli_pattern import Exclude, Group, GroupRows, Pattern, Score, Sparsity, Tile, parse_pattern

if TYPE_CHECKING:
    from colonnade.sparsify.onnx_file import PruneReport

FEW = 64  # calibration inputs: fewer are told


def prune(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The trained model.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="The pruned model to write.")],
    sparsity: Sparsity = None,
    group: Group = None,
    pattern: Pattern = None,
    tile: Tile = 8,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE.toml", help="The pattern of every layer, from `plan` or `fit`."),
    ] = None,
    score: Score = "l1",
    exclude: Exclude = None,
    group_rows: GroupRows = True,
    method: Annotated[
        str, typer.Option(metavar="magnitude|obs", help="obs fits what is kept to calibration inputs; no labels.")
    ] = "magnitude",
    balance: Annotated[
        bool, typer.Option("--balance", help="Spread the same work over the layers by what each of them loses.")
    ] = False,
    winograd: Annotated[
        str,
        typer.Option(metavar="2x2|4x1|4x4", help="Prune 3x3 layers behind Winograd's transform, of such tiles."),
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE.npz", help="Photos or arrays of inputs for --method obs and --balance."),
    ] = None,
    images: Annotated[int, typer.Option(help="Calibration inputs to use at most.", min=1)] = 512,
    preprocess: Annotated[
        str, typer.Option(metavar="imagenet|FILE.json", help="How calibration photos become inputs.")
    ] = "imagenet",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Prune an ONNX model column-wise, N of every M inside tiles of rows; the result is plain ONNX."""
    from colonnade.errors import UserError

    if output.suffix != ".onnx":
        raise UserError(f"{output}: the pruned model is an ONNX file: give a name that ends in .onnx")
    if plan is not None and (sparsity, group, pattern) != (None, None, None):
        raise UserError("--plan says what every layer loses: leave --sparsity, --group and --pattern out")
    if plan is not None and winograd:
        raise UserError("--plan says what every layer loses: leave --winograd out")
    chosen = replace(parse_pattern(sparsity, group, pattern, tile), winograd=winograd) if plan is None else None
    if chosen is not None and chosen.sparsity == 0:
        raise UserError("no column would be removed: give the share to remove, such as --sparsity 0.75")

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from colonnade.sparsify.allocate import PrunePlan
    from colonnade.sparsify.onnx_file import prune_file

    if balance and plan is not None:
        raise UserError("--plan says what every layer loses: leave --balance out")
    inputs = None
    if method == "obs" or balance:
        if calibration is None:
            needs = "--balance" if balance else "--method obs"
            raise UserError(f"{needs} needs --calibration: a folder of photos or an .npz of inputs, a few hundred")
        from colonnade.accuracy import calibration_inputs

        inputs = calibration_inputs(calibration, preprocess=preprocess, limit=images)
    elif calibration is not None:
        raise UserError("--calibration belongs to --method obs and --balance: magnitudes alone need no inputs")
    patterns = PrunePlan.read(plan).layers if plan is not None else None
    console = Console(stderr=True, markup=False)
    if inputs is not None and (count := len(next(iter(inputs.values())))) < FEW:
        console.print(f"{count} calibration inputs are few: what is fitted to them may be right on them alone")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
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
            patterns=patterns,
            balance=balance,
            progress=lambda done, total, at: bar.update(task, completed=done, total=total, description=escape(at)),
        )
    _print(report, method)


def _print(report: PruneReport, method: str) -> None:
    from rich.console import Console
    from rich.table import Table

    wanted = f"{report.pattern or 'by plan'}{', balanced' if report.balanced else ''}"
    table = Table(title=f"{report.source.name} → {report.destination.name}, {wanted}")
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
    console = Console(markup=False)
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
    elif method == "magnitude":
        typer.echo("kept by magnitude: train it further, or keep more with --method obs --balance --calibration PHOTOS")
