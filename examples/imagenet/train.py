"""Prune a network of torchvision and train it on ImageNet, by a named preset, on any number of GPUs.

    accelerate launch train.py IMAGENET --model resnet50 --pattern 1:4 --tile 8 --preset paper -o resnet50-1of4

IMAGENET holds train/CLASS/photo and val/CLASS/photo, as torchvision's ImageFolder takes them. A run that was stopped
goes on when the same line is given again. What comes out: OUT.safetensors, OUT.onnx (for `colonnade build`) and
OUT.json with every epoch.

`--preset paper` is the recipe of "Efficient Column-Wise N:M Pruning on RISC-V CPU" (arXiv 2507.17301); `short` and
`long` are this project's: see `colonnade.sparsify.presets`. `--model` may also be module:function for a network of
your own.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import colonnade as cn
from colonnade.cli_pattern import parse_pattern
from colonnade.errors import UserError
from colonnade.sparsify.presets import PRESETS, preset
from colonnade.training import make_model, put_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument(
        "--model", default="resnet50", help="of torchvision.models with its weights, or module:function"
    )
    parser.add_argument("--model-args", metavar="JSON", help="arguments of module:function")
    parser.add_argument("--weights", type=Path, help="trained weights to start from, instead of torchvision's")
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--group", type=int)
    parser.add_argument("--pattern", metavar="N:M")
    parser.add_argument("--tile", type=int, default=8)
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="samples of a step, all processes together; instead of the preset's")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--workers", type=int, default=8, help="of each process")
    parser.add_argument("-o", "--output", type=Path, default=Path("pruned"))
    return parser.parse_args()


def folders(root: Path, size: int, batch: int, workers: int) -> tuple[DataLoader, DataLoader]:
    """Random parts to train on, middles to validate on, as is usual for ImageNet."""
    from torchvision import datasets, transforms

    scaled = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    views = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *scaled],
        "val": [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *scaled],
    }
    made = []
    for part, view in views.items():
        photos = datasets.ImageFolder(root / part, transforms.Compose(view))
        train = part == "train"
        made.append(DataLoader(photos, batch, shuffle=train, drop_last=train and len(photos) >= batch,
                               num_workers=workers, pin_memory=torch.cuda.is_available(),
                               persistent_workers=workers > 0))  # fmt: skip
    return made[0], made[1]


def network(options: argparse.Namespace) -> torch.nn.Module:
    """The dense network with its weights."""
    if ":" in options.model:
        torch.manual_seed(0)  # without weights it starts the same in every process
        model = make_model(options.model, options.model_args)
    else:
        from torchvision import models

        with Accelerator().main_process_first():  # one of them downloads
            model = models.get_model(options.model, weights=None if options.weights else "IMAGENET1K_V1")
    if options.weights:
        put_state(model, options.weights)
    return model


def beside(output: Path, ending: str) -> Path:
    """A file of this run; what stands behind a dot of ``output`` is a part of its name, as in resnet50-0.75."""
    return output.with_name(output.name + ending)


def main() -> None:
    options = arguments()
    recipe = preset(options.preset)
    settings = dict(recipe.finetune)
    if options.epochs:
        settings["epochs"] = options.epochs
    batch = options.batch or recipe.batch
    train, validation = folders(options.data, options.size, batch, options.workers)
    model = network(options)
    teacher = copy.deepcopy(model) if recipe.teaches else None
    example = torch.zeros(1, 3, options.size, options.size)
    pattern = parse_pattern(options.sparsity, options.group, options.pattern, options.tile)
    moving = settings.get("rechoose") is not None
    layers = cn.sparsify_(model, pattern, example, movable=moving, **recipe.prune)
    history = cn.finetune(
        model, train, validation, teacher=teacher, mixed_precision=options.precision,
        checkpoint_dir=beside(options.output, ".checkpoints"), **settings,
    )  # fmt: skip
    if not Accelerator().is_main_process:
        return
    plain = cn.remove_masks(model.cpu())
    save_file({key: value.contiguous().clone() for key, value in plain.state_dict().items()},
              beside(options.output, ".safetensors"))  # fmt: skip
    cn.export(plain, example, beside(options.output, ".onnx"))
    record = {
        "model": options.model, "preset": options.preset, "pattern": str(pattern), "batch": batch,
        "pruned": [layer.name for layer in layers if layer.pattern is not None], "best": history.best,
        "accuracy": history.accuracy, "epochs": [asdict(epoch) for epoch in history.epochs],
    }  # fmt: skip
    beside(options.output, ".json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{options.output}: epoch {history.best}, {100 * (history.accuracy or 0):.2f} % of the validation photos right"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
