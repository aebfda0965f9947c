"""Whole networks on emulated RISC-V: one bundle, unchanged, gives onnxruntime's answers at every vector length."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from emulated import INSTALLED, MISSING
from everywhere import compare
from models import bottlenecks, onnxruntime_outputs
from onnx import helper, numpy_helper
from test_parity import TOLERANCE, files  # noqa: F401  (a fixture)

from colonnade.pattern import ColumnPattern
from colonnade.sparsify.onnx_file import prune_file
from colonnade.targets import Qemu
from colonnade.workload.winograd import SIZES
from tests.zoo import SPARSITIES, ZOO, emulated, model_of, pruned

pytestmark = pytest.mark.skipif(not INSTALLED, reason=MISSING)


@pytest.mark.parametrize("percent", [0, 75])
def test_resnet18_in_small(files, tmp_path, percent):  # noqa: F811
    compare(files("resnet18", percent), tmp_path, (1, 3, 64, 64), TOLERANCE)


@pytest.mark.parametrize("tile, vectors", [(None, "x2v"), (2, "x4v")])
def test_bottlenecks_in_panels(tmp_path, tile, vectors):
    """Where lanes of a tensor in panels stand depends on the vector length; the bundle does not. For tiles of two rows
    strips are wider."""
    onnx.save(bottlenecks(), tmp_path / "model.onnx")
    if tile:
        prune_file(tmp_path / "model.onnx", tmp_path / "pruned.onnx", ColumnPattern(0.5, tile))
    compare(tmp_path / ("pruned.onnx" if tile else "model.onnx"), tmp_path, (1, 3, 22, 22), TOLERANCE)
    steps = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["steps"]
    inner = [step["kernel"] for step in steps if step["params"].get("feed") == 2]
    assert len(inner) >= 5 and all(vectors in kernel for kernel in inner)


@pytest.mark.parametrize("size", SIZES)
def test_bottlenecks_behind_a_transform(tmp_path, size):
    """3x3 convolutions whose transformed weights are pruned: what stands between the transforms depends on the vector
    length, the bundle and the answers do not."""
    onnx.save(bottlenecks(), tmp_path / "model.onnx")
    seen = {"x": np.random.default_rng(1).standard_normal((8, 3, 22, 22)).astype(np.float32)}
    pattern = ColumnPattern(0.5, 8, winograd=size)
    prune_file(tmp_path / "model.onnx", tmp_path / "pruned.onnx", pattern, method="obs", calibration=seen)
    compare(tmp_path / "pruned.onnx", tmp_path, (1, 3, 22, 22), TOLERANCE)
    steps = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["steps"]
    assert sum(step["params"].get("winograd") == SIZES[size][0] for step in steps) >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("percent", [0, 75])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_resnets_at_every_vector_length(files, tmp_path, network, percent):  # noqa: F811
    compare(files(network, percent), tmp_path, (1, 3, 224, 224), TOLERANCE)


# every network of the zoo at its smallest size, dense and pruned: one on each day, all on demand
SHARE = [(name, sparsity) for sparsity in SPARSITIES for name in sorted(ZOO)]
if not os.environ.get("COLONNADE_ALL_MODELS"):
    SHARE = [pair for pair in SHARE if not ZOO[pair[0]].huge]
    SHARE = [SHARE[datetime.date.today().toordinal() % len(SHARE)]]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name, sparsity", SHARE)
def test_a_network_of_the_zoo(name, sparsity, tmp_path):
    """The same bundle at VLEN 128 and 256."""
    model = pruned(model_of(name, ZOO[name].emulated), sparsity, tmp_path, ZOO[name].quick)
    assert max(emulated(name, model, tmp_path)) <= TOLERANCE


def colonnade(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A verb by command line."""
    return subprocess.run([sys.executable, "-m", "colonnade.cli", *map(str, words)], capture_output=True, text=True)


def test_the_verbs_on_the_emulated_machine(tmp_path):
    """Build for one vector length, run at another; what makes no sense there is refused in one line."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((9, 3, 3, 3)).astype(np.float32), "w")
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["y"])],
            "small",
            [helper.make_tensor_value_info("x", 1, [1, 3, 10, 11])],
            [helper.make_tensor_value_info("y", 1, [1, 9, 10, 11])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    file, bundle, x, y = tmp_path / "m.onnx", tmp_path / "b", tmp_path / "x.npy", tmp_path / "y.npy"
    onnx.save(model, file)
    feeds = {"x": rng.standard_normal((1, 3, 10, 11)).astype(np.float32)}
    np.save(x, feeds["x"])
    done = colonnade("build", file, "--target", "qemu:vlen=256", "-o", bundle)
    assert done.returncode == 0 and "rvv" in done.stdout, done.stderr
    done = colonnade("run", bundle, "--input", x, "-o", y, "--target", "qemu:vlen=512", "--threads", "2")
    assert done.returncode == 0, done.stderr
    wanted = onnxruntime_outputs(model, feeds)["y"]
    assert np.abs(np.load(y) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    library, program = ((bundle / name).read_bytes() for name in ("libmodel.so", "run"))
    assert library[18:20] == program[18:20] == bytes([243, 0])  # e_machine: RISC-V
    versions = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([\d.]+)", library)}
    assert versions and max(versions) <= (2, 28), "the boards' own images are older than what the library asks for"
    assert b"/lib/ld" not in program, "the program is static"
    qemu, _, cpu = Qemu().command()
    for machine in ("rv64", cpu.replace("v=true", "v=false")):
        done = subprocess.run([qemu, "-cpu", machine, bundle / "run"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "v" in done.stderr.split(), done.stderr
    np.save(x, feeds["x"][:, :, :9])
    for words, said in (
        (("run", bundle, "--input", x, "--target", "qemu"), "shape (1, 3, 9, 11), expected (1, 3, 10, 11)"),
        (("run", bundle, "--input", x), "needs riscv64"),
        (("tune", file, "--target", "qemu", "--db", tmp_path / "db"), "the static ranking chooses"),
        (("build", file, "--target", "qemu", "-o", tmp_path / "c", "--tune"), "the static ranking chooses"),
        (("bench", file, "--target", "qemu"), "times under QEMU say nothing about a chip"),
    ):
        done = colonnade(*words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (words, done.stderr)
    assert not (tmp_path / "c").exists()
