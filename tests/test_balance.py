"""One sparsity's work spread over layers: the knapsack by hand, losses of layers against pruning them by hand."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import Builder
from sklearn.datasets import load_digits
from torch import nn

import colonnade as cn
from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.balance import balance, sensitivities
from colonnade.sparsify.balance_onnx import dense_work
from colonnade.sparsify.joint import divergence
from colonnade.sparsify.layer_losses import layer_losses
from colonnade.sparsify.masks import sparsify_
from colonnade.sparsify.onnx_file import prune_file, read_targets
from colonnade.sparsify.select import as_matrix, from_matrix, select_by_score
from colonnade.sparsify.spread import FITTED, MEASURED, loss_between, spread


class Net(nn.Module):
    """A stem, a layer most of whose inputs are dead, one whose inputs all count, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.idle = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.busy = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.idle(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.busy(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32))[:, None] / 16
    y = torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(5):
        for index in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        model.idle.weight[:, 8:] *= 0.01
    return model.eval(), x[:64]


def test_losses_between_measured_ones():
    known = {0.5: 0.01, 0.75: 0.16}
    assert loss_between(known, 0.5) == pytest.approx(0.01) and loss_between(known, 0.75) == pytest.approx(0.16)
    assert loss_between(known, 0.625) == pytest.approx(0.04)
    assert loss_between(known, 0.25) == pytest.approx(0.01 / 8)
    assert loss_between({0.25: 0.01, 0.5: 0.04}, 0.125) == pytest.approx(0.01 / 4)


@pytest.mark.parametrize("group", [None, 4])
def test_no_more_work_than_uniform_and_less_loss(group):
    random = np.random.default_rng(0)
    losses = {f"l{at}": {s: float(a * s**3) for s in MEASURED} for at, a in enumerate(random.uniform(0.01, 2, 12))}
    work = {name: float(random.uniform(1, 9)) for name in losses}
    pattern = ColumnPattern(0.5, 8, group)
    chosen = spread(losses, work, pattern)
    sparsity = {name: part.sparsity if part else 0.0 for name, part in chosen.items()}
    assert sum(work[n] * (1 - s) for n, s in sparsity.items()) <= 0.5 * sum(work.values()) * (1 + 1e-6)
    lost = sum(loss_between(losses[n], s) if s else 0.0 for n, s in sparsity.items())
    assert lost < 0.95 * sum(loss_between(row, 0.5) for row in losses.values())
    assert all(part is None or (part.tile, part.group) == (8, group) for part in chosen.values())
    frail, hardy = (choose(losses, key=lambda name: losses[name][0.5]) for choose in (max, min))
    assert sparsity[frail] < 0.5 < sparsity[hardy]


def test_a_loss_is_that_of_the_layer_pruned_by_hand(net):
    """The weights themselves count, and not only the mean that is mended (autocast once kept an old copy of them)."""
    dense, x = net
    work = copy.deepcopy(dense)
    found, macs = sensitivities(work, ["idle", "busy"], x, ColumnPattern(0.5, 8))
    assert macs == {"idle": 64.0 * 32 * 288, "busy": 64.0 * 32 * 32}
    assert all(torch.equal(a, b) for a, b in zip(work.state_dict().values(), dense.state_dict().values(), strict=True))
    with torch.no_grad():
        inputs = torch.relu(dense.norm(dense.idle(torch.relu(dense.stem(x)))))
        matrix = as_matrix(dense.busy.weight.numpy())
        power, mean = inputs.var((0, 2, 3), correction=0).numpy(), inputs.mean((0, 2, 3)).numpy()
        for sparsity in MEASURED:
            kept = select_by_score((matrix**2 * power).astype(np.float32), ColumnPattern(sparsity, 8)).mask
            model = copy.deepcopy(dense)
            model.busy.weight.copy_(torch.from_numpy(from_matrix(np.where(kept, matrix, 0), (32, 32, 1, 1)).copy()))
            model.busy.bias.add_(torch.from_numpy((np.where(kept, 0, matrix) @ mean).astype(np.float32)))
            assert found["busy"][sparsity] == pytest.approx(float(divergence(model(x), dense(x))), rel=0.1, abs=2e-3)


def test_what_hardly_counts_gives_more_and_the_work_is_the_same(net):
    dense, x = net
    patterns = balance(dense, ColumnPattern(0.5, 8), x)
    assert list(patterns) == ["stem", "idle", "busy", "head"]
    assert patterns["stem"] is None and patterns["head"] is None
    assert patterns["idle"].sparsity > 0.5 > (patterns["busy"].sparsity if patterns["busy"] else 0)
    layers = {part.name: part for part in sparsify_(copy.deepcopy(dense), patterns, x[:1])}
    left = sum((1 - layers[name].sparsity) * size for name, size in (("idle", 288), ("busy", 32)))
    assert left <= 0.51 * (288 + 32)
    assert balance(dense, ColumnPattern(0.5, 8), x, exclude=["busy"])["busy"] is None
    with pytest.raises(UserError, match="no input"):
        balance(dense, ColumnPattern(0.5, 8), x[:0])


