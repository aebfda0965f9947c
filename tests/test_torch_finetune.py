"""Fine-tuning on the bundled digits: zeros stay, resuming changes nothing, the best epoch is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import colonnade as cn
from colonnade.demo.network import Shifted, SmallResNet, digits
from colonnade.errors import UserError
from colonnade.sparsify.masks import masks


@pytest.fixture(scope="module")
def data() -> tuple[Shifted, TensorDataset]:
    (images, labels), test = digits()
    return Shifted(images[:192], labels[:192]), TensorDataset(test[0][:96], test[1][:96])


@pytest.fixture(scope="module")
def start(data: tuple[Shifted, TensorDataset]) -> nn.Module:
    torch.manual_seed(0)
    model = SmallResNet((16, 16, 24))
    cn.sparsify_(model, cn.ColumnPattern(0.5), data[0][0][0][None])
    return model


def tune(model: nn.Module, data: tuple[Shifted, TensorDataset], **options: Any) -> Any:
    settings = {"epochs": 3, "lr": 0.05, "progress": False} | options
    train = DataLoader(data[0], 32, shuffle=True)
    return cn.finetune(model, train, DataLoader(data[1], 40), **settings)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_masks_stay_and_the_loss_falls(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    model = copy.deepcopy(start)
    history = tune(model, data, momentum=0.9, weight_decay=0.01)
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert history.epochs[-1].lr == 0
    assert not model.training
    for (name, mine), (_, before) in zip(masks(model), masks(start), strict=True):
        assert torch.equal(mine.mask, before.mask)
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert bool((weight[~before.mask] == 0).all())
    assert not same(model, start)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_equals_not_stopping(
    start: nn.Module, data: tuple[Shifted, TensorDataset], tmp_path: Path, optimizer: str
) -> None:
    whole, parts, again = (copy.deepcopy(start) for _ in range(3))
    expected = tune(whole, data, optimizer=optimizer, lr=0.01)

    class Stop(Exception):
        pass

    def stopping(calls: int) -> Any:
        cross_entropy = nn.CrossEntropyLoss()
        left = iter(range(calls))

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if next(left, None) is None:
                raise Stop
            return cross_entropy(outputs, targets)

        return loss

    with pytest.raises(Stop):  # in the middle of the second epoch
        tune(parts, data, optimizer=optimizer, lr=0.01, checkpoint_dir=tmp_path, loss=stopping(9))
    history = tune(again, data, optimizer=optimizer, lr=0.01, checkpoint_dir=tmp_path)
    assert [epoch.loss for epoch in history.epochs] == [epoch.loss for epoch in expected.epochs]
    assert same(again, whole)
    # Finished: a third call has nothing left to do and gives the same.
    assert tune(parts, data, optimizer=optimizer, lr=0.01, checkpoint_dir=tmp_path).best == expected.best
    assert same(parts, whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0003"]


def test_the_best_epoch_is_kept(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    model = copy.deepcopy(start)
    history = tune(model, data, epochs=4)
    best = max(epoch.accuracy for epoch in history.epochs)
    assert history.accuracy == best
    images, labels = data[1].tensors
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) == pytest.approx(best)


def test_a_checkpoint_of_another_run_is_refused(
    start: nn.Module, data: tuple[Shifted, TensorDataset], tmp_path: Path
) -> None:
    tune(copy.deepcopy(start), data, epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(UserError, match=r"other options \(lr was 0.05\)"):
        tune(copy.deepcopy(start), data, epochs=1, lr=0.01, checkpoint_dir=tmp_path)
    (tmp_path / "epoch-0001" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="not a checkpoint of this model"):
        tune(copy.deepcopy(start), data, epochs=1, checkpoint_dir=tmp_path)
    tune(copy.deepcopy(start), data, epochs=1, checkpoint_dir=tmp_path, resume=False)


def test_a_checkpoint_of_another_pruning_is_refused(
    start: nn.Module, data: tuple[Shifted, TensorDataset], tmp_path: Path
) -> None:
    """Its masks would take the place of those that were asked for."""
    sparser = cn.remove_masks(copy.deepcopy(start))
    cn.sparsify_(sparser, cn.ColumnPattern(0.875, tile=4), data[1].tensors[0][:1])
    tune(copy.deepcopy(start), data, epochs=1, checkpoint_dir=tmp_path)
    torch.manual_seed(0)
    smaller = SmallResNet((16, 16, 24))
    cn.sparsify_(smaller, cn.ColumnPattern(0.5, tile=4), data[1].tensors[0][:1])  # as many zeros
    for other in (sparser, smaller):
        with pytest.raises(UserError, match=r"of a run with other masks \(of .*\): remove it, or give another folder"):
            tune(other, data, epochs=1, checkpoint_dir=tmp_path)


def test_a_checkpoint_of_another_pattern_is_refused(
    start: nn.Module, data: tuple[Shifted, TensorDataset], tmp_path: Path
) -> None:
    """Masks that move are none that could be compared."""
    for pattern in (cn.ColumnPattern(0.75), cn.ColumnPattern(0.75, tile=4), cn.ColumnPattern(0.5)):
        model = cn.remove_masks(copy.deepcopy(start))
        cn.sparsify_(model, pattern, data[1].tensors[0][:1], movable=True)
        options = {"epochs": 1, "checkpoint_dir": tmp_path, "rechoose": cn.Rechoose()}
        if pattern == cn.ColumnPattern(0.75):
            tune(model, data, **options)
        else:
            with pytest.raises(UserError, match="other options"):
                tune(model, data, **options)


def test_a_validation_loader_without_a_batch(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    few = DataLoader(data[1], 10**6, drop_last=True)
    with pytest.raises(UserError, match="the validation loader has no batch"):
        cn.finetune(copy.deepcopy(start), DataLoader(data[0], 32), few, epochs=1, lr=0.05, progress=False)


def test_averages_are_of_weights(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    """A buffer of infinities, such as a mask of classes, has no average."""
    model = copy.deepcopy(start)
    model.register_buffer("barred", torch.tensor([0.0, -math.inf]))
    tune(model, data, epochs=1, ema=0.9)
    assert model.barred.tolist() == [0.0, -math.inf]


def test_bfloat16_leaves_no_wrapper(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    model = copy.deepcopy(start)
    tune(model, data, epochs=1, mixed_precision="bf16")
    assert model(data[1].tensors[0][:1]).dtype == torch.float32
    copy.deepcopy(model)
    tune(model, data, epochs=1)  # another precision in the same process
    other = copy.deepcopy(start)
    with pytest.raises(UserError, match="the loss became"):
        tune(other, data, epochs=1, mixed_precision="bf16", lr=1e30)
    assert other.forward == type(other).forward.__get__(other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs >= 1"),
        ({"lr": -1.0}, "lr > 0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"optimizer": "magic"}, "optimizer is 'magic'"),
        ({"mixed_precision": "int3"}, "mixed_precision is 'int3'"),
        ({"lr": 1e30}, "the loss became"),
        ({"teacher_share": 2.0}, "teacher_share=2.0"),
    ],
)
def test_wrong_options(
    start: nn.Module, data: tuple[Shifted, TensorDataset], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        tune(copy.deepcopy(start), data, **options)


def test_processes_that_do_not_meet(
    start: nn.Module, data: tuple[Shifted, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="set ACCELERATE_USE_CPU"):
        tune(copy.deepcopy(start), data)


def test_a_teacher_is_learned_from(start: nn.Module, data: tuple[Shifted, TensorDataset]) -> None:
    """With its whole share the labels do not count: answers come closer to the teacher's, who stays as she is."""
    torch.manual_seed(1)
    teacher = SmallResNet((16, 16, 24)).eval()
    before = copy.deepcopy(teacher.state_dict())
    model = copy.deepcopy(start)
    history = tune(
        model, data, epochs=4, lr=0.02, teacher=teacher, teacher_share=1.0, loss=lambda out, _: out.sum() * 0
    )
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Sums are split over threads: with the same number of them, runs give the same bits.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
