"""Whole networks on emulated RISC-V: one bundle, unchanged, gives onnxruntime's answers at every vector length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from emulated import INSTALLED, MISSING
from models import onnxruntime_outputs
from test_parity import TOLERANCE, files  # noqa: F401  (a fixture)

from colonnade.api import build
from colonnade.bench.ours import Ours
from colonnade.targets import Qemu
from colonnade.targets.qemu import VLENS

pytestmark = pytest.mark.skipif(not INSTALLED, reason=MISSING)


def digest(folder: Path) -> str:
    """Of all files of a bundle, their names and contents."""
    words = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        words.update(f"{path.relative_to(folder)}:{path.stat().st_size}:".encode() + path.read_bytes())
    return words.hexdigest()


def compare(file: Path, folder: Path, size: int) -> None:
    """At all vector lengths, lanes beyond the vector length poisoned; 1 thread and, at one length, 2."""
    bundle = build(file, "qemu:vlen=256", input_shapes={"x": (1, 3, size, size)}, out=folder / "bundle")
    assert bundle.manifest["isa"] == "rvv" and bundle.manifest["arch"] == "riscv64"
    before = digest(bundle.path)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)}
    (wanted,) = onnxruntime_outputs(onnx.load(file), feeds).values()
    for vlen in VLENS:
        (answer,) = Ours(bundle, Qemu(vlen, poison=True), feeds, 1).outputs()
        assert np.abs(answer - wanted).max() <= TOLERANCE * np.abs(wanted).max(), vlen
        if vlen == 128:
            (again,) = Ours(bundle, Qemu(vlen), feeds, 2).outputs()
            np.testing.assert_array_equal(again, answer, "two threads, or lanes without poison, give other bits")
    assert digest(bundle.path) == before


@pytest.mark.parametrize("percent", [0, 75])
def test_resnet18_in_small(files, tmp_path, percent):  # noqa: F811
    compare(files("resnet18", percent), tmp_path, 64)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("percent", [0, 75])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_resnets_at_every_vector_length(files, tmp_path, network, percent):  # noqa: F811
    compare(files(network, percent), tmp_path, 224)
