"""Fine-tuning with frozen masks, on HF Accelerate: one script for a laptop, several GPUs, several nodes.

Every random decision of an epoch follows from (seed, epoch), and the learning rate from the step, so a run that was
stopped and resumed gives the weights of one that was not. Checkpoints are safetensors and JSON: data, no code.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from colonnade.errors import UserError
from colonnade.sparsify.parallel import Batches, synchronized_batchnorm

FORMAT = 1
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 1, mean training loss, share of validation samples that were right (None: no
    validation), learning rate at its end, seconds."""

    number: int
    loss: float
    accuracy: float | None
    lr: float
    seconds: float


@dataclass
class History:
    """What a run did. ``best``: the epoch whose weights the model now has."""

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0

    @property
    def accuracy(self) -> float | None:
        """Validation accuracy of the weights that were kept."""
        return self.epochs[self.best - 1].accuracy if self.best else None


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
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    teacher: nn.Module | None = None,
    teacher_share: float = 0.5,
    temperature: float = 2.0,
    sync_batchnorm: bool = True,
    mixed_precision: str = "no",
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    title: str = "fine-tuning",
) -> History:
    """Train ``model`` in place; masks (see ``sparsify_``) stay as they are, so a pruned weight stays zero.

    train_loader, val_loader: DataLoaders, or lists, of (inputs, targets) batches. Under ``accelerate launch`` each
        batch is shared out among the processes, so their number changes neither the batches nor the steps, and what
        a sample draws at random follows from (seed, epoch, index) alone.
    epochs:          all in all, also after a resume.
    lr:              the highest learning rate; after ``warmup`` (share of all steps) it falls to 0 along half a cosine.
    optimizer:       "sgd" (Nesterov), "adamw", or a function from parameters to an optimizer. Norms and biases get no
                     weight decay.
    loss:            (model's outputs, targets) -> scalar, a mean over the batch; default: cross entropy with
                     ``label_smoothing``.
    teacher:         a model (the dense one, say) whose answers are learned too, by ``teacher_share`` of the loss:
                     "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531) at this ``temperature``.
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
    built = _optimizer(model, optimizer, lr, momentum, weight_decay)
    options = {
        "format": FORMAT, "epochs": epochs, "lr": lr, "optimizer": type(built).__name__, "momentum": momentum,
        "weight_decay": weight_decay, "warmup": warmup, "label_smoothing": label_smoothing, "clip_norm": clip_norm,
        "mixed_precision": mixed_precision, "seed": seed, "steps": steps,
        "teacher": [teacher_share, temperature] if teacher is not None else None,
    }  # fmt: skip
    wrapped, ready = accelerator.prepare(model, built)
    keeper = _Checkpoints(Path(checkpoint_dir), options) if checkpoint_dir is not None else None
    history = History()
    best: dict[str, Tensor] | None = None
    if keeper is not None and resume and (found := keeper.load(model, built)) is not None:
        history, best = found
    elif keeper is not None and accelerator.is_main_process:
        keeper.clear()
    criterion: Loss = loss or nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(accelerator.device).requires_grad_(False).eval()
    total, processes = epochs * steps, accelerator.num_processes
    with (
        _bar(total, title, progress and accelerator.is_main_process) as tell,
        synchronized_batchnorm(model, processes if sync_batchnorm else 1),
    ):
        tell(len(history.epochs) * steps, "")
        for epoch in range(len(history.epochs), epochs):
            began = time.monotonic()
            set_seed(seed + 1 + epoch, device_specific=processes > 1)
            wrapped.train()
            summed, seen = 0.0, 0.0
            for index, (inputs, targets, count) in enumerate(train.epoch(epoch)):
                _set_lr(ready, _rate(epoch * steps + index, total, lr, warmup))
                ready.zero_grad()
                with accelerator.autocast():
                    outputs = wrapped(inputs)
                    value = criterion(outputs, targets)
                    if teacher is not None:
                        with torch.no_grad():
                            wanted = teacher(inputs)
                        value = torch.lerp(value, _distance(outputs, wanted, temperature), teacher_share)
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
                summed, seen = summed + mean * whole, seen + whole
                tell(epoch * steps + index + 1, f"loss {mean:.3f}")
            if processes > 1 and not sync_batchnorm:
                broadcast(list(model.buffers()))
            accuracy = _accuracy(model, validation, accelerator) if validation is not None else None
            history.epochs.append(
                Epoch(epoch + 1, summed / seen, accuracy, _rate((epoch + 1) * steps, total, lr, warmup),
                      time.monotonic() - began)
            )  # fmt: skip
            before = history.accuracy
            if accuracy is None or before is None or accuracy >= before:
                history.best = epoch + 1
                best = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
            if keeper is not None and accelerator.is_main_process:
                keeper.save(model, built, history, best or {})
            accelerator.wait_for_everyone()
    if best is not None:
        model.load_state_dict(best)
    # Mixed precision had put a wrapper around the model's forward.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    model.eval()
    return history


def _distance(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened answers, per sample; the factor keeps gradients at the size of the other loss's."""
    ours, theirs = (functional.log_softmax(logits.float() / temperature, dim=1) for logits in (outputs, wanted))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


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


