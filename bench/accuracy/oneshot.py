"""Accuracy after pruning without any label, calibrated on at most 512 images: the numbers of docs/accuracy.md.

    python bench/accuracy/oneshot.py --network resnet18 [--sparsity 0.5]… [--tile 8]… [--method obs+grouping]…
        [--schedule joint_epochs=8,joint_lr=0.02] [--images 512] [--seed 0] [--test] [--bundle]
        [--records FILE.json] [--keep DIR] [--data ../shared/data]
    python bench/accuracy/oneshot.py --table --records FILE.json

Without --test, accuracy is that on photos of the calibration set (CIFAR: training images) that were not used to
calibrate: what settings are chosen on. With --test it is that on both test sets pooled (1,000 photos; CIFAR: the 10,000
test images), each row with its paired difference from the dense network. --bundle compiles every pruned network too and
ends with an error if a single answer differs from torch's, but for ties: images on which torch's logits of the two
answers are nearer to each other than single precision tells apart. The records count them.

A method with +winograd prunes 3x3 convolutions at stride 1 behind the transform of F(2x2, 3x3), one with +winograd4x1
behind that of F(4, 3) down columns, by the same sparsity.

Rows that stand in FILE are not computed again, so a run that was stopped goes on; --keep holds pruned networks and the
dense one's answers in DIR, from which other rows go on. --table prints what FILE holds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import colonnade as cn
from colonnade.accuracy import Accuracy
from colonnade.errors import run_script
from colonnade.sparsify.balance import measured
from colonnade.sparsify.joint import distance
from colonnade.sparsify.masks import mask_zeros_
from colonnade.sparsify.reconstruct import Schedule, twin
from colonnade.sparsify.spread import spread

RECONSTRUCTED = "+reconstruction"
METHODS = (
    "unstructured", "2:4", "magnitude", "magnitude+grouping", "obs", "obs+grouping", "obs+grouping+reconstruction",
    "obs+grouping+balance", "obs+grouping+balance+reconstruction", "obs+grouping+winograd",
    "obs+grouping+winograd+balance", "obs+grouping+winograd+balance+reconstruction", "obs+grouping+winograd4x1",
    "obs+grouping+winograd4x1+balance",
)  # fmt: skip
NETWORKS = {
    "resnet18": "pqf_resnet18", "resnet50": "pqf_resnet50_large", "mobilenet_v2": "", "cifar_resnet20": "20",
    "cifar_resnet56": "56",
}  # fmt: skip
TESTS = ("nips2017_dev_a500", "ilsvrc_val_10cls_500")
MOST = 512  # calibration images; those after them are for choosing settings
REESTIMATE = 256  # images that BatchNorm's statistics are taken from
BATCH = 50  # of the compiled network; divides the number of test images
# Two logits are a tie up to this many times the error of single precision: each has its own, in torch and compiled.
ROUNDINGS = 4


@dataclass(frozen=True, eq=False)
class Task:
    """A dense network, calibration inputs without labels, and labelled inputs to judge on."""

    dense: nn.Module
    calibration: Tensor
    x: Tensor
    labels: np.ndarray


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--tile", type=int, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--schedule", default="", help="of reconstruction: fields of Schedule, name=number,…")
    parser.add_argument("--images", type=int, default=MOST, help=f"for calibration, at most {MOST}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--bundle", action="store_true")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def scheduled(words: str) -> Schedule:
    """The default schedule with the fields that `name=number,…` names."""
    pairs = dict(word.split("=") for word in words.split(",") if word)
    default = Schedule()
    return replace(default, **{name: type(getattr(default, name))(float(value)) for name, value in pairs.items()})


def load(options: argparse.Namespace) -> Task:
    sys.path.insert(0, str(options.data / "loaders"))
    import images  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    name = options.network
    cifar, mobile = name.startswith("cifar"), name == "mobilenet_v2"
    mean, std = torch.tensor(weights.MEAN).view(1, 3, 1, 1), torch.tensor(weights.STD).view(1, 3, 1, 1)

    def photos(source: str, most: int | None = None) -> tuple[Tensor, np.ndarray]:
        pixels, labels = images.cifar10_jpeg(source) if cifar else images.imagenet(source)
        if most is not None:  # they are sorted by class
            some = np.random.default_rng(options.seed).permutation(len(pixels))[:most]
            pixels, labels = pixels[some], labels[some]
        maps = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        return weights.mobilenet_input(maps) if mobile else (maps / 255 - mean) / std, labels

    dense = (
        weights.cifar_resnet(int(NETWORKS[name]), jpeg=True) if cifar
        else weights.mobilenet_v2() if mobile
        else weights.resnet(NETWORKS[name])
    )  # fmt: skip
    seen, labels = photos("train", 6000) if cifar else photos("train_1000")
    order = np.random.default_rng(options.seed).permutation(len(seen))
    calibration, unused = seen[order[: min(options.images, MOST)]], order[MOST:]
    if options.test:
        sets = [photos(source) for source in (("test",) if cifar else TESTS)]
        x, labels = torch.cat([maps for maps, _ in sets]), np.concatenate([label for _, label in sets])
    else:
        unused = unused[: len(unused) // BATCH * BATCH]
        x, labels = seen[unused], labels[unused]
    if not cifar:  # statistics that were folded into weights come back; the function stays the same
        weights.unfold_batchnorm(dense, calibration[:REESTIMATE].split(32))
    return Task(dense, calibration, x, labels)


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


@torch.no_grad()
def reestimate_(model: nn.Module, inputs: Tensor) -> None:
    """BatchNorm's statistics anew, over all of these inputs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    shares = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    for part in inputs.split(64):
        model(part.contiguous(memory_format=torch.channels_last))
    for norm, share in zip(norms, shares, strict=True):
        norm.momentum = share  # training later must forget the statistics of its first steps
    model.eval()


