"""`colonnade finetune` on the bundled digits: as arrays and as photos, its files, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_torch_processes import ALONE, LAUNCH

import colonnade as cn
from colonnade.cli import run_verb
from colonnade.demo.network import MEAN, STD, SmallResNet, digits
from colonnade.errors import UserError
from colonnade.sparsify.masks import masks
from colonnade.training import open_data, put_state, read_state

MODEL = "colonnade.demo.network:SmallResNet"
WIDTHS = [16, 16, 24]
ARGS = ("--model-args", json.dumps({"widths": WIDTHS}), "--batch", "32")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (x, y), (tx, ty) = digits()
    path = tmp_path_factory.mktemp("arrays") / "digits.npz"
    np.savez(path, x_train=x[:160].numpy(), y_train=y[:160].numpy(), x_val=tx[:50].numpy(), y_val=ty[:50].numpy())
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of one folder per class, and the preprocessing beside them."""
    root = tmp_path_factory.mktemp("photos")
    (x, y), _ = digits()
    pixels = ((x * STD + MEAN) * 255).round().clip(0, 255).byte().numpy()
    for index in range(80):
        folder = root / ("train" if index < 60 else "val") / str(int(y[index]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index, 0]).save(folder / f"{index}.png")
    (root / "view.json").write_text(json.dumps({"resize": 32, "crop": [32, 32], "mean": [MEAN], "std": [STD]}))
    return root


def finetune(*words: str | Path) -> int:
    return run_verb(["finetune", MODEL, *map(str, words)])


def test_from_arrays_to_a_bundle(arrays: Path, tmp_path: Path) -> None:
    out, onnx = tmp_path / "out.safetensors", tmp_path / "out.onnx"
    assert finetune(arrays, "-o", out, "--onnx", onnx, "--sparsity", "0.5", "--epochs", "1", *ARGS) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.onnx", "out.safetensors"]
    model = SmallResNet(tuple(WIDTHS))
    model.load_state_dict(load_file(out))
    layers = [
        layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d) and "stem" not in name
    ]
    assert all(float((layer.weight == 0).float().mean()) == 0.5 for layer in layers)
    bundle = cn.build(onnx, out=tmp_path / "bundle")
    x = digits()[1][0][:1]
    with cn.Session(bundle.path) as session, torch.no_grad():
        np.testing.assert_allclose(session.run({"input": x.numpy()})["output"], model.eval()(x).numpy(), atol=1e-4)


