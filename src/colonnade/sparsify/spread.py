"""The multiply-adds that one sparsity leaves, spread over layers by what each of them loses alone.

Between the sparsities whose loss is known its logarithm is taken as straight; below the first the loss is a power of
the sparsity, as between the first two, the third at most. A knapsack (allocate.py) picks one sparsity a layer: the
smallest sum of losses among those that leave as many multiply-adds as the same sparsity everywhere would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from colonnade.pattern import ColumnPattern
from colonnade.sparsify.allocate import Choice, allocate

MEASURED = (0.5, 0.75, 0.875)  # sparsities whose loss is measured, by magnitude
FITTED = (0.25, 0.5, 0.75, 0.875)  # and by the second-order method
STEP = 1 / 16  # between the sparsities that a layer may get, with whole rows as groups
MOST = MEASURED[-1]
IMAGES = 32  # whose answers are looked at
LEAST_LOSS = 1e-4  # nats: what half precision makes of nothing


def spread(
    losses: Mapping[str, Mapping[float, float]], work: Mapping[str, float], pattern: ColumnPattern
) -> dict[str, ColumnPattern | None]:
    """One pattern a layer, from the loss of each at some sparsities and its multiply-adds when it is dense; layers
    whose work is not there stay dense."""
    steps = 1 / STEP if pattern.group is None else pattern.group
    sparsities = [at / steps for at in range(1, int(steps)) if at / steps <= MOST] + [pattern.sparsity]
    choices = {
        name: [Choice(None, macs, 0.0)]
        + [
            Choice(replace(pattern, sparsity=s), macs * (1 - s), loss_between(losses[name], s))
            for s in sorted(set(sparsities))
        ]
        for name, macs in work.items()
    }
    chosen = allocate(choices, sum(work.values()) * (1 - pattern.sparsity))
    return {name: chosen[name].pattern if name in chosen else None for name in losses}


def loss_between(measured: Mapping[float, float], sparsity: float) -> float:
    """The loss at a sparsity from those at others."""
    known = sorted(measured)
    values = [max(measured[at], LEAST_LOSS) for at in known]
    if sparsity <= known[0]:
        power = np.log(values[1] / values[0]) / np.log(known[1] / known[0])
        return float(values[0] * (sparsity / known[0]) ** np.clip(power, 1, 3))
    return float(np.exp(np.interp(sparsity, known, np.log(values))))
