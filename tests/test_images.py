"""Large batches: image by image where that is the same, whole where images meet."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from colonnade.bundle import write_bundle
from colonnade.codegen.in_process import Program
from colonnade.frontend import images, load, reference
from colonnade.kernels import registry
from colonnade.kernels.isa import isa
from colonnade.plan import Plan
from colonnade.runtime.session import Session
from colonnade.targets import Local
from colonnade.tune import tune
from tests.models import Builder

PORTABLE = isa("portable")
BATCH = 3


def network(kind: str) -> onnx.ModelProto:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (BATCH, 3, 9, 9)), 3, 4, 3, pads=(1, 1, 1, 1)))
    y = b.op("Relu", b.op("Add", x, b.conv(x, 4, 4, 3, pads=(1, 1, 1, 1))))
    if kind == "classes":
        y = b.op("Softmax", b.op("Flatten", b.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2])))
    if kind == "classifier":
        y = b.op("Flatten", b.op("GlobalAveragePool", y))
        for sizes in ((4, 16), (16, 5)):
            y = b.op("Gemm", y, b.random(*sizes), b.random(*sizes[1:]))
    if kind == "images meet":
        y = b.op("Sub", y, b.op("ReduceMean", y, b.constant(np.array([0], np.int64)), keepdims=1))
    return b.build(y)


def expected(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    import onnxruntime

    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])


def taken_apart(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, heavy: int = 1) -> Plan:
    monkeypatch.setattr(images, "NEAR", 0)
    monkeypatch.setattr(images, "SMALL", 100)  # more than what leaves the classifier
    monkeypatch.setattr(images, "HEAVY", heavy)
    return load(model)


def runs(plan: Plan) -> list[int]:
    """How often every step is run."""
    return [plan.images if i < plan.once else 1 for i in range(len(plan.steps))]


@pytest.mark.parametrize("kind", ["planes", "classes", "images meet", "classifier"])
def test_images_are_separate_where_they_do_not_meet(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(kind)
    x = np.random.default_rng(0).standard_normal((BATCH, 3, 9, 9)).astype(np.float32)
    whole, plan = load(model), taken_apart(model, monkeypatch)
    assert whole.images == 1 and plan.images == (1 if kind == "images meet" else BATCH)
    assert (plan.inputs, plan.outputs) == (whole.inputs, whole.outputs)
    assert plan.arena <= whole.arena
    wanted = expected(model, x)
    for found in (reference.run(plan, {"x": x}), Program(plan, PORTABLE).run({"x": x})):
        np.testing.assert_allclose(next(iter(found.values())), wanted, atol=1e-5)


def test_heavy_constants_of_small_steps_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("classifier")
    assert taken_apart(model, monkeypatch, heavy=10**6).seam is None
    plan = taken_apart(model, monkeypatch)
    # its layers move less than their weights, and the pooled maps are larger
    assert [s.workload.op for s in plan.steps[plan.once :]] == ["convert", "linear", "linear", "convert"]
    assert plan.seam is not None and plan.seam.shape == (BATCH, 4)
    assert taken_apart(network("planes"), monkeypatch).seam is None


@pytest.mark.parametrize("kind", ["classes", "classifier"])
def test_a_bundle_runs_its_images_in_turn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(kind)
    plan = taken_apart(model, monkeypatch)
    assert (plan.seam is not None) == (kind == "classifier")
    choices = [registry.candidates(step, PORTABLE, 1)[0] for step in plan.steps]
    bundle = write_bundle(plan, choices, PORTABLE, tmp_path / "bundle", threads=2)
    x = np.random.default_rng(1).standard_normal((BATCH, 3, 9, 9)).astype(np.float32)
    for threads in (1, 2):
        with Session(bundle.path, threads=threads) as session:
            np.testing.assert_allclose(next(iter(session.run({"x": x}).values())), expected(model, x), atol=1e-5)
    told = json.loads(
        subprocess.run([bundle.program, "--repeat", "2", "--profile", "--json"], capture_output=True, check=True).stdout
    )
    # every step's time is that of all images
    assert [len(ns) for ns in told["step_ns"]] == [2] * len(plan.steps)
    assert all(0 < sum(ns[i] for ns in told["step_ns"]) <= told["run_ns"][i] for i in range(2))
    macs = {step["name"]: step["macs"] for step in bundle.manifest["steps"]}
    # a step for all images says so in its workload
    assert macs == {step.name: count * step.workload.macs for step, count in zip(plan.steps, runs(plan), strict=True)}
    assert len(set(runs(plan))) == (2 if kind == "classifier" else 1)
    assert bundle.manifest["images_in_turn"] == BATCH


@pytest.mark.slow
def test_steps_for_all_images_are_tuned_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = taken_apart(network("classifier"), monkeypatch)
    found = tune(plan, Local(), Local().probe().pick_isa(), 1, 5.0, tmp_path / "t.db")
    assert found.walks > 0 and not found.failures  # its second convolution adds what it reads
