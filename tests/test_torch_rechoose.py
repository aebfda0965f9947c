"""Masks chosen anew while training, learning from blocks, moving averages: on the bundled digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_torch_finetune import same, tune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import colonnade as cn
from colonnade.demo.network import Shifted, SmallResNet, digits
from colonnade.errors import UserError
from colonnade.sparsify.averaging import Average
from colonnade.sparsify.distil import BlockOutputs, block_names, blocks_distance, chosen_blocks
from colonnade.sparsify.masks import ColumnMask, masks
from colonnade.sparsify.rechoose import MovableMask, Rechooser, freeze, keep_largest, movable_masks, tile_rows
from colonnade.sparsify.select import as_matrix, select

PATTERNS = [
    cn.ColumnPattern(0.75, 8),
    cn.ColumnPattern.nm(1, 4, 4),
    cn.ColumnPattern(0.6, 5),
    cn.ColumnPattern.nm(2, 5, 8),
]


@pytest.fixture(scope="module")
def data() -> tuple[Shifted, TensorDataset]:
    (images, labels), test = digits()
    return Shifted(images[:160], labels[:160]), TensorDataset(test[0][:80], test[1][:80])


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet((16, 16, 24))


def movable(dense: nn.Module, pattern: Any = PATTERNS[0], **options: Any) -> nn.Module:
    model = copy.deepcopy(dense)
    cn.sparsify_(model, pattern, torch.zeros(1, 1, 32, 32), movable=True, **options)
    return model


def train(model: nn.Module, data: Any, **options: Any) -> Any:
    return tune(model, data, **{"epochs": 2} | options)


def counts_hold(model: nn.Module, pattern: cn.ColumnPattern) -> None:
    for name, part in masks(model):
        module = model.get_submodule(name.rpartition(".")[0])
        matrix = part.mask.movedim(1, -1).flatten(1).numpy()
        for first, stop, kept in pattern.spans(matrix.shape[1]):
            assert (matrix[:, first:stop].sum(1) == kept).all()
        # Every tile of T rows keeps the same columns.
        supports, members = np.unique(matrix, axis=0, return_counts=True)
        assert len(supports) <= -(-len(matrix) // pattern.tile)
        assert (members % pattern.tile != 0).sum() <= getattr(module, "groups", 1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("columns", [1, 9, 30, 37])
def test_columns_are_chosen_as_in_numpy(pattern: cn.ColumnPattern, columns: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(columns).integers(0, 4, (6, columns)).astype(np.float32))
    kept = keep_largest(scores, pattern)
    for row, chosen in zip(scores.numpy(), kept.numpy(), strict=True):
        expected = select(row[None], cn.ColumnPattern(pattern.sparsity, 1, pattern.group), similar_rows=False).mask[0]
        assert np.array_equal(chosen, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_are_read_off_a_mask(pattern: cn.ColumnPattern, groups: int) -> None:
    weight = np.random.default_rng(0).standard_normal((36, 6, 3, 3)).astype(np.float32)
    mask = select(as_matrix(weight), pattern, groups=groups).mask
    as_weight = torch.from_numpy(np.moveaxis(mask.reshape(36, 3, 3, 6), -1, 1).copy())
    rows = tile_rows(as_weight, pattern, groups)
    members = [row[row < 36].tolist() for row in rows]
    assert sorted(row for tile in members for row in tile) == list(range(36))
    for tile in members:
        assert len(tile) <= pattern.tile and (mask[tile] == mask[tile[0]]).all()
        assert len({row // (36 // groups) for row in tile}) == 1


def test_gradients_reach_masked_weights_until_frozen(dense: nn.Module) -> None:
    model = movable(dense)
    name, mask = next(movable_masks(model))
    layer: Any = model.get_submodule(name)
    values = layer.parametrizations.weight.original
    assert bool((values[~mask.mask] != 0).any())
    assert bool((layer.weight[~mask.mask] == 0).all())
    layer.weight.square().sum().backward()
    assert torch.equal(values.grad, 2 * layer.weight)
    values.grad = None
    (layer.weight * 3).sum().backward()
    assert bool((values.grad == 3).all())
    freeze(model)
    assert not list(movable_masks(model)) and len(list(masks(model))) > 0
    assert bool((values[~mask.mask] == 0).all())
    values.grad = None
    (layer.weight * 3).sum().backward()
    assert bool((values.grad[~mask.mask] == 0).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_chosen_masks_keep_the_counts(dense: nn.Module, data: Any, pattern: cn.ColumnPattern) -> None:
    model = movable(dense, pattern)
    before = {name: part.mask.clone() for name, part in masks(model)}
    history = train(model, data, rechoose=cn.Rechoose(every=2, until=0.75, decay=0.01), epochs=1, lr=0.1)
    assert history.best == 1
    assert all(type(part) is ColumnMask for _, part in masks(model))
    counts_hold(model, pattern)
    moved = sum(int((part.mask != before[name]).sum()) for name, part in masks(model))
    assert moved > 0
    for name, part in masks(model):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        assert bool((layer.parametrizations.weight.original[~part.mask] == 0).all())


def test_counts_hold_at_every_step_of_a_ramp(dense: nn.Module) -> None:
    pattern = cn.ColumnPattern(0.75, 8)
    model = movable(dense, pattern)
    mover = Rechooser(model, cn.Rechoose(ramp=0.5, until=0.75), 40)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for step in range(40):
        mover.before(step)
        sparsity = cn.Rechoose(ramp=0.5, until=0.75).sparsity(0.75, step / 40)
        counts_hold(model, cn.ColumnPattern(sparsity, 8))
        shares.append(sparsity)
        masked = [part.mask.clone() for _, part in masks(model)]
        for parametrized, _ in mover.layers:
            noise = torch.randn(parametrized.original.shape, generator=generator)
            parametrized.original.data.add_(noise * 0.05)
        mover.after(0.1)
        if step >= 30:  # until: they stay
            mover.before(step + 1)
            assert all(torch.equal(a, part.mask) for a, (_, part) in zip(masked, masks(model), strict=True))
    assert shares[0] == 0 and shares == sorted(shares) and shares[20:] == [0.75] * 20


def test_masked_weights_shrink() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    cn.sparsify_(model, {"1": cn.ColumnPattern(0.5, 4)}, torch.zeros(1, 3, 5, 5), movable=True)
    mover = Rechooser(model, cn.Rechoose(decay=0.5), 4)
    parametrized, mask = mover.layers[0]
    before = parametrized.original.detach().clone()
    mover.after(0.1)
    assert torch.equal(parametrized.original[mask.mask], before[mask.mask])
    assert torch.allclose(parametrized.original[~mask.mask], before[~mask.mask] * 0.95)


def test_best_epochs_are_those_with_settled_masks(dense: nn.Module, data: Any) -> None:
    model = movable(dense, cn.ColumnPattern(0.9, 8))
    history = train(model, data, rechoose=cn.Rechoose(ramp=0.5, until=0.5), epochs=3)
    assert history.best >= 2
    counts_hold(model, cn.ColumnPattern(0.9, 8))


def test_frozen_training_of_movable_masks_moves_nothing(dense: nn.Module, data: Any) -> None:
    model = movable(dense)
    before = {name: part.mask.clone() for name, part in masks(model)}
    train(model, data, epochs=1)
    assert all(type(part) is ColumnMask and torch.equal(part.mask, before[name]) for name, part in masks(model))


def test_after_obs_masks_can_move_too(dense: nn.Module, data: Any) -> None:
    x = torch.stack([data[0][i][0] for i in range(64)])
    pattern = cn.ColumnPattern(0.5, 8)
    model = movable(dense, pattern, method="obs", calibration=x)
    assert all(isinstance(part, MovableMask) for _, part in masks(model))
    counts_hold(model, pattern)
    train(model, data, rechoose=cn.Rechoose(), epochs=1)
    counts_hold(model, pattern)


@pytest.mark.parametrize("until", [0.5, 1.0])
def test_resuming_equals_not_stopping(dense: nn.Module, data: Any, tmp_path: Path, until: float) -> None:
    options = {
        "rechoose": cn.Rechoose(every=2, ramp=0.4, until=until), "ema": 0.9, "teacher": dense, "block_weight": 0.5,
        "epochs": 3,
    }  # fmt: skip
    whole, parts, again = (movable(dense) for _ in range(3))
    expected = train(whole, data, **options)

    class Stop(Exception):
        pass

    left = iter(range(13))  # stops in the third epoch of five steps

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Stop
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(Stop):
        train(parts, data, loss=loss, checkpoint_dir=tmp_path / "run", **options)
    found = train(again, data, checkpoint_dir=tmp_path / "run", **options)
    assert same(again, whole)
    assert [epoch.loss for epoch in found.epochs] == [epoch.loss for epoch in expected.epochs]
    with pytest.raises(UserError, match="ema was"):
        train(movable(dense), data, checkpoint_dir=tmp_path / "run", **{**options, "ema": 0.8})


def test_the_average_is_the_average(dense: nn.Module) -> None:
    model = copy.deepcopy(dense)
    average = Average(model, 0.5)
    weight = next(model.parameters())
    with torch.no_grad():
        weight.fill_(1)
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    expected = next(dense.parameters()).clone()
    for step in range(6):
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = expected * decay + (1 - decay)
        assert torch.allclose(next(average.model.parameters()), expected, atol=1e-6)
    assert all(int(b) == 7 for n, b in average.model.named_buffers() if n.endswith("num_batches_tracked"))
    assert not average.model.training


def test_an_average_is_kept_and_validated(dense: nn.Module, data: Any) -> None:
    plain, averaged = movable(dense), movable(dense)
    train(plain, data, lr=0.2)
    history = train(averaged, data, lr=0.2, ema=0.9)
    assert not same(plain, averaged)
    right = sum(int(averaged(x[None]).argmax() == y) for x, y in data[1])
    assert history.accuracy == pytest.approx(right / len(data[1]))


def test_blocks_of_networks(dense: nn.Module, torchvision_models: Any) -> None:
    assert block_names(dense) == [f"stages.{i}" for i in range(4)]
    resnet = torchvision_models.resnet18()
    assert block_names(resnet) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    mobile = block_names(torchvision_models.mobilenet_v2())
    assert mobile == [f"features.{i}" for i in range(1, 18)]
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(UserError, match="no blocks"):
        chosen_blocks(plain, ())
    cn.sparsify_(plain, {"1": cn.ColumnPattern(0.5, 8)})
    assert chosen_blocks(plain, ()) == ["1"]
    assert chosen_blocks(dense, ["stages.[02]"]) == ["stages.0", "stages.2"]
    with pytest.raises(UserError, match="matches no module"):
        chosen_blocks(dense, ["nothing.*"])


def test_block_distances(dense: nn.Module) -> None:
    other = copy.deepcopy(dense)
    names = block_names(dense)
    ours, theirs = BlockOutputs(other, names), BlockOutputs(dense, names)
    x = digits()[0][0][:6]
    dense.eval()(x), other.eval()(x)
    assert blocks_distance(ours, theirs).item() == 0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other(x)
    whole = blocks_distance(ours, theirs).item()
    assert whole > 0.01
    # A mean over samples: the halves' mean is that of the whole.
    halves = []
    for part in (x[:3], x[3:]):
        dense(part), other(part)
        halves.append(blocks_distance(ours, theirs).item())
    assert np.mean(halves) == pytest.approx(whole, rel=1e-4)
    ours.close(), theirs.close()
    other(x)
    assert not ours.values


def test_blocks_are_learned(dense: nn.Module, data: Any) -> None:
    x = torch.stack([data[0][i][0] for i in range(64)])
    teacher = copy.deepcopy(dense)
    cn.finetune(teacher, DataLoader(data[0], 32, shuffle=True), epochs=6, lr=0.1, progress=False)

    def distance(model: nn.Module) -> float:
        names = block_names(dense)
        ours, theirs = BlockOutputs(model, names), BlockOutputs(teacher, names)
        with torch.no_grad():
            model.eval()(x), teacher.eval()(x)
        found = blocks_distance(ours, theirs).item()
        ours.close(), theirs.close()
        return found

    start = copy.deepcopy(teacher)
    cn.sparsify_(start, cn.ColumnPattern(0.75, 8), x[:1])
    without, learned = copy.deepcopy(start), copy.deepcopy(start)
    train(without, data, lr=0.05, epochs=6)
    train(learned, data, lr=0.05, epochs=6, teacher=teacher, teacher_share=0.5, block_weight=1.0)
    assert distance(learned) < 0.8 * distance(without)
    assert distance(learned) < distance(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_weight": 1.0}, "a teacher to learn blocks from"),
        ({"ema": 1.5}, "ema is 1.5"),
        ({"decay_epochs": 0}, "decay_epochs is 0"),
        ({"rechoose": cn.Rechoose()}, "movable=True"),
    ],
)
def test_wrong_options(dense: nn.Module, data: Any, options: dict[str, Any], message: str) -> None:
    model = copy.deepcopy(dense)
    cn.sparsify_(model, PATTERNS[0], torch.zeros(1, 1, 32, 32))
    with pytest.raises(UserError, match=message):
        train(model, data, **options)
    for wrong in ({"every": 0}, {"ramp": 0.9}, {"until": 1.5}, {"start": 1.0}, {"decay": -1.0}, {"score": "l3"}):
        with pytest.raises(UserError):
            cn.Rechoose(**wrong)  # type: ignore[arg-type]


def test_the_rate_falls_in_steps(dense: nn.Module, data: Any) -> None:
    model = copy.deepcopy(dense)
    cn.sparsify_(model, PATTERNS[0], torch.zeros(1, 1, 32, 32))
    history = train(model, data, epochs=3, lr=0.1, decay_epochs=1)
    assert [epoch.lr for epoch in history.epochs] == pytest.approx([0.01, 0.001, 0.0001])
