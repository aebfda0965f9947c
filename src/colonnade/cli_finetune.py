"""`colonnade finetune`: a torch model pruned and trained further, weights and ONNX out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colonnade.cli_pattern import Exclude, Group, GroupRows, Pattern, Score, Sparsity, Tile, parse_pattern
from colonnade.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def finetune(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="What returns the model, as torchvision.models:resnet18.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE.npz",
            help="train/CLASS/photo, val/CLASS/photo; or CLASS/photo; or arrays x, y (x_train, y_train, x_val, y_val).",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.safetensors", help="The weights to write, zeros in place.")
    ],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="OUT.onnx", help="Write the model as ONNX too, to build.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="The trained weights: safetensors, or a state_dict."),
    ] = None,
    model_args: Annotated[
        str | None, typer.Option("--model-args", metavar="JSON", help="Arguments of the function, as an object.")
    ] = None,
    sparsity: Sparsity = None,
    group: Group = None,
    pattern: Pattern = None,
    tile: Tile = 8,
    score: Score = "l1",
    exclude: Exclude = None,
    group_rows: GroupRows = True,
    preset: Annotated[
        str | None,
        typer.Option(metavar="short|long|paper", help="A recipe for all that follows; options that are given win."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="0 only prunes and writes.")] = 10,
    lr: Annotated[float, typer.Option(help="The highest learning rate; it falls to 0 along half a cosine.")] = 0.01,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step, all processes together.")] = 128,
    optimizer: Annotated[str, typer.Option(metavar="sgd|adamw")] = "sgd",
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0)] = 1e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.0,
    decay_epochs: Annotated[
        int | None, typer.Option("--decay-epochs", min=1, help="A tenth of the rate after so many epochs; no cosine.")
    ] = None,
    clip_norm: Annotated[float | None, typer.Option("--clip-norm", help="Largest norm of a step's gradient.")] = None,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", min=0, max=1)] = 0.0,
    precision: Annotated[str, typer.Option(metavar="no|bf16|fp16", help="Mixed precision.")] = "no",
    distill: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0, max=1, help="Share of the loss that learns the dense model's answers."),
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="Of the answers that --distill learns: more tells more of unlikely classes.")
    ] = 2.0,
    distill_blocks: Annotated[
        float,
        typer.Option("--distill-blocks", metavar="WEIGHT", min=0, help="Learn the dense model's block outputs too."),
    ] = 0.0,
    ema: Annotated[
        float | None, typer.Option("--ema", metavar="0.999", help="Keep a moving average of the weights instead.")
    ] = None,
    rechoose: Annotated[
        bool, typer.Option("--rechoose/--no-rechoose", help="Choose masks anew while training (SR-STE).")
    ] = False,
    ramp: Annotated[
        float, typer.Option("--ramp", min=0, max=1, help="Share of the steps in which sparsity rises; with --rechoose.")
    ] = 0.0,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="imagenet|FILE.json", help="How photos become inputs; of byte arrays, mean and std."),
    ] = None,
    augment: Annotated[
        str | None, typer.Option(metavar="none|shift|crop", help="Random views; crop for photos by default.")
    ] = None,
    mirror: Annotated[
        bool | None, typer.Option("--mirror/--no-mirror", help="Mirror every second sample; with crop by default.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the last epoch here; a stopped run goes on from it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the outputs.")] = False,
) -> None:
    """Prune a torch model and train it further; under `accelerate launch`, on many processes. Its zeros are frozen
    unless --rechoose is given.

    Without --sparsity or --pattern, the zeros that the weights bring are held.
    """
    wanted = None
    if sparsity is not None or pattern is not None:
        wanted = parse_pattern(sparsity, group, pattern, tile)
    elif group is not None:
        raise UserError("--group belongs to --sparsity")
    for path in (output, onnx):
        if path is not None and path.exists() and (path.is_dir() or not force):
            raise UserError(f"{path}: exists; pass --force to overwrite it, or choose another name")
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    # Idle threads of torch sleep: spinning, two of them on a busy machine take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from colonnade.sparsify.rechoose import Rechoose

    options: dict[str, Any] = {
        "epochs": epochs, "lr": lr, "optimizer": optimizer, "weight_decay": weight_decay, "warmup": warmup,
        "decay_epochs": decay_epochs, "clip_norm": clip_norm, "label_smoothing": label_smoothing,
        "teacher_share": distill, "temperature": temperature, "block_weight": distill_blocks, "ema": ema,
        "rechoose": Rechoose(ramp=ramp) if rechoose else None,
    }  # fmt: skip
    pruning: dict[str, Any] = {"score": score, "group_rows": group_rows, "exclude": exclude or ()}
    if preset is not None:
        batch = _apply(preset, context, options, pruning, batch)
    if ramp and options["rechoose"] is None:
        raise UserError("--ramp belongs to --rechoose: a frozen mask has its full sparsity from the first")
    if not options["lr"] > 0:
        raise UserError(f"--lr is {options['lr']:g}: expected more than 0")
    learns = options["teacher_share"] > 0 or options["block_weight"] > 0
    if (learns or options["rechoose"]) and wanted is None:
        what = "--distill learns from" if learns else "--rechoose needs"
        raise UserError(f"{what} the model before pruning: give --sparsity or --pattern too")
    import copy

    import torch
    from accelerate import Accelerator
    from rich.console import Console
    from torch.utils.data import DataLoader

    from colonnade.photo import preprocessing
    from colonnade.sparsify import finetune as training
    from colonnade.sparsify.masks import check_excluded, mask_zeros_, sparsify_
    from colonnade.training import make_model, open_data, put_state

    samples = open_data(data, preprocessing(preprocess) if preprocess else None, augment=augment, mirror=mirror)
    torch.manual_seed(seed)  # a model without weights starts the same in every process, and after a stop
    network = make_model(model, model_args)
    if weights is not None:
        put_state(network, weights)
    example = torch.zeros(1, *samples.shape)
    _check(network, example, samples.labels)
    teacher = copy.deepcopy(network) if learns else None
    main = Accelerator().is_main_process
    console = Console(stderr=True, markup=False, quiet=not main)
    if wanted is not None:
        check_excluded(network, example, exclude or ())  # a preset's may match nothing
        with console.status("pruning"):
            layers = sparsify_(network, wanted, example, movable=options["rechoose"] is not None, **pruning)
        held = sum(layer.pattern is not None for layer in layers)
    elif not (held := len(mask_zeros_(network))):
        raise UserError("no layer has zeros to hold: prune first, with --sparsity or --pattern")
    console.print(f"{held} layers pruned, their zeros held", highlight=False)
    history = None
    if options["epochs"]:
        loaders: list[Any] = [
            DataLoader(part, batch, shuffle=train, drop_last=train and len(part) >= batch, num_workers=workers,  # type: ignore[arg-type]
                       persistent_workers=workers > 0)
            if part is not None else None
            for part, train in ((samples.train, True), (samples.validation, False))
        ]  # fmt: skip
        history = training.finetune(
            network, *loaders, mixed_precision=precision, teacher=teacher, checkpoint_dir=checkpoints, seed=seed,
            **options,
        )  # fmt: skip
    if main:
        _write(network, example, output, onnx)
        _tell(history, output, onnx)


# Options that a preset decides, by the names that they have in `finetune` and `sparsify_`.
NAMES = {"teacher_share": "distill", "block_weight": "distill_blocks"}


def _apply(name: str, context: typer.Context, options: dict[str, Any], pruning: dict[str, Any], batch: int) -> int:
    """Put a preset's values where the user gave none; returns the batch."""
    from dataclasses import replace

    from colonnade.sparsify.presets import preset

    def given(option: str) -> bool:
        source = context.get_parameter_source(NAMES.get(option, option))
        return source is not None and source.name != "DEFAULT"

    chosen = preset(name)
    for place, values in ((options, chosen.finetune), (pruning, chosen.prune)):
        place.update({option: value for option, value in values.items() if not given(option)})
    moving = chosen.finetune.get("rechoose")
    if moving is not None and given("ramp") and options["rechoose"] is not None:
        ramp = context.params["ramp"]
        options["rechoose"] = replace(moving, ramp=ramp, until=max(moving.until, ramp))
    return batch if given("batch") else chosen.batch