def test_losses_by_obs_are_those_of_inputs_it_was_not_fitted_to(net):
    """By hand: one 1x1 layer, least squares on the kept columns that `sparsify_` finds from the same inputs."""
    dense, x = net
    work = copy.deepcopy(dense)
    found, macs = layer_losses(work, ["idle", "busy"], x, ColumnPattern(0.5, 8), 16)
    assert all(torch.equal(a, b) for a, b in zip(work.state_dict().values(), dense.state_dict().values(), strict=True))
    assert macs == {"idle": 64.0 * 32 * 288, "busy": 64.0 * 32 * 32}
    for losses in found.values():
        assert list(losses) == list(FITTED)
        assert all(0 < less < more for less, more in zip(losses.values(), [*losses.values()][1:], strict=False))
    by_magnitude, _ = sensitivities(work, ["idle", "busy"], x[48:], ColumnPattern(0.5, 8))
    for sparsity in (0.5, 0.75):
        pruned = copy.deepcopy(dense)
        only = {"busy": ColumnPattern(sparsity, 8)}
        sparsify_(pruned, only, x[:1], method="obs", calibration=[x[:24], x[24:48]], exclude=["stem", "idle", "head"])
        with torch.no_grad():
            direct = float(divergence(pruned(x[48:]), dense(x[48:])))
        assert found["busy"][sparsity] == pytest.approx(direct, rel=0.6)
        assert found["busy"][sparsity] < 0.7 * by_magnitude["busy"][sparsity]


def test_balance_by_obs(net):
    dense, x = net
    patterns = balance(dense, ColumnPattern(0.5, 8), x, method="obs")
    assert patterns["idle"].sparsity > 0.5 > (patterns["busy"].sparsity if patterns["busy"] else 0)
    with pytest.raises(UserError, match="holds one input"):
        balance(dense, ColumnPattern(0.5, 8), x[:1], method="obs")
    with pytest.raises(UserError, match="'best': expected 'magnitude' or 'obs'"):
        balance(dense, ColumnPattern(0.5, 8), x, method="best")


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_balance_of_a_file(net, tmp_path, method):
    """The same kind of plan without torch, the same work in all, and answers nearer to the dense ones."""
    dense, x = net
    cn.export(dense, x[:2], tmp_path / "dense.onnx", dynamic_batch=True)
    samples = {"input": x.numpy()}
    reports = {
        balance: prune_file(
            tmp_path / "dense.onnx", tmp_path / f"{balance}.onnx", ColumnPattern(0.5, 8), method=method,
            balance=balance, calibration=samples if balance or method == "obs" else None,
        )
        for balance in (False, True)
    }  # fmt: skip
    kept = {balance: {layer.columns: layer.kept for layer in report.pruned} for balance, report in reports.items()}
    assert kept[False] == {288: 144, 32: 16}
    assert kept[True].get(32, 32) > 16 and kept[True][288] < 144
    # both layers are computed at as many pixels, by as many rows
    assert kept[True][288] + kept[True].get(32, 32) <= 1.02 * (144 + 16)
    wanted, *found = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(None, samples)[0] for name in ("dense", False, True)
    )
    uniform, balanced = (float(divergence(torch.from_numpy(one), torch.from_numpy(wanted))) for one in found)
    assert balanced < uniform


def test_multiply_adds_of_a_file(tmp_path):
    """Convolutions of two axes and of one with stride and groups, and a product over tokens, by the definition."""
    b = Builder(0)
    x = b.input("x", ["n", 8, 9, 11])
    stem = b.op("Conv", x, b.random(8, 8, 1, 1), name="stem")
    two = b.op("Conv", stem, b.random(16, 8, 3, 3), name="two", strides=[2, 1], pads=[1, 0, 1, 0])
    flat = b.op("Reshape", b.op("Relu", two), b.constant(np.array([0, 16, -1])))
    one = b.op("Conv", flat, b.random(12, 8, 3), name="one", group=2, strides=[2])
    tokens = b.op("MatMul", b.op("Transpose", one, perm=[0, 2, 1]), b.random(12, 7), name="product")
    onnx.save(b.build(b.op("MatMul", tokens, b.random(7, 5), name="head")), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    inputs = {"x": np.ones((3, 8, 9, 11), np.float32)}
    found = dense_work(model, read_targets(tmp_path / "m.onnx", model), inputs)
    # 5x9 pixels of 16 rows by 72 columns; then 45 pixels, 22 of them by a kernel of 3; a token for each
    assert found == {"two": 5 * 9 * 16 * 72, "one": 22 * 12 * 24, "product": 22 * 7 * 12}
