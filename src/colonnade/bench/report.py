"""Results as a JSON record and as tables for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from colonnade.bench.protocol import BLOCK_S, FOREIGN, PAUSE_S, PEAK_DROP, STEAL, Result
from colonnade.targets.base import Machine

FORMAT = 1


def layers(manifest: Mapping[str, Any], step_ns: Sequence[Sequence[int]], peak_gflops: float) -> list[dict[str, Any]]:
    """One row a step: workload, kernel symbol, median ms, GFLOP/s on kept work, its share of the FMA peak (or None)."""
    rows = []
    for step, ns in zip(manifest["steps"], step_ns, strict=True):
        middle = median(ns)
        flops = 2.0 * step["kept_macs"]
        rate = flops / middle if flops and middle else None
        rows.append(
            {
                "name": step["name"],
                "workload": step["workload"],
                "kernel": step["kernel"],
                "params": step["params"],
                "ms": middle / 1e6,
                "gflops": rate,
                "peak_share": rate / peak_gflops if rate is not None and peak_gflops else None,
            }
        )
    return rows


def record(
    model: str,
    machine: Machine,
    isa: str,
    threads: int,
    peak: tuple[float, float],
    results: Sequence[Result],
    layer_rows: Mapping[str, list[dict[str, Any]]],
    differences: Mapping[str, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything about one bench as JSON values; times in ms, but repetitions in ns."""
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "machine": {"cpu": machine.cpu, "arch": machine.arch, "key": machine.key(), "kernel": machine.kernel},
        "python": platform.python_version(),
        "isa": isa,
        "threads": threads,
        "peak": {"gflops": peak[0], "gbps": peak[1]},
        "protocol": {
            "block_s": BLOCK_S, "pause_s": PAUSE_S, "peak_drop": PEAK_DROP, "foreign": FOREIGN, "steal": STEAL,
        },
        "contenders": [
            {
                "name": r.contender.name,
                "version": r.contender.version,
                "options": dict(r.contender.options),
                "ms": r.summary(),
                "blocks": len(r.blocks),
                "thrown_away": len(r.blocks) - len(r.counted),
                "disturbed": r.disturbed,
                "difference": differences.get(r.contender.name),
                "measured": [
                    {
                        "ns": list(b.ns), "peak": [b.peak_before, b.peak_after], "foreign": b.foreign,
                        "steal": b.steal, "disturbance": b.disturbance,
                    }
                    for b in r.blocks
                ],
            }
            for r in results
        ],
        "layers": dict(layer_rows),
        "notes": list(notes),
    }  # fmt: skip


def table(found: Mapping[str, Any], show_layers: int = 12) -> list[Any]:
    """What to print: rich tables and lines. ``show_layers``: the slowest steps of each of our builds; 0 for none."""
    from rich.table import Table

    first = found["contenders"][0]["ms"]["median"]
    title = f"{found['model']}, {found['machine']['cpu']}, {found['isa']}, {found['threads']} thread(s)"
    summary = Table(title=title, title_justify="left")
    for name in ("", "median ms", "min", "quartiles", "times ours", "blocks", "output differs"):
        summary.add_column(name, justify="left" if not name else "right")
    for row in found["contenders"]:
        ms, away = row["ms"], row["thrown_away"]
        differs = row["difference"]
        summary.add_row(
            f"{row['name']} {row['version']}".strip(),
            f"{ms['median']:.3f}" + (" (disturbed)" if row["disturbed"] else ""),
            f"{ms['min']:.3f}",
            f"{ms['q1']:.3f}–{ms['q3']:.3f}",
            f"{ms['median'] / first:.2f}",
            f"{row['blocks'] - away}" + (f" (+{away} thrown away)" if away else ""),
            "" if differs is None else f"{differs:.1e}",
        )
    parts: list[Any] = [summary]
    peak = found["peak"]
    parts.append(
        f"measured limits: {peak['gflops']:.0f} GFLOP/s f32 multiply-add, {peak['gbps']:.1f} GB/s read from memory"
    )
    for row in found["contenders"]:
        if row["options"]:
            parts.append(f"{row['name']}: " + ", ".join(f"{k}={v}" for k, v in row["options"].items()))
    parts += found["notes"]
    for name, rows in found["layers"].items():
        if show_layers:
            parts.append(_layer_table(name, rows, show_layers))
    return parts


def _layer_table(name: str, rows: Sequence[Mapping[str, Any]], count: int) -> Any:
    from rich.table import Table

    total = sum(r["ms"] for r in rows)
    slowest = sorted(rows, key=lambda r: -r["ms"])[:count]
    shown = sum(r["ms"] for r in slowest)
    title = f"{name}: the {len(slowest)} slowest of {len(rows)} steps, {shown:.2f} of {total:.2f} ms"
    made = Table(title=title, title_justify="left")
    made.add_column("step", max_width=28, overflow="ellipsis", no_wrap=True)
    made.add_column("workload", max_width=60, overflow="fold")
    made.add_column("kernel", no_wrap=True)
    for column in ("ms", "GFLOP/s", "of peak"):
        made.add_column(column, justify="right")
    for row in slowest:
        rate, share = row["gflops"], row["peak_share"]
        made.add_row(
            row["name"], row["workload"], row["kernel"], f"{row['ms']:.3f}",
            "" if rate is None else f"{rate:.1f}", "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    return made
