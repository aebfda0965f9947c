"""One bundle by itself: its time, its layers, the machine's limits. ``colonnade report`` shows the record."""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import median, quantiles
from typing import Any

from colonnade.bench.ours import Ours
from colonnade.bench.protocol import FOREIGN, Load
from colonnade.bench.record import layers
from colonnade.bench.run import profiles, random_inputs
from colonnade.build.toolchain import Toolchain
from colonnade.bundle import Bundle
from colonnade.errors import UserError
from colonnade.report.bundle import FORMAT, enrich, totals
from colonnade.targets.base import Target
from colonnade.targets.peak import measure_peak

REPEAT_S = 1.0


def measure(bundle: Bundle, target: Target, threads: int, toolchain: Toolchain) -> dict[str, Any]:
    """Run ``bundle`` with random inputs on ``target``; the record as JSON values, times in ms.

    Raises ``UserError`` for a target that is not timed or cannot run the bundle, ``TargetError`` when it fails.
    """
    if target.untimed:
        raise UserError(f"{target.name}: {target.untimed}; report from a machine of its own (local or ssh://...)")
    machine, manifest = target.probe(), bundle.manifest
    if manifest["arch"] != machine.arch:
        raise UserError(f"{bundle.path}: this bundle needs {manifest['arch']}; {target.name} is {machine.arch}")
    isa = machine.pick_isa(manifest["isa"], timed=True)
    ours = Ours(bundle, target, random_inputs(dict(manifest)), threads)
    load = Load() if target.name == "local" else None
    peak = measure_peak(target, isa, threads, toolchain)
    modelled = bool(target.modelled)  # then it repeats itself, and a second of it takes minutes
    once = median(ours.block(1, 3))
    ns = sorted(ours.block(2, 3 if modelled else min(max(int(REPEAT_S * 1e9 / once), 5), 1000)))
    low, _, high = quantiles(ns, n=4, method="inclusive")
    rows = layers(manifest, profiles({"": ours}, modelled)[""], peak.gflops)
    tuning = manifest.get("tuning", {})
    for row, fought in zip(rows, tuning.get("duels") or [None] * len(rows), strict=True):
        row["dense_ms"] = fought["dense_ns"] / 1e6 if fought else None
    limits = {"gflops": peak.gflops, "gbps": peak.gbps}
    enriched = enrich(rows, limits)
    sums = totals(enriched)
    notes = []
    if tuning.get("untuned"):
        notes.append(
            f"{tuning['untuned']} of {tuning['tunable']} layers untuned: `colonnade build --tune` gives the best times"
        )
    dense = [r["name"] for r in rows if r["dense_ms"] is not None and r["params"].get("dense")]
    if dense:
        notes.append(f"{len(dense)} pruned layers run dense, faster here in the tuner's duel: {', '.join(dense)}")
    if load is not None and (foreign := load.shares()[0]) > FOREIGN:
        notes.append(f"other programs took {foreign:.0%} of a core meanwhile: the figures are not evidence")
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": manifest["name"],
        "target": target.name,
        "machine": {"cpu": machine.cpu, "arch": machine.arch, "kernel": machine.kernel},
        "isa": isa.name,
        "threads": threads,
        "compiler": manifest.get("compiler", ""),
        "peak": limits,
        "ms": {"median": median(ns) / 1e6, "min": ns[0] / 1e6, "q1": low / 1e6, "q3": high / 1e6},
        "work_share": sums["peak_share"] if peak.gflops else None,
        "totals": sums,
        "layers": enriched,
        "notes": notes,
    }
