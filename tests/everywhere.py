"""One bundle on emulated RISC-V at every vector length, beside onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from models import onnxruntime_outputs

from colonnade.api import build
from colonnade.bench.ours import Ours
from colonnade.bundle import Bundle
from colonnade.targets import Qemu
from colonnade.targets.qemu import VLENS


def digest(folder: Path) -> str:
    """Of all files of a bundle, their names and contents."""
    words = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        words.update(f"{path.relative_to(folder)}:{path.stat().st_size}:".encode() + path.read_bytes())
    return words.hexdigest()


def compare(file: Path, folder: Path, shape: tuple[int, ...], tolerance: float, dtype: str = "f32") -> Bundle:
    """Its bundle, unchanged, gives onnxruntime's answer to ``x`` at all vector lengths, up to ``tolerance`` of the
    largest number, with poisoned lanes beyond the vector length; two threads give the same bits."""
    bundle = build(file, "qemu:vlen=256", dtype=dtype, input_shapes={"x": shape}, out=folder / "bundle")
    assert bundle.manifest["isa"] == ("rvv" if dtype == "f32" else "rvv_zvfh")
    assert (bundle.manifest["arch"], bundle.manifest["dtype"]) == ("riscv64", dtype)
    before = digest(bundle.path)
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    (wanted,) = onnxruntime_outputs(onnx.load(file), feeds).values()
    for vlen in VLENS:
        (answer,) = Ours(bundle, Qemu(vlen, poison=True), feeds, 1).outputs()
        assert answer.dtype == np.float32
        assert np.abs(answer - wanted).max() <= tolerance * np.abs(wanted).max(), vlen
        if vlen == VLENS[0]:
            (again,) = Ours(bundle, Qemu(vlen), feeds, 2).outputs()
            np.testing.assert_array_equal(again, answer, "two threads, or lanes without poison, give other bits")
    assert digest(bundle.path) == before
    return bundle
