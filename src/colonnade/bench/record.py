"""Results as one JSON record (``colonnade.report.bench`` shows it)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from colonnade.bench.protocol import BLOCK_S, FOREIGN, PAUSE_S, PEAK_DROP, STEAL, Result
from colonnade.targets.base import Machine

FORMAT = 1


def layers(
    manifest: Mapping[str, Any], step_ns: Sequence[Sequence[int]], peak_gflops: float, dense: bool = False
) -> list[dict[str, Any]]:
    """One row a step: workload, kernel symbol, median ms, GFLOP/s, its share of the FMA peak (or None).

    The work counted is that on kept weights, so zeros that are multiplied all the same show as a lower rate; in a
    ``dense`` build all weights are kept.
    """
    rows = []
    for step, ns in zip(manifest["steps"], step_ns, strict=True):
        middle = median(ns)
        macs = step["macs"] if dense else step["kept_macs"]
        flops = 2.0 * macs
        rate = flops / middle if flops and middle else None
        rows.append(
            {
                "name": step["name"],
                "workload": step["workload"],
                "kernel": step["kernel"],
                "params": step["params"],
                "kept": macs / step["macs"] if step["macs"] else None,
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
