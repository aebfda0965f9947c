"""CIFAR-10 (JPEG q75): the dense network trained further, then pruned, then trained for a few epochs: docs/accuracy.md.

    python bench/accuracy/cifar_finetune.py --network cifar_resnet56 [--sparsity 0.75]… [--method obs+grouping]…
        [--tile 8] [--dense-epochs 5] [--dense-lr 0.02] [--epochs 5] [--lr 0.05] [--batch 128] [--teacher-share 0.9]
        [--temperature 4] [--block-weight 0] [--ema 0.99] [--weight-decay 1e-4] [--precision bf16] [--rechoose]
        [--seed 0] [--test] [--bundle] [--records FILE.json] [--keep DIR] [--threads 1] [--data ../shared/data]
    python bench/accuracy/cifar_finetune.py --table --records FILE.json

The dense network is trained first, on labels alone, so that what more training gives it is not credited to pruning; it
is what pruned networks start from, are taught by and are compared with. --dense-epochs 0 takes it as it is, --epochs 0
judges right after pruning, and --sparsity 0 trains the dense network once more as the pruned ones are trained. Options
of training are those of the pruned networks, but for --dense-epochs and --dense-lr.

Without --test, 5,000 training images are left out of all training and judged on: what settings are chosen on (the
network as it is given has seen them, so only differences tell something). With --test all 50,000 are trained on, and
the 10,000 test images judge each network. --bundle compiles each one and counts the answers that are not torch's, all
of which must be ties (see oneshot.py).

Rows that stand in FILE are not computed again. With --keep, a run that was stopped goes on from the last whole epoch.
Ends with an error when a zero did not stay, training made a pruned network worse, or a compiled answer is not torch's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oneshot import METHODS as ONESHOT
from oneshot import MOST, NETWORKS, Records, Task, compiled, judged, judged_once, pruned, ties, wrong_data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import colonnade as cn
from colonnade.accuracy import Accuracy
from colonnade.errors import run_script
from colonnade.sparsify.masks import mask_zeros_, masks, set_movable_mask

METHODS = tuple(method for method in ONESHOT if "magnitude" in method or method in ("obs", "obs+grouping"))
HELD_OUT = 5000  # training images that judge without --test
LEAST = 0.01  # share of zeros from which a layer counts as pruned
# How the dense network is trained further, but for epochs and rate. All rows are compared with it: it stays the same.
DENSE = {"batch": 128, "ema": 0.99, "weight_decay": 1e-4, "precision": "bf16"}
# Options of the pruned networks' training.
RECIPE = (
    "epochs", "lr", "batch", "teacher_share", "temperature", "block_weight", "ema", "weight_decay", "precision",
    "rechoose",
)  # fmt: skip


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Training images as these networks were trained on: moved by up to 4 pixels a side, every second one mirrored.

    pixels: uint8 [N, 3, 32, 32]; labels: int64 [N].
    """

    def __init__(self, pixels: Tensor, labels: Tensor, normalize: Any) -> None:
        self.pixels, self.labels, self.normalize = functional.pad(pixels, (4, 4, 4, 4)), labels, normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y, x, mirror = (int(torch.randint(0, limit, ())) for limit in (9, 9, 2))
        image = self.pixels[index, :, y : y + 32, x : x + 32]
        return self.normalize(image.flip(2) if mirror else image), self.labels[index]


class Remembered(nn.Module):
    """A teacher that keeps its answers: with one seed all networks are shown the same views, so it is asked once.

    path: where the answers of earlier calls lie, and `save` puts those of this one; None: in memory only.
    """

    def __init__(self, model: nn.Module, path: Path | None) -> None:
        super().__init__()
        self.model, self.path = model, path
        self.known: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self.known = torch.load(path, weights_only=True)

    def __deepcopy__(self, _memo: Any) -> Remembered:
        return self  # `finetune` trains with a copy: one with the same memory

    def forward(self, x: Tensor) -> Tensor:
        """The model's answers; a batch counts as seen if every bit of it is the same."""
        key = hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        if key not in self.known:
            self.known[key] = self.model(x).cpu()
        return self.known[key].to(x.device)

    def save(self) -> None:
        if self.path is not None:
            torch.save(self.known, self.path)


