"""Networks that people deploy, random weights, end to end in kernels against onnxruntime: dense and pruned.

Of the small networks one combination a day is quick, by the date, and the others are slow; of the large ones one a day
is slow. All of them (up to minutes and gigabytes each) run on demand: COLONNADE_ALL_MODELS=1.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.kernels.isa import isa
from tests.models import export, onnxruntime_outputs
from tests.zoo import SPARSITIES, ZOO, check, model_of, on_host, pruned


def _share() -> list[Any]:
    small = [(name, sparsity) for sparsity in SPARSITIES for name in sorted(ZOO) if ZOO[name].quick]
    large = [(name, sparsity) for name in sorted(ZOO) if not ZOO[name].quick for sparsity in SPARSITIES]
    day = datetime.date.today().toordinal()
    quick = small[day % len(small)]
    if not os.environ.get("COLONNADE_ALL_MODELS"):
        large = [pair for pair in large if not ZOO[pair[0]].huge]
        large = [large[day % len(large)]]
    return [pair if pair == quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in small + large]


@pytest.mark.parametrize("name, sparsity", _share())
def test_network(name: str, sparsity: float, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    network = ZOO[name]
    model = pruned(model_of(name, network.side), sparsity, tmp_path, network.quick)
    plan = frontend.load(model)
    assert on_host(model, plan, network.feeds(plan, network.side)) < 1e-4


def small_unet() -> Any:
    from tests.zoo_bodies import unet

    return unet((8, 16, 32))


def body(name: str) -> Any:
    from tests import zoo_bodies

    return small_unet() if name == "unet" else getattr(zoo_bodies, name)()


@pytest.mark.parametrize("name", ["fpn", "unet", "aspp"])
def test_bodies(name: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = body(name)
    check(export(module, 2, 3, 32, 40))
    check(export(module, 1, 3, 32, 40, dynamic=True), batch=3)


def test_files_with_external_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = export(small_unet(), 1, 3, 16, 16)
    rng = np.random.default_rng(0)
    feeds = {model.graph.input[0].name: rng.standard_normal((1, 3, 16, 16)).astype(np.float32)}
    (theirs,) = onnxruntime_outputs(model, feeds).values()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    plan = frontend.load(tmp_path / "m.onnx")
    (ours,) = Program(plan, isa("portable")).run(feeds).values()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
