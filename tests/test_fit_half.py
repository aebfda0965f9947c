"""`colonnade fit` and `colonnade plan` with --dtype f16: times, bundles, answers of float16, apart from float32's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_fit import QUICK, trained  # noqa: F401  (a fixture)

from colonnade import accuracy
from colonnade.bench.ours import Ours
from colonnade.bundle import Bundle
from colonnade.cli import run_verb
from colonnade.cli_fit import NOT_MET
from colonnade.fitting import answers, plans, times
from colonnade.fitting.plans import Settings
from colonnade.pattern import ColumnPattern
from colonnade.plan import Step
from colonnade.sparsify import sensitivity
from colonnade.sparsify.allocate import PrunePlan
from colonnade.sparsify.onnx_file import read_targets
from colonnade.targets import Qemu, qemu
from colonnade.workload import Conv2d, Precision

TARGET = "qemu:vlen=256"
Trained = tuple[Path, Path, Path]
FEW = 12  # images that an emulator answers too


@pytest.fixture(scope="module")
def digits(trained: Trained) -> Trained:  # noqa: F811
    """The network, its images, and a database that nothing else here uses."""
    return trained


@pytest.fixture
def timed(half_qemu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target with float16 whose times count, a ns for each multiply-add: no modelled core is on every machine."""
    monkeypatch.setattr(Qemu, "untimed", "")
    monkeypatch.setattr(Qemu, "modelled", "modelled on nothing", raising=False)

    def block(self: Ours, warmup: int, repeat: int) -> list[int]:
        return [sum(step["kept_macs"] for step in self.bundle.manifest["steps"])] * repeat

    monkeypatch.setattr(Ours, "block", block)


def place(db: Path, dtype: str = "f16") -> plans.Place:
    return plans.place_of(TARGET, 1, None, None, 1, db, "zig", 0.0, None, dtype)


