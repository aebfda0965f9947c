"""What float16 changes in a network's answers: the kernels of `--dtype f16` beside float32 on the same photos.

    python bench/accuracy/half.py --network resnet18 [--sparsity 0.5] [--method obs+grouping] [--photos 1000]
        [--threads 1] [--data ../shared/data]

The ISA `rvv_emulated` computes on an x86-64 host what a RISC-V core with Zvfh does, to the bit. Photos are the test
images, all of them or as many of either set, evenly spaced. Without --sparsity the network is the dense one; pruning is
that of oneshot.py, on training photos.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from oneshot import METHODS, NETWORKS, load, pruned, wrong_data

import colonnade as cn
from colonnade.accuracy import Accuracy
from colonnade.errors import run_script
from colonnade.runtime.session import Session

BATCH = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--method", choices=METHODS, default="obs+grouping")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.set_defaults(images=512, seed=0, test=True)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if wrong_data(options.data):
        return 2
    torch.set_num_threads(options.threads)
    task = load(options)
    model = pruned(task, options.method, options.sparsity, 8) if options.sparsity else task.dense
    count = min(options.photos, len(task.x)) // BATCH * BATCH
    some = np.linspace(0, len(task.x) - 1, count).astype(int)
    x, labels = task.x[torch.from_numpy(some)], task.labels[some]
    with tempfile.TemporaryDirectory(prefix="colonnade-") as room, torch.no_grad():
        file = cn.export(model, x[:BATCH], Path(room) / "model.onnx")
        bundle = cn.build(file, "local", isa="rvv_emulated", dtype="f16", batch=BATCH, out=Path(room) / "half")
        wanted, found = [], []
        with Session(bundle.path, threads=options.threads) as session:
            (name,) = (port.name for port in session.get_inputs())
            for part in x.split(BATCH):
                wanted.append(model(part).numpy())
                found.extend(session.run({name: part.numpy()}).values())
    single, half = np.concatenate(wanted), np.concatenate(found)
    change = cn.compare(Accuracy(single.argmax(1), labels), Accuracy(half.argmax(1), labels))
    error = np.abs(half - single).max(1) / np.abs(single).max(1)
    right = [float((logits.argmax(1) == labels).mean()) for logits in (single, half)]
    what = f"{options.sparsity:.0%}, {options.method}" if options.sparsity else "dense"
    print(f"{options.network}, {what}: top-1 {right[0]:.1%} in float32, {right[1]:.1%} in float16: {change}")
    print(f"logits differ by {np.median(error):.2%} of the largest one (median of photos), {error.max():.2%} at most")
    return 0


if __name__ == "__main__":
    run_script(main)
