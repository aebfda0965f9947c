"""Named recipes: arguments of `sparsify_` and `finetune` that belong together.

``short`` and ``long`` are starting points of this project. ``paper`` follows the scripts that the authors of "Efficient
Column-Wise N:M Pruning on RISC-V CPU" (arXiv 2507.17301) published with their compiler: one-shot magnitude pruning in
tiles of neighbouring rows, masks frozen, AdamW with its default weight decay, a tenth of the rate every 30 epochs, 200
epochs of cross entropy alone; the first stage of a ResNet stays dense. Their batch is 32 a GPU; how many GPUs is not
said, 8 are taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colonnade.errors import UserError
from colonnade.sparsify.rechoose import Rechoose


@dataclass(frozen=True)
class Preset:
    """finetune: arguments of `finetune`, but for teacher and loaders; prune: of `sparsify_`, but for the pattern;
    batch: samples of a step, all processes together; teaches: whether the dense model is the teacher."""

    finetune: Mapping[str, Any]
    prune: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 128

    @property
    def teaches(self) -> bool:
        """Whether the dense model is learned from."""
        return bool(self.finetune.get("teacher_share") or self.finetune.get("block_weight"))


PRESETS: dict[str, Preset] = {
    "short": Preset({
        "epochs": 5, "lr": 0.05, "optimizer": "sgd", "weight_decay": 1e-4, "warmup": 0.05, "teacher_share": 0.9,
        "temperature": 4.0, "block_weight": 0.5, "ema": 0.99,
    }),
    "long": Preset({
        "epochs": 100, "lr": 0.1, "optimizer": "sgd", "weight_decay": 1e-4, "warmup": 0.05, "label_smoothing": 0.1,
        "teacher_share": 0.5, "ema": 0.999, "rechoose": Rechoose(ramp=0.3, until=0.8),
    }, batch=256),
    "paper": Preset({
        "epochs": 200, "lr": 1e-4, "optimizer": "adamw", "weight_decay": 0.01, "decay_epochs": 30, "clip_norm": 1.0,
        "teacher_share": 0.0, "sync_batchnorm": False,
    }, {
        "score": "l1", "group_rows": False,
        "exclude": (r"layer1\..*", r"layer2\.0\.conv1", r"layer2\.0\.downsample\..*"),
    }, batch=256),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The recipe called `name`. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
