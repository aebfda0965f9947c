"""`colonnade inspect`, the page of operators, and the options that fix or cut a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from colonnade.cli import run_verb
from colonnade.cli_inspect import examine_model
from colonnade.cli_shapes import parse_shapes
from colonnade.errors import UserError
from tests.models import Builder

ROOT = Path(__file__).resolve().parent.parent


def model(free: bool = False) -> onnx.ModelProto:
    """Stem, a pruned convolution, a depthwise one, an operator that is not supported, a classifier."""
    b = Builder()
    x = b.input("x", ("n", 3, "h", "w") if free else (1, 3, 12, 10))
    y = b.op("Relu", b.conv(x, 3, 8, 3))
    weight = b.rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    weight[:, ::2] = 0
    y = b.op("Conv", y, b.constant(weight, "body.weight"), name="body_node")
    y = b.conv(y, 8, 8, 3, groups=8)
    odd = b.op("Hardmax", y, name="odd")
    z = b.op("Flatten", b.op("GlobalAveragePool", y))
    z = b.op("Gemm", z, b.random(5, 8, name="head.weight"), transB=1, name="head_node")
    return b.build(z, odd)


def test_what_is_in_a_model(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    found = examine_model(tmp_path / "m.onnx")
    stem, body, deep, head = found.layers
    assert stem.reason == "stem" and deep.reason == "depthwise" and head.reason == "classifier" and body.reason is None
    assert body.name == "body" and body.tile == 8 and body.kept == 0.5 and body.zeros == 0.5
    assert body.macs == 8 * 72 * 8 * 6 and stem.macs == 8 * 27 * 10 * 8 and head.macs == 40
    assert body.parameters == 576 and found.macs == sum(layer.macs or 0 for layer in found.layers)
    assert len(found.unsupported) == 1 and "Hardmax 'odd'" in found.unsupported[0]


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    assert run_verb(["inspect", str(tmp_path / "m.onnx"), "--json", str(tmp_path / "m.json")]) == 0
    said = capsys.readouterr().out
    assert "4 layers" in said and "50.0% of columns, T = 8" in said and "no: depthwise" in said
    assert "1 part not supported" in said and "Hardmax" in said
    assert json.loads((tmp_path / "m.json").read_text())["layers"][1]["kept"] == 0.5
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_modules_of_torch(tmp_path: Path) -> None:
    """The exporter transposes the weights of linear layers and loses their names; it notes where nodes come from."""
    b = Builder()
    x = b.op("MatMul", b.input("x", (2, 20, 16)), b.random(16, 32, name="val_1"), name="node_MatMul_1")
    b.nodes[-1].metadata_props.add(
        key="pkg.torch.onnx.name_scopes", value="['', 'layers.0', 'layers.0.query', 'linear']"
    )
    y = b.op("MatMul", x, b.random(32, 16, name="val_2"), name="node_MatMul_2")
    b.nodes[-1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="[broken")
    onnx.save(b.build(y), tmp_path / "m.onnx")
    first, second = examine_model(tmp_path / "m.onnx", exclude=(r"\.query$",)).layers
    assert (first.name, second.name) == ("layers.0.query", "node_MatMul_2")
    assert first.reason and "query" in first.reason and first.macs == 2 * 20 * 16 * 32 and second.macs


def test_free_sizes(tmp_path: Path, capsys: Any) -> None:
    onnx.save(model(free=True), tmp_path / "m.onnx")
    assert run_verb(["inspect", str(tmp_path / "m.onnx")]) == 2
    assert "such as --input-shape x=1x3x224x224" in capsys.readouterr().err
    assert run_verb(["inspect", str(tmp_path / "m.onnx"), "--input-shape", "x=1x3x12x10"]) == 0


def test_a_missing_file_and_a_bad_shape(tmp_path: Path, capsys: Any) -> None:
    assert run_verb(["inspect", str(tmp_path / "none.onnx")]) == 2
    assert parse_shapes(["a=1x3", "b=c=2,2"]) == {"a": [1, 3], "b=c": [2, 2]} and parse_shapes([]) is None
    for text in ("x", "=1x3", "x=1x", "x=axb"):
        with pytest.raises(UserError, match="NAME=SIZES"):
            parse_shapes([text])


def test_the_page_of_operators_is_current() -> None:
    spec = importlib.util.spec_from_file_location("operators", ROOT / "scripts" / "operators.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.TARGET.read_text(encoding="utf-8") == page.text(), "run scripts/operators.py"
    assert all(row.count("|") == 5 and len(row.split("|")[2]) > 5 for row in page.text().splitlines()[-20:])