def transform(method: str) -> str:
    """The tiles of pixels of the method's transform; "": it has none."""
    part = next((part for part in method.split("+") if part.startswith("winograd")), None)
    return "" if part is None else part.removeprefix("winograd") or "2x2"


def pruned(task: Task, method: str, sparsity: float, tile: int, losses: Path | None = None) -> nn.Module:
    """losses: where those of single layers are kept, for balance."""
    model = copy.deepcopy(task.dense)
    if method in ("unstructured", "2:4"):
        elementwise_(model, sparsity, method == "2:4")
    else:
        name, *parts = method.split("+")
        pattern = cn.ColumnPattern(sparsity, tile)
        if kind := transform(method):
            cn.winograd_(model, kind)
        cn.sparsify_(
            model, balanced(task, model, pattern, name, losses) if "balance" in parts else pattern,
            task.calibration[:1],
            method=name, group_rows="grouping" in parts,
            calibration=task.calibration if name == "obs" else None,
        )  # fmt: skip
    return model if method.startswith("obs") else reestimated(model, task)


@torch.no_grad()
def reestimated(model: nn.Module, task: Task) -> nn.Module:
    """The model with BatchNorm's statistics anew, or as it was where its answers were nearer to the dense ones: on
    CIFAR-10 the dense network itself loses 6 points by new statistics."""
    inputs = task.calibration[:REESTIMATE]
    anew = copy.deepcopy(model)
    reestimate_(anew, inputs)
    parts = inputs.split(64)
    wanted = [task.dense(part) for part in parts]
    return min(anew, model, key=lambda one: distance([one(part) for part in parts], wanted))


def balanced(
    task: Task, dense: nn.Module, pattern: cn.ColumnPattern, method: str, path: Path | None
) -> dict[str, cn.ColumnPattern | None]:
    """The pattern's work spread over the layers, by their losses from ``path`` where it is there."""
    if path is not None and path.exists():
        losses, work = torch.load(path)
    else:
        losses, work = measured(dense, pattern, task.calibration, method=method)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((losses, work), path)
    return spread(losses, work, pattern)


