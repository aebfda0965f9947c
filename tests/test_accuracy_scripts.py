"""bench/accuracy/cifar_finetune.py with a small network and the bundled digits in the place of CIFAR-10."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colonnade.demo.network import Shifted, SmallResNet, digits
from colonnade.sparsify.checkpoints import History

SCRIPTS = Path(__file__).resolve().parent.parent / "bench" / "accuracy"
TRAINED = 1152  # digits; nine batches of the script


class Stopped(Shifted):
    """Digits that are gone after so many were asked for."""

    left = -1  # of all instances together

    def __getitem__(self, index: int) -> Any:
        if Stopped.left == 0:
            raise KeyboardInterrupt
        Stopped.left -= 1
        return super().__getitem__(index)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script's module; what it loads are digits."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("cifar_finetune")
    (images, labels), (x, truth) = digits()
    torch.manual_seed(0)
    network = SmallResNet((16, 16, 24)).eval()
    task = module.Task(network, images[:64], x[:100], truth[:100].numpy())
    setting = module.Setting(task, Stopped(images[:TRAINED], labels[:TRAINED]))
    monkeypatch.setattr(module, "load", lambda _options: setting)
    monkeypatch.setitem(module.DENSE, "precision", "no")  # bf16 is slow where a CPU lacks it
    (tmp_path / "loaders").mkdir()
    return module


def rows(module: Any, folder: Path, keep: str, *more: str) -> list[dict[str, Any]]:
    """The records of one call that went well."""
    options = ["--data", folder, "--keep", folder / keep, "--records", folder / f"{keep}.json", "--precision", "no",
               "--dense-epochs", "2", "--epochs", "2", "--sparsity", "0.75", "--lr", "0.1",
               "--dense-lr", "0.1", *more]  # fmt: skip
    sys.argv = ["cifar_finetune.py", *map(str, options)]
    assert module.main() == 0
    return list(json.loads((folder / f"{keep}.json").read_text()))


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    whole = rows(script, tmp_path, "whole")
    (row,) = whole
    assert row["dense"] > row["given"] and row["top1"] > row["pruned"] and row["ties"] is None
    assert row["returned"] == 0 and row["zeros"] > 0
    monkeypatch.setattr(Stopped, "left", 3 * TRAINED + 7)  # of the pruned network's second epoch, some
    with pytest.raises(KeyboardInterrupt):
        rows(script, tmp_path, "stopped")
    assert not (tmp_path / "stopped.json").exists()
    monkeypatch.setattr(Stopped, "left", TRAINED)  # of what is left one epoch, and nothing again
    assert rows(script, tmp_path, "stopped") == whole
    monkeypatch.setattr(Stopped, "left", 0)
    assert rows(script, tmp_path, "stopped") == whole, "what stands in the records is not computed again"


def test_masks_that_move_and_a_network_that_stays_dense(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    frozen = rows(script, tmp_path, "all")[0]
    moved = rows(script, tmp_path, "all", "--rechoose")[1]
    dense = rows(script, tmp_path, "all", "--sparsity", "0")[-1]
    assert moved["zeros"] == frozen["zeros"] and moved["returned"] == 0 and moved["pruned"] == frozen["pruned"]
    assert dense["zeros"] == 0 and dense["pruned"] == dense["dense"] == frozen["dense"]
    text = script.table([frozen, moved, dense])
    assert "obs+grouping, re-choosing" in text and "| 0 % |  | dense |" in text


def test_a_teacher_is_asked_once_for_each_batch(script: Any, tmp_path: Path) -> None:
    asked = []

    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(x)
            return x.sum(1)

    path, first, second = tmp_path / "answers.pt", torch.rand(4, 3), torch.rand(4, 3)
    teacher = script.Remembered(Teacher(), path)
    for x in (first, second, first):
        assert torch.equal(copy.deepcopy(teacher)(x), x.sum(1))
    assert len(asked) == 2
    teacher.save()
    again = script.Remembered(Teacher(), path)
    assert torch.equal(again(second), second.sum(1)) and len(asked) == 2
    assert torch.equal(again(first.flip(0)), first.flip(0).sum(1)) and len(asked) == 3


def test_zeros_that_came_back_are_counted(script: Any) -> None:
    before, after = nn.Linear(8, 8), nn.Linear(8, 8)
    with torch.no_grad():
        before.weight[:4], after.weight[:3], after.weight[3:] = 0, 0, 1
    assert script.returned(before, after, False) == 8 == script.returned(before, after, True)
    with torch.no_grad():
        after.weight[:4], after.weight[4:] = 1, 0  # as many zeros, in other places
    assert script.returned(before, after, False) == 32 and script.returned(before, after, True) == 0
    row = {"returned": 8, "sparsity": 0.5, "epochs": 1, "top1": 0.9, "pruned": 0.8}
    assert script.broken(row) == "8 zeros came back"
    assert script.broken(row | {"returned": 0, "top1": 0.7}) and not script.broken(row | {"returned": 0})


def test_statistics_taken_anew_still_follow_training(script: Any) -> None:
    oneshot, norm = importlib.import_module("oneshot"), nn.BatchNorm2d(3, momentum=0.25)
    x = torch.rand(128, 3, 4, 4)
    oneshot.reestimate_(norm, x)
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3))) and not norm.training
    norm.train()(x + 1)
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)) + 0.25), "a mean over all steps would be nearer to x's"


def test_the_recipe_reaches_training_and_the_name_of_what_is_kept(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def finetune(_model: nn.Module, loader: Any, **options: Any) -> History:
        seen.append({"batch": loader.batch_size, **options})
        return History()

    monkeypatch.setattr(script.cn, "finetune", finetune)
    recipe = {"--epochs": 3, "--lr": 0.3, "--batch": 32, "--teacher-share": 0.7, "--temperature": 3.0, "--ema": 0.5,
              "--block-weight": 0.25, "--weight-decay": 0.01, "--precision": "no"}  # fmt: skip
    for one in (None, *recipe):
        words = [part for name, value in recipe.items() if one in (None, name) for part in (name, str(value))]
        monkeypatch.setattr(sys, "argv", ["cifar_finetune.py", *words])
        options = script.arguments()
        setting = script.load(options)
        key = {name: getattr(options, name) for name in script.RECIPE} | {"sparsity": 0.0, "method": "obs"}
        script.trained_on(setting.task.dense, setting.task.dense, key, setting, options)
    for name, value in recipe.items():
        told = {"precision": "mixed_precision"}.get(name[2:], name[2:].replace("-", "_"))
        assert seen[0][told] == value, name
    assert len({call["title"] for call in seen}) == 1 + len(recipe), "one name would let one row go on from another's"
    assert isinstance(seen[0]["teacher"], SmallResNet) and isinstance(seen[1]["teacher"], script.Remembered)
    monkeypatch.setattr(sys, "argv", ["cifar_finetune.py", "--ema", "0", "--teacher-share", "0"])
    options = script.arguments()
    key = {name: getattr(options, name) for name in script.RECIPE} | {"sparsity": 0.0, "method": "obs"}
    script.trained_on(setting.task.dense, setting.task.dense, key, setting, options)
    assert seen[-1]["ema"] is None and "teacher" not in seen[-1]


@pytest.mark.parametrize("name", ["oneshot", "cifar_finetune"])
def test_a_wrong_folder_of_data_is_one_line(
    script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--data", str(tmp_path / "none")])
    assert importlib.import_module(name).main() == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"error: {tmp_path / 'none'}: expected")
