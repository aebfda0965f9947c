"""The exponential moving average of a model's weights and statistics while it is trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average:
    """`model` holds the average; masks and counters are those of the trained model.

    decay: share of the old average that stays at a step; in the first steps less, (1 + n) / (10 + n), so that the
    weights of the beginning do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        # other buffers are what they are: masks, tables, infinities
        self.averaged = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.averaged |= {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        for name, mine in self.model.state_dict().items():
            value = state[name].detach()
            if name in self.averaged and mine.is_floating_point():
                mine.lerp_(value.to(mine.dtype), share)
            else:
                mine.copy_(value)

    @torch.no_grad()
    def take_masks(self, model: nn.Module) -> None:
        """Take over the masks that training ended with."""
        state = model.state_dict()
        for name, mine in self.model.state_dict().items():
            if not mine.is_floating_point():
                mine.copy_(state[name])

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state)
        self.updates = updates
