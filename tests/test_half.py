"""Bundles whose convolutions compute with float16: whole networks in emulation, and who is told that they cannot."""

from __future__ import annotations

import datetime
from dataclasses import replace

import numpy as np
import onnx
import pytest
from everywhere import compare
from models import Builder, bottlenecks
from test_kernel_half import halved
from test_kernel_panels import case_of
from test_parity import files  # noqa: F401  (a fixture)

from colonnade.api import build
from colonnade.bench.ours import Ours
from colonnade.bench.record import layers
from colonnade.errors import ColonnadeError, UserError
from colonnade.frontend import imported
from colonnade.kernels import registry
from colonnade.kernels.isa import isa
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.onnx_file import prune_file
from colonnade.targets import Qemu, qemu
from colonnade.targets.base import Machine
from colonnade.tune.job import Run, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.workload import RELU, Conv2d, Epilogue, Linear
from tests.zoo import ZOO, emulated, model_of, pruned

TOLERANCE = 0.01  # of the largest answer: a few dozen layers, each rounded to 11 bits


@pytest.mark.parametrize("percent", [0, 75])
def test_resnet18_in_small(half_qemu, files, tmp_path, percent):  # noqa: F811
    """All convolutions, the stem joined with its pool, and copies into phases between them."""
    bundle = compare(files("resnet18", percent), tmp_path, (1, 3, 64, 64), TOLERANCE, "f16")
    kernels = [step["kernel"] for step in bundle.manifest["steps"]]
    assert sum(k.startswith("f16_convpool") for k in kernels) == 1
    assert sum(k.startswith("f16_spconv") for k in kernels) == 19
    assert sum(k.startswith("f16_copy") for k in kernels) == 3


@pytest.mark.parametrize("tile", [None, 2, 8])
def test_bottlenecks_in_panels(half_qemu, tmp_path, tile):
    onnx.save(bottlenecks(), tmp_path / "model.onnx")
    if tile:
        prune_file(tmp_path / "model.onnx", tmp_path / "pruned.onnx", ColumnPattern(0.5, tile))
    compare(tmp_path / ("pruned.onnx" if tile else "model.onnx"), tmp_path, (1, 3, 22, 22), TOLERANCE, "f16")


def test_weights_beyond_float16_stay_as_they_are(half_qemu, tmp_path):
    """A layer whose weights it cannot hold computes with float32, all others with float16."""
    model = bottlenecks()
    wide = next(i for i in model.graph.initializer if len(i.dims) == 4 and list(i.dims[2:]) == [1, 1])
    following = [node for node in model.graph.node if wide.name in node.input]
    values = onnx.numpy_helper.to_array(wide).copy()
    values.reshape(-1)[0] = 1e5
    wide.CopyFrom(onnx.numpy_helper.from_array(values, wide.name))
    onnx.save(model, tmp_path / "model.onnx")
    bundle = build(tmp_path / "model.onnx", "qemu", dtype="f16", input_shapes={"x": (1, 3, 22, 22)}, out=tmp_path / "b")
    kernels = {step["name"]: step["kernel"] for step in bundle.manifest["steps"]}
    mine = [k for name, k in kernels.items() if name.startswith(following[0].name)]
    assert mine and not mine[0].startswith("f16_") and any(k.startswith("f16_spconv") for k in kernels.values())


@pytest.mark.allow_skip("where the usual emulator knows Zvfh, none refuses it")
def test_a_bundle_says_that_a_machine_lacks_it(half_qemu, tmp_path, monkeypatch):
    onnx.save(bottlenecks(), tmp_path / "model.onnx")
    bundle = build(tmp_path / "model.onnx", "qemu", dtype="f16", input_shapes={"x": (1, 3, 22, 22)}, out=tmp_path / "b")
    monkeypatch.delenv("COLONNADE_QEMU")
    if qemu.half(qemu.program("this test")):
        pytest.skip("this emulator knows Zvfh")
    feeds = {"x": np.zeros((1, 3, 22, 22), np.float32)}
    with pytest.raises(ColonnadeError, match="this bundle needs rvv_zvfh; this machine lacks zvfh"):
        Ours(bundle, Qemu(), feeds, 1).outputs()


