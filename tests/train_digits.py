"""A training script as a user writes one, for `accelerate launch`: digits, pruned, three epochs; writes what came out.

python train_digits.py OUT.json float32|float64 [DIR for checkpoints]     ($RICH: with everything that finetune can do)
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from torch.utils.data import DataLoader, TensorDataset

import colonnade as cn
from colonnade.demo.network import Shifted, SmallResNet, digits
from colonnade.sparsify.masks import masks


def main() -> None:
    torch.set_num_threads(1)
    (images, labels), test = digits()
    kind = getattr(torch, sys.argv[2])
    torch.manual_seed(0)
    model = SmallResNet((16, 16, 24)).to(kind)
    options = {}
    if rich := "RICH" in os.environ:
        options = {"teacher": copy.deepcopy(model), "block_weight": 0.5, "ema": 0.9, "rechoose": cn.Rechoose(ramp=0.4)}
    cn.sparsify_(model, cn.ColumnPattern(0.5), images[:1].to(kind), movable=rich)
    zeros = {name: ~mask.mask for name, mask in masks(model)}
    # 153 of 32: the last batch has 25, shared out as 13 and 12; 97 test images are odd too
    train = DataLoader(Shifted(images[:153].to(kind), labels[:153]), 32, shuffle=True)
    history = cn.finetune(
        model, train, DataLoader(TensorDataset(test[0][:97].to(kind), test[1][:97]), 40), epochs=3, lr=0.005,
        progress=False, checkpoint_dir=sys.argv[3] if len(sys.argv) > 3 else None, **options,
    )  # fmt: skip
    if rich:
        zeros = {name: ~mask.mask for name, mask in masks(model)}
    returned = sum(int((model.get_submodule(name[:-7]).weight[gone] != 0).sum()) for name, gone in zeros.items())
    state = accelerate.PartialState()
    if state.is_main_process:
        result = {
            "processes": state.num_processes,
            "loss": [epoch.loss for epoch in history.epochs],
            "accuracy": [epoch.accuracy for epoch in history.epochs],
            "returned": returned,
            "weights": {key: value.double().flatten().tolist()[:100] for key, value in model.state_dict().items()},
        }
        Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
