"""The record of a bench as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def table(found: Mapping[str, Any], show_layers: int = 12) -> list[Any]:
    """What to print: rich tables and lines. ``show_layers``: the slowest steps of each of our builds; 0 for none."""
    from rich.table import Table

    first = found["contenders"][0]["ms"]["median"]
    title = f"{found['model']}, {found['machine']['cpu']}, {found['isa']}, {found['threads']} thread(s)"
    summary = Table(title=title, title_justify="left")
    for name in ("", "median ms", "min", "quartiles", "times ours", "blocks", "differs"):
        summary.add_column(name, justify="left" if not name else "right", no_wrap=True, overflow="fold")
    for row in found["contenders"]:
        ms, away = row["ms"], row["thrown_away"]
        differs = row["difference"]
        summary.add_row(
            f"{row['name']} {row['version']}".strip(),
            f"{ms['median']:.3f}" + (" ?" if row["disturbed"] else ""),
            f"{ms['min']:.3f}",
            f"{ms['q1']:.3f}–{ms['q3']:.3f}",
            f"{ms['median'] / first:.2f}",
            f"{row['blocks'] - away}" + (f" (-{away})" if away else ""),
            "" if differs is None else f"{differs:.1e}",
        )
    parts: list[Any] = [summary]
    if "modelled" in found["machine"]["cpu"]:  # as the target's probe says
        parts.append("all times are modelled, none is measured: docs/machine-models.md")
    if any(row["thrown_away"] for row in found["contenders"]):
        parts.append("(-n): blocks taken under foreign load and thrown away")
    if any(row["disturbed"] for row in found["contenders"]):
        parts.append("?: no block was undisturbed, the figure is not evidence")
    peak = found["peak"]
    how = "modelled" if "modelled" in found["machine"]["cpu"] else "measured"
    parts.append(
        f"{how} limits: {peak['gflops']:.0f} GFLOP/s f32 multiply-add, {peak['gbps']:.1f} GB/s read from memory"
    )
    for row in found["contenders"]:
        if row["options"]:
            parts.append(f"{row['name']}: " + ", ".join(f"{k}={v}" for k, v in row["options"].items()))
    parts += found["notes"]
    for name, rows in found["layers"].items():
        if show_layers:
            parts.append(_layer_table(name, rows, show_layers))
    return parts


def short(workload: str, kept: float | None) -> str:
    """A workload's key for people: ``conv2d 3x3/2 256→256 28x28, 25 % kept``."""
    op, _, rest = workload.partition("(")
    # commas inside an activation's limits do not part fields
    at = dict(part.split("=", 1) for part in re.split(r",(?=\w+=)", rest.removesuffix(")")) if "=" in part)
    words = [op, at.get("kind", "")]
    if "kernel" in at:
        stride = at.get("stride", "1x1").split("x")[0]
        words.append(at["kernel"] + (f"/{stride}" if stride != "1" else ""))
    if "out_channels" in at:
        words.append(f"{at['in_channels']}→{at['out_channels']}")
    elif "channels" in at:
        words.append(at["channels"])
    if "height" in at:
        words.append(f"{at['height']}x{at['width']}")
    elif "shape" in at:
        words.append(at["shape"])
    return " ".join(w for w in words if w) + (f", {kept:.0%} kept" if kept is not None and kept < 1 else "")


def _layer_table(name: str, rows: Sequence[Mapping[str, Any]], count: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    total = sum(r["ms"] for r in rows)
    slowest = sorted(rows, key=lambda r: -r["ms"])[:count]
    shown = sum(r["ms"] for r in slowest)
    title = f"{name}: the {len(slowest)} slowest of {len(rows)} steps, {shown:.2f} of {total:.2f} ms"
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    beside = any("dense_ms" in row for row in rows)
    for column in ("step", "workload", "kernel"):  # where room is short words go on in the next line, numbers never
        made.add_column(column, overflow="fold", min_width=8)
    for column in ("ms", *(["dense"] if beside else []), "GFLOP/s", "of peak"):
        made.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), 6))
    for row in slowest:
        rate, share = row["gflops"], row["peak_share"]
        dense = [f"{row['dense_ms']:.3f}" if "dense_ms" in row else ""] if beside else []
        made.add_row(
            row["name"].rpartition("/")[0][-28:] or row["name"], short(row["workload"], row["kept"]),
            row["kernel"].partition("__")[0], f"{row['ms']:.3f}", *dense,
            "" if rate is None else f"{rate:.1f}", "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    return made