def judged(model: nn.Module, x: Tensor, labels: np.ndarray) -> Accuracy:
    return cn.evaluate(copy.deepcopy(model).to(memory_format=torch.channels_last), (x.numpy(), labels), batch=BATCH)


def judged_once(model: nn.Module, task: Task, path: Path | None) -> Accuracy:
    """The accuracy, from ``path`` where it is there."""
    if path is not None and path.exists():
        known: Accuracy = torch.load(path, weights_only=False)  # made by this function
        return known
    found = judged(model, task.x, task.labels)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return found


def dense_answers(task: Task, options: argparse.Namespace) -> Accuracy:
    """The dense network's accuracy, from --keep where it is there."""
    name = f"{options.network}-dense-{'test' if options.test else options.seed}.pt"
    return judged_once(task.dense, task, options.keep / name if options.keep else None)


def compiled(model: nn.Module, x: Tensor, labels: np.ndarray) -> Accuracy:
    with tempfile.TemporaryDirectory() as folder:
        file = cn.export(model, x[:BATCH], Path(folder) / "model.onnx")
        bundle = cn.build(file, out=Path(folder) / "bundle", threads=torch.get_num_threads())
        return cn.evaluate(bundle.path, (x.numpy(), labels))


@torch.no_grad()
def ties(model: nn.Module, x: Tensor, answers: np.ndarray, others: np.ndarray) -> int:
    """On how many images the two answers differ, all of them ties: torch's logits of both, in double precision, are
    nearer than ROUNDINGS times the largest error of its single precision on these images. Ends with an error otherwise.
    """
    at = np.flatnonzero(answers != others)
    if not len(at):
        return 0
    images = x[torch.from_numpy(at)]
    exact = copy.deepcopy(model).double()(images.double())
    rounding = float((model(images) - exact).abs().max())
    pairs = exact.gather(1, torch.from_numpy(np.stack([answers[at], others[at]], 1)))
    apart = (pairs[:, 0] - pairs[:, 1]).abs()
    wrong = int((apart > ROUNDINGS * rounding).sum())
    if wrong:
        raise SystemExit(f"the compiled network answers differently on {wrong} images, by {float(apart.max()):.1e}")
    print(f"ties: {len(at)}, logits up to {float(apart.max()):.1e} apart, rounding {rounding:.1e}", flush=True)
    return len(at)


