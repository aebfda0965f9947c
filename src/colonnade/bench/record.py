"""Results as one JSON record (``colonnade.report.bench`` shows it)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median, quantiles
from typing import Any

from colonnade.bench.protocol import BLOCK_S, FOREIGN, PAUSE_S, STEAL, Result
from colonnade.targets.base import Machine
from colonnade.targets.peak import DROP, HANDOVER_DROP

FORMAT = 1
NEVER_SLOWER = 0.03  # a pruned layer may take this much longer than its dense self, beyond the spread


def layers(
    manifest: Mapping[str, Any], step_ns: Sequence[Sequence[int]], peak_gflops: float, dense: bool = False
) -> list[dict[str, Any]]:
    """One row a step: workload, kernel symbol, median ms, GFLOP/s, its share of the FMA peak (or None); ``peak_gflops``
    are those of f32.

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
                "spread_ms": half_range(ns) / 1e6,
                "bytes": step.get("constant_bytes", 0) + step.get("activation_bytes", 0),
                "gflops": rate,
                "lanes": lanes(step["kernel"]),
                "peak_share": rate / peak_gflops / lanes(step["kernel"]) if rate is not None and peak_gflops else None,
            }
        )
    return rows


def lanes(kernel: str) -> int:
    """How many times as many lanes as the f32 FMA peak has a kernel of this name multiplies at once."""
    return 2 if kernel.startswith(("f16_spconv", "f16_dwconv")) else 1


def half_range(ns: Sequence[int]) -> float:
    """Half the distance between the quartiles: the spread that two medians are compared beyond."""
    if len(ns) < 2:
        return 0.0
    low, _, high = quantiles(ns, n=4, method="inclusive")
    return (high - low) / 2


def beside_dense(pruned: Sequence[dict[str, Any]], dense: Sequence[Mapping[str, Any]]) -> list[str]:
    """Note each pruned layer's dense self in its row (``dense_ms``, ``dense_kernel``); the names of layers that are
    slower than it by more than ``NEVER_SLOWER`` and the spread."""
    slower = []
    for row, other in zip(pruned, dense, strict=True):
        if row["kept"] is None or row["kept"] >= 1:
            continue
        row["dense_ms"], row["dense_kernel"] = other["ms"], other["kernel"]
        if row["ms"] > (1 + NEVER_SLOWER) * other["ms"] + row["spread_ms"] + other["spread_ms"]:
            slower.append(row["name"])
    return slower


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
            "block_s": BLOCK_S, "pause_s": PAUSE_S, "foreign": FOREIGN, "steal": STEAL,
            "peak_drop": DROP, "handover_drop": HANDOVER_DROP,
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
                        "ns": list(b.ns), "peak": [b.before.gflops, b.after.gflops],
                        "pace": [b.before.pace, b.after.pace],
                        "handover": [b.before.handover, b.after.handover], "foreign": b.foreign,
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
