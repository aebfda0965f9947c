"""Second-order pruning of a whole network: layer after layer, each on the inputs that the pruned ones before it give.

The network is a `Chain`: its operators in an order in which every layer to be pruned begins a stage. Two copies of
every value that is still needed are held for all calibration inputs, the dense model's and the pruned one's, so each
stage runs once for each and nothing is computed twice. Where a layer's output is added to something computed earlier (a
residual block), the layer also makes up for what pruning did to that other operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, Floats
from colonnade.sparsify.arrays import Arrays
from colonnade.sparsify.held import Store
from colonnade.sparsify.moments import Damping
from colonnade.sparsify.samples import SAMPLES_A_COLUMN, Layer, Samples, Values, gather, rectified, usable_scale
from colonnade.sparsify.second_order import ROUNDS, Solution, choose_damping, solve
from colonnade.sparsify.select import as_matrix, from_matrix

# Bytes of calibration values that are held in memory; the rest waits in files. With the matrices of large layers
# (K = 4,608) a process stays below 4 GB; those of larger ones take from these bytes, all but a quarter of them.
MEMORY, LARGE, MATRICES = 1 << 30, 4608, 5
# How much of the spread of its outputs a layer before a ReLU is given back (see `second_order.Solution.spread`).
SPREAD = 1.0
# How often a layer before a ReLU is fitted anew (see `samples.rectified`).
REFITS = 2


class Chain(Protocol):
    """A network as stages: stage 0 is everything before the first layer, stage i > 0 begins with layers[i - 1]."""

    @property
    def arrays(self) -> Arrays: ...

    @property
    def layers(self) -> Sequence[Layer]: ...

    def inputs(self) -> Sequence[Values]:
        """The calibration inputs, batch by batch."""
        ...

    def run(self, stage: int, values: Values) -> Values:
        """Run a stage; returns every value that later stages or the caller need, with those that were passed on."""
        ...

    def assign(self, layer: Layer, weight: Floats, bias: Floats) -> None:
        """Give a layer new weights (shape as layer.weight), and add `bias` [OC] to its (unscaled) output."""
        ...


@dataclass(frozen=True)
class Options:
    """Settings of the second-order method; see `second_order.solve`, `samples.rectified` (refits) and
    `second_order.Solution.spread`."""

    similar_rows: bool = True
    damping: float | None = None
    rounds: int = ROUNDS
    refits: int = REFITS
    spread: float = SPREAD
    samples: int = SAMPLES_A_COLUMN
    seed: int = 0
    memory: int = MEMORY


@dataclass(frozen=True, eq=False)
class LayerResult:
    """explained: share of the wanted outputs' variance that the pruned layer can reproduce on its pruned inputs;
    damping, alike: that were used (`second_order.Damping`; means over convolution groups)."""

    layer: Layer
    mask: npt.NDArray[np.bool_]
    tiles: int
    explained: float
    damping: float
    alike: float


def prune_chain(
    chain: Chain,
    patterns: Mapping[str, ColumnPattern | None],
    options: Options | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[LayerResult]:
    """Prune the layers of a chain, in its order, and leave it with their new weights.

    patterns: of each layer, by name; a layer that is not named or has None keeps all columns and is fitted anew.
    progress: hears (layers done, layers in all, name) before every layer.

    Raises UserError for calibration inputs that are none or hold NaN or infinity.
    """
    options = options or Options()
    given = chain.inputs()
    if not given:
        raise UserError("calibration holds no input: expected at least one batch of the model's inputs")
    store = Store(chain.arrays, room(options.memory, chain.layers), len(given))
    try:
        return _prune(chain, given, patterns, options, store, progress)
    finally:
        store.close()


def room(memory: int, layers: Sequence[Layer]) -> int:
    """What of `memory` bytes is left for values beside the matrices of these layers."""
    most = max((layer.columns for layer in layers), default=0)
    return max(memory - 4 * MATRICES * max(most**2 - LARGE**2, 0), memory // 4)


def _prune(
    chain: Chain,
    given: Sequence[Values],
    patterns: Mapping[str, ColumnPattern | None],
    options: Options,
    store: Store,
    progress: Callable[[int, int, str], None] | None,
) -> list[LayerResult]:
    dense = [store.put_all(chain.run(0, batch), {}) for batch in given]
    # Before the first pruned layer both are the same.
    pruned = [dict(batch) for batch in dense]
    results = []
    for at, layer in enumerate(chain.layers):
        if progress:
            progress(at, len(chain.layers), layer.name)
        pattern = patterns.get(layer.name) or ColumnPattern(0.0, tile=max(len(layer.weight), 1))
        samples = Samples.of(store, layer, dense, pruned, options.samples, options.seed)
        weight, bias, result = prune_layer(samples, pattern, options)
        del samples
        results.append(result)
        for index, batch in enumerate(dense):
            dense[index] = advance(chain, store, at + 1, batch)
        chain.assign(layer, weight, bias)
        for index, batch in enumerate(pruned):
            pruned[index] = advance(chain, store, at + 1, batch)
    return results


def advance(chain: Chain, store: Store, stage: int, batch: Values) -> Values:
    """Run a stage on values that are held in `store`; what comes of it is held there too."""
    opened = {name: (held, store.get(held)) for name, held in batch.items()}
    return store.put_all(chain.run(stage, {name: value for name, (_, value) in opened.items()}), opened)


def prune_layer(samples: Samples, pattern: ColumnPattern, options: Options) -> tuple[Floats, Floats, LayerResult]:
    """New weight and added bias of one layer.

    Its damping is chosen on a quarter of the batches; the fit uses all of them.
    """
    layer, arrays = samples.layer, samples.store.arrays
    scale = usable_scale(layer)
    matrices = np.split(as_matrix(layer.weight) * scale[:, None], layer.groups)
    batches = len(samples.dense)
    cut = batches if options.damping is not None else -(-3 * batches // 4)
    refits = options.refits if layer.rectifier is not None and layer.intercept and samples.follows() else 0
    if refits:
        samples = samples.keep()
    moments = gather(samples.part(0, cut))
    dampings = [Damping() if options.damping is None else Damping(options.damping)] * layer.groups
    if cut < batches:
        fresh = gather(samples.part(cut, batches))
        dampings = [
            choose_damping(matrix, known, new, pattern, arrays, intercept=layer.intercept, taps=layer.taps)
            for matrix, known, new in zip(matrices, moments, fresh, strict=True)
        ]
        moments = [known.plus(new) for known, new in zip(moments, fresh, strict=True)]
        del fresh
    found = [
        solve(
            matrix, sums, pattern, arrays, similar_rows=options.similar_rows, intercept=layer.intercept,
            damping=damping, taps=layer.taps, rounds=options.rounds, refits=refits > 0,
        )
        for matrix, sums, damping in zip(matrices, moments, dampings, strict=True)
    ]  # fmt: skip
    del moments
    if layer.rectifier is not None and layer.intercept:
        for _ in range(refits):
            wanted = rectified(samples, layer.rectifier, [f.weights for f in found], [f.bias for f in found])
            found = [solution.towards(*sums) for solution, sums in zip(found, wanted, strict=True)]
        found = [solution.spread(options.spread) for solution in found]
    weight, bias = unscaled(layer, found)
    mask = np.concatenate([solution.mask for solution in found])
    result = LayerResult(
        layer, from_matrix(mask, layer.weight.shape), sum(len(f.rows) for f in found),
        float(np.mean([f.explained for f in found])), float(np.mean([d.plain for d in dampings])),
        float(np.mean([d.alike for d in dampings])),
    )  # fmt: skip
    return weight, bias, result


def unscaled(layer: Layer, found: Sequence[Solution]) -> tuple[Floats, Floats]:
    """The layer's weight and the bias to be added to its output, from a solution for the scaled one of each group."""
    scale = usable_scale(layer)
    weights, bias = (np.concatenate(parts) for parts in zip(*((f.weights, f.bias) for f in found), strict=True))
    weight = from_matrix(weights / scale[:, None], layer.weight.shape).astype(np.float32)
    return weight, np.asarray(bias / scale, np.float32)
