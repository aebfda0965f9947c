"""What a training run did, and its checkpoints: safetensors and JSON, data and no code."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from colonnade.errors import UserError
from colonnade.sparsify.averaging import Average
from colonnade.sparsify.masks import ColumnMask


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


class Checkpoints:
    """``DIR/epoch-NNNN/``: {model, optimizer, best, average}.safetensors and state.json; whole, or not there."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-????")) if self.folder.is_dir() else []

    def clear(self) -> None:
        """Remove what another run left."""
        for old in self._found():
            shutil.rmtree(old)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        history: History,
        best: dict[str, Tensor],
        average: Average | None = None,
    ) -> None:
        """One whole epoch, in the place of the one before. Raises UserError where it cannot be written."""
        number = len(history.epochs)
        aside, final = self.folder / f"epoch-{number:04d}.partial", self.folder / f"epoch-{number:04d}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            tensors, scalars = _flatten(optimizer.state_dict()["state"])
            save_file(_contiguous(model.state_dict()), aside / "model.safetensors")
            save_file(_contiguous(best), aside / "best.safetensors")
            save_file(tensors, aside / "optimizer.safetensors")
            if average is not None:
                save_file(_contiguous(average.model.state_dict()), aside / "average.safetensors")
            state = {
                "updates": average.updates if average is not None else 0, "options": self.options,
                "epochs": [asdict(epoch) for epoch in history.epochs], "best": history.best,
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

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
    ) -> tuple[History, dict[str, Tensor]] | None:
        """Put the newest checkpoint into model, optimizer and average. Raises UserError for one of another run."""
        found = self._found()
        if not found:
            return None
        newest = found[-1]
        try:
            state = json.loads((newest / "state.json").read_text())
            different = [key for key, value in self.options.items() if state["options"].get(key) != value]
            if different:
                said = ", ".join(f"{key} was {state['options'].get(key)!r}" for key in different)
                raise UserError(f"{newest} is of a run with other options ({said}): remove it, or give another folder")
            stored = load_file(newest / "model.safetensors")
            for name, part in model.named_modules():  # masks that may move have their pattern among the options
                mask = stored.get(f"{name}.mask")
                if type(part) is ColumnMask and mask is not None and not torch.equal(mask, part.mask.cpu()):
                    where = name.split(".parametrizations")[0]
                    raise UserError(
                        f"{newest} is of a run with other masks (of {where}): remove it, or give another folder"
                    )
            model.load_state_dict(stored)
            current = optimizer.state_dict()
            current["state"] = _unflatten(load_file(newest / "optimizer.safetensors"), state["optimizer"])
            optimizer.load_state_dict(current)
            if average is not None:
                average.load(load_file(newest / "average.safetensors"), state["updates"])
            history = History([Epoch(**epoch) for epoch in state["epochs"]], state["best"])
            return history, load_file(newest / "best.safetensors")
        except UserError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()
            raise UserError(
                f"{newest}: not a checkpoint of this model ({line[0] if line else type(error).__name__}): "
                "remove it, or give another folder"
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
