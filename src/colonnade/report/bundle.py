"""The record of one bundle's run: as a table for the terminal, or as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from colonnade.report.bench import short

FORMAT = 1
SHOWN = 15


def enrich(rows: Sequence[Mapping[str, Any]], peak: Mapping[str, float]) -> list[dict[str, Any]]:
    """The layers of a bench record with what they mean: ``what`` (workload for people), ``role`` (convolution,
    conversion, …), ``gbps``, and ``limit_ms``, the time below which the measured limits let no kernel go: its
    multiply-adds at the FMA peak, or its bytes at memory's pace where that is longer (``bound``).

    Bytes are weights and tensors, each counted once. What fits the caches may be read faster than memory, so a small
    layer can run below a limit by bytes.
    """
    made = []
    for row in rows:
        op = row["workload"].partition("(")[0]
        kind = row["workload"].partition("kind=")[2].partition(",")[0]
        flops = row["gflops"] * row["ms"] * 1e6 if row["gflops"] else 0.0
        # the peak is that of f32
        compute = flops / peak["gflops"] / row.get("lanes", 1) / 1e6 if peak["gflops"] else 0.0
        memory = row["bytes"] / peak["gbps"] / 1e6 if peak["gbps"] else 0.0
        moves = op in ("reorder", "interleave", "precision") or (op == "convert" and kind not in ("import", "export"))
        role = "conversion" if moves else op
        made.append(
            dict(row)
            | {
                "what": short(row["workload"], row["kept"]),
                "role": "input and output" if op == "convert" and role != "conversion" else role,
                "gbps": row["bytes"] / row["ms"] / 1e6 if row["ms"] else None,
                "limit_ms": max(compute, memory),
                "bound": "arithmetic" if compute >= memory else "bytes",
                "limit_share": max(compute, memory) / row["ms"] if row["ms"] else None,
                "gathers": bool(row["params"].get("feed")),
            }
        )
    return made


def totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ms and counts over all layers: ``roles`` by role, conversions, panels gathered inside layers, kept work."""
    roles: dict[str, dict[str, float]] = {}
    for row in layers:
        at = roles.setdefault(row["role"], {"steps": 0, "ms": 0.0})
        at["steps"] += 1
        at["ms"] += row["ms"]
    total = sum(row["ms"] for row in layers)
    flops = sum(row["gflops"] * row["ms"] for row in layers if row["gflops"])  # in 10^6
    shares = sum((row["peak_share"] or 0.0) * row["ms"] for row in layers)
    conversions = roles.get("conversion", {"steps": 0, "ms": 0.0})
    return {
        "ms": total,
        "gflops": flops / total if total else 0.0,
        "peak_share": shares / total if total else 0.0,
        "limit_ms": sum(row["limit_ms"] for row in layers),
        "roles": roles,
        "conversions": {**conversions, "share": conversions["ms"] / total if total else 0.0},
        "gathering_layers": sum(row["gathers"] for row in layers),
    }


