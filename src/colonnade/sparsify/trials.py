"""One layer alone, pruned by the second-order method to several sparsities: what that method makes of it.

It is done as `sequential.prune_layer` does it, on the dense model's inputs, but fitted to a first part of the
calibration inputs only. The others show what the pruned layer does not give, the error; so a layer that a few hundred
inputs do not determine counts as what it is. The divergence of the answers is nearly in proportion to the error, so it
is measured at two sparsities, and the ratio makes nats of the errors at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.held import Store
from colonnade.sparsify.samples import Layer, Samples, Values, gather, usable_scale
from colonnade.sparsify.second_order import choose_damping, solve_each, unexplained
from colonnade.sparsify.select import as_matrix
from colonnade.sparsify.sequential import MEMORY, SPREAD, Chain, advance, room, unscaled
from colonnade.sparsify.transformed import variant

GROUPED_FOR = 0.5  # the sparsity (or the next one there is) that rows are grouped and the damping is chosen for
ANSWERED = (0.5, 0.75)  # where the answers are looked at, or next to it
# Tiles of so many rows are all pruned; of smaller ones as many as there would be of these, but so many at least.
USUAL, ENOUGH = 8, 32
# Tiles of transformed weights, which have up to four times the columns and so take the more.
FEW = 8
# Enough to tell sparsities apart; the pruning itself takes more of all three.
ROUNDS = 4
EXCHANGES = 4
SAMPLES_A_COLUMN = 8


@dataclass(frozen=True, eq=False)
class Trial:
    """A pruned layer. bias: [OC], what is added to its (unscaled) output; error: share of the outputs' variance that it
    does not give on inputs it was not fitted to; share: of its rows that are pruned, the others are dense."""

    pattern: ColumnPattern
    weight: Floats
    bias: Floats
    error: float
    share: float = 1.0


@contextmanager
def dense_walk(
    chain: Chain, given: Sequence[Values], progress: Callable[[float, str], None] | None
) -> Iterator[Iterator[tuple[int, Layer, Store, Sequence[Values]]]]:
    """Every layer of a model with its number and the model's values before it, held in a store, batch by batch.

    progress: hears (share done, layer).
    """
    store = Store(chain.arrays, room(MEMORY, chain.layers), len(given))

    def steps() -> Iterator[tuple[int, Layer, Store, Sequence[Values]]]:
        values = [store.put_all(chain.run(0, batch), {}) for batch in given]
        for at, layer in enumerate(chain.layers):
            if progress:
                progress(at / len(chain.layers), layer.name)
            yield at, layer, store, values
            if at + 1 < len(chain.layers):
                for number, batch in enumerate(values):
                    values[number] = advance(chain, store, at + 1, batch)

    try:
        yield steps()
    finally:
        store.close()


def first_part(batches: int) -> int:
    """How many of so many batches, two or more, layers are fitted to."""
    return min(-(-3 * batches // 4), batches - 1)


def losses(
    store: Store,
    layer: Layer,
    values: Sequence[Values],
    patterns: Sequence[ColumnPattern],
    answered: Callable[[Trial], float],
) -> dict[ColumnPattern, float]:
    """What each pattern costs the answers.

    values:   the dense model's, held in `store`, batch by batch.
    patterns: of one M; some, with m of a transform, ask for the layer's transformed weights, others do not.
    answered: measures the divergence with the layer as it is in a trial.

    Raises UserError for inputs that hold NaN or infinity.
    """
    found = trials(store, layer, values, [p for p in patterns if not p.winograd])
    most = max(trial.share for trial in found)
    ratios: dict[int, float] = {}
    for tile in sorted({trial.pattern.tile for trial in found if trial.share == most}):
        mine = [trial for trial in found if trial.pattern.tile == tile]
        looked_at = {_nearest([trial.pattern for trial in mine], sparsity) for sparsity in ANSWERED}
        seen = [trial for trial in mine if trial.pattern in looked_at]
        ratios[tile] = sum(answered(trial) for trial in seen) / max(sum(trial.error for trial in seen), 1e-30)
    # a part of the rows moves the answers too little to tell: an error of them costs what it does in another tile
    usual = ratios[min(ratios)]
    for name in sorted({p.winograd for p in patterns if p.winograd}):
        found += trials(store, variant(layer, name), values, [p for p in patterns if p.winograd == name])
    return {t.pattern: ratios.get(t.pattern.tile, usual) * t.error / t.share for t in found}


def trials(store: Store, layer: Layer, values: Sequence[Values], patterns: Sequence[ColumnPattern]) -> list[Trial]:
    """The layer with each pattern, tile by tile, each sparser than the last."""
    arrays, cut = store.arrays, first_part(len(values))
    samples = Samples.of(store, layer, values, values, SAMPLES_A_COLUMN, 0)
    known, fresh = gather(samples.part(0, cut)), gather(samples.part(cut, len(values)))
    scale = usable_scale(layer)
    matrices = np.split(as_matrix(layer.weight) * scale[:, None], layer.groups)
    found = []
    for tile in sorted({pattern.tile for pattern in patterns}):
        rising = sorted((p for p in patterns if p.tile == tile), key=lambda pattern: pattern.sparsity)
        middle = _nearest(rising, GROUPED_FOR)
        every = max(min(USUAL // tile, len(matrices[0]) // tile // ENOUGH), 1)
        if middle.winograd:
            every = max(len(matrices[0]) // tile // FEW, 1)
        groups = []
        for matrix, old, new in zip(matrices, known, fresh, strict=True):
            damping = choose_damping(matrix, old, new, middle, arrays, intercept=layer.intercept, taps=layer.taps)
            groups.append(solve_each(
                matrix, old, rising, arrays, grouped_for=middle, intercept=layer.intercept, damping=damping,
                taps=layer.taps, rounds=ROUNDS, exchanges=EXCHANGES, every=every,
            ))  # fmt: skip
        for pattern, parts in zip(rising, zip(*groups, strict=True), strict=True):
            if layer.rectifier is not None and layer.intercept:
                parts = tuple(part.spread(SPREAD) for part in parts)
            errors = [unexplained(part.weights, part.bias, new, arrays) for part, new in zip(parts, fresh, strict=True)]
            weight, bias = unscaled(layer, parts)
            share = sum(len(rows) for part in parts for rows in part.rows) / len(weight)
            found.append(Trial(pattern, weight, bias, max(float(np.mean(errors)), 0.0), share))
    return found


def _nearest(patterns: Sequence[ColumnPattern], sparsity: float) -> ColumnPattern:
    return min(patterns, key=lambda pattern: abs(pattern.sparsity - sparsity))