@dataclass(frozen=True, eq=False)
class Setting:
    """task: the network as it is given, calibration inputs and what judges; train: what is trained on."""

    task: Task
    train: Augmented


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=[name for name in NETWORKS if name.startswith("cifar")], default="cifar_resnet56")
    add("--sparsity", type=float, action="append", help="may be repeated; 0.5 and 0.75 by default")
    add("--method", choices=METHODS, action="append", help="may be repeated; obs+grouping by default")
    add("--tile", type=int, default=8)
    add("--dense-epochs", type=int, default=5, help="of the dense network, before all else")
    add("--dense-lr", type=float, default=0.02, help="the highest rate there")
    add("--epochs", type=int, default=5, help="of each pruned network")
    add("--lr", type=float, default=0.05, help="the highest rate")
    add("--batch", type=int, default=128, help="images of a step")
    add("--teacher-share", type=float, default=0.9, help="of the loss: the dense network's answers; 0: labels only")
    add("--temperature", type=float, default=4.0, help="of the teacher's answers")
    add("--block-weight", type=float, default=0.0, help="of the distance from the teacher's block outputs")
    add("--ema", type=float, default=0.99, help="the moving average's decay; 0: none")
    add("--weight-decay", type=float, default=1e-4)
    add("--rechoose", action="store_true", help="masks are chosen anew during the first 80 %% of the steps")
    add("--precision", choices=("no", "bf16", "fp16"), default="bf16", help="that trains; all is judged in f32")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--test", action="store_true")
    add("--bundle", action="store_true")
    add("--records", type=Path)
    add("--keep", type=Path, metavar="DIR")
    add("--data", type=Path, default=Path("../shared/data"))
    add("--table", action="store_true")
    return parser.parse_args()


def load(options: argparse.Namespace) -> Setting:
    sys.path.insert(0, str(options.data / "loaders"))
    import images  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (weights.MEAN, weights.STD))

    def normalize(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - mean) / std

    def split(name: str) -> tuple[Tensor, np.ndarray]:
        pixels, labels = images.cifar10_jpeg(name)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), labels

    pixels, labels = split("train")
    order = np.random.default_rng(options.seed).permutation(len(pixels))
    trained = np.arange(len(pixels)) if options.test else order[:-HELD_OUT]
    x, truth = split("test") if options.test else (pixels[order[-HELD_OUT:]], labels[order[-HELD_OUT:]])
    dense = weights.cifar_resnet(int(NETWORKS[options.network]), jpeg=True)
    task = Task(dense, normalize(pixels[order[:MOST]]), normalize(x), truth)
    return Setting(task, Augmented(pixels[trained], torch.from_numpy(labels[trained]), normalize))


def name_of(options: argparse.Namespace, kind: str) -> str:
    """Of what --keep holds, up to the dense network's training: everything that changes it is in the name."""
    where = "" if options.test else "-held_out"
    trained = f"{options.dense_epochs}-{options.dense_lr:g}-{DENSE['precision']}"
    return f"{options.network}-{kind}-{trained}-{options.seed}{where}"


def train(
    model: nn.Module, name: str, setting: Setting, options: argparse.Namespace, *, batch: int, ema: float,
    precision: str, **more: Any,
) -> nn.Module:  # fmt: skip
    """Train in place, on from a checkpoint where --keep has one."""
    # Convolutions of few channels run faster on CPUs this way; the numbers mean the same.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    history = cn.finetune(
        model, DataLoader(setting.train, batch, shuffle=True, drop_last=True), warmup=0.05, ema=ema or None,
        mixed_precision=precision, seed=options.seed, title=name,
        checkpoint_dir=options.keep / name if options.keep else None, progress=sys.stderr.isatty(), **more,
    )  # fmt: skip
    print(f"{name}: losses {', '.join(f'{epoch.loss:.4f}' for epoch in history.epochs)}", flush=True)
    plain: nn.Module = model.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return plain


