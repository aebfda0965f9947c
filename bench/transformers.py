"""BERT-base (128 tokens) and ViT-B/16, random weights, dense and 75 % pruned, beside onnxruntime: one table.

Bundles are untuned: the static ranking's choices. Blocks alternate, and medians and quartiles over all repetitions are
printed. What was exported, pruned and built stays in the folder and is taken as it is the next time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.bench.ours import Ours
from colonnade.bundle import Bundle
from colonnade.errors import run_script
from colonnade.targets import Local

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SPARSITY = 0.75


def export(name: str, path: Path) -> None:
    """Write the dense model."""
    import onnx

    if name == "bert":
        from tests.transformers_like import BASE, bert_model

        onnx.save(bert_model(BASE, 1, 128), path)
        return
    import torch

    from tests import models

    torch.manual_seed(0)
    onnx.save(models.export(models.torchvision_zoo().vit_b_16(weights=None), 1, 3, 224, 224), path)


def prepare(name: str, folder: Path) -> None:
    """The ONNX files and bundles that are not there yet."""
    import colonnade as cn
    from colonnade.pattern import ColumnPattern
    from colonnade.sparsify.onnx_file import prune_file

    dense, pruned = folder / f"{name}-dense.onnx", folder / f"{name}-pruned.onnx"
    if not dense.is_file():
        export(name, dense)
    if not pruned.is_file():
        prune_file(dense, pruned, ColumnPattern(SPARSITY), group_rows=False)  # which rows form a tile costs no time
    for model in (dense, pruned):
        if not model.with_suffix("").is_dir():
            cn.build(str(model), target="local", threads=1, out=str(model.with_suffix("")))


def feeds_of(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random inputs: pictures, or ids, a mask of zeros and ones, two types."""
    rng = np.random.default_rng(0)
    made = {}
    for port in manifest["inputs"]:
        shape, limit = port["shape"], 30522 if "ids" in port["name"] and "type" not in port["name"] else 2
        whole = "int" in str(port.get("type") or port.get("dtype"))
        made[port["name"]] = rng.integers(0, limit, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    return made


def main() -> None:
    """Prepare, measure, print."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build-out" / "transformers")
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| model | 75 % pruned | dense | onnxruntime, dense |\n|---|---|---|---|")
    for name, title in (("bert", "BERT-base, 128 tokens"), ("vit", "ViT-B/16, 224²")):
        prepare(name, options.folder)
        pruned, dense = (Bundle.load(options.folder / f"{name}-{kind}") for kind in ("pruned", "dense"))
        feeds = feeds_of(pruned.manifest)
        ours = [Ours(bundle, Local(), feeds, 1) for bundle in (pruned, dense)]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(f"{dense.path}.onnx", settings, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        times: list[list[float]] = [[], [], []]
        for _ in range(options.blocks):
            for index, side in enumerate(ours):
                times[index] += [ns / 1e6 for ns in side.block(2, 8)]
            for _ in range(6):
                start = time.perf_counter()
                session.run(None, feeds)
                times[2].append(1e3 * (time.perf_counter() - start))
        cells = []
        for taken in times:
            low, middle, high = np.percentile(taken, [25, 50, 75])
            cells.append(f"{middle:.1f} ms ({low:.1f}–{high:.1f})")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