@pytest.mark.slow
def test_float16_from_a_file_to_bundles_and_beside_float32(
    timed: None, digits: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, db = tmp_path / "out", tmp_path / "t.db"
    model, images, _ = digits

    def fit(dtype: str, *words: str) -> dict[str, object]:
        given = ["fit", str(model), "--images", str(images), "-o", str(out), "--db", str(db), *QUICK]
        given += ["--target", TARGET, "--dtype", dtype, "--points", "1", "--budget", "0s", *words]
        assert run_verb(given) in (0, NOT_MET)
        return dict(json.loads((out / "fit.json").read_text()))

    found = fit("f16", "--speedup", "1.2")
    said = capsys.readouterr().out
    assert "digits.onnx in float16: at most" in said and "dense, float16 answers as float32 does on" in said
    assert found["dtype"] == "f16" and found["latency_is"] == "modelled on nothing"
    dense, pruned = found["points"]
    assert dense["record"]["top1"] > 0.7 and dense["record"]["beside_f32"]["agreement"] > 0.95
    for point in (dense, pruned):
        at = Path(point["record"]["bundle"])
        bundle = Bundle.load(at)
        assert (bundle.manifest["isa"], bundle.manifest["dtype"]) == ("rvv_zvfh", "f16")
        assert any(step["kernel"].startswith("f16_spconv") for step in bundle.manifest["steps"])
        assert at.parent.name.endswith("-f16")
        # what answered is gone, and answered as the bundle itself does
        files = {"bundle", "point.json"} | ({"plan.toml", "pruned.onnx"} if point is pruned else set())
        assert {entry.name for entry in at.parent.iterdir()} == files
        kept = json.loads((at.parent / "point.json").read_text())["answers"]
        x = split_off(images)[:FEW]
        own = [
            Ours(bundle, Qemu(256), {bundle.manifest["inputs"][0]["name"]: x[i : i + 1]}, 1).outputs()
            for i in range(FEW)
        ]
        assert [int(np.argmax(scores)) for (scores,) in own] == kept[:FEW]
    plan = Path(pruned["record"]["plan_file"])
    assert "(rvv_zvfh, float16, 1 thread(s))" in plan.read_text() and "winograd" not in plan.read_text()
    assert any(pattern is not None for pattern in PrunePlan.read(plan).layers.values())

    # float32 in the same folder finds nothing of its own there, and leaves the others
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*-f16/pruned.onnx")}
    single = fit("f32", "--speedup", "1.2")
    assert "in float16" not in capsys.readouterr().out and single["dtype"] == "f32"
    assert not any("f16" in Path(point["record"]["bundle"]).parent.name for point in single["points"])
    assert all(Bundle.load(Path(p["record"]["bundle"])).manifest["dtype"] == "f32" for p in single["points"])
    # and the other way round: the point that was made is there, and taken as it is
    again = fit("f16", "--speedup", "1.2")
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    known = [(p["record"]["plan"], p["budget"], p["loss"], p["latency"]) for p in again["points"]]
    assert (pruned["record"]["plan"], pruned["budget"], pruned["loss"], pruned["latency"]) in known


def split_off(images: Path) -> np.ndarray:
    """The images that `fit` answers, as its options in QUICK say."""
    from colonnade.fitting.road import split

    return split(accuracy.samples(images, limit=296), 96, 200, 0)[1].inputs


def test_layers_are_timed_as_float16_has_them(
    timed: None,
    digits: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dense and pruned, with the conversions around them; one that float16 cannot hold as float32."""
    proto = onnx.load(str(digits[0]))
    layers = read_targets(digits[0], proto)
    last = layers[-1].tensor.name
    tensor = next(t for t in proto.graph.initializer if t.name == last)
    wide = onnx.numpy_helper.to_array(tensor).copy()
    wide.reshape(-1)[:] *= 1e6
    tensor.CopyFrom(onnx.numpy_helper.from_array(wide, last))
    seen: list[Step] = []
    known = times._known

    def look(wanted, where, source):  # type: ignore[no-untyped-def]
        seen.extend(wanted.values())
        return known(wanted, where, source)

    keys = {}
    monkeypatch.setattr(times, "_known", look)
    patterns = {layer.name: [ColumnPattern(0.5, 8), ColumnPattern(0.75, 8)] for layer in layers}
    found = {}
    for dtype in ("f32", "f16"):
        seen.clear()
        found[dtype] = times.layer_times(proto, layers, patterns, place(tmp_path / "t.db", dtype=dtype))
        convolutions = [step for step in seen if isinstance(step.workload, Conv2d)]
        pruned = [step for step in convolutions if step.workload.tile]
        assert len(pruned) >= 8 and len(pruned) < len(convolutions)
        sizes = {step.inputs[0].layout.itemsize for step in (*convolutions, *pruned) if step.inputs}
        assert sizes == ({2, 4} if dtype == "f16" else {4})
        single = [s for s in pruned if dtype == "f16" and s.inputs and s.inputs[0].layout.itemsize == 4]
        assert dtype == "f32" or 1 <= len({step.name for step in single}) <= 2  # the wide one, and a stem
        keys[dtype] = {step.key() for step in pruned if step not in single}
        assert any(isinstance(step.workload, Precision) for step in seen) == (dtype == "f16")
    assert keys["f16"] and not keys["f16"] & keys["f32"]  # so records of the one are not taken for the other
    assert found["f16"].dense.keys() == found["f32"].dense.keys() and not found["f16"].untimed


def test_transforms_are_no_choice_in_float16(
    timed: None,
    digits: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where they might take any time; losses are kept beside those of float32's patterns, for either."""
    monkeypatch.setattr(plans, "PAYS", {"2x2": math.inf})
    monkeypatch.setattr(plans, "ESTIMATED", "nothing")  # estimates will do here
    proto, x = onnx.load(str(digits[0])), accuracy.samples(digits[1], limit=64, seed=0).inputs
    inputs, settings = {plans.input_for(digits[0], proto, x): x}, Settings(tiles=(8,), sparsities=(0.5,), budget=0)
    kept, made = tmp_path / "losses.json", []

    def losses(model, layers, inputs, wanted, some, progress):  # type: ignore[no-untyped-def]
        made.append(wanted)
        return {name: dict.fromkeys(row, 1.0) for name, row in wanted.items()}

    monkeypatch.setattr(sensitivity, "second_order", losses)
    for dtype, transforms, count in (("f32", {"", "2x2"}, 1), ("f16", {""}, 1), ("f32", {"", "2x2"}, 1)):
        where = place(tmp_path / "t.db", dtype=dtype)
        choices, _, _ = plans.choices_of(digits[0], proto, inputs, where, settings, keep=kept)
        assert {c.pattern.winograd for row in choices.values() for c in row if c.pattern} == transforms
        assert len(made) == count


@pytest.mark.slow
def test_only_the_plan_of_float16(
    timed: None,
    digits: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "plan",
        str(digits[0]),
        "--images",
        str(digits[1]),
        "-o",
        str(tmp_path / "plan.toml"),
        "--speedup",
        "1.3",
    ]
    more = ["--target", TARGET, "--dtype", "f16", "--budget", "0s", "--tiles", "8", "--sparsities", "0.5,0.75"]
    assert run_verb([*words, *more, "--db", str(tmp_path / "t.db")]) == 0
    assert "layers pruned, layer times in float16" in capsys.readouterr().out
    assert f"on {TARGET} (rvv_zvfh, float16, 1 thread(s))" in (tmp_path / "plan.toml").read_text()


@pytest.mark.parametrize("verb", ["fit", "plan"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "f16"), "does not compute with f16, which takes RISC-V's Zvfh"),
        (("--dtype", "f16", "--isa", "portable"), "ISA portable does not compute with f16"),
        (("--dtype", "f8"), "dtype 'f8': expected f32 or f16"),
        (("--dtype", "f16", "--target", TARGET), "does not compute with f16, which takes RISC-V's Zvfh"),
    ],
)
def test_who_cannot_is_told_before_any_work(
    digits: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, verb: str, words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Qemu, "untimed", "")
    monkeypatch.setattr(qemu, "half", lambda path: False)
    out = tmp_path / "out"
    given = [verb, str(digits[0]), "--images", str(tmp_path / "not looked at"), "-o", str(out), "--speedup", "2"]
    assert run_verb([*given, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_machine_that_cannot_emulate_is_told_too(
    timed: None, digits: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(answers, "EMULATED", "rvv_nowhere")
    out = tmp_path / "out"
    given = ["fit", str(digits[0]), "--images", str(tmp_path / "not looked at"), "-o", str(out), "--speedup", "2"]
    assert run_verb([*given, "--target", TARGET, "--dtype", "f16"]) == 2
    error = capsys.readouterr().err
    assert "answers in float16 are emulated on this machine: " in error and error.count("\n") == 1
    assert not out.exists()
