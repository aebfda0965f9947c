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
from tests.models import Builder

PORTABLE = isa("portable")
BATCH = 3


def network(kind: str) -> onnx.ModelProto:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (BATCH, 3, 9, 9)), 3, 4, 3, pads=(1, 1, 1, 1)))
    y = b.op("Relu", b.op("Add", x, b.conv(x, 4, 4, 3, pads=(1, 1, 1, 1))))
    if kind == "classes":
        y = b.op("Softmax", b.op("Flatten", b.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2])))
    if kind == "images meet":
        y = b.op("Sub", y, b.op("ReduceMean", y, b.constant(np.array([0], np.int64)), keepdims=1))
    return b.build(y)


def expected(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    import onnxruntime

    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])


def taken_apart(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(images, "NEAR", 0)
    return load(model)


@pytest.mark.parametrize("kind", ["planes", "classes", "images meet"])
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


def test_a_bundle_runs_its_images_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("classes")
    plan = taken_apart(model, monkeypatch)
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
    assert macs == {step.name: BATCH * step.workload.macs for step in plan.steps}
    assert bundle.manifest["images_in_turn"] == BATCH
