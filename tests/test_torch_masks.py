"""Masks on torch models: where they go, what they hold, and how they leave."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import colonnade as cn
from colonnade.errors import UserError
from colonnade.pattern import discover
from colonnade.sparsify.masks import mask_zeros_, masks
from colonnade.sparsify.select import as_matrix

PATTERN = cn.ColumnPattern(0.75, tile=8)


class Net(nn.Module):
    """Registered in another order than it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 10)
        self.second = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.wise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.stem = nn.Conv2d(1, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.stem(x).relu())).relu()
        return self.head(self.grouped(self.wise(x)).relu().mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_stem_depthwise_and_classifier_stay_dense(net: Net, x: torch.Tensor) -> None:
    norm = net.norm.running_mean.clone()
    layers = {layer.name: layer for layer in cn.sparsify_(net, PATTERN, x)}
    assert list(layers) == ["stem", "second", "wise", "grouped", "head"]
    assert {name: layer.reason for name, layer in layers.items() if layer.pattern is None} == {
        "stem": "stem", "wise": "depthwise", "head": "classifier",
    }  # fmt: skip
    assert layers["second"].sparsity == 0.75
    assert net.training
    assert torch.equal(net.norm.running_mean, norm)
    assert [name for name, _ in masks(net)] == ["second.weight", "grouped.weight"]


def test_the_zeros_are_tiles(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    for layer, groups in ((net.second, 1), (net.grouped, 4)):
        tiled = discover(as_matrix(layer.weight.detach().numpy()), groups)
        columns = tiled.shape[1]
        assert all(len(tile.rows) == 8 and len(tile.columns) == PATTERN.kept(columns) for tile in tiled.tiles)


def test_grouping_rows_keeps_more(net: Net, x: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    cn.sparsify_(net, PATTERN, x)
    cn.sparsify_(plain, PATTERN, x, group_rows=False)
    assert net.second.weight.abs().sum() > plain.second.weight.abs().sum()


def test_patterns_by_name(net: Net, x: torch.Tensor) -> None:
    half, none = cn.ColumnPattern(0.5, tile=4), None
    found = {layer.name: layer for layer in cn.sparsify_(net, {"gr.*": half, "head": half, "s*": none}, x)}
    assert found["grouped"].pattern == found["head"].pattern == half  # named exactly: pruned though the classifier
    assert found["second"].pattern is None


class Stages(nn.Module):
    """Layers in groups with dotted names, a transposed one, linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.layer2 = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.head = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


def test_patterns_by_group_of_layers(x: torch.Tensor, tmp_path: Path) -> None:
    """The first key that matches counts; what runs afterwards is what torch says."""
    torch.manual_seed(0)
    model = Stages().eval()
    heavy, light, linear = cn.ColumnPattern(0.875, tile=8), cn.ColumnPattern.nm(2, 4, tile=4), cn.ColumnPattern(0.5)
    layers = {
        layer.name: layer
        for layer in cn.sparsify_(
            model, {"layer2.0": None, "layer2.*": heavy, r"layer\d\..*": light, "head.*": linear}, x
        )
    }
    assert list(layers)[-3:] == ["up", "head.0", "head.2"]
    assert {name: layer.reason for name, layer in layers.items() if layer.pattern is None} == {
        "stem": "stem", "layer2.0": "not named", "up": "transposed convolution", "head.2": "classifier",
    }  # fmt: skip
    assert {name: layer.sparsity for name, layer in layers.items() if layer.pattern is not None} == {
        "layer1.0": 0.5, "layer1.2": 0.5, "layer2.2": 0.875, "head.0": 0.5,
    }  # fmt: skip
    (tile, *_) = discover(as_matrix(model.head[0].weight.detach().numpy())).tiles
    assert (len(tile.rows), len(tile.columns)) == (8, 8)
    bundle = cn.build(cn.export(model, x, tmp_path / "stages.onnx"), out=tmp_path / "bundle")
    with cn.Session(bundle.path) as session, torch.no_grad():
        np.testing.assert_allclose(session.run({"input": x.numpy()})["output"], model(x).numpy(), atol=1e-5)


def test_transposed_convolutions_stay_dense(x: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"layer up is a transposed convolution \(ConvTranspose2d\) and stays dense"):
        cn.sparsify_(Stages(), {"up": PATTERN}, x)
    with pytest.raises(UserError, match="has no convolution or linear layer to prune"):
        cn.sparsify_(nn.Sequential(nn.ConvTranspose2d(8, 8, 2)), PATTERN)


def test_exclude(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x, exclude=["second"])
    assert [name for name, _ in masks(net)] == ["grouped.weight"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "method is 'magic'"),
        ({"score": "l7"}, "score is 'l7'"),
        ({"pattern": {"nowhere.*": PATTERN}}, "matches no layer"),
        ({"exclude": [".*"]}, "nothing was pruned"),
    ],
)
def test_wrong_options_change_nothing(net: Net, x: torch.Tensor, options: dict[str, object], said: str) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=said):
        cn.sparsify_(net, options.pop("pattern", PATTERN), x, **options)
    after = net.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_that_are_none_are_refused(net: Net, x: torch.Tensor) -> None:
    with torch.no_grad():
        net.grouped.weight[3] = float("nan")
    with pytest.raises(UserError, match="layer grouped: its weights hold NaN"):
        cn.sparsify_(net, PATTERN, x)
    assert not list(masks(net))


def test_shared_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    model[2].weight = model[1].weight
    before = model[1].weight.detach().clone()
    for options in ({}, {"exclude": ["2"]}):  # the one that stays dense would lose its weights too
        with pytest.raises(UserError, match="layers 1 and 2 share one weight"):
            cn.sparsify_(model, PATTERN, **options)
    assert torch.equal(model[1].weight, before) and not list(masks(model))
    cn.sparsify_(model, {"0": PATTERN})
    assert torch.equal(model[2].weight, before) and len(list(masks(model))) == 1


def test_a_weight_that_a_hook_computes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is the old way
        nn.utils.weight_norm(model[2])
    with pytest.raises(UserError, match="layer 2: a hook computes its weight"):
        cn.sparsify_(model, PATTERN)
    assert not list(masks(model))


def test_plain_masks_take_the_place_of_movable_ones(net: Net, x: torch.Tensor) -> None:
    from colonnade.sparsify.masks import ColumnMask

    cn.sparsify_(net, cn.ColumnPattern(0.5, tile=4), x, movable=True)
    cn.sparsify_(net, cn.ColumnPattern(0.75, tile=4), x)
    parts = [m for m in net.modules() if isinstance(m, ColumnMask)]
    assert parts and all(type(part) is ColumnMask for part in parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_are_fitted_in_single_precision_only(net: Net, x: torch.Tensor, dtype: torch.dtype) -> None:
    half = net.to(dtype)
    with pytest.raises(UserError, match="needs a float32 model"):
        cn.sparsify_(half, PATTERN, x.to(dtype), method="obs", calibration=x.to(dtype))
    assert not list(masks(half))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_zeros_never_return(net: Net, x: torch.Tensor, kind: str) -> None:
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    }[kind]
    warm = make(net.parameters())
    for _ in range(3):
        step(net, x, warm)
    cn.sparsify_(net, PATTERN, x)
    zero = {name: ~mask.mask for name, mask in masks(net)}
    before = net.second.weight.detach().clone()
    optimizer = make(net.parameters())
    for _ in range(5):
        step(net, x, optimizer)
    assert not torch.equal(net.second.weight, before)
    for name, gone in zero.items():
        assert bool((net.get_submodule(name.rpartition(".")[0]).weight[gone] == 0).all())


def test_state_dict_round_trip(net: Net, x: torch.Tensor) -> None:
    fresh = copy.deepcopy(net)
    cn.sparsify_(net, PATTERN, x)
    cn.sparsify_(fresh, cn.ColumnPattern(0.5), x)
    fresh.load_state_dict(net.state_dict())
    for (_, mine), (_, other) in zip(masks(net), masks(fresh), strict=True):
        assert torch.equal(mine.mask, other.mask)
    assert torch.equal(net.eval()(x), fresh.eval()(x))


def test_deepcopy_is_independent(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    other = copy.deepcopy(net)
    assert torch.equal(net.eval()(x), other.eval()(x))
    cn.remove_masks(other)
    assert len(list(masks(net))) == 2
    assert not list(masks(other))
    assert torch.equal(net(x), other(x))


def test_data_parallel(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    assert torch.equal(nn.DataParallel(net.eval())(x), net(x))


@pytest.mark.timeout(120)
def test_distributed_data_parallel(net: Net, x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks this machine's name up in the network

    cn.sparsify_(net, PATTERN, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        step(wrapped, x, torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9))
    finally:
        dist.destroy_process_group()
    assert float((net.second.weight == 0).float().mean()) == 0.75


@pytest.mark.slow
def test_compile(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    net.eval()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    net.train()
    step(compiled, x, torch.optim.SGD(net.parameters(), 0.1))
    assert float((net.second.weight == 0).float().mean()) == 0.75


def test_autocast(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    original = net.second.parametrizations["weight"].original  # type: ignore[index,union-attr]
    assert bool((original.grad[net.second.weight == 0] == 0).all())
    assert bool((original.grad != 0).any())


def test_remove_leaves_plain_weights(net: Net, x: torch.Tensor) -> None:
    names = list(net.state_dict())
    cn.sparsify_(net, PATTERN, x)
    masked = net.eval()(x)
    assert cn.remove_masks(net) is net
    assert sorted(net.state_dict()) == sorted(names)
    assert type(net.second) is nn.Conv2d
    assert isinstance(net.second.weight, nn.Parameter)
    assert float((net.second.weight == 0).float().mean()) == 0.75
    assert torch.equal(net(x), masked)


def test_masks_from_zeros(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, PATTERN, x)
    cn.remove_masks(net)
    assert mask_zeros_(net) == ["second", "grouped"]
    step(net, x, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    assert float((net.second.weight == 0).float().mean()) == 0.75


def test_pruning_again_prunes_more(net: Net, x: torch.Tensor) -> None:
    cn.sparsify_(net, cn.ColumnPattern(0.5), x)
    cn.sparsify_(net, PATTERN, x)
    assert float((net.second.weight == 0).float().mean()) == 0.75
    cn.remove_masks(net)
    assert float((net.second.weight == 0).float().mean()) == 0.75


def test_export_equals_torch(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    import onnxruntime

    cn.sparsify_(net, PATTERN, x)
    net.train()
    path = cn.export(net, x, tmp_path / "deep" / "net.onnx")
    assert net.training
    assert len(list(masks(net))) == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-5 * np.abs(expected).max())


def test_exported_zeros_are_exact(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    cn.sparsify_(net, PATTERN, x)
    model = onnx.load(cn.export(net, x, tmp_path / "net.onnx"))
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    (second,) = [weight for weight in weights if weight.shape == (32, 16, 3, 3)]
    assert (second == 0).mean() == 0.75


@pytest.mark.slow
def test_export_with_open_batch(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    import onnxruntime

    path = cn.export(net, x, tmp_path / "net.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.concatenate([x.numpy()] * 2)[:7]})[0].shape == (7, 10)


@pytest.mark.slow
def test_export_of_pixels_whose_channels_lie_inside(tmp_path: Path) -> None:
    """An image as it is read, its axes permuted: the batch stays open, whatever the strides of the example."""
    import onnx

    class Subsampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))

    example = torch.zeros(1, 16, 16, 3).permute(0, 3, 1, 2)
    path = cn.export(Subsampled(), example, tmp_path / "net.onnx", dynamic_batch=True)
    assert onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(np.frombuffer(x.numpy().tobytes(), np.float32)[0])

    with pytest.raises(UserError, match=r"torch cannot export Odd: (?!Failed to export)"):
        cn.export(Odd(), torch.ones(1, 2), tmp_path / "odd.onnx")
    assert not list(tmp_path.iterdir())
