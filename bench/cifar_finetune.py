"""CIFAR-10 (JPEG q75): ResNet-20 pruned, trained one epoch with its zeros frozen, compiled, and judged three times.

    python bench/cifar_finetune.py [--sparsity 0.5 --sparsity 0.75] [--data ../shared/data] [-o DIR] [--markdown]

The test images are read after training only: one epoch is trained on all training images and nothing is chosen by the
result. Ends with an error when a promise does not hold: better than right after pruning, every zero still there,
the compiled network's answer that of torch on every single test image.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import colonnade as cn
from colonnade.sparsify.masks import masks

BATCH = 100  # of the compiled network; divides the test images


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Training images as this network was trained on: moved by up to 4 pixels a side, every second one mirrored."""

    def __init__(self, pixels: Tensor, labels: Tensor, normalize: Any) -> None:
        self.pixels, self.labels, self.normalize = functional.pad(pixels, (4, 4, 4, 4)), labels, normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y, x, mirror = (int(torch.randint(0, limit, ())) for limit in (9, 9, 2))
        image = self.pixels[index, :, y : y + 32, x : x + 32]
        return self.normalize(image.flip(2) if mirror else image), self.labels[index]


@dataclass
class Row:
    """Shares of the test images that were right; zeros as counted in the weights; ``different``: compiled answers that
    are not torch's."""

    sparsity: float
    pruned: float
    trained: float
    compiled: float
    different: int
    zeros: int
    returned: int
    minutes: float


def torch_answers(model: nn.Module, images: Tensor) -> npt.NDArray[np.int64]:
    """The class that torch finds most likely for every image."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(BATCH)]).numpy()


def compiled_answers(model: nn.Module, images: Tensor, folder: Path, threads: int) -> npt.NDArray[np.int64]:
    """The same from the network as a bundle."""
    path = cn.export(model, images[:BATCH], folder / "model.onnx")
    bundle = cn.build(path, threads=threads, out=folder / "model.bundle", force=True)
    found = []
    with cn.Session(bundle.path, threads=threads) as session:
        for part in images.split(BATCH):
            found.append(session.run({"input": part.numpy()})["output"].argmax(1))
    return np.concatenate(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, action="append", help="may be repeated; 0.5 and 0.75 by default")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, help="train on the first N images only (a look, no result)")
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/training.md")
    parser.add_argument("-o", "--output", type=Path, help="folder for the models; a temporary one by default")
    options = parser.parse_args()
    if not (options.data / "loaders").is_dir():
        print(f"error: {options.data}: expected the folder with loaders/ and cifar10/; give it with --data")
        return 2
    sys.path.insert(0, str(options.data / "loaders"))
    import images as loader  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    torch.set_num_threads(options.threads)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (weights.MEAN, weights.STD))

    def normalize(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - mean) / std

    def split(name: str) -> tuple[Tensor, Tensor]:
        pixels, labels = loader.cifar10_jpeg(name)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)

    train, (test_pixels, test_labels) = split("train"), split("test")
    data = Augmented(*(part[: options.images] for part in train), normalize)
    test, truth = normalize(test_pixels), test_labels.numpy()

    dense: nn.Module = weights.cifar_resnet(20, jpeg=True)
    right = float((torch_answers(dense, test) == truth).mean())
    print(f"dense: {100 * right:.2f} % of {len(truth)} test images", flush=True)
    rows = []
    for sparsity in options.sparsity or [0.5, 0.75]:
        rows.append(one(dense, sparsity, data, (test, truth), options))
        print(rows[-1], flush=True)
    show(right, rows, len(truth), options.markdown)
    broken = [row.sparsity for row in rows if row.returned or row.different or row.trained <= row.pruned]
    if broken:
        print(f"a promise is broken at sparsity {broken}", file=sys.stderr)
    return 1 if broken else 0


def one(dense: nn.Module, sparsity: float, data: Augmented, test: tuple[Tensor, Any], options: Any) -> Row:
    """Prune, train, compile, judge."""
    images, truth = test
    began = time.monotonic()
    torch.manual_seed(0)
    # Convolutions of few channels run faster on CPUs this way; the numbers mean the same.
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cn.sparsify_(model, cn.ColumnPattern(sparsity, tile=8), images[:1])
    pruned = float((torch_answers(model, images) == truth).mean())
    before = {name: mask.mask.clone() for name, mask in masks(model)}
    zeros = sum(int((~mask).sum()) for mask in before.values())
    cn.finetune(
        model, DataLoader(data, 128, shuffle=True, drop_last=True), epochs=options.epochs, lr=options.lr, warmup=0.05,
        weight_decay=1e-4, progress=sys.stderr.isatty(),
    )  # fmt: skip
    cn.remove_masks(model)
    returned = sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in before.items())
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    answers = torch_answers(model, images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output / f"{100 * sparsity:g}" if options.output else Path(temporary)
        compiled = compiled_answers(model, images, folder, options.threads)
    return Row(
        sparsity, pruned, float((answers == truth).mean()), float((compiled == truth).mean()),
        int((compiled != answers).sum()), zeros, returned, (time.monotonic() - began) / 60,
    )  # fmt: skip


def show(dense: float, rows: list[Row], images: int, markdown: bool) -> None:
    """The table, for the terminal or for a page."""
    heads = (
        "sparsity", "dense", "pruned", "after training", "compiled", "answers unlike torch's", "zeros", "of them back",
    )  # fmt: skip
    lines = [
        (
            f"{100 * row.sparsity:g} %", f"{100 * dense:.2f} %", f"{100 * row.pruned:.2f} %",
            f"{100 * row.trained:.2f} %", f"{100 * row.compiled:.2f} %", f"{row.different} of {images}",
            f"{row.zeros:,}", str(row.returned),
        )
        for row in rows
    ]  # fmt: skip
    if markdown:
        print(f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads), sep="\n")
        for line in lines:
            print(f"| {' | '.join(line)} |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"CIFAR-10 (JPEG q75), ResNet-20, {images} test images")
    for head in heads:
        table.add_column(head, justify="right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
