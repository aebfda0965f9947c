"""`colonnade bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from colonnade.cli_tune import Compiler, Cpus, Db, Dtype, IsaName, Target, Threads, bar
from colonnade.errors import UserError

WIDE = 140  # columns of tables that go to a file or a pipe


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|BUNDLE")],
    target: Target = "local",
    threads: Threads = None,
    cpus: Cpus = None,
    vs: Annotated[str, typer.Option("--vs", help="Other runtimes: onnxruntime,openvino,ncnn,torch.")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    isa: IsaName = None,
    dtype: Dtype = "f32",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch size where the model is open.")] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Undisturbed blocks of each contender.")] = 6,
    layers: Annotated[int, typer.Option("--layers", min=0, help="Show this many of the slowest layers.")] = 12,
    db: Db = None,
    cc: Compiler = "zig",
) -> None:
    """Time a model or bundle, its dense self, and other runtimes beside it, in alternating blocks."""
    if not model.exists():
        raise UserError(f"{model}: no such file or bundle")
    from rich.console import Console

    from colonnade import targets
    from colonnade.bench.run import bench as measure
    from colonnade.build.toolchain import Toolchain
    from colonnade.onnx_io import check_writable, writing_aside
    from colonnade.report.bench import table

    if output is not None:
        check_writable(output, force=True)  # before anything is measured
    console = Console(stderr=True, markup=False)
    toolchain = Toolchain(cc, notice=console.print)
    names = [name.strip() for name in vs.split(",") if name.strip()]
    where, count = targets.settle(targets.parse(target), threads, cpus)
    with bar(console, "measuring") as progress:
        found = measure(model, where, count, names, isa, dtype, batch, db, blocks, toolchain, progress)
    out = Console(markup=False) if sys.stdout.isatty() else Console(width=WIDE, markup=False)
    for part in table(found, layers):
        out.print(part, highlight=False) if isinstance(part, str) else out.print(part)
    if output is not None:
        with writing_aside(output) as aside:
            aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