def dense_further(setting: Setting, options: argparse.Namespace) -> nn.Module:
    """What everything else starts from, is taught by and is compared with."""
    model = copy.deepcopy(setting.task.dense)
    if options.dense_epochs:
        name = name_of(options, "dense")
        model = train(model, name, setting, options, epochs=options.dense_epochs, lr=options.dense_lr, **DENSE)
    return model


def answers_file(name: str, options: argparse.Namespace) -> Path | None:
    """Where --keep has a network's accuracy."""
    return options.keep / f"{name}.answers.pt" if options.keep else None


def pruned_once(dense: nn.Module, sparsity: float, method: str, setting: Setting, options: argparse.Namespace) -> Any:
    """(plain network with zeros, its accuracy), from --keep where it is there."""
    kind = name_of(options, f"{sparsity:g}-{options.tile}-{method}")
    path = options.keep / f"{kind}.pt" if options.keep else None
    model = copy.deepcopy(dense)
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    elif sparsity:
        model = cn.remove_masks(pruned(replace(setting.task, dense=dense), method, sparsity, options.tile))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return model, judged_once(model, setting.task, answers_file(kind, options))


def trained_on(
    start: nn.Module, dense: nn.Module, key: dict[str, Any], setting: Setting, options: argparse.Namespace
) -> nn.Module:
    """The pruned network after its epochs, its masks taken off again."""
    model, more = copy.deepcopy(start), dict[str, Any]()
    if key["sparsity"]:
        mask_zeros_(model, least=LEAST)
    if options.rechoose:
        pattern = cn.ColumnPattern(key["sparsity"], options.tile)
        for layer, _ in list(masks(model)):
            set_movable_mask(model.get_submodule(layer.rpartition(".")[0]), None, pattern)
        more = {"rechoose": cn.Rechoose()}
    teacher = taught_by(dense, options)
    if teacher is not None:
        more |= {"teacher": teacher, "teacher_share": options.teacher_share, "temperature": options.temperature}
    named = "-".join(f"{key[name]:g}" if isinstance(key[name], float) else str(key[name]) for name in RECIPE)
    name = name_of(options, f"{key['sparsity']:g}-{options.tile}-{key['method']}") + f"-{named}"
    recipe = {each: key[each] for each in ("epochs", "lr", "batch", "ema", "weight_decay", "precision")}
    more["block_weight"] = options.block_weight
    model = cn.remove_masks(train(model, name, setting, options, **recipe, **more))
    if isinstance(teacher, Remembered):
        teacher.save()
    return model


def taught_by(dense: nn.Module, options: argparse.Namespace) -> nn.Module | None:
    """The teacher, if there is one; one whose blocks are compared has to see the views itself."""
    if not options.teacher_share and not options.block_weight:
        return None
    copied: nn.Module = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.block_weight:
        return copied
    name = name_of(options, f"teacher-{options.precision}-{options.batch}")
    return Remembered(copied, options.keep / f"{name}.pt" if options.keep else None)


def returned(before: nn.Module, after: nn.Module, moved: bool) -> int:
    """Zeros that training gave back; of masks that moved, the zeros that are fewer now."""
    lost = 0
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        if one.ndim > 1 and float((one == 0).float().mean()) >= LEAST:
            back = int((one == 0).sum() - (other == 0).sum()) if moved else int(((one == 0) & (other != 0)).sum())
            lost += max(0, back)
    return lost


