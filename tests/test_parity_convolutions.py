"""Networks of grouped and depthwise convolutions, and with BatchNorms in front, to bundles, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from models import export, torchvision_model
from test_parity import compare

from colonnade import ColumnPattern
from colonnade.sparsify.onnx_file import prune_file


def test_mobilenet_v2_with_real_weights(shared_data: Path, tmp_path: Path) -> None:
    import weights

    onnx.save(export(weights.mobilenet_v2(), 1, 3, 224, 224), tmp_path / "model.onnx")
    compare(tmp_path / "model.onnx", tmp_path, 1, (224, 224))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "percent"), [("resnext50_32x4d", 0), ("resnext50_32x4d", 75), ("densenet121", 0), ("densenet121", 75)]
)
def test_networks_of_torchvision(network: str, percent: int, torchvision_models: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(export(torchvision_model(torchvision_models, network), 1, 3, 96, 96), file)
    if percent:
        prune_file(file, tmp_path / "pruned.onnx", ColumnPattern(percent / 100, tile=8), group_rows=False)
        file = tmp_path / "pruned.onnx"
    compare(file, tmp_path, 1, (96, 96))