def _rate(step: int, total: int, lr: float, warmup: float) -> float:
    """Learning rate at ``step``: a straight rise, then half a cosine down to 0."""
    rise = round(warmup * total)
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


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


class _Checkpoints:
    """``DIR/epoch-NNNN/`` {model, optimizer, best}.safetensors and state.json: whole, or not there (renamed last)."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-????")) if self.folder.is_dir() else []

    def clear(self) -> None:
        for old in self._found():
            shutil.rmtree(old)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, history: History, best: dict[str, Tensor]
    ) -> None:
        number = len(history.epochs)
        aside, final = self.folder / f"epoch-{number:04d}.partial", self.folder / f"epoch-{number:04d}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            tensors, scalars = _flatten(optimizer.state_dict()["state"])
            save_file(_contiguous(model.state_dict()), aside / "model.safetensors")
            save_file(_contiguous(best), aside / "best.safetensors")
            save_file(tensors, aside / "optimizer.safetensors")
            state = {
                "options": self.options, "epochs": [asdict(epoch) for epoch in history.epochs], "best": history.best,
                "optimizer": scalars,
            }  # fmt: skip
            (aside / "state.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{final}: the checkpoint cannot be written ({error.strerror or error})") from error
        for old in self._found():
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[History, dict[str, Tensor]] | None:
        """Put the newest checkpoint into model and optimizer. Raises UserError if it is broken or another run's."""
        found = self._found()
        if not found:
            return None
        newest = found[-1]
        try:
            state = json.loads((newest / "state.json").read_text())
            different = [key for key, value in self.options.items() if state["options"].get(key) != value]
            if different:
                said = ", ".join(f"{key} was {state['options'].get(key)!r}" for key in different)
                raise UserError(
                    f"{newest} is of a run with other options ({said}): give another folder, or resume=False"
                )
            model.load_state_dict(load_file(newest / "model.safetensors"))
            current = optimizer.state_dict()
            current["state"] = _unflatten(load_file(newest / "optimizer.safetensors"), state["optimizer"])
            optimizer.load_state_dict(current)
            history = History([Epoch(**epoch) for epoch in state["epochs"]], state["best"])
            return history, load_file(newest / "best.safetensors")
        except UserError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()
            raise UserError(
                f"{newest}: not a checkpoint of this model ({line[0] if line else type(error).__name__}): "
                "give another folder, or resume=False"
            ) from error


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _flatten(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and plain values, both under "index.name"."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                values[f"{index}.{name}"] = value
    return tensors, values


def _unflatten(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *values.items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return state


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
