"""`colonnade inspect`: what is in a model, without building anything."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from colonnade.cli_shapes import InputShapes, Outputs, parse_shapes


@dataclass(frozen=True)
class Layer:
    """A layer with weights. ``macs`` None: it was not reached. ``tile``, ``kept``: the pattern found in its zeros, rows
    in the largest tile and the share of columns that it keeps (0 and 1 where there is none). ``zeros``: share of
    weights. ``reason``: why `colonnade prune` leaves it dense, or None."""

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    macs: int | None
    tile: int
    kept: float
    zeros: float
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """A model's layers, the operators around them (steps by operator), and a line for every unsupported part."""

    model: str
    opset: int
    layers: tuple[Layer, ...]
    steps: dict[str, int]
    unsupported: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers that were reached."""
        return sum(layer.macs or 0 for layer in self.layers)


def examine_model(
    path: Path,
    batch: int | None = None,
    input_shapes: dict[str, list[int]] | None = None,
    outputs: list[str] | None = None,
    exclude: tuple[str, ...] = (),
) -> Inspection:
    """Read a model and tell what is in it.

    Raises:
        UserError: the file cannot be read, a size stays free, or a name is unknown.
    """
    from collections import Counter

    import numpy as np

    from colonnade.frontend import examine
    from colonnade.onnx_io import load_written_out, node_name
    from colonnade.pattern import discover
    from colonnade.sparsify.onnx_file import read_layers
    from colonnade.sparsify.select import as_matrix

    model = load_written_out(path)
    found = read_layers(model, exclude)
    steps, unsupported = examine(model, batch=batch, input_shapes=input_shapes, outputs=outputs)
    macs = {name: workload.macs for name, workload in steps}
    groups = {node_name(node): node for node in model.graph.node}
    layers = []
    for report, weight in found:
        tile, kept, zeros = 0, 1.0, 0.0
        if weight is not None and weight.size and np.isfinite(weight).all():
            zeros = float((weight == 0).mean())
            count = next((a.i for a in groups[report.node].attribute if a.name == "group"), 1)
            if zeros and report.op != "ConvTranspose" and weight.shape[0] % count == 0 and weight[0].size > 1:
                tiled = discover(as_matrix(weight).astype(np.float32), count)
                if not tiled.is_dense:
                    tile = max(len(t.rows) for t in tiled.tiles)
                    kept = tiled.kept / (tiled.shape[0] * tiled.shape[1])
        own = (report.weight.removesuffix(".weight"), report.node)
        layers.append(
            Layer(
                report.name,
                report.op,
                report.shape,
                report.parameters if report.shape else 0,
                next((macs[name] for name in own if name in macs), None),
                tile,
                kept,
                zeros,
                report.reason,
            )
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    counts = dict(sorted(Counter(workload.op for _, workload in steps).items()))
    return Inspection(path.name, opset, tuple(layers), counts, tuple(unsupported))


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model.")],
    batch: Annotated[int | None, typer.Option(help="First size of every input.", min=1)] = None,
    input_shape: InputShapes = None,
    outputs: Outputs = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="As in `colonnade prune`.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write it all as JSON too.")] = None,
) -> None:
    """List layers, multiply-adds, parameters, what can be pruned and why not, and what is unsupported."""
    from rich.console import Console
    from rich.table import Table

    result = examine_model(model, batch, parse_shapes(input_shape), outputs, tuple(exclude or ()))
    table = Table(title=f"{result.model}, opset {result.opset}")
    table.add_column("layer", overflow="fold")
    table.add_column("operator", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for heading in ("parameters", "MMAC"):
        table.add_column(heading, justify="right")
    table.add_column("zeros", no_wrap=True)
    table.add_column("prunable", overflow="fold")
    for layer in result.layers:
        pattern = f"{layer.zeros:.0%}" if layer.zeros >= 0.005 else ""
        if layer.tile:
            pattern = f"{1 - layer.kept:.1%} of columns, T = {layer.tile}"
        table.add_row(
            layer.name,
            layer.op,
            "x".join(map(str, layer.shape)),
            f"{layer.parameters:,}",
            "?" if layer.macs is None else f"{layer.macs / 1e6:,.1f}",
            pattern,
            "yes" if layer.reason is None else f"no: {layer.reason}",
        )
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)
    prunable = [layer for layer in result.layers if layer.reason is None]
    parameters, able = sum(x.parameters for x in result.layers), sum(x.parameters for x in prunable)
    work = sum(layer.macs or 0 for layer in prunable)
    print(f"{len(result.layers)} layers, {parameters:,} parameters, {result.macs / 1e6:,.1f} MMAC")
    print(
        f"prunable: {len(prunable)} layers, {able / max(parameters, 1):.0%} of the parameters, "
        f"{work / max(result.macs, 1):.0%} of the work"
    )
    print("steps: " + ", ".join(f"{count} {op}" for op, count in result.steps.items()))
    count = len(result.unsupported)
    print(f"{count} part{'s' * (count > 1)} not supported:" if count else "everything is supported")
    for line in result.unsupported:
        print(f"  {line}")
    if as_json is not None:
        text = json.dumps(asdict(result) | {"macs": result.macs}, indent=1) + "\n"
        aside = as_json.with_name(as_json.name + ".part")
        aside.write_text(text, encoding="utf-8")
        aside.replace(as_json)
