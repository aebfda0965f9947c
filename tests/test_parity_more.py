"""Networks of depthwise and grouped convolutions, from ONNX to bundle: onnxruntime's answers on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import export, onnxruntime_outputs, torchvision_model

from colonnade import ColumnPattern, Session
from colonnade.api import build
from colonnade.sparsify.onnx_file import prune_file

TOLERANCE = 1e-4  # of the largest magnitude
QUICK = (64, 96)
SLOW = [(1, (224, 224)), (3, (160, 192))]


@pytest.fixture(scope="session")
def files(request: pytest.FixtureRequest, torchvision_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(network, sparsity in percent) → ONNX file of any batch and size, pruned in consecutive rows."""
    folder = tmp_path_factory.mktemp("more-networks")
    ready: dict[tuple[str, int], Path] = {}

    def network(name: str) -> Any:
        if name == "mobilenet_v2":  # real weights: random ones say little about ReLU6
            request.getfixturevalue("shared_data")
            import weights

            return weights.mobilenet_v2()
        return torchvision_model(torchvision_models, name)

    def file(name: str, percent: int) -> Path:
        if (name, percent) not in ready:
            path = folder / f"{name}-{percent}.onnx"
            if percent:
                prune_file(file(name, 0), path, ColumnPattern(percent / 100, tile=8), group_rows=False)
            else:
                model = export(network(name), 1, 3, 224, 224, dynamic=True)
                for axis, free in ((2, "height"), (3, "width")):
                    model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = free
                del model.graph.value_info[:]
                onnx.save(model, path)
            ready[name, percent] = path
        return ready[name, percent]

    return file


def compare(file: Path, folder: Path, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    """The bundle's manifest, after its answers with one thread and two were found right, and equal in two runs."""
    bundle = build(file, input_shapes={"x": (batch, 3, *size)}, threads=2, out=folder / "bundle")
    feeds = {"x": np.random.default_rng(0).standard_normal((batch, 3, *size)).astype(np.float32)}
    expected = onnxruntime_outputs(onnx.load(file), feeds)
    for threads in (1, 2):
        with Session(bundle.path, threads=threads) as session:
            first, second = session.run(feeds), session.run(feeds)
        for name, wanted in expected.items():
            np.testing.assert_array_equal(first[name], second[name], "two runs differ")
            assert np.abs(first[name] - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    return bundle.manifest


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
