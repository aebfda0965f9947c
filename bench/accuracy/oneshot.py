"""Accuracy after pruning without any label: ImageNet networks, calibrated on at most 512 photos, the tables' numbers.

    python bench/accuracy/oneshot.py --network resnet18 --sparsity 0.5 [--tile 8] [--method obs+grouping]…
        [--reconstruct EPOCHS] [--images 512] [--data ../shared/data] [--test] [--bundle] [--json FILE] [--seed 0]

Without --test, accuracy is that on the photos of the calibration set that were not used to calibrate: what settings
are chosen on. With --test it is that on both test sets pooled (1,000 photos), each with its paired difference from the
dense network. --bundle compiles every pruned network too and ends with an error if a single answer differs from
torch's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import colonnade as cn
from colonnade.accuracy import Accuracy
from colonnade.sparsify.reconstruct import Schedule, twin

METHODS = ("magnitude", "magnitude+grouping", "obs", "obs+grouping", "unstructured", "2:4")
NETWORKS = {"resnet18": "pqf_resnet18", "resnet50": "pqf_resnet50_large", "mobilenet_v2": ""}
TESTS = ("nips2017_dev_a500", "ilsvrc_val_10cls_500")
BATCH = 50  # of the compiled network; divides the test photos


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--tile", type=int, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--reconstruct", type=int, default=0, metavar="EPOCHS", help="after obs+grouping")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--bundle", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prepared(images: Any, weights: Any, network: str, name: str) -> tuple[Tensor, np.ndarray]:
    pixels, labels = images.imagenet(name)
    maps = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    if network == "mobilenet_v2":
        return weights.mobilenet_input(maps), labels
    mean, std = torch.tensor(weights.MEAN).view(1, 3, 1, 1), torch.tensor(weights.STD).view(1, 3, 1, 1)
    return (maps / 255 - mean) / std, labels


def elementwise_(model: nn.Module, sparsity: float, nm: bool) -> None:
    """The bounds: each weight by its size, anywhere in a layer, or 2 of every 4 in a row (input channels in order)."""
    planned = cn.sparsify_(copy.deepcopy(model), cn.ColumnPattern(0.5, 8), group_rows=False)
    for layer in planned:
        if layer.pattern is None:
            continue
        weight = model.get_submodule(layer.name).weight.data
        size = weight.abs()
        if nm:
            rows = size.movedim(1, -1).reshape(-1, 4)
            keep = torch.zeros_like(rows).scatter_(1, rows.topk(2, 1).indices, 1)
            shape = size.movedim(1, -1).shape
            weight *= keep.reshape(shape).movedim(-1, 1)
        else:
            weight[size <= size.flatten().kthvalue(int(sparsity * size.numel())).values] = 0


def pruned(dense: nn.Module, method: str, sparsity: float, tile: int, calibration: Tensor) -> nn.Module:
    model = copy.deepcopy(dense)
    if method in ("unstructured", "2:4"):
        elementwise_(model, sparsity, method == "2:4")
        return model
    name, _, grouping = method.partition("+")
    cn.sparsify_(
        model, cn.ColumnPattern(sparsity, tile), calibration[:1], method=name, group_rows=bool(grouping),
        calibration=calibration if name == "obs" else None,
    )  # fmt: skip
    return model


def judged(model: nn.Module, x: Tensor, labels: np.ndarray) -> Accuracy:
    return cn.evaluate(model, (x.numpy(), labels), batch=BATCH)


def compiled(model: nn.Module, x: Tensor, labels: np.ndarray) -> Accuracy:
    with tempfile.TemporaryDirectory() as folder:
        file = cn.export(model, x[:BATCH], Path(folder) / "model.onnx")
        bundle = cn.build(file, out=Path(folder) / "bundle", threads=torch.get_num_threads())
        return cn.evaluate(bundle.path, (x.numpy(), labels))


def main() -> int:
    options = arguments()
    sys.path.insert(0, str(options.data / "loaders"))
    import images  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    dense = weights.mobilenet_v2() if options.network == "mobilenet_v2" else weights.resnet(NETWORKS[options.network])
    photos, labels = prepared(images, weights, options.network, "train_1000")
    order = np.random.default_rng(options.seed).permutation(len(photos))
    used, unused = order[: options.images], order[512:]
    calibration = photos[used]
    if options.test:
        sets = [prepared(images, weights, options.network, name) for name in TESTS]
        x, labels = torch.cat([maps for maps, _ in sets]), np.concatenate([label for _, label in sets])
    else:
        x, labels = photos[unused], labels[unused]
        x, labels = x[: len(x) // BATCH * BATCH], labels[: len(x) // BATCH * BATCH]
    base = judged(dense, x, labels)
    print(f"{options.network} dense: {base}", flush=True)
    records = []

    def report(row: str, sparsity: float, tile: int, model: nn.Module, seconds: float) -> None:
        result = judged(model, x, labels)
        change = cn.compare(base, result)
        if options.bundle:
            same = int((compiled(model, x, labels).answers == result.answers).sum())
            if same != len(labels):
                raise SystemExit(f"{row}: the compiled network answers differently on {len(labels) - same} photos")
        print(f"{sparsity:.3f} T={tile} {row:32} {100 * result.top1:5.1f}  {change}  {seconds:.0f} s", flush=True)
        records.append({
            "network": options.network, "sparsity": sparsity, "tile": tile, "method": row, "images": result.images,
            "test": options.test, "dense": base.top1, "top1": result.top1, "difference": change.points,
            "low": change.low, "high": change.high, "agreement": change.agreement, "seconds": seconds,
            "calibration": len(calibration), "seed": options.seed, "bundle": options.bundle,
        })  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(records, indent=1) + "\n")

    for sparsity in options.sparsity or [0.5, 0.75]:
        for tile in options.tile or [8]:
            for method in options.method or METHODS:
                if method == "2:4" and sparsity != 0.5:
                    continue
                start = time.perf_counter()
                model = pruned(dense, method, sparsity, tile, calibration)
                report(method, sparsity, tile, model, time.perf_counter() - start)
                if options.reconstruct and method == "obs+grouping":
                    start = time.perf_counter()
                    cn.reconstruct_(model, twin(dense), calibration, Schedule(epochs=options.reconstruct))
                    report("… + block-wise reconstruction", sparsity, tile, model, time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
