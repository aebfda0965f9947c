"""What float16 changes in a network's answers: a bundle of `--dtype f16`, emulated, beside float32 on the same photos.

    python bench/accuracy/half.py --network resnet18 [--sparsity 0.5] [--method obs+grouping] [--photos 200]
        [--jobs 2] [--data ../shared/data]

COLONNADE_QEMU names an emulator that knows Zvfh where the usual one does not. Photos are test images, as many of either
set, evenly spaced. Without --sparsity the network is the dense one; pruning is that of oneshot.py, on training photos.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from oneshot import METHODS, NETWORKS, load, pruned, wrong_data

import colonnade as cn
from colonnade import targets
from colonnade.bench.ours import Ours
from colonnade.errors import run_script

VLEN = 256
BATCH = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--method", choices=METHODS, default="obs+grouping")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.set_defaults(images=512, seed=0, test=True)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if wrong_data(options.data):
        return 2
    task = load(options)
    model = pruned(task, options.method, options.sparsity, 8) if options.sparsity else task.dense
    some = np.linspace(0, len(task.x) - 1, options.photos // BATCH * BATCH).astype(int)
    x, labels = task.x[torch.from_numpy(some)].numpy(), task.labels[some]
    place = targets.parse(f"qemu:vlen={VLEN}")
    with tempfile.TemporaryDirectory(prefix="colonnade-") as room, torch.no_grad():
        file = cn.export(model, task.x[:BATCH], Path(room) / "model.onnx")
        bundle = cn.build(file, place.name, dtype="f16", batch=BATCH, out=Path(room) / "half")
        (name,) = (port["name"] for port in bundle.manifest["inputs"])
        parts = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]

        def emulated(part: np.ndarray) -> np.ndarray:
            (answer,) = Ours(bundle, place, {name: part}, 1).outputs(timeout=1800)
            return np.asarray(answer)

        wanted = np.concatenate([model(torch.from_numpy(part)).numpy() for part in parts])
        with ThreadPoolExecutor(options.jobs) as pool:
            found = np.concatenate(list(pool.map(emulated, parts)))
    same = (found.argmax(1) == wanted.argmax(1)).mean()
    right = [float((logits.argmax(1) == labels).mean()) for logits in (wanted, found)]
    error = np.abs(found - wanted).max(1) / np.abs(wanted).max(1)
    what = f"{options.sparsity:.0%}, {options.method}" if options.sparsity else "dense"
    print(f"{options.network}, {what}: {len(x)} photos, top-1 {right[0]:.1%} in float32, {right[1]:.1%} in float16,")
    print(
        f"the same answer on {same:.1%}; logits differ by {np.median(error):.2%} of the largest one (median of photos),"
    )
    print(f"{error.max():.2%} at most")
    return 0


if __name__ == "__main__":
    run_script(main)