def table(found: Mapping[str, Any], count: int = SHOWN) -> list[Any]:
    """What to print: rich tables and lines; the ``count`` slowest steps, 0 for all."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    sums, peak, layers = found["totals"], found["peak"], found["layers"]
    shown = sorted(layers, key=lambda r: -r["ms"])[: count or None]
    title = (
        f"{found['name']}: {found['ms']['median']:.3f} ms (quartiles {found['ms']['q1']:.3f}–{found['ms']['q3']:.3f}), "
        f"{found['isa']}, {found['threads']} thread(s), {found['machine']['cpu']}"
    )
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "workload", "kernel"):  # where room is short words go on in the next line, numbers never
        made.add_column(column, overflow="fold", min_width=8)
    duels = any(row.get("dense_ms") is not None for row in layers)
    for column in ("ms", *(["dense"] if duels else []), "GFLOP/s", "of peak", "of limit"):
        made.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), 6))
    for row in shown:
        dense = [f"{row['dense_ms']:.3f}" if row.get("dense_ms") is not None else ""] if duels else []
        made.add_row(
            row["name"][-24:], row["what"], row["kernel"].partition("__")[0], f"{row['ms']:.3f}", *dense,
            number(row["gflops"]), percent(row["peak_share"]), percent(row["limit_share"]),
        )  # fmt: skip
    conversions = sums["conversions"]
    return [
        made,
        f"{len(shown)} of {len(layers)} steps; all of them {sums['ms']:.3f} ms: {sums['gflops']:.1f} GFLOP/s on kept "
        f"work, {percent(found['work_share'])} of the measured peak",
        f"measured limits: {peak['gflops']:.0f} GFLOP/s f32 multiply-add, {peak['gbps']:.1f} GB/s read from memory",
        f"layout conversions: {conversions['steps']:.0f} steps, {conversions['ms']:.3f} ms, {conversions['share']:.1%};"
        f" {sums['gathering_layers']} layers gather panels themselves",
        *found["notes"],
    ]


def number(value: float | None) -> str:
    """One decimal, or nothing."""
    return "" if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    """Whole per cent, or nothing."""
    return "" if value is None else f"{value:.0%}"


def page(found: Mapping[str, Any]) -> str:
    """One HTML page with everything in it, plotly's program included."""
    import jinja2
    import plotly.graph_objects as go
    import plotly.io
    import plotly.offline

    layers = found["layers"]
    layout = dict(template="plotly_white", margin=dict(l=10, r=10, t=30, b=10), font=dict(size=12), dragmode=False)
    names = [f"{i + 1}. {row['name'][-40:]}" for i, row in enumerate(layers)]
    hover = [f"{r['name']}<br>{r['what']}<br>{r['kernel']}<br>{r['ms']:.4f} ms" for r in layers]
    time = go.Figure()
    for role in dict.fromkeys(row["role"] for row in layers):
        mine = [i for i, row in enumerate(layers) if row["role"] == role]
        time.add_bar(
            y=[names[i] for i in mine], x=[layers[i]["ms"] for i in mine], orientation="h", name=role,
            hovertext=[hover[i] for i in mine], hoverinfo="text",
        )  # fmt: skip
    time.add_scatter(
        y=names, x=[row["limit_ms"] for row in layers], mode="markers", name="limit", hoverinfo="skip",
        marker=dict(symbol="line-ns", size=11, line=dict(width=2, color="black")),
    )  # fmt: skip
    if any(row.get("dense_ms") is not None for row in layers):
        time.add_scatter(
            y=names, x=[row.get("dense_ms") for row in layers], mode="markers", name="dense self, when tuned",
            marker=dict(symbol="circle-open", size=8, color="firebrick"),
        )  # fmt: skip
    time.update_layout(
        **layout, height=120 + 18 * len(layers), barmode="overlay", legend=dict(orientation="h", y=1, yanchor="bottom"),
        xaxis=dict(title="ms", side="bottom"), yaxis=dict(autorange="reversed", categoryorder="array",
        categoryarray=names, tickfont=dict(size=11)),
    )  # fmt: skip
    work = [row for row in layers if row["peak_share"] is not None]
    share = go.Figure()
    share.add_scatter(
        x=[row["ms"] for row in work], y=[100 * row["peak_share"] for row in work], mode="markers",
        hovertext=[f"{r['name']}<br>{r['what']}<br>{r['kernel']}" for r in work], hoverinfo="text+x+y",
        marker=dict(size=9, color=[100 * (row["kept"] or 1) for row in work], colorscale="Viridis", cmin=0, cmax=100,
        colorbar=dict(title="% kept")),
    )  # fmt: skip
    share.update_layout(
        **layout,
        height=360,
        xaxis=dict(title="ms", type="log"),
        yaxis=dict(title="% of the FMA peak", rangemode="tozero"),
    )
    figures = [
        plotly.io.to_html(
            f, include_plotlyjs=False, full_html=False, config={"displayModeBar": False, "responsive": True}
        )
        for f in (time, share)
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "percent": percent}
    source = (resources.files("colonnade.report") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        found=found,
        figures=figures,
        plotly=plotly.offline.get_plotlyjs(),
        duels=any(r.get("dense_ms") is not None for r in layers),
    )