def test_photos_go_on_from_pruned_weights(photos: Path, arrays: Path, tmp_path: Path) -> None:
    """Zeros that a file brings are held without a pattern; checkpoints of a run are weights too."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert finetune(arrays, "-o", first, "--pattern", "1:4", "--epochs", "0", *ARGS) == 0
    words = (photos, "-o", second, "--weights", first, "--preprocess", photos / "view.json", "--epochs", "1")
    assert finetune(*words, "--checkpoints", tmp_path / "kept", *ARGS) == 0
    before, after = load_file(first), load_file(second)
    key = "stages.1.body.0.weight"
    assert float((before[key] == 0).float().mean()) == 0.75
    assert torch.equal(before[key] == 0, after[key] == 0)
    assert not torch.equal(before[key], after[key])
    masked = read_state(tmp_path / "kept" / "epoch-0001" / "model.safetensors")
    assert list(masked) and sorted(masked) == sorted(after)
    assert torch.equal(masked[key], after[key])
    assert finetune(*words, *ARGS) == 2  # the output is there
    assert finetune(*words, "--force", "--lr", "0.001", *ARGS) == 0


def test_data(photos: Path, arrays: Path, tmp_path: Path) -> None:
    view = json.loads((photos / "view.json").read_text())
    data = open_data(photos, view)
    assert (data.shape, data.labels, len(data.train)) == ((1, 32, 32), 10, 60)  # type: ignore[arg-type]
    assert data.validation is not None
    x = digits()[0][0]
    plain = open_data(photos, view, augment="none", mirror=False).train
    number = int(Path(plain.samples[7][0]).stem)  # type: ignore[attr-defined]
    assert float((plain[7][0] - x[number]).abs().max()) <= 0.5 / 255 / STD + 1e-5
    assert data.train[7][0].shape == (1, 32, 32)
    bytes_file = tmp_path / "bytes.npz"
    np.savez(bytes_file, x=np.full((4, 6, 5, 3), 255, np.uint8), y=np.arange(4))
    image, label = open_data(bytes_file, {"mean": [0.5, 0, 0], "std": [1, 1, 2]}, augment="shift").train[3]
    assert (image.shape, label) == ((3, 6, 5), 3)
    np.testing.assert_allclose(open_data(bytes_file, None).train[0][0], 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{arrays}", "--sparsity", "0.5", "--exclude", "stages.9"], "exclude 'stages.9' matches no layer"),
        (["nowhere.npz"], "there is no such file"),
        (["{arrays}"], "no layer has zeros to hold"),
        (["{arrays}", "--distill", "0.5"], "--distill learns from the model before pruning"),
        (["{arrays}", "--sparsity", "2"], "sparsity"),
        (["{arrays}", "--sparsity", "0.5", "--model-args", "{}x"], "not JSON"),
        (["{arrays}", "--sparsity", "0.5", "--model-args", '{"depth": 3}'], "SmallResNet failed (TypeError"),
        (["{arrays}", "--sparsity", "0.5", "--weights", "{arrays}"], "pickled objects are refused"),
        (["{arrays}", "--sparsity", "0.5", "--augment", "crop"], "for folders of photos"),
        (["{photos}", "--sparsity", "0.5"], "does not take an input of shape (1, 3, 224, 224)"),
    ],
)
def test_errors_are_one_line(
    arrays: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    filled = [word.replace("{arrays}", str(arrays)).replace("{photos}", str(photos)) for word in words]
    assert finetune(*filled, "-o", tmp_path / "out.safetensors") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1] and errors[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["SmallResNet", "nowhere.at.all:f", "json:dumps", "colonnade.demo.network:Nothing"])
def test_what_is_no_model(arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert run_verb(["finetune", model, str(arrays), "-o", str(tmp_path / "o.safetensors"), "--sparsity", "0.5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_of_another_model_and_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="pickled objects are refused"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    model = torch.nn.Linear(3, 2)
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"weight has shape \(2, 4\)"):
        put_state(model, tmp_path / "wide.safetensors")
    save_file({"kernel": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"2 missing \(weight, …\) and 1 unknown \(kernel, …\)"):
        put_state(model, tmp_path / "other.safetensors")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "dp.pt"
    )
    put_state(torch.nn.Linear(3, 2), tmp_path / "dp.pt")


def test_masks_in_a_checkpoint_become_zeros(tmp_path: Path) -> None:
    model = SmallResNet(tuple(WIDTHS))
    cn.sparsify_(model, cn.ColumnPattern(0.5), torch.zeros(1, 1, 32, 32))
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    plain = SmallResNet(tuple(WIDTHS))
    put_state(plain, tmp_path / "masked.pt")
    for name, mask in masks(model):
        assert bool((plain.get_parameter(name)[~mask.mask] == 0).all())
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_by_command_line(arrays: Path, tmp_path: Path) -> None:
    """The same command under `accelerate launch`: the weights of one process, up to rounding, written once."""
    words = ["finetune", MODEL, str(arrays), "--sparsity", "0.5", "--epochs", "1", "--lr", "0.001", *ARGS]
    states = []
    for name, before in (("one", (sys.executable, "-m")), ("two", (*LAUNCH, "-m"))):
        out = tmp_path / f"{name}.safetensors"
        done = subprocess.run(
            [*before, "colonnade.cli", *words, "-o", str(out)],
            env=os.environ | ALONE, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("safetensors: weights") == done.stderr.count("zeros held") == 1
        states.append(load_file(out))
    one, two = states
    for key, value in one.items():
        torch.testing.assert_close(two[key].float(), value.float(), rtol=1e-3, atol=1e-4, msg=key)


def test_a_preset_and_what_wins_over_it(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from colonnade.sparsify import finetune as module
    from colonnade.sparsify.presets import preset
    from colonnade.sparsify.rechoose import Rechoose

    seen: dict[str, Any] = {}

    def instead(model: Any, train: Any, validation: Any, **options: Any) -> module.History:
        seen.clear()
        seen.update(options, batch=train.batch_size, movable=sum(hasattr(m, "rows") for m in model.modules()))
        return module.History()

    monkeypatch.setattr(module, "finetune", instead)
    words = (arrays, "-o", tmp_path / "out.safetensors", "--sparsity", "0.5", "--force", *ARGS[:2])
    assert finetune(*words, "--preset", "paper", "--epochs", "3", "--lr", "0.01") == 0
    assert (seen["optimizer"], seen["epochs"], seen["lr"], seen["decay_epochs"]) == ("adamw", 3, 0.01, 30)
    assert seen["batch"] == 256 and seen["teacher"] is None and not seen["movable"] and seen["rechoose"] is None
    assert finetune(*words, "--preset", "long", "--ramp", "0.9", "--batch", "16") == 0
    assert seen["rechoose"] == Rechoose(ramp=0.9, until=0.9) and seen["batch"] == 16
    assert seen["movable"] > 3 and seen["teacher"] is not None
    assert finetune(*words, "--preset", "long", "--no-rechoose") == 0
    assert seen["rechoose"] is None and not seen["movable"]
    assert finetune(*words, "--rechoose", "--ramp", "0.5", "--ema", "0.9", "--distill-blocks", "0.3") == 0
    assert seen["rechoose"] == Rechoose(ramp=0.5) and seen["ema"] == 0.9 and seen["block_weight"] == 0.3
    assert seen["batch"] == 128 and seen["epochs"] == 10 and seen["temperature"] == 2
    short = preset("short").finetune
    assert finetune(*words, "--preset", "short") == 0
    assert all(seen[name] == value for name, value in short.items()) and seen["teacher"] is not None
    assert finetune(*words, "--preset", "short", "--temperature", "8") == 0
    assert seen["temperature"] == 8 and seen["lr"] == short["lr"]
    capsys.readouterr()
    for wrong, message in (
        (("--preset", "best"), "expected one of short, long, paper"),
        (("--ramp", "0.5"), "--ramp belongs to --rechoose"),
    ):
        assert finetune(*words, *wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert finetune(arrays, "-o", tmp_path / "no.safetensors", "--rechoose", *ARGS) == 2
    assert "needs the model before pruning" in capsys.readouterr().err
