"""`colonnade report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from colonnade.cli_bench import WIDE
from colonnade.cli_tune import Compiler, Cpus, Target
from colonnade.errors import UserError


def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="report.html", help="One page that needs no network.")
    ] = None,
    target: Target = "local",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Threads; the bundle's own number by default.")
    ] = None,
    cpus: Cpus = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Show this many of the slowest; 0 for all.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file.")] = None,
    cc: Compiler = "zig",
) -> None:
    """Run a bundle and tell what ran, how fast, and how far from the machine's limits."""
    from rich.console import Console

    from colonnade import targets
    from colonnade.bench.bundle import measure
    from colonnade.build.toolchain import Toolchain
    from colonnade.bundle import Bundle
    from colonnade.onnx_io import writing_aside
    from colonnade.report.bundle import page, table

    opened = Bundle.load(bundle)
    if output is not None:
        if output.suffix not in (".html", ".htm"):
            raise UserError(f"{output}: expected a name that ends in .html (--json writes the record)")
        import plotly  # noqa: F401  before anything long begins
    for path in (output, json_file):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    where, count = targets.settle(targets.parse(target), threads or int(opened.manifest["threads"]), cpus)
    console = Console(stderr=True, markup=False)
    with console.status("measuring"):
        found = measure(opened, where, count, Toolchain(cc, notice=console.print))
    out = Console(markup=False) if sys.stdout.isatty() else Console(width=WIDE, markup=False)
    for part in table(found, steps):
        out.print(part, highlight=False) if isinstance(part, str) else out.print(part)
    if json_file is not None:
        with writing_aside(json_file) as aside:
            aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if output is not None:
        with writing_aside(output) as aside:
            aside.write_text(page(found), encoding="utf-8")
        typer.echo(f"{output}: open it in a browser")
