"""examples/imagenet/train.py on the bundled digits as a folder of photos: a few steps of every preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_torch_processes import ALONE, LAUNCH

from colonnade.demo.network import MEAN, STD, digits
from colonnade.sparsify.presets import PRESETS

SCRIPT = Path(__file__).parent.parent / "examples" / "imagenet" / "train.py"
NETWORK = '''
from torch import nn
from colonnade.demo.network import SmallResNet, convolution

def small():
    """The digits' network, for photos in three channels."""
    model = SmallResNet((16, 16, 24))
    model.stem = nn.Sequential(*convolution(3, 8, 3, 1), nn.ReLU())
    return model
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    (x, y), _ = digits()
    pixels = ((x * STD + MEAN) * 255).round().clip(0, 255).byte().numpy()
    for index in range(110):
        at = root / ("train" if index < 70 else "val") / f"class{int(y[index])}"
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index, 0]).convert("RGB").save(at / f"{index}.png")
    (root / "own.py").write_text(NETWORK)
    return root


def train(folder: Path, out: Path, *words: str, launch: tuple[str, ...] = (sys.executable,)) -> dict[str, Any]:
    # This build of torch may have no operators of torchvision's own: the data sets need none of them.
    shim = "import torch; lib = torch.library.Library('torchvision', 'DEF'); " + "; ".join(
        f"lib.define('{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')" for name in ("nms", "qnms")
    )
    site = folder / "site"
    site.mkdir(exist_ok=True)
    probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    if probe.returncode:
        (site / "sitecustomize.py").write_text(shim + "\n")
    paths = [str(site), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder), "--model", "own:small", "--size", "32", "--workers", "0", "--batch", "24",
         "-o", str(out), *words],
        env=os.environ | ALONE | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=300,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.with_suffix(".json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    record = train(folder, out, "--preset", name, "--pattern", "1:4", "--tile", "4", "--epochs", "2")
    assert len(record["epochs"]) == 2 and record["preset"] == name and record["pattern"] == "1:4 T=4"
    assert record["epochs"][0]["lr"] > 0
    state = load_file(out.with_suffix(".safetensors"))
    for layer in record["pruned"]:
        weight = state[f"{layer}.weight"]
        matrix = weight.movedim(1, -1).flatten(1)
        groups = matrix[:, : matrix.shape[1] // 4 * 4].reshape(len(matrix), -1, 4)
        assert int((groups != 0).sum(2).max()) <= 1
        assert float((weight == 0).float().mean()) >= 0.74
    # What was written is what a run in every runtime gives.
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"input": np.zeros((1, 3, 32, 32), np.float32)})[0]
    assert scores.shape == (1, 10) and np.isfinite(scores).all()


@pytest.mark.slow
def test_two_processes_train_alike(folder: Path, tmp_path: Path) -> None:
    words = ("--preset", "short", "--sparsity", "0.5", "--tile", "8", "--epochs", "2")
    one = train(folder, tmp_path / "one", *words)
    two = train(folder, tmp_path / "two", *words, launch=LAUNCH)
    losses = [[epoch["loss"] for epoch in record["epochs"]] for record in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    # The same line again finds everything done.
    again = train(folder, tmp_path / "one", *words)
    assert again["epochs"] == one["epochs"]