class Records:
    """Rows by what they are; the file is written whole after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else []

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            aside = self.path.with_suffix(".partial")
            aside.write_text(json.dumps(self.rows, indent=1) + "\n")
            aside.replace(self.path)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, network by network, the bounds first."""
    parts = []
    for network, test in sorted({(row["network"], row["test"]) for row in rows}):
        chosen = [row for row in rows if row["network"] == network and row["test"] == test]
        first = chosen[0]
        where = "test images" if test else "training images that were not used to calibrate"
        parts.append(f"{network}, dense {100 * first['dense']:.1f} % on {first['images']:,} {where}\n")
        parts.append("| sparsity | T | method | top-1 | difference, 95 % interval | same answer | minutes | bundle |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        chosen.sort(key=lambda row: (row["sparsity"], row["tile"], METHODS.index(row["method"]), row["seed"]))
        for row in chosen:
            tile = "" if row["method"] in ("unstructured", "2:4") else row["tile"]
            how = f"{row['method']} {row['schedule']}".strip() + (f", seed {row['seed']}" if row["seed"] else "")
            points, low, high = (f"{100 * row[name]:+.1f}" for name in ("difference", "low", "high"))
            parts.append(
                f"| {100 * row['sparsity']:g} % | {tile} | {how} | {100 * row['top1']:.1f} | "
                f"{points} ({low} to {high}) | {100 * row['agreement']:.1f} % | {row['seconds'] / 60:.1f} | "
                f"{_equal(row)} |"
            )
        parts.append("")
    return "\n".join(parts).replace("+-", "-")


def wrong_data(folder: Path) -> bool:
    """Is it not the folder of weights and images? Then one line says so."""
    wrong = not (folder / "loaders").is_dir()
    if wrong:
        print(f"error: {folder}: expected the folder with loaders/ and the images; give it with --data")
    return wrong


def _equal(row: dict[str, Any]) -> str:
    """What the compiled network's answers are beside torch's."""
    if not row["bundle"]:
        return ""
    tied = row.get("ties", 0)
    return f"equal but for {tied} {'tie' if tied == 1 else 'ties'}" if tied else "equal"


def main() -> int:
    options = arguments()
    records = Records(options.records)
    if options.table:
        print(table(records.rows))
        return 0
    wanted = [
        (sparsity, tile, method)
        for sparsity in options.sparsity or [0.5, 0.75]
        for tile in options.tile or [8]
        for method in options.method or METHODS
        if method != "2:4" or sparsity == 0.5
    ]
    common = {
        "network": options.network, "test": options.test, "calibration": min(options.images, MOST),
        "seed": options.seed,
    }  # fmt: skip

    def key(sparsity: float, tile: int, method: str) -> dict[str, Any]:
        elementwise = method in ("unstructured", "2:4")
        own = {"schedule": options.schedule} if method.endswith(RECONSTRUCTED) else {}
        return {**common, "sparsity": sparsity, "method": method, **({} if elementwise else {"tile": tile}), **own}

    wanted = [row for row in wanted if not records.has(key(*row))]
    if not wanted:
        return 0
    if wrong_data(options.data):
        return 2
    task = load(options)
    base = dense_answers(task, options)
    print(f"{options.network} dense: {base}", flush=True)

    def kept(sparsity: float, tile: int, method: str) -> tuple[nn.Module, float]:
        """A pruned network and the seconds it took, from --keep where it is there."""
        name = f"{options.network}-{sparsity}-{tile}-{method}-{common['calibration']}-{options.seed}"
        name += f"-{options.schedule}.pt" if method.endswith(RECONSTRUCTED) and options.schedule else ".pt"
        path = options.keep / name if options.keep else None
        if path is not None and path.exists():
            model, seconds = torch.load(path, weights_only=False)  # made by this script
            mask_zeros_(model, least=0.01)
            return model, seconds
        if method.endswith(RECONSTRUCTED):
            model, seconds = kept(sparsity, tile, method.removesuffix(RECONSTRUCTED))
            start = time.perf_counter() - seconds
            cn.reconstruct_(model, twin(task.dense), task.calibration, scheduled(options.schedule))
        else:
            start = time.perf_counter()
            kind = "".join(f"-{part}" for part in method.split("+") if part.startswith("winograd"))
            losses = f"{options.network}-losses{kind}-{tile}-{common['calibration']}-{options.seed}.pt"
            model = pruned(task, method, sparsity, tile, options.keep / losses if options.keep else None)
        seconds = time.perf_counter() - start
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((cn.remove_masks(copy.deepcopy(model)), seconds), path)
        return model, seconds

    for sparsity, tile, method in wanted:
        model, seconds = kept(sparsity, tile, method)
        result = judged(model, task.x, task.labels)
        change = cn.compare(base, result)
        tied = (
            ties(model, task.x, result.answers, compiled(model, task.x, task.labels).answers) if options.bundle else 0
        )
        print(f"{sparsity:.3f} T={tile} {method:28} {100 * result.top1:5.1f}  {change}  {seconds:.0f} s", flush=True)
        records.add({
            **common, "sparsity": sparsity, "tile": tile, "method": method, "images": result.images,
            "dense": base.top1, "top1": result.top1, "difference": change.points, "low": change.low,
            "high": change.high, "agreement": change.agreement, "seconds": seconds, "bundle": options.bundle,
            "ties": tied, "schedule": options.schedule if method.endswith(RECONSTRUCTED) else "",
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script(main)
