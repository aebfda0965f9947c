"""The tables of host.md, from the record that host.py takes, and the goals that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colonnade.report.bundle import percent

TILE = 8
# ratio of medians to the fastest peer's dense run, by sparsity in per cent
GOALS: dict[str, dict[float, float]] = {
    "resnet50": {0: 1.0, 50: 1.9, 75: 3.5, 87.5: 5.5},
    "resnet18": {0: 1.0, 50: 1.8, 75: 3.0, 87.5: 4.5},
    "densenet121": {0: 1.0, 50: 1.7, 75: 2.8},
    "mobilenet_v2": {0: 1.0, 50: 1.4, 75: 1.9},
}
MAIN = 75.0  # the sparsity that threads, batch, memory and layers are shown at
SLOWEST = 8  # layers that are shown


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of the record."""
    lines = [
        f"Measured {found['date']} on {found['machine']['cpu']}, {found['machine']['cores']} cores, {found['isa']}, "
        f"Linux {found['machine']['kernel']}. f32, 224x224, batch 1 and one thread unless said; T = {TILE}.",
        "Medians in ms with their quartiles. **?**: no undisturbed block, not evidence.",
        "",
    ]
    if found["quick"]:
        lines += ["**A rehearsal (`--quick`): none of these figures is evidence.**", ""]
    lines += ["## Against the fastest peer's dense run", ""]
    lines += ["| network | sparsity | T | ms | fastest peer | ms | ratio | goal | |", "| --- " * 9 + "|"]
    for network, record in found["networks"].items():
        peer = fastest(record)
        for name, sparsity in ours_of(record):
            goal = GOALS[network].get(sparsity)
            ratio = (
                record["contenders"][peer]["ms"]["median"] / record["contenders"][name]["ms"]["median"]
                if peer
                else None
            )
            theirs = ms(record["contenders"][peer]) if peer else "–"
            lines.append(
                f"| {network} | {sparsity:g} % | {TILE if sparsity else '–'} | {ms(record['contenders'][name])} | "
                f"{peer or '–'} | {theirs} | {'–' if ratio is None else f'{ratio:.2f}'} | {goal or '–'} | "
                f"{verdict(ratio, goal)} |"
            )
    lines += [
        "",
        "## Every contender",
        "",
        "| network | contender | median | min | blocks | thrown away | output differs |",
    ]
    lines += ["| --- " * 7 + "|"]
    for network, record in found["networks"].items():
        for name, row in record["contenders"].items():
            differs = record["differences"].get(name)
            lines.append(
                f"| {network} | {name} {row['version']} | {ms(row)} | {row['ms']['min']:.2f} | {row['blocks']} | "
                f"{row['thrown_away']} | {'' if differs is None else f'{differs:.0e}'} |"
            )
        lines += [f"| {network} | {kind} | {why} | | | | |" for kind, why in record["refused"].items()]
    lines += ["", *options_of(found), "", "## Floors and side conditions", "", "| network | what | found | wanted | |"]
    lines += ["| --- " * 5 + "|", *(f"| {' | '.join(row)} |" for row in conditions(found))]
    for network, record in found["networks"].items():
        name = f"colonnade {MAIN:g} %"
        for shown in ([name] if name in record["layers"] else []) + ["colonnade 0 %"]:
            if shown not in record["layers"]:
                continue
            rows = sorted(record["layers"][shown], key=lambda r: -r["ms"])[:SLOWEST]
            lines += ["", f"## The slowest layers: {network}, {shown}", ""]
            lines += ["| layer | workload | kernel | ms | dense ms | of FMA peak | limit ms | bound by | of limit |"]
            lines += ["| --- " * 9 + "|"]
            for row in rows:
                dense = f"{row['dense_ms']:.3f}" if row.get("dense_ms") is not None else ""
                lines.append(
                    f"| {row['name']} | {row['what']} | {row['kernel']} | {row['ms']:.3f} | {dense} | "
                    f"{percent(row['peak_share'])} | {row['limit_ms']:.3f} | {row['bound']} | "
                    f"{percent(row['limit_share'])} |"
                )
    lines += ["", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def fastest(record: Mapping[str, Any]) -> str | None:
    """The peer with the lowest median."""
    return min(record["peers"], key=lambda kind: record["contenders"][kind]["ms"]["median"], default=None)


def ours_of(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Our contenders with their sparsity in per cent."""
    return [(n, float(n.split()[1])) for n in record["contenders"] if n.startswith("colonnade ")]


def ms(row: Mapping[str, Any]) -> str:
    """``21.30 (21.10–21.60)``"""
    at = row["ms"]
    return f"{at['median']:.2f} ({at['q1']:.2f}–{at['q3']:.2f})" + (" **?**" if row["disturbed"] else "")


def verdict(value: float | None, least: float | None) -> str:
    """met, missed, or nothing where there is no goal."""
    return "" if value is None or least is None else "met" if value >= least else "missed"


def options_of(found: Mapping[str, Any]) -> list[str]:
    """One line a peer: what it ran with."""
    said = {}
    for record in found["networks"].values():
        for kind in record["peers"]:
            row = record["contenders"][kind]
            said[kind] = f"- {kind} {row['version']}: " + ", ".join(f"{k}={v}" for k, v in row["options"].items())
    return list(said.values())


def conditions(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(network, what, found, wanted, verdict) of everything but the main table."""
    rows: list[tuple[str, ...]] = []
    for network, record in found["networks"].items():
        at = {name: row["ms"]["median"] for name, row in record["contenders"].items()}
        dense, main = at.get("colonnade 0 %"), at.get(f"colonnade {MAIN:g} %")
        if network == "resnet50" and dense and main:
            rows.append(
                (network, f"{MAIN:g} % over own dense", f"{dense / main:.2f}x", "≥ 2.5", verdict(dense / main, 2.5))
            )
        if network == "resnet50" and dense and "onnxruntime" in at:
            ratio = dense / at["onnxruntime"]
            rows.append((network, "dense over onnxruntime's time", f"{ratio:.2f}x", "≤ 1.3", verdict(1.3, ratio)))
        scale = record.get("scaling", {})
        if "batch8" in scale:
            rate = scale["batch8"]
            rows.append((network, "batch 8, images/s over batch 1", f"{rate:.2f}x", "≥ 1", verdict(rate, 1)))
        if "threads2" in scale:
            rows.append(
                (network, "2 threads over 1", f"{scale['threads2']:.2f}x", "≥ 1.8", verdict(scale["threads2"], 1.8))
            )
        for name, share in record["kept_work_share"].items():
            wanted = 0.7 if network == "resnet50" and name == f"colonnade {MAIN:g} %" else None
            rows.append(
                (
                    network,
                    f"{name}: kept work of FMA peak",
                    f"{share:.0%}",
                    "≥ 70 %" if wanted else "",
                    verdict(share, wanted),
                )
            )
        slow = max(record["load_ms"].values())
        rows.append((network, "session load, slowest", f"{slow:.0f} ms", "≤ 150", verdict(150, slow)))
        for name, at_most in record["memory"].items():
            peak, allowed = at_most["peak"] / 1e6, at_most["allowed"] / 1e6
            rows.append((network, f"{name}: peak memory", f"{peak:.0f} MB", f"≤ {allowed:.0f}", verdict(allowed, peak)))
        for name, slower in record["slower_than_dense"].items():
            said = ", ".join(slower) or "none"
            rows.append((network, f"{name}: layers slower than dense", said, "none", "missed" if slower else "met"))
    return rows