def test_weights_that_vanish_in_float16_stay_as_they_are(tmp_path):
    """Numbers of 1e-8 are zeros there, and of 1e-6 hardly themselves."""
    for size, kind in ((1e-7, "f32"), (1e-3, "f16")):
        made = Builder(0)
        x = made.input("x", (1, 8))
        y = made.op("Gemm", x, made.random(8, 4, scale=size))
        onnx.save(made.build(y), tmp_path / "model.onnx")
        plan = imported(tmp_path / "model.onnx").arrange(half=()).plan()
        assert [s.workload.dtype for s in plan.steps if isinstance(s.workload, Linear)] == [kind]


@pytest.mark.parametrize("strips", [(0, 0, 0), (2, 2, 2)])
def test_the_measuring_program_checks_float16(half_qemu, strips):
    """From planes and panels; a result that is not what must come out is told from one that is. Large weights do not
    take sums out of range."""
    conv = Conv2d(1, 24, 40, 13, 17, (1, 1), epilogue=Epilogue(True, RELU))
    case, _ = halved(*case_of(conv, ColumnPattern(0.5, tile=8), 3, strips))
    case.constants["weight"] = case.constants["weight"] * 2000
    object.__setattr__(case, "key", lambda: "convolution")
    found: list[Measurement] = []
    chosen, target = isa("rvv_zvfh"), Qemu(256, poison=True)
    made = problem(case, 8, False)
    assert all(np.isfinite(np.frombuffer(e.data, np.float16)).any() and e.itemsize == 2 for e in made.expected)
    first = made.expected[0]
    off = np.frombuffer(first.data, np.float16) + np.float16(300)
    wrong = replace(made, expected=(replace(first, data=off.tobytes()), *made.expected[1:]))
    runs = [Run(0, check=True, least=0, most=0, budget_ns=0, limit_s=20)]
    for each in (made, wrong):
        best = registry.candidates(case, chosen, 2)[:1]
        Harness(target, chosen, 2).run(each, best, runs, lambda _, measured: found.append(measured), registry.bind)
    assert [m.outcome for m in found] == ["ok", "wrong"]


def test_machines_without_it_are_told():
    plain = Machine("riscv64", "a board", frozenset("imafdcv"), 1)
    assert plain.pick_isa().name == "rvv"
    with pytest.raises(UserError, match="a board does not compute with f16, which takes RISC-V's Zvfh"):
        plain.pick_isa(dtype="f16")
    with pytest.raises(UserError, match="dtype 'f8': expected f32 or f16"):
        plain.pick_isa(dtype="f8")
    able = Machine("riscv64", "a board", frozenset([*"imafdcv", "zvfh"]), 1)
    assert able.pick_isa().name == "rvv"  # float32 needs no more than vectors
    assert (able.pick_isa(dtype="f16").name, able.pick_isa(dtype="f16").itemsize) == ("rvv_zvfh", 2)
    with pytest.raises(UserError, match="ISA portable does not compute with f16"):
        able.pick_isa("portable", "f16")


def test_shares_of_the_peak_count_the_lanes():
    """Twice the f32 peak is what float16 can reach."""
    step = {"name": "a", "workload": "conv2d()", "params": {}, "macs": 500, "kept_macs": 500}
    steps = [{**step, "kernel": f"{kind}_spconv_8x2v"} for kind in ("f16", "f32")]
    half, single = layers({"steps": steps}, [[100], [100]], 20.0)
    assert (half["peak_share"], single["peak_share"]) == (0.25, 0.5)


SHARE = sorted(name for name in ZOO if not ZOO[name].huge)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [SHARE[datetime.date.today().toordinal() % len(SHARE)]])
def test_a_network_of_the_zoo(half_qemu, name, tmp_path):
    """A different one each day, pruned, at its smallest size; transformers' rows are sums of hundreds of numbers."""
    model = pruned(model_of(name, ZOO[name].emulated), 0.75, tmp_path)
    worst = emulated(name, model, tmp_path, (256,), "f16")
    assert max(worst) <= (3 if name == "distilbert" else 1.5) * TOLERANCE
