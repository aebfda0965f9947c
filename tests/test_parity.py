"""Whole networks from ONNX to bundle: the answers of onnxruntime on the same file, and of torch on real photos."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import export, onnxruntime_outputs

from colonnade import ColumnPattern, Session
from colonnade.api import build
from colonnade.sparsify.onnx_file import prune_file

TOLERANCE = 1e-4  # of the largest magnitude


def stored(folder: Path, network: Callable[[str], Any]) -> Callable[[str, int], Path]:
    """(network, sparsity in percent) → ONNX file in ``folder``, of any batch and size, pruned in consecutive rows
    (grouping takes minutes and changes nothing for a kernel). ``network``: the torch module of a name."""
    ready: dict[tuple[str, int], Path] = {}

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


@pytest.fixture(scope="session")
def files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`stored` networks with real weights."""
    import weights

    loaders = {"resnet18": "pqf_resnet18", "resnet50": "pqf_resnet50_large"}
    return stored(tmp_path_factory.mktemp("networks"), lambda name: weights.resnet(loaders[name]))


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


def test_resnet18_pruned_equals_onnxruntime(files, tmp_path):
    compare(files("resnet18", 75), tmp_path, batch=1, size=(160, 192))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (160, 192)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("percent", [0, 50, 75])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_resnets_equal_onnxruntime(files, tmp_path, network, percent, batch, size):
    compare(files(network, percent), tmp_path, batch, size)


def colonnade(*words: str | Path) -> str:
    """The verb's output; it must succeed."""
    done = subprocess.run([sys.executable, "-m", "colonnade.cli", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_road_by_command_line_on_real_photos(shared_data, tmp_path):
    """prune → tune → build → run; top-1 over 100 photos is that of torch with the same pruned weights."""
    import images
    import torch
    import weights
    from onnx import numpy_helper

    pruned, bundle, db = tmp_path / "pruned.onnx", tmp_path / "bundle", tmp_path / "tuning.db"
    onnx.save(export(weights.resnet("pqf_resnet18"), 1, 3, 224, 224), tmp_path / "dense.onnx")
    colonnade("prune", tmp_path / "dense.onnx", "-o", pruned, "--sparsity", "0.5", "--no-group-rows")
    said = colonnade("tune", pruned, "--threads", "2", "--budget", "30s", "--db", db)
    assert "measured" in said or "known" in said
    colonnade("build", pruned, "-o", bundle, "--threads", "2", "--db", db, "--preprocess", "imagenet")

    # the exporter folds BatchNorm into the weights: a zero is a zero in torch's model too
    model = weights.resnet("pqf_resnet18")
    written = {i.name: numpy_helper.to_array(i) for i in onnx.load(pruned).graph.initializer}
    state = model.state_dict()
    layers = [name for name, value in written.items() if name in state and not value.all()]
    assert len(layers) == 19  # all convolutions but the stem
    for name in layers:
        state[name] = state[name] * torch.from_numpy(written[name] != 0)
    model.load_state_dict(state)

    pixels, _ = images.imagenet("nips2017_dev_a500")
    inputs = (pixels[:100].astype(np.float32) / 255 - np.float32(weights.MEAN)) / np.float32(weights.STD)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())).argmax(1).tolist()

    folder = shared_data / "imagenet_images"
    rows = (folder / "nips2017_dev_a500.tsv").read_text().splitlines()[1:101]
    photos = [folder / "nips2017_dev_a500" / row.split("\t")[0] for row in rows]

    def best(photo: Path) -> int:
        said = colonnade("run", bundle, "--input", photo)
        return int(said.split(":", 1)[1].split()[0])

    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(best, photos))
    assert actual == expected
