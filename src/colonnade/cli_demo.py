"""`colonnade demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from colonnade.cli_tune import Db, seconds
from colonnade.errors import UserError

MARK = ".colonnade-demo"  # tells a demo's own folder from one with somebody's files


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where everything is written.")] = Path(
        "colonnade-demo"
    ),
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads of the compiled networks.")] = 1,
    budget: Annotated[str, typer.Option("--budget", help="Time to tune each of the two networks.")] = "30s",
    db: Db = None,
) -> None:
    """The whole road on bundled real data: train, prune, train further, tune, build, run; a few minutes."""
    limit = seconds(budget)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).exists())):
        raise UserError(f"{output}: exists and is not the folder of a demo; choose another with -o")
    # Idle threads of torch sleep: spinning, two of them on a busy machine take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    with console.status("starting"):
        from colonnade.demo import road
    output.mkdir(parents=True, exist_ok=True)  # once it is known that all is there which it needs
    (output / MARK).touch()
    result = road.demo(output, console, threads=threads, budget=limit, db=db)
    console.print(road.table(result))
    console.print(f"Everything is in {output}: dense.onnx, pruned.onnx, and the bundles of both")
    console.print("Your own model: colonnade prune MODEL.onnx -o PRUNED.onnx --sparsity 0.75, then colonnade build")
