"""Pruning behind Winograd's transform: torch modules, ONNX files, and what comes of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import onnx
import pytest

import colonnade as cn
from colonnade.cli import run_verb
from colonnade.codegen.in_process import Program
from colonnade.errors import UserError
from colonnade.frontend import load
from colonnade.kernels.isa import isa
from colonnade.pattern import ColumnPattern, discover
from colonnade.sparsify.allocate import PrunePlan
from colonnade.sparsify.arrays import NumpyArrays
from colonnade.sparsify.onnx_file import prune_file, read_layers, read_targets
from colonnade.sparsify.sensitivity import second_order
from colonnade.sparsify.transformed import columns, sizes
from colonnade.workload import WinogradConv2d, matrix
from colonnade.workload.winograd import SIZES, seen
from tests.models import onnxruntime_outputs

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from colonnade.sparsify.masks import remove_masks, sparsify_  # noqa: E402
from colonnade.sparsify.winograd_torch import WinogradConv2d as Transformed  # noqa: E402
from colonnade.sparsify.winograd_torch import winograd_  # noqa: E402


class Block(nn.Module):
    """A stem, a residual block of two 3x3 convolutions (the second with a bias), a strided one and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.one, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 16, 3, padding="same")
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.two(torch.relu(self.norm(self.one(x))))
        return self.last(torch.relu(self.down(torch.relu(y + x))).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = Block()
    found.norm.running_mean.normal_(std=0.1)
    found.norm.running_var.uniform_(0.5, 1.5)
    return found.eval()


@pytest.fixture
def calibration():
    """Smooth inputs, as photos are: neighbouring pixels are alike."""
    x = torch.randn(48, 3, 13, 10, generator=torch.Generator().manual_seed(1))
    return nn.functional.avg_pool2d(x, 3, 1, 1) * 3


@pytest.mark.parametrize("size", SIZES)
def test_the_model_computes_what_it_did(model, calibration, size):
    before = model(calibration)
    assert winograd_(model, size) == ["one", "two"]
    assert isinstance(model.one, Transformed) and model.one.weight.shape == (16, 16, *seen(SIZES[size]))
    assert torch.allclose(model(calibration), before, atol=1e-5)
    state = model.state_dict()
    assert not [name for name in state if "into" in name or "back" in name]  # only what is learned
    with pytest.raises(UserError, match="no 3x3 convolution at stride 1"):
        winograd_(model, size)


def test_which_modules_stay(model):
    assert winograd_(copy.deepcopy(model), least=2) == ["stem", "one", "two"]
    assert winograd_(copy.deepcopy(model), exclude=["o*"]) == ["two"]
    with pytest.raises(UserError, match="size is '3': expected 2x2, 4x4, 4x1"):
        winograd_(model, "3")


def test_a_module_under_two_names_stays_one(model, calibration):
    model.again, model.one.weight.requires_grad = model.one, False
    before = model(calibration)
    assert winograd_(model) == ["one", "two"] and model.again is model.one
    assert torch.allclose(model(calibration), before, atol=1e-5)
    assert not model.one.weight.requires_grad and model.two.weight.requires_grad


def test_weights_that_cannot_be_replaced(model):
    model.one, model.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    model.two.weight = model.one.weight
    model.stem = nn.Conv2d(16, 16, 3, padding=1)  # which comes before them
    with pytest.raises(UserError, match="one shares its weight with another module"):
        winograd_(model)
    assert not [name for name, module in model.named_modules() if isinstance(module, Transformed)]
    with pytest.raises(UserError, match="Conv2d has no 3x3 convolution at stride 1"):
        winograd_(nn.Conv2d(16, 16, 3, padding=1))  # there is no module to put another one into


@pytest.mark.parametrize("size, most", [("2x2", 512), ("4x1", 455), ("4x4", 227)])
def test_how_many_channels_are_too_many(size, most):
    layers = nn.Sequential(nn.Conv2d(most, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, most + 1, 3, padding=1))
    layers.append(nn.Conv2d(most + 1, 16, 3, padding=1))
    assert winograd_(layers, size) == ["0", "2"]


@pytest.mark.parametrize("size", SIZES)
def test_columns_of_the_regression_give_the_output(size):
    """Weights over their sizes times the inputs of a pixel are what the module gives there, at edges too."""
    my, mx = m = SIZES[size]
    torch.manual_seed(my + mx)
    plain = nn.Conv2d(5, 7, 3, padding=1, bias=False)
    module, x = Transformed(plain, size), torch.randn(1, 5, 7, 9)
    with torch.no_grad():
        module.weight.add_(torch.randn_like(module.weight))
        y = module(x)[0].permute(1, 2, 0).numpy()
    row, column = (part.reshape(-1) for part in np.mgrid[0:7, 0:9])
    wide = np.pad(x[0].numpy(), ((0, 0), (1, my), (1, mx)))
    near = [[wide[:, row // my * my + i, column // mx * mx + j].T for j in range(mx + 2)] for i in range(my + 2)]
    rows = (module.weight.detach().numpy() / sizes(size)).transpose(0, 2, 3, 1).reshape(7, -1)
    found = columns(NumpyArrays(), near, m, row % my, column % mx) @ rows.T
    assert np.allclose(found.reshape(7, 9, 7), y, atol=1e-5 * np.abs(y).max())


def lost(model, dense, calibration):
    with torch.no_grad():
        return float((model(calibration) - dense(calibration)).square().mean() / dense(calibration).var())


@pytest.mark.parametrize(("size", "sparsity", "share"), [("2x2", 7 / 16, 0.5), ("4x1", 0.5, 0.6), ("4x4", 0.5, 1.0)])
def test_obs_loses_less_at_the_same_work(model, calibration, size, sparsity, share):
    """As many multiply-adds as a quarter of the taps, 9 / 4 = (1 - s) (m + 2) (m' + 2) / m m' a pixel; 4x4: half of
    that."""
    dense = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    sparsify_(plain, {"one": ColumnPattern(0.75), "two": ColumnPattern(0.75)}, method="obs", calibration=calibration)
    winograd_(model, size)
    pattern = ColumnPattern(sparsity)
    results = sparsify_(model, {"one": pattern, "two": pattern}, method="obs", calibration=calibration)
    assert {r.name: round(r.sparsity, 2) for r in results if r.pattern} == dict.fromkeys(
        ("one", "two"), round(pattern.sparsity, 2)
    )
    tiles = discover(matrix(remove_masks(copy.deepcopy(model)).one.weight.detach().numpy())).tiles
    assert [len(tile.rows) for tile in tiles] == [8, 8]
    assert lost(model, dense, calibration) < share * lost(plain, dense, calibration)


@pytest.mark.parametrize("size", SIZES)
def test_from_torch_to_a_file_and_to_code(model, calibration, size, tmp_path):
    winograd_(model, size)
    sparsify_(model, {"one": ColumnPattern(0.5), "two": ColumnPattern(0.5)}, method="obs", calibration=calibration)
    path = cn.export(model, calibration[:2], tmp_path / "model.onnx")
    file, x = onnx.load(str(path)), calibration[:2].numpy()
    onnx.checker.check_model(file, full_check=True)
    expected = model(calibration[:2]).detach().numpy()
    (theirs,) = onnxruntime_outputs(file, {"input": x}).values()
    assert np.allclose(theirs, expected, atol=1e-4)
    plan = load(path)
    found = [step.workload for step in plan.steps if isinstance(step.workload, WinogradConv2d)]
    assert [(conv.m, conv.tile, conv.columns) for conv in found] == [
        (SIZES[size], 8, 16 * 16 * math.prod(seen(SIZES[size])) // 2)
    ] * 2
    (ours,) = Program(plan, isa("portable")).run({"input": x}).values()
    assert np.allclose(ours, expected, atol=1e-4)


@pytest.fixture
def file(model, calibration, tmp_path) -> Path:
    return cn.export(model, calibration[:1], tmp_path / "dense.onnx", dynamic_batch=True)


@pytest.mark.parametrize("balance", [False, True])
def test_a_file_is_pruned_behind_the_transform(file, calibration, balance, tmp_path):
    x = {"input": calibration.numpy()}
    (dense,) = onnxruntime_outputs(onnx.load(str(file)), x).values()

    def error(name: str, winograd: str, sparsity: float) -> float:
        report = prune_file(
            file, tmp_path / name, ColumnPattern(sparsity, winograd=winograd), method="obs", calibration=x,
            exclude=["down"], balance=balance,
        )  # fmt: skip
        assert balance or [layer.reason for layer in report.layers].count(None) == 2
        (found,) = onnxruntime_outputs(onnx.load(str(tmp_path / name)), x).values()
        return float(np.square(found - dense).mean())

    found = error("w.onnx", "2x2", 7 / 16)
    assert found < 1e-5 if balance else found < 0.5 * error("plain.onnx", "", 0.75)
    pruned = onnx.load(str(tmp_path / "w.onnx"))
    assert [node.op_type for node in pruned.graph.node if node.domain] == ["WinogradConv2x2"] * 2
    (ours,) = Program(load(pruned, batch=48), isa("portable")).run(x).values()
    (theirs,) = onnxruntime_outputs(pruned, x).values()
    assert np.allclose(ours, theirs, atol=1e-4)


def test_a_pruned_file_can_be_pruned_again(file, calibration, tmp_path, capsys):
    """Its operators are layers like others: by magnitude too, by plan, and in what `inspect` lists."""
    x = {"input": calibration.numpy()}
    prune_file(file, tmp_path / "w.onnx", ColumnPattern(0.25, winograd="2x2"), method="obs", calibration=x)
    report = prune_file(tmp_path / "w.onnx", tmp_path / "more.onnx", ColumnPattern(0.5))
    assert [layer.columns for layer in report.pruned] == [256, 256, 144]
    assert run_verb(["inspect", str(tmp_path / "w.onnx")]) == 0
    assert "4x4" in capsys.readouterr().out.replace("×", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pruned by method obs only"),
        ({"method": "obs", "exclude": ["one", "two"]}, "no 3x3 convolution at stride 1 will be pruned"),
    ],
)
def test_what_cannot_be(file, calibration, tmp_path, options, message):
    given = {"calibration": {"input": calibration.numpy()}} if options.get("method") else {}
    with pytest.raises(UserError, match=message):
        prune_file(file, tmp_path / "out.onnx", ColumnPattern(0.5, winograd="2x2"), **options, **given)
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(UserError, match="winograd is '3x3': expected 2x2, 4x4, 4x1"):
        ColumnPattern(0.5, winograd="3x3")


def test_by_a_plan(file, calibration, tmp_path):
    """Each layer as its own line says; one that cannot is named."""
    x = {"input": calibration.numpy()}
    layers = {layer.name: layer for layer, _ in read_layers(onnx.load(str(file)))}
    one, two, down = (next(n for n, layer in layers.items() if w in layer.weight) for w in ("one", "two", "down"))
    plan = PrunePlan(
        {one: ColumnPattern(0.5, 8, winograd="4x1"), two: ColumnPattern(0.75, 8, winograd="2x2"), down: None}
    )
    plan.write(tmp_path / "plan.toml")
    assert PrunePlan.read(tmp_path / "plan.toml") == plan
    prune_file(file, tmp_path / "w.onnx", None, method="obs", calibration=x, patterns=plan.layers)
    pruned = onnx.load(str(tmp_path / "w.onnx"))
    assert [node.op_type for node in pruned.graph.node if node.domain] == ["WinogradConv4x1", "WinogradConv2x2"]
    found = [step.workload for step in load(pruned, batch=1).steps if isinstance(step.workload, WinogradConv2d)]
    assert [(conv.m, conv.columns) for conv in found] == [((4, 1), 16 * 16 * 18 // 2), ((2, 2), 16 * 16 * 16 // 4)]
    wrong = {**plan.layers, down: ColumnPattern(0.5, winograd="2x2")}
    with pytest.raises(UserError, match="no weights of a 3x3 convolution at stride 1 to transform: 50 % T=8 F"):
        prune_file(file, tmp_path / "x.onnx", None, method="obs", calibration=x, patterns=wrong)


def test_losses_of_both_kinds(file, calibration):
    """At the work of a quarter of the taps a layer loses less behind the transform, in nats of the same scale."""
    x = {"input": calibration.numpy()}
    targets = [t for t in read_targets(file, onnx.load(str(file)), ()) if "down" not in t.tensor.name]
    plain, inside = ColumnPattern(0.75), ColumnPattern(7 / 16, winograd="2x2")
    found = second_order(onnx.load(str(file)), targets, x, {t.name: [plain, inside] for t in targets}, 16)
    assert len(found) == 2 and all(0 < row[inside] < row[plain] for row in found.values())


def test_torch_modules_are_transformed_first(model, calibration):
    with pytest.raises(UserError, match=r"transform its weights by winograd_\(model\), and take 50 % T=8$"):
        sparsify_(model, ColumnPattern(0.5, winograd="2x2"), calibration[:1])


def test_magnitudes_do_not_balance_transformed_weights(file, model, calibration, tmp_path):
    x = {"input": calibration.numpy()}
    prune_file(file, tmp_path / "w.onnx", ColumnPattern(0.25, winograd="2x2"), method="obs", calibration=x)
    with pytest.raises(UserError, match="transformed weights, of which magnitudes say little"):
        prune_file(tmp_path / "w.onnx", tmp_path / "b.onnx", ColumnPattern(0.5), balance=True, calibration=x)
    winograd_(model)
    with pytest.raises(UserError, match="transformed weights, of which magnitudes say little"):
        cn.balance(model, ColumnPattern(0.5), calibration)
