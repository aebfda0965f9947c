"""The ISA that emulates a RISC-V core on this machine: the same bits as that core's kernels under QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_harness import machine_has
from models import Builder
from zoo import ZOO, model_of, pruned, random_feeds

import colonnade as cn
from colonnade import frontend, targets
from colonnade.bench.ours import Ours
from colonnade.cli import run_verb
from colonnade.errors import UserError
from colonnade.runtime.session import Session
from colonnade.targets import Local

NAME = "rvv_emulated"
pytestmark = pytest.mark.skipif(not machine_has(NAME), reason=f"this machine has no {NAME}")


def answers(model: Any, place: str, feeds: dict[str, np.ndarray], dtype: str, folder: Path) -> list[np.ndarray]:
    """Of the network as it is built for ``place``."""
    isa = NAME if place == "local" else None
    bundle = cn.build(model, place, isa=isa, dtype=dtype, out=folder / f"{place[:4]}-{dtype}")
    if place == "local":
        with Session(bundle.path, threads=2) as session:
            return list(session.run(feeds).values())
    return [np.asarray(y) for y in Ours(bundle, targets.parse(place), feeds, 1).outputs(timeout=600)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mobilenet_v3_large", "f32"), ("mobilenet_v3_large", "f16"), ("yolo_like", "f16"), ("googlenet", "f16")],
)
def test_networks_answer_as_on_a_board(half_qemu: str, name: str, dtype: str, tmp_path: Path) -> None:
    """Not a bit differs: convolutions of all kinds, depthwise ones, pools, functions, sums."""
    model = pruned(model_of(name, ZOO[name].emulated), 0.5, tmp_path)
    feeds = random_feeds(frontend.load(model))
    here, there = (answers(model, place, feeds, dtype, tmp_path) for place in ("local", "qemu:vlen=256"))
    for mine, wanted in zip(here, there, strict=True):
        assert np.count_nonzero(wanted) > wanted.size // 2, "the network answers nothing"
        np.testing.assert_array_equal(mine.reshape(-1), wanted.reshape(-1))


def test_nobody_gets_it_unasked() -> None:
    """Neither for float32, where it is the last of all, nor for float16, which the machine itself lacks."""
    machine = Local().probe()
    assert machine.isas[-1].name == NAME
    assert machine.pick_isa(NAME, "f16").itemsize == 2
    with pytest.raises(UserError, match=f"does not compute with f16, .* or take --isa {NAME} for its answers"):
        machine.pick_isa(None, "f16")
    with pytest.raises(UserError, match=r"leave out --dtype f16$"):  # its times would mean nothing
        machine.pick_isa(None, "f16", timed=True)


def test_a_build_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not that tuning would help."""
    made = Builder(7)
    onnx.save(made.build(made.conv(made.input("x", (1, 8, 6, 6)), 8, 8, 3)), tmp_path / "m.onnx")
    assert run_verb(["build", str(tmp_path / "m.onnx"), "--isa", NAME, "-o", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "its times are not" in said and "untuned" not in said


@pytest.mark.parametrize("verb", ["bench", "report", "tune", "build"])
def test_its_times_mean_nothing(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for them is told so, and gets nothing."""
    model, out = tmp_path / "m.onnx", tmp_path / "out.html"
    made = Builder(7)
    onnx.save(made.build(made.conv(made.input("x", (1, 8, 6, 6)), 8, 8, 3)), model)
    words = [verb, str(model), "--isa", NAME]
    if verb == "build":
        words += ["--tune", "-o", str(out)]
    if verb == "report":
        words = [verb, str(cn.build(model, "local", isa=NAME, out=tmp_path / "b").path), "-o", str(out)]
    assert run_verb(words) == 2
    assert f"error: ISA {NAME} gives another machine's answers, not its times" in capsys.readouterr().err
    assert not out.exists()
