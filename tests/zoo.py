"""The networks that people deploy, random weights: where each comes from, its smallest input, and how it is compared.

``tests/test_models_zoo.py`` and ``tests/test_rvv_networks.py`` check a share of them each day and all on demand;
``scripts/zoo.py`` prints them as a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.kernels.isa import isa
from colonnade.pattern import ColumnPattern
from colonnade.plan import Plan
from colonnade.sparsify.onnx_file import prune_file
from tests.models import export, onnxruntime_outputs, torchvision_model, torchvision_zoo

SPARSITIES = (0.0, 0.5, 0.75)
Feeds = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """``side``: rows and columns of its input on the host (tokens of a transformer's text); ``emulated``: the smallest
    that it takes, for machines that are emulated. ``quick``: seconds, so that one of these is among the quick tests.
    ``build``: of a name and a side, the model as torch exports it."""

    name: str
    source: str
    side: int
    emulated: int
    build: Callable[[str, int], onnx.ModelProto]
    quick: bool = False
    feeds: Callable[[Plan, int], Feeds] = field(default=lambda plan, _: random_feeds(plan))

    @property
    def huge(self) -> bool:
        """Minutes or gigabytes: on demand only."""
        return self.name in ("bert_base", "vgg16_bn", "vit_b_16", "resnet152")

    @property
    def input(self) -> str:
        """In words."""
        return self._words(self.side)

    @property
    def smallest(self) -> str:
        """The emulated one, in words."""
        return self._words(self.emulated)

    def _words(self, side: int) -> str:
        return f"{side} tokens" if self.source == "transformers" else f"{side} x {side}"


def random_feeds(plan: Plan) -> Feeds:
    """Random numbers for every input."""
    rng = np.random.default_rng(0)
    return {port.name: rng.standard_normal(port.shape).astype(port.dtype) for port in plan.inputs}


# --- where they come from ---------------------------------------------------------------------------------------------


def _exported(module: Any, side: int) -> onnx.ModelProto:
    import torch

    for parameter in module.parameters():
        if not parameter.any():  # a head that starts as zeros would make any answer right
            torch.nn.init.normal_(parameter, std=0.05)
    return export(module, 1, 3, side, side)


def _torchvision(name: str, side: int) -> onnx.ModelProto:
    options = {"image_size": side} if name == "vit_b_16" else {}
    return _exported(torchvision_model(torchvision_zoo(), name, **options), side)


def _timm(name: str, side: int) -> onnx.ModelProto:
    import torch

    torchvision_zoo()  # before timm, which imports torchvision too
    import timm

    torch.manual_seed(0)
    name = name.removeprefix("timm ")
    sized = {"img_size": side} if name.startswith("vit") else {}
    return _exported(timm.create_model(name, pretrained=False, **sized).eval(), side)


def _body(name: str, side: int) -> onnx.ModelProto:
    import torch

    from tests import zoo_bodies

    torch.manual_seed(0)
    return _exported(getattr(zoo_bodies, name)(), side)


def _transformer(name: str, tokens: int) -> onnx.ModelProto:
    from tests.transformers_like import BASE, DISTILLED, bert_model

    return bert_model(BASE if name == "bert_base" else DISTILLED, 1, tokens)


def _words(plan: Plan, tokens: int) -> Feeds:
    from tests.transformers_like import BASE, bert_feeds

    feeds = bert_feeds(BASE, 1, tokens)
    return {port.name: feeds[port.name] for port in plan.inputs}


# name: side on the host, the smallest that it takes
QUICK = {
    "densenet121": (64, 32), "efficientnet_b0": (64, 32), "mnasnet1_0": (64, 32), "mobilenet_v2": (64, 32),
    "mobilenet_v3_large": (64, 32), "regnet_y_400mf": (64, 32), "resnet18": (64, 32), "shufflenet_v2_x1_0": (64, 32),
    "squeezenet1_1": (64, 32),
}  # fmt: skip
LARGE = {
    "convnext_tiny": (64, 32), "googlenet": (64, 32), "inception_v3": (96, 75), "resnet34": (64, 32),
    "resnet50": (64, 32), "resnet101": (64, 32), "resnet152": (64, 32), "resnext50_32x4d": (64, 32),
    "swin_t": (64, 32), "vgg16_bn": (224, 224), "vit_b_16": (224, 32), "wide_resnet50_2": (64, 32),
}  # fmt: skip
BODIES = {
    "fpn": (64, 32), "fpn_resnet50": (128, 64), "ssdlite": (96, 64), "yolo_like": (64, 32),
    "deeplabv3_resnet50": (96, 33), "unet": (64, 16),
}  # fmt: skip
TIMM = {
    "resnet18": (64, 32), "resnet50": (64, 32), "resnext50_32x4d": (64, 32), "wide_resnet50_2": (64, 32),
    "densenet121": (64, 32), "mobilenetv2_100": (64, 32), "mobilenetv3_large_100": (64, 32), "vgg16_bn": (224, 224),
    "efficientnet_b0": (64, 32), "tf_efficientnet_b0": (64, 32), "regnety_004": (64, 32), "mnasnet_100": (64, 32),
    "inception_v3": (96, 75), "convnext_tiny": (64, 32), "vit_base_patch16_224": (224, 32),
}  # fmt: skip
ZOO = {
    network.name: network
    for network in (
        *(Network(name, "torchvision", *sides, _torchvision, True) for name, sides in QUICK.items()),
        *(Network(name, "torchvision", *sides, _torchvision) for name, sides in LARGE.items()),
        *(Network(name, "bodies", *sides, _body) for name, sides in BODIES.items()),
        *(Network(name, "transformers", 128, 8, _transformer, feeds=_words) for name in ("bert_base", "distilbert")),
    )
}
ZOO_OF_TIMM = {
    f"timm {name}": Network(f"timm {name}", "timm", *sides, _timm) for name, sides in TIMM.items()
}  # which the tests do not install


# --- how they are compared --------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def model_of(name: str, side: int) -> onnx.ModelProto:
    """The network as torch exports it."""
    return (ZOO | ZOO_OF_TIMM)[name].build(name, side)


def pruned(model: onnx.ModelProto, sparsity: float, folder: Path, group_rows: bool = False) -> onnx.ModelProto:
    """The model as ``colonnade prune`` leaves it; rows are grouped where asked, which takes minutes for large ones."""
    if not sparsity:
        return model
    onnx.save(model, folder / "dense.onnx")
    prune_file(folder / "dense.onnx", folder / "pruned.onnx", ColumnPattern(sparsity), group_rows=group_rows)
    return onnx.load(folder / "pruned.onnx")


def difference(ours: Feeds, theirs: Feeds) -> float:
    """Largest difference of an output over its largest magnitude; all outputs are finite and none is zero."""
    worst = 0.0
    for name, wanted in theirs.items():
        assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0
        assert ours[name].shape == wanted.shape
        worst = max(worst, float(np.abs(ours[name] - wanted).max() / np.abs(wanted).max()))
    return worst


def on_host(model: onnx.ModelProto, plan: Plan, feeds: Feeds) -> float:
    """In this process, in the kernels of the machine's best ISA, against onnxruntime."""
    from kernel_harness import machine_has

    best = next(name for name in ("avx512", "avx2", "portable") if machine_has(name))
    return difference(Program(plan, isa(best)).run(feeds), onnxruntime_outputs(model, feeds))


def check(model: onnx.ModelProto, tolerance: float = 1e-4, **options: Any) -> float:
    """``on_host`` with random inputs."""
    plan = frontend.load(model, **options)
    worst = on_host(model, plan, random_feeds(plan))
    assert worst < tolerance
    return worst


def emulated(
    name: str, model: onnx.ModelProto, folder: Path, vlens: tuple[int, ...] = (128, 256), dtype: str = "f32"
) -> list[float]:
    """One bundle, unchanged, by vector length; lanes beyond the vector length are poisoned."""
    from colonnade.api import build
    from colonnade.bench.ours import Ours
    from colonnade.targets import Qemu

    network = (ZOO | ZOO_OF_TIMM)[name]
    onnx.save(model, folder / "model.onnx")
    bundle = build(folder / "model.onnx", f"qemu:vlen={vlens[0]}", dtype=dtype, out=folder / "bundle")
    plan = frontend.load(model)
    feeds = network.feeds(plan, network.emulated)
    theirs = onnxruntime_outputs(model, feeds)
    names = [port["name"] for port in bundle.manifest["outputs"]]
    worst = []
    for vlen in vlens:
        found = Ours(bundle, Qemu(vlen, poison=True), feeds, 1).outputs(timeout=3600)
        worst.append(difference(dict(zip(names, found, strict=True)), theirs))
    return worst
