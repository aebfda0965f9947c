"""Networks of depthwise and grouped convolutions, from ONNX to bundle: onnxruntime's answers on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import torchvision_model
from test_parity import compare, stored

QUICK = (64, 96)
SLOW = [(1, (224, 224)), (3, (160, 192))]


@pytest.fixture(scope="session")
def files(request: pytest.FixtureRequest, torchvision_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`stored` networks of torchvision."""

    def network(name: str) -> Any:
        if name == "mobilenet_v2":  # real weights: random ones say little about ReLU6
            request.getfixturevalue("shared_data")
            import weights

            return weights.mobilenet_v2()
        return torchvision_model(torchvision_models, name)

    return stored(tmp_path_factory.mktemp("more-networks"), network)


def kept(manifest: dict[str, Any]) -> float:
    """Share of the network's multiply-adds that is left."""
    steps = manifest["steps"]
    return sum(step["kept_macs"] for step in steps) / sum(step["macs"] for step in steps)


def test_mobilenet_v2_pruned_equals_onnxruntime(files: Any, tmp_path: Path) -> None:
    assert kept(compare(files("mobilenet_v2", 75), tmp_path, 1, QUICK)) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "size"), SLOW, ids=str)
@pytest.mark.parametrize("percent", [0, 50, 75])
@pytest.mark.parametrize("network", ["mobilenet_v2", "resnext50_32x4d"])
def test_equals_onnxruntime(
    files: Any, tmp_path: Path, network: str, percent: int, batch: int, size: tuple[int, int]
) -> None:
    share = kept(compare(files(network, percent), tmp_path, batch, size))
    # the real weights of MobileNetV2, once quantised, bring a few zeros of their own
    assert share > 0.9 if percent == 0 else share < 1.1 - 0.8 * percent / 100