def _check(network: nn.Module, example: Any, labels: int) -> None:
    """Raise UserError unless the model takes ``example`` and answers with one score for each of ``labels`` classes."""
    import torch

    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            scores = network(example)
    except Exception as error:
        line = " ".join(str(error).split())
        raise UserError(f"the model does not take an input of shape {tuple(example.shape)}: {line[:200]}") from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        raise UserError("the model answers with something else than scores [batch, classes]: use colonnade.finetune")
    if scores.shape[1] < labels:
        raise UserError(
            f"the model tells {scores.shape[1]} classes apart, the data has {labels}: see --model-args, such as "
            f"'{{\"num_classes\": {labels}}}'"
        )


def _write(network: nn.Module, example: Any, output: Path, onnx: Path | None) -> None:
    """Weights and ONNX file, each whole or not there."""
    import secrets

    from safetensors.torch import save_file

    from colonnade.sparsify.masks import remove_masks
    from colonnade.sparsify.torch_model import export

    remove_masks(network.to("cpu"))
    aside = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        save_file({key: value.detach().contiguous().clone() for key, value in network.state_dict().items()}, aside)
        aside.replace(output)
    except Exception as error:
        aside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{output}: cannot be written ({reason})") from error
    if onnx is not None:
        export(network, example, onnx)


def _tell(history: Any, output: Path, onnx: Path | None) -> None:
    """What came out, on standard output."""
    from rich.console import Console
    from rich.table import Table

    if history is not None:
        table = Table()
        for heading in ("epoch", "loss", "validation", "seconds"):
            table.add_column(heading, justify="right")
        for epoch in history.epochs:
            accuracy = "" if epoch.accuracy is None else f"{100 * epoch.accuracy:.2f} %"
            kept = " ←" if epoch.number == history.best and epoch.accuracy is not None else ""
            table.add_row(str(epoch.number), f"{epoch.loss:.4f}", accuracy + kept, f"{epoch.seconds:.1f}")
        Console(markup=False).print(table)
        if history.accuracy is not None:
            typer.echo(f"kept: epoch {history.best}, {100 * history.accuracy:.2f} % of the validation samples right")
    typer.echo(f"{output}: weights" + (f"; {onnx}: to build with `colonnade build {onnx} -o BUNDLE`" if onnx else ""))