def judge(
    key: dict[str, Any], dense: nn.Module, base: Accuracy, given: Accuracy, setting: Setting,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One row: prune, train, judge, compile."""
    task = setting.task
    start, right_after = pruned_once(dense, key["sparsity"], key["method"], setting, options)
    model = trained_on(start, dense, key, setting, options) if options.epochs else start
    result = judged(model, task.x, task.labels) if options.epochs else right_after
    change, before = cn.compare(base, result), cn.compare(base, right_after)
    row = {
        **key, "images": result.images, "given": given.top1, "dense": base.top1, "pruned": right_after.top1,
        "pruned_difference": [before.points, before.low, before.high], "top1": result.top1,
        "difference": [change.points, change.low, change.high], "agreement": change.agreement,
        "zeros": sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1),
        "returned": returned(start, model, options.rechoose), "ties": None,
    }  # fmt: skip
    if options.bundle:
        row["ties"] = ties(model, task.x, result.answers, compiled(model, task.x, task.labels).answers)
    print(f"{key['sparsity']:g} {key['method']}: {100 * right_after.top1:.2f} %, then {change}", flush=True)
    return row


def broken(row: dict[str, Any]) -> str:
    """The promise that a row does not keep, or nothing."""
    if row["returned"]:
        return f"{row['returned']} zeros came back"
    return "training did not help" if row["sparsity"] and row["epochs"] and row["top1"] <= row["pruned"] else ""


def interval(row: dict[str, Any], name: str) -> str:
    points, low, high = (f"{100 * value:+.2f}" for value in row[name])
    return f"{points} ({low} to {high})"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one table for each network and way of training."""
    parts = []
    shared = ("network", "test", "dense_epochs", "dense_lr", "seed", *RECIPE[1:-1])
    for group in sorted({tuple(row[name] for name in shared) for row in rows}):
        chosen = [row for row in rows if tuple(row[name] for name in shared) == group]
        first = chosen[0]
        where = "test images" if first["test"] else "training images that were left out of training"
        parts.append(
            f"{first['network']}, {first['images']:,} {where}: dense {100 * first['given']:.2f} % as given, "
            f"{100 * first['dense']:.2f} % after {first['dense_epochs']} epochs from {first['dense_lr']:g}; rate "
            f"{first['lr']:g}, batch {first['batch']}, teacher's share {first['teacher_share']:g} at temperature "
            f"{first['temperature']:g}, blocks {first['block_weight']:g}, average {first['ema']:g}, weight decay "
            f"{first['weight_decay']:g}, precision {first['precision']}, seed {first['seed']}\n"
        )
        parts.append(
            "| sparsity | T | method | right after pruning | epochs | top-1 | difference, 95 % interval | "
            "same answer | zeros | bundle unlike torch, all ties |"
        )
        parts.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        chosen.sort(
            key=lambda row: (row["sparsity"], row["tile"], METHODS.index(row["method"]), row["rechoose"], row["epochs"])
        )
        for row in chosen:
            how = row["method"] + (", re-choosing" if row["rechoose"] else "") if row["sparsity"] else "dense"
            unlike = "" if row["ties"] is None else f"{row['ties']} of {row['images']:,}"
            parts.append(
                f"| {100 * row['sparsity']:g} % | {row['tile'] if row['sparsity'] else ''} | {how} | "
                f"{100 * row['pruned']:.2f} | {row['epochs']} | {100 * row['top1']:.2f} | "
                f"{interval(row, 'difference')} | {100 * row['agreement']:.1f} % | {row['zeros']:,} | {unlike} |"
            )
        parts.append("")
    return "\n".join(parts).replace("+-", "-")


def main() -> int:
    options = arguments()
    records = Records(options.records)
    if options.table:
        print(table(records.rows))
        return 0
    if wrong_data(options.data):
        return 2
    torch.set_num_threads(options.threads)
    common = {
        name: getattr(options, name)
        for name in ("network", "test", "tile", "dense_epochs", "dense_lr", "seed", *RECIPE)
    }
    wanted = [
        {**common, "sparsity": sparsity, "method": method}
        for sparsity in options.sparsity or [0.5, 0.75]
        for method in options.method or ["obs+grouping"]
    ]
    wanted = [key for key in wanted if not records.has(key)]
    if not wanted:
        return 0
    setting = load(options)
    dense = dense_further(setting, options)
    given = judged_once(setting.task.dense, setting.task, answers_file(name_of(options, "given"), options))
    base = judged_once(dense, setting.task, answers_file(name_of(options, "dense"), options))
    print(f"{options.network}: {given} as given, {base} after {options.dense_epochs} epochs", flush=True)
    problems = []
    for key in wanted:
        row = judge(key, dense, base, given, setting, options)
        records.add(row)
        if said := broken(row):
            problems.append(f"{key['sparsity']:g} {key['method']}: {said}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
