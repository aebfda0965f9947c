"""The report of a bundle: limits, conversions, the terminal's table, and one page that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import colonnade as cn
from colonnade.cli import run_verb
from colonnade.report.bundle import enrich, page, table, totals


def row(**given: Any) -> dict[str, Any]:
    base = {"name": "c", "workload": "conv2d(kind=x)", "kernel": "k__portable", "params": {}, "kept": 1.0, "ms": 1.0}
    return base | {"gflops": 50.0, "peak_share": 0.5, "bytes": 10**6, "dense_ms": None} | given


def test_limits_are_arithmetic_or_bytes_whichever_takes_longer() -> None:
    peak = {"gflops": 100.0, "gbps": 10.0}
    busy, moving = enrich([row(), row(bytes=8 * 10**6)], peak)
    assert (busy["bound"], busy["limit_ms"], busy["limit_share"]) == ("arithmetic", 0.5, 0.5)
    assert (moving["bound"], moving["limit_ms"]) == ("bytes", 0.8) and moving["gbps"] == 8.0


def test_conversions_and_gathers_are_counted() -> None:
    rows = [
        row(),
        row(workload="convert(kind=planes,shape=1x2x3x4)", gflops=None, peak_share=None, ms=0.25),
        row(workload="convert(kind=import,shape=1x2x3x4)", gflops=None, peak_share=None, ms=0.5),
        row(params={"feed": 1}),
    ]
    sums = totals(enrich(rows, {"gflops": 100.0, "gbps": 10.0}))
    assert sums["conversions"] == {"steps": 1, "ms": 0.25, "share": 0.25 / 2.75}
    assert sums["gathering_layers"] == 1 and sums["roles"]["input and output"]["steps"] == 1
    assert sums["gflops"] == pytest.approx(100.0 / 2.75)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A pruned convolution, tuned, whose name a page must not take for markup."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    weight[:, ::2] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "<b>conv</b>", pads=[1] * 4, kernel_shape=[3, 3]),
            helper.make_node("GlobalAveragePool", ["c"], ["y"], "pool"),
        ],
        "small",
        [helper.make_tensor_value_info("x", 1, [1, 4, 12, 12])],
        [helper.make_tensor_value_info("y", 1, [1, 8, 1, 1])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    made = cn.build(path, out=tmp_path / "b", db=tmp_path / "t.db", tune=True, budget=30, isa="portable")
    return made.path


def test_a_report_from_bundle_to_page(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    html, record = tmp_path / "r.html", tmp_path / "r.json"
    assert run_verb(["report", str(bundle), "-o", str(html), "--json", str(record)]) == 0
    said = capsys.readouterr().out
    assert "layout conversions: " in said and "f32_spconv" in said and "of the measured peak" in said
    found = json.loads(record.read_text())
    (conv,) = [r for r in found["layers"] if r["workload"].startswith("conv2d")]
    assert conv["ms"] > 0 and 0 < conv["peak_share"] < 2 and conv["kept"] == 0.5
    assert conv["dense_ms"] is not None and conv["dense_ms"] > 0, "the duel of the tuner stands beside it"
    # kept weights and tables, not all weights
    manifest = json.loads((bundle / "manifest.json").read_text())
    (step,) = [s for s in manifest["steps"] if s["workload"].startswith("conv2d")]
    assert conv["bytes"] == step["constant_bytes"] + step["activation_bytes"]
    text = html.read_text()
    assert "<td>&lt;b&gt;conv&lt;/b&gt;" in text and "Plotly.newPlot" in text
    outside = text.replace(re.search(r"<script>(?:(?!</script>).){100000,}</script>", text, re.S)[0], "")  # type: ignore[index]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside), "the page must need no network"
    assert len(table(found, 0)) >= 4 and page(found).startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["-o", "r.pdf"], "ends in .html"),
        (["-o", "no/such/r.html"], "no folder"),
        (["--target", "qemu:vlen=256"], "qemu"),
    ],
)
def test_mistakes_are_one_line(
    bundle: Path, words: list[str], what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    assert run_verb(["report", str(bundle), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert what in line and not list(bundle.parent.glob("r.*"))
