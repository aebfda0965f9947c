"""Networks that people deploy, random weights, end to end in kernels against onnxruntime: dense and pruned.

One combination a day is quick, by the date; the others of the small networks are slow, and the large networks (up to
minutes and gigabytes each) run on demand: COLONNADE_ALL_MODELS=1.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_harness import machine_has

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.kernels.isa import isa
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.onnx_file import prune_file
from tests.models import export, onnxruntime_outputs, torchvision_model

# name: side of the smallest input that shows all of the network, or nearly
SMALL = {
    "densenet121": 64,
    "efficientnet_b0": 64,
    "mnasnet1_0": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64,
}
LARGE = {
    "convnext_tiny": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "resnet34": 64,
    "resnet50": 64,
    "resnet101": 64,
    "resnet152": 64,
    "resnext50_32x4d": 64,
    "swin_t": 64,
    "vgg16_bn": 224,
    "vit_b_16": 224,
    "wide_resnet50_2": 64,
}


SPARSITIES = (0.0, 0.5, 0.75)


def _share() -> list[Any]:
    small = [(name, sparsity) for sparsity in SPARSITIES for name in sorted(SMALL)]
    wanted = sorted(LARGE) if os.environ.get("COLONNADE_ALL_MODELS") else []
    large = [(name, sparsity) for name in wanted for sparsity in SPARSITIES]
    quick = small[datetime.date.today().toordinal() % len(small)]
    return [pair if pair == quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in small + large]


@functools.cache
def network(models: Any, name: str) -> onnx.ModelProto:
    """The network as torch exports it."""
    import torch

    size = (SMALL | LARGE)[name]
    if name in ("googlenet", "inception_v3"):
        torch.manual_seed(0)
        module = getattr(models, name)(weights=None, init_weights=False).eval()
    else:
        module = torchvision_model(models, name)
    for parameter in module.parameters():
        if not parameter.any():  # a head that starts as zeros would make any answer right
            torch.nn.init.normal_(parameter, std=0.05)
    return export(module, 1, 3, size, size)


def check(model: onnx.ModelProto, tolerance: float = 1e-4, **options: Any) -> float:
    """Largest difference from onnxruntime's outputs, over their largest magnitude."""
    plan = frontend.load(model, **options)
    rng = np.random.default_rng(0)
    feeds = {port.name: rng.standard_normal(port.shape).astype(port.dtype) for port in plan.inputs}
    best = next(name for name in ("avx512", "avx2", "portable") if machine_has(name))
    ours, theirs = Program(plan, isa(best)).run(feeds), onnxruntime_outputs(model, feeds)
    worst = 0.0
    for port in plan.outputs:
        wanted = theirs[port.name]
        assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0
        worst = max(worst, float(np.abs(ours[port.name] - wanted).max() / np.abs(wanted).max()))
    assert worst < tolerance
    return worst


@pytest.mark.parametrize("name, sparsity", _share())
def test_network(name: str, sparsity: float, torchvision_models: Any, tmp_path: Path) -> None:
    model = network(torchvision_models, name)
    if sparsity:
        onnx.save(model, tmp_path / "dense.onnx")
        prune_file(tmp_path / "dense.onnx", tmp_path / "pruned.onnx", ColumnPattern(sparsity))
        model = onnx.load(tmp_path / "pruned.onnx")
    check(model)


# --- bodies that torchvision writes as parts -------------------------------------------------------------------------


def fpn(torch: Any) -> Any:
    """Three resolutions, upsampled by nearest and by bilinear, added and smoothed."""

    class Fpn(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.stages = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 24))])
            self.lateral = nn.ModuleList([nn.Conv2d(c, 12, 1) for c in (8, 16, 24)])
            self.smooth = nn.ModuleList([nn.Conv2d(12, 12, 3, 1, 1) for _ in range(3)])

        def forward(self, x: Any) -> Any:
            maps = []
            for stage in self.stages:
                x = torch.relu(stage(x))
                maps.append(x)
            top = self.lateral[2](maps[2])
            up = torch.nn.functional.interpolate(top, scale_factor=2.0, mode="nearest")
            middle = self.lateral[1](maps[1]) + up
            up = torch.nn.functional.interpolate(middle, scale_factor=2.0, mode="bilinear", align_corners=False)
            fine = self.lateral[0](maps[0]) + up
            return tuple(s(m) for s, m in zip(self.smooth, (fine, middle, top), strict=True))

    return Fpn()


def unet(torch: Any) -> Any:
    """Down by pools, up by transposed convolutions, joined by concat."""

    class Unet(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.first, self.deep = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
            self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 4, 3, 1, 1)

        def forward(self, x: Any) -> Any:
            fine = torch.relu(self.first(x))
            deep = torch.relu(self.deep(torch.nn.functional.max_pool2d(fine, 2)))
            return self.last(torch.cat([fine, self.up(deep)], 1))

    return Unet()


def aspp(torch: Any) -> Any:
    """DeepLab's head: dilated convolutions beside a pooled branch that is resized back."""

    class Aspp(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            nn = torch.nn
            self.body = nn.Conv2d(3, 8, 3, 2, 1)
            self.branches = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=d, dilation=d) for d in (1, 6, 12)])
            self.pooled, self.project = nn.Conv2d(8, 6, 1), nn.Conv2d(24, 5, 1)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.body(x))
            parts = [torch.relu(branch(x)) for branch in self.branches]
            mean = torch.relu(self.pooled(x.mean((2, 3), keepdim=True)))
            parts.append(torch.nn.functional.interpolate(mean, size=x.shape[2:], mode="bilinear", align_corners=False))
            y = self.project(torch.cat(parts, 1))
            return torch.nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)

    return Aspp()


@pytest.mark.parametrize("body", [fpn, unet, aspp])
def test_bodies(body: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = export(body(torch), 2, 3, 32, 40)
    check(model)
    check(export(body(torch), 1, 3, 32, 40, dynamic=True), batch=3)


def test_files_with_external_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = export(unet(torch), 1, 3, 16, 16)
    rng = np.random.default_rng(0)
    feeds = {model.graph.input[0].name: rng.standard_normal((1, 3, 16, 16)).astype(np.float32)}
    (theirs,) = onnxruntime_outputs(model, feeds).values()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    plan = frontend.load(tmp_path / "m.onnx")
    (ours,) = Program(plan, isa("portable")).run(feeds).values()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
