"""Fine-tuning with masks frozen or chosen anew, on HF Accelerate: one script for a laptop, several GPUs, several nodes.

Every random decision of an epoch follows from (seed, epoch), and the learning rate from the step, so a run that was
stopped and resumed gives the weights of one that was not. Checkpoints are safetensors and JSON: data, no code.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from colonnade.errors import UserError
from colonnade.sparsify.averaging import Average
from colonnade.sparsify.checkpoints import Checkpoints, Epoch, History
from colonnade.sparsify.distil import BlockOutputs, answers_distance, blocks_distance, chosen_blocks
from colonnade.sparsify.masks import masks
from colonnade.sparsify.parallel import Batches, synchronized_batchnorm
from colonnade.sparsify.rechoose import MovableMask, Rechoose, Rechooser, freeze

FORMAT = 1
Loss = Callable[[Any, Any], Tensor]


def finetune(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    epochs: int,
    lr: float,
    optimizer: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: float = 0.0,
    decay_epochs: int | None = None,
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    teacher: nn.Module | None = None,
    teacher_share: float = 0.5,
    temperature: float = 2.0,
    block_weight: float = 0.0,
    blocks: Iterable[str] = (),
    ema: float | None = None,
    rechoose: Rechoose | None = None,
    sync_batchnorm: bool = True,
    mixed_precision: str = "no",
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    title: str = "fine-tuning",
) -> History:
    """Train ``model`` in place; masks (see ``sparsify_``) stay as they are, so a pruned weight stays zero, unless
    ``rechoose`` says when they are chosen anew; at the end they are fixed in any case.

    train_loader, val_loader: DataLoaders, or lists, of (inputs, targets) batches. Under ``accelerate launch`` each
        batch is shared out among the processes, so their number changes neither the batches nor the steps, and what
        a sample draws at random follows from (seed, epoch, index) alone.
    epochs:          all in all, also after a resume.
    lr:              the highest learning rate; after ``warmup`` (share of all steps) it falls to 0 along half a cosine.
    decay_epochs:    instead of the cosine, a tenth of the rate after so many epochs, again and again.
    optimizer:       "sgd" (Nesterov), "adamw", or a function from parameters to an optimizer. Norms and biases get no
                     weight decay.
    loss:            (model's outputs, targets) -> scalar, a mean over the batch; default: cross entropy with
                     ``label_smoothing``.
    teacher:         a model (the dense one, say) whose answers are learned too, by ``teacher_share`` of the loss:
                     "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531) at this ``temperature``.
    block_weight:    added to the loss: so many times the relative squared error of the blocks' outputs from the
                     teacher's; ``blocks``: globs of the modules that are compared, by default the residual blocks.
    ema:             decay (such as 0.999) of a moving average of the weights, which is validated and kept instead.
    rechoose:        masks of ``sparsify_(…, movable=True)`` move while training, see ``Rechoose``.
    sync_batchnorm:  with several processes, BatchNorm uses the statistics of the whole batch, as one process would;
                     otherwise each uses its share, and those of the first are kept.
    mixed_precision: "no", "bf16" or "fp16".
    checkpoint_dir:  one checkpoint after each epoch, and the best weights; with ``resume`` a run goes on from there.
    progress:        a bar with the time left.

    With ``val_loader`` the weights of the best epoch are kept (the later one of equals), else the last ones. Ctrl-C
    leaves the checkpoint of the last whole epoch. Raises UserError for wrong options, a loss that is not finite, an
    empty loader, and a checkpoint of another run.
    """
    if epochs < 1 or not lr > 0 or not 0 <= warmup < 1:
        raise UserError(f"epochs={epochs}, lr={lr}, warmup={warmup}: expected epochs >= 1, lr > 0 and 0 <= warmup < 1")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision is {mixed_precision!r}: expected 'no', 'bf16' or 'fp16'")
    if not 0 <= teacher_share <= 1 or not temperature > 0:
        raise UserError(
            f"teacher_share={teacher_share}, temperature={temperature}: expected 0 to 1, and a temperature above 0"
        )
    if block_weight < 0 or (block_weight and teacher is None):
        raise UserError(f"block_weight is {block_weight}: expected at least 0, and a teacher to learn blocks from")
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"ema is {ema}: expected a share between 0 and 1, such as 0.999")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm is {clip_norm}: expected a number above 0, or None")
    if decay_epochs is not None and decay_epochs < 1:
        raise UserError(f"decay_epochs is {decay_epochs}: expected at least 1")
    # The state is process-wide and would keep the precision of an earlier call.
    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(mixed_precision=mixed_precision)
    if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started, but Accelerate would let each train on its own: "
            "without GPUs, set ACCELERATE_USE_CPU=true"
        )
    set_seed(seed)
    shares: dict[str, Any] = {
        "rank": accelerator.process_index, "processes": accelerator.num_processes, "device": accelerator.device,
        "seed": seed,
    }  # fmt: skip
    train = Batches(train_loader, "training", **shares)
    validation = Batches(val_loader, "validation", **shares) if val_loader is not None else None
    steps = len(train)
    if steps == 0:
        raise UserError("the training loader has no batch: give it data, or a smaller batch with drop_last")
    if validation is not None and len(validation) == 0:
        raise UserError("the validation loader has no batch: give it data, or leave drop_last out")
    moving = Rechooser(model, rechoose, epochs * steps) if rechoose is not None else None
    if moving is None:
        freeze(model)
    average = Average(model, ema) if ema is not None else None
    built = _optimizer(model, optimizer, lr, momentum, weight_decay)
    options = {
        "format": FORMAT, "epochs": epochs, "lr": lr, "optimizer": type(built).__name__, "momentum": momentum,
        "weight_decay": weight_decay, "warmup": warmup, "label_smoothing": label_smoothing, "clip_norm": clip_norm,
        "mixed_precision": mixed_precision, "seed": seed, "steps": steps,
        "teacher": [teacher_share, temperature] if teacher is not None else None,
        # None where they are not used, so that checkpoints from before they were known fit
        "decay_epochs": decay_epochs, "block_weight": block_weight or None, "ema": ema,
        "rechoose": asdict(rechoose) if rechoose is not None else None,
        "patterns": {name: str(mask.pattern) for name, mask in masks(model) if isinstance(mask, MovableMask)} or None,
    }  # fmt: skip
    keeper = Checkpoints(Path(checkpoint_dir), options) if checkpoint_dir is not None else None
    history = History()
    best: dict[str, Tensor] | None = None
    criterion: Loss = loss or nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(accelerator.device).requires_grad_(False).eval()
    if average is not None:
        average.model.to(accelerator.device)
    total, processes = epochs * steps, accelerator.num_processes
    falls = None if decay_epochs is None else decay_epochs * steps
    with (
        _prepared(accelerator, model, built) as (wrapped, ready),
        _compared(model, teacher if block_weight else None, blocks) as compared,
        _bar(total, title, progress and accelerator.is_main_process) as tell,
        synchronized_batchnorm(model, processes if sync_batchnorm else 1),
    ):
        if keeper is not None and resume and (found := keeper.load(model, built, average)) is not None:
            history, best = found
        elif keeper is not None and accelerator.is_main_process:
            keeper.clear()
        tell(len(history.epochs) * steps, "")
        for epoch in range(len(history.epochs), epochs):
            began = time.monotonic()
            set_seed(seed + 1 + epoch, device_specific=processes > 1)
            wrapped.train()
            summed, seen = 0.0, 0.0
            for index, (inputs, targets, count) in enumerate(train.epoch(epoch)):
                step = epoch * steps + index
                rate = _rate(step, total, lr, warmup, falls)
                _set_lr(ready, rate)
                if moving is not None:
                    moving.before(step)
                ready.zero_grad()
                with accelerator.autocast():
                    outputs = wrapped(inputs)
                    value = criterion(outputs, targets)
                    if teacher is not None:
                        with torch.no_grad():
                            wanted = teacher(inputs)
                        value = torch.lerp(value, answers_distance(outputs, wanted, temperature), teacher_share)
                    if compared is not None:
                        value = value + block_weight * blocks_distance(*compared)
                # Known to every process before any goes on: they all stop at a bad loss, or none.
                sums = value.detach().to(torch.promote_types(value.dtype, torch.float32)) * count
                sums = cast(Tensor, accelerator.reduce(torch.stack([sums, torch.full_like(sums, count)])))
                mean, whole = float(sums[0] / sums[1]), float(sums[1])
                if not math.isfinite(mean):
                    raise UserError(
                        f"the loss became {mean} in epoch {epoch + 1}: lower lr (it is {lr:g}) or set clip_norm"
                    )
                # Gradients are averaged over processes, whose shares may differ in size.
                accelerator.backward(value * (count * processes / whole))
                if clip_norm is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
                ready.step()
                if moving is not None:
                    moving.after(rate)
                if average is not None:
                    average.update(model)
                summed, seen = summed + mean * whole, seen + whole
                tell(epoch * steps + index + 1, f"loss {mean:.3f}")
            if processes > 1 and not sync_batchnorm:
                broadcast(list(model.buffers()))
            if moving is not None and epoch + 1 == epochs:
                moving.settle()
                if average is not None:
                    average.take_masks(model)
            kept = model if average is None else average.model
            accuracy = _accuracy(kept, validation, accelerator) if validation is not None else None
            history.epochs.append(
                Epoch(epoch + 1, summed / seen, accuracy, _rate((epoch + 1) * steps, total, lr, warmup, falls),
                      time.monotonic() - began)
            )  # fmt: skip
            before = history.accuracy
            # Before its masks are settled a model may be better than what the pattern allows.
            settled = moving is None or (epoch + 1) * steps > moving.last or epoch + 1 == epochs
            if settled and (accuracy is None or before is None or accuracy >= before):
                history.best = epoch + 1
                best = {key: value.detach().cpu().clone() for key, value in kept.state_dict().items()}
            if keeper is not None and accelerator.is_main_process:
                keeper.save(model, built, history, best or {}, average)
            accelerator.wait_for_everyone()
    if best is not None:
        model.load_state_dict(best)
    freeze(model)
    model.eval()
    return history


@contextlib.contextmanager
def _prepared(
    accelerator: accelerate.Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Both as Accelerate wraps them, for the time: mixed precision puts a wrapper around the model's forward."""
    wrapped, ready = accelerator.prepare(model, optimizer)
    try:
        yield wrapped, ready
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()


def _optimizer(
    model: nn.Module,
    kind: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("the model has no parameter to train (requires_grad is false everywhere)")
    if not isinstance(kind, str):
        return kind(trained)
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    raise UserError(f"optimizer is {kind!r}: expected 'sgd', 'adamw' or a function")


def _rate(step: int, total: int, lr: float, warmup: float, falls: int | None = None) -> float:
    """Learning rate at ``step``: a straight rise, then half a cosine down to 0, or tenths after ``falls`` steps."""
    rise = round(warmup * total)
    if step < rise:
        return lr * (step + 1) / rise
    if falls is not None:
        return float(lr * 0.1 ** (step // falls))
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


@contextlib.contextmanager
def _compared(
    model: nn.Module, teacher: nn.Module | None, blocks: Iterable[str]
) -> Iterator[tuple[BlockOutputs, BlockOutputs] | None]:
    """What the blocks of both models return, in each step; None without a teacher to learn them from."""
    if teacher is None:
        yield None
        return
    names = chosen_blocks(model, blocks)
    missing = [name for name in names if name not in dict(teacher.named_modules())]
    if missing:
        raise UserError(f"the teacher has no block {missing[0]!r}: it must have the model's architecture")
    ours, theirs = BlockOutputs(model, names), BlockOutputs(teacher, names)
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _accuracy(model: nn.Module, batches: Batches, accelerator: accelerate.Accelerator) -> float:
    """Share of right top-1 answers over all processes, every sample counted once."""
    model.eval()
    right = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    with torch.no_grad():
        for inputs, targets, count in batches.epoch(0):
            with accelerator.autocast():
                answers = model(inputs).argmax(1)
            right[0] += (answers == targets)[:count].sum()
            right[1] += count
    right = cast(Tensor, accelerator.reduce(right))
    return float(right[0].double() / right[1].double())


@contextlib.contextmanager
def _bar(total: int, title: str, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """A progress bar with the time left; what it yields takes (steps done, a short note)."""
    if not shown:
        yield lambda _done, _note: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
