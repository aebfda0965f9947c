"""`colonnade fit`: an accuracy-latency frontier of ready bundles in one command. `colonnade plan`: only the plan."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colonnade.cli_pattern import Exclude
from colonnade.cli_tune import Compiler, Cpus, Db, Dtype, IsaName, Target, Threads, seconds
from colonnade.errors import UserError

if TYPE_CHECKING:
    from colonnade.fitting.goal import Point
    from colonnade.fitting.road import Fit

NOT_MET = 3  # exit code where no point meets the budget
WIDE = 120

Images = Annotated[
    Path,
    typer.Option("--images", metavar="DIR|FILE.npz", help="Photos (a folder for each class, or no labels), or arrays."),
]
Latency = Annotated[str | None, typer.Option("--latency", metavar="40ms", help="The time that one inference may take.")]
Speedup = Annotated[float | None, typer.Option("--speedup", metavar="N", help="Times as fast as the dense network.")]
Method = Annotated[str, typer.Option("--method", metavar="obs|magnitude", help="How kept weights are found.")]
Tiles = Annotated[str, typer.Option("--tiles", metavar="2,4,8,16", help="Tiles to choose from, layer by layer.")]
Sparsities = Annotated[str, typer.Option("--sparsities", metavar="0.5,0.75,…", help="Shares that a layer may lose.")]
Calibration = Annotated[int, typer.Option("--calibration-images", min=8, help="Images that calibrate, at most.")]
Budget = Annotated[str, typer.Option("--budget", help="Time to tune layers for, such as 180s; 0s: only what is known.")]
Preprocess = Annotated[
    str | None,
    typer.Option("--preprocess", metavar="imagenet|FILE.json", help="How photos become inputs; imagenet by default."),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Batch size where the model leaves it open.")]


def parse_latency(text: str) -> float:
    """``40ms``, ``0.04s``, ``800us`` → seconds. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|us)", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--latency {text}: expected a time such as 40ms")
    return float(match[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[match[2]]


def parse_numbers(text: str, option: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """``2,4,8,16`` → (2, 4, 8, 16), rising and each once. Raises UserError."""
    try:
        return tuple(sorted({kind(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise UserError(f"{option} {text}: expected numbers with commas between them") from None


def fit(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The trained model.")],
    images: Images,
    target: Target = "local",
    latency: Latency = None,
    speedup: Speedup = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="POINTS", help="Points of top-1 that may be lost, such as 1.0."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder of the bundles; NAME.fit by default.")
    ] = None,
    points: Annotated[int, typer.Option("--points", min=1, max=20, help="Pruned networks to make at most.")] = 4,
    method: Method = "obs",
    tiles: Tiles = "2,4,8,16",
    sparsities: Sparsities = "0.25,0.5,0.625,0.75,0.875",
    exclude: Exclude = None,
    calibration: Calibration = 256,
    test: Annotated[int, typer.Option("--test-images", min=8, help="Other images to compare answers on.")] = 500,
    preprocess: Preprocess = None,
    threads: Threads = None,
    cpus: Cpus = None,
    isa: IsaName = None,
    dtype: Dtype = "f32",
    batch: Batch = None,
    budget: Budget = "180s",
    db: Db = None,
    cc: Compiler = "zig",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a fit of another model or other images.")] = False,
) -> None:
    """Make an accuracy-latency frontier of ready bundles, without training, and mark the one that meets a budget.

    Exit code 3 where none does. A second call goes on where the first one stopped.
    """
    wanted = parse_latency(latency) if latency is not None else None
    settings = _settings(method, tiles, sparsities, exclude, budget, seed)
    from rich.console import Console

    from colonnade.fitting.road import fit as make

    console = Console(stderr=True, markup=False)
    with Stages(console) as progress:
        found = make(
            model, images, target, latency=wanted, speedup=speedup, max_drop=max_drop, out=output, points=points,
            settings=settings, calibration=calibration, test=test, preprocess=preprocess, threads=threads, cpus=cpus,
            isa=isa, dtype=dtype, batch=batch, db=db, cc=cc, force=force, progress=progress, notice=console.print,
        )  # fmt: skip
    _print(found, model)
    if found.best is None and (found.goal.latency is not None or found.goal.max_drop is not None):
        raise typer.Exit(NOT_MET)


def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The trained model.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN.toml", help="The plan to write.")],
    images: Images,
    target: Target = "local",
    latency: Latency = None,
    speedup: Speedup = None,
    tiles: Tiles = "2,4,8,16",
    sparsities: Sparsities = "0.25,0.5,0.625,0.75,0.875",
    exclude: Exclude = None,
    calibration: Calibration = 128,
    preprocess: Preprocess = None,
    threads: Threads = None,
    cpus: Cpus = None,
    isa: IsaName = None,
    dtype: Dtype = "f32",
    batch: Batch = None,
    budget: Budget = "180s",
    db: Db = None,
    cc: Compiler = "zig",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the plan.")] = False,
) -> None:
    """Choose what every layer loses, by its measured loss and time; the file goes to `colonnade prune --plan`.

    Times are sums of layers'; `colonnade fit` measures whole networks, and their accuracy.
    """
    if (latency is None) == (speedup is None):
        raise UserError("give either --latency (such as 40ms) or --speedup (such as 2)")
    wanted = parse_latency(latency) if latency is not None else None
    settings = _settings("obs", tiles, sparsities, exclude, budget, 0)
    from rich.console import Console

    from colonnade.fitting.plans import make_plan

    console = Console(stderr=True, markup=False)
    with Stages(console) as progress:
        made = make_plan(
            model, images, output, target, latency=wanted, speedup=speedup, settings=settings, calibration=calibration,
            preprocess=preprocess, threads=threads, cpus=cpus, isa=isa, dtype=dtype, batch=batch, db=db, cc=cc,
            force=force, progress=progress, notice=console.print,
        )  # fmt: skip
    for note in made.notes:
        typer.echo(note)
    kind = " in float16" if dtype == "f16" else ""
    typer.echo(
        f"{output}: {made.pruned} of {made.layers} layers pruned, layer times{kind} {1e3 * made.seconds:.2f} ms of "
        f"{1e3 * made.dense:.2f} ms dense ({made.dense / made.seconds:.2f} times)"
    )


def _settings(method: str, tiles: str, sparsities: str, exclude: list[str] | None, budget: str, seed: int) -> Any:
    from colonnade.fitting.plans import Settings

    return Settings(
        method, parse_numbers(tiles, "--tiles", int), parse_numbers(sparsities, "--sparsities", float),
        tuple(exclude or ()), seconds(budget), seed,
    )  # fmt: skip


class Stages:
    """A progress bar for each stage, as context: yields the callable that `fit` reports to. Where nobody watches (a
    file, a pipe) a line says when each stage begins."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[at]}", markup=False),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._console = console

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: float, text: str) -> None:
        """Show that ``done`` (0 .. 1) of a stage is over and ``text`` is at hand."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, at="")
            if not self._console.is_terminal:
                self._console.print(f"{stage} …", highlight=False)
        self._progress.update(self._tasks[stage], completed=done, at=text[-48:])


def _print(found: Fit, model: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(markup=False) if sys.stdout.isatty() else Console(width=WIDE, markup=False)
    best = found.best
    timed = found.latency_is
    dense = found.points[0]
    kind = " in float16" if found.dtype == "f16" else ""
    table = Table(title=f"{model.name}{kind}: {found.goal}", title_justify="left")
    table.add_column("")
    for heading in (f"ms, {timed}", "speed", "work left", "top-1" if found.labelled else "", "lost", "same answers"):
        if heading:
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"bundle in {found.folder}", overflow="fold")
    for point in found.points:
        at = point.record
        cells = [
            f"{'→ ' if best is not None and point is best else '  '}{point.name}",
            f"{1e3 * point.latency:.2f}",
            f"{dense.latency / point.latency:.2f}",
            f"{100 * at['kept']:.0f} %",
        ]
        if found.labelled:
            cells += [f"{100 * at['top1']:.1f} %", _lost(point, point is dense)]
        else:
            share = "" if point is dense else f"at most {100 * point.loss:.1f}"
            cells.append(share)
        cells += [f"{100 * at['agreement']:.1f} %", str(Path(at["bundle"]).relative_to(found.folder))]
        table.add_row(*cells, style="bold" if best is not None and point is best else None)
    out.print(table)
    for note in found.notes:
        typer.echo(f"note: {note}")
    images = dense.record["images"]
    typer.echo(f"{images} images that did not calibrate; everything: {found.folder / 'fit.json'}")
    if best is not None:
        typer.echo(f"{found.goal}: {best.name}, {best.record['bundle']}")
    elif found.goal.latency is not None or found.goal.max_drop is not None:
        near = found.closest
        typer.echo(
            f"{found.goal}: not reachable; closest is {near.name} with {1e3 * near.latency:.2f} ms and "
            f"{100 * near.loss:.1f} points lost, {near.record['bundle']}"
        )


def _lost(point: Point, dense: bool) -> str:
    at = point.record
    if dense:
        return ""
    # 0.0 - x: no minus sign before a zero
    lost, low, high = (round(0.0 - 100 * at[key], 1) + 0.0 for key in ("points", "high", "low"))
    return f"{lost:.1f} ({low:.1f} to {high:.1f})"
