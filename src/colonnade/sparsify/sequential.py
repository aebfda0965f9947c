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
from colonnade.sparsify.arrays import Array, Arrays
from colonnade.sparsify.held import Store
from colonnade.sparsify.second_order import DAMPING, ROUNDS, Moments, choose_damping, solve
from colonnade.sparsify.select import as_matrix, from_matrix

# Samples (pixels of calibration images) a column of the regression; more is slower and hardly better.
SAMPLES_A_COLUMN = 16
LEAST_SAMPLES = 32_768
# Samples that are multiplied at once: bounds the memory of the gathered inputs.
BLOCK_BYTES = 128 << 20
# Bytes of calibration values that are held in memory; the rest waits in files. With the matrices of the largest layers
# (K = 4,608) a process stays below 4 GB.
MEMORY = 1 << 30


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer to be pruned.

    weight:  [OC, IC/groups, *kernel] (kernel of 0 to 2 axes); strides, dilation and padding (top, left, bottom, right)
             belong to two axes.
    input:   name of the value it reads; channels are its axis 1 for a convolution, its last for a matrix product.
    scale:   [OC]: its output is multiplied by this before anything else happens (BatchNorm), else None.
    residual: the value, known before this layer runs, that is added to the scaled output; None: nothing is.
    intercept: whether a bias can be added to the output.
    """

    name: str
    weight: Floats
    input: str
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    scale: Floats | None = None
    residual: str | None = None
    intercept: bool = True

    @property
    def columns(self) -> int:
        return int(np.prod(self.weight.shape[1:]))


Values = dict[str, Array]


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
    """Settings of the second-order method; see `second_order.solve`."""

    similar_rows: bool = True
    damping: float | None = None
    rounds: int = ROUNDS
    samples: int = SAMPLES_A_COLUMN
    seed: int = 0
    memory: int = MEMORY


@dataclass(frozen=True, eq=False)
class LayerResult:
    """explained: share of the wanted outputs' variance that the pruned layer reproduces on its pruned inputs;
    damping: that was used (the mean over convolution groups)."""

    layer: Layer
    mask: npt.NDArray[np.bool_]
    tiles: int
    explained: float
    damping: float


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
    store = Store(chain.arrays, options.memory, len(given))
    try:
        return _prune(chain, given, patterns, options, store, progress)
    finally:
        store.close()


def _prune(
    chain: Chain,
    given: Sequence[Values],
    patterns: Mapping[str, ColumnPattern | None],
    options: Options,
    store: Store,
    progress: Callable[[int, int, str], None] | None,
) -> list[LayerResult]:
    def advance(stage: int, batch: Values) -> Values:
        opened = {name: (held, store.get(held)) for name, held in batch.items()}
        return store.put_all(chain.run(stage, {name: value for name, (_, value) in opened.items()}), opened)

    dense = [store.put_all(chain.run(0, batch), {}) for batch in given]
    # Before the first pruned layer both are the same.
    pruned = [dict(batch) for batch in dense]
    results = []
    for at, layer in enumerate(chain.layers):
        if progress:
            progress(at, len(chain.layers), layer.name)
        pattern = patterns.get(layer.name) or ColumnPattern(0.0, tile=max(len(layer.weight), 1))
        known, fresh = _gathered(store, layer, dense, pruned, options)
        weight, bias, result = prune_layer(chain.arrays, layer, known, fresh, pattern, options)
        results.append(result)
        for index, batch in enumerate(dense):
            dense[index] = advance(at + 1, batch)
        chain.assign(layer, weight, bias)
        for index, batch in enumerate(pruned):
            pruned[index] = advance(at + 1, batch)
    return results


def _gathered(
    store: Store, layer: Layer, dense: Sequence[Values], pruned: Sequence[Values], options: Options
) -> tuple[list[Moments], list[Moments]]:
    """Moments of three quarters of the batches, and those of the others if a damping is to be chosen."""
    images = sum(len(batch[layer.input]) for batch in dense)
    cut = len(dense) if options.damping is not None else -(-3 * len(dense) // 4)
    both = [gather(store, layer, dense[part], pruned[part], options, images) for part in (slice(cut), slice(cut, None))]
    return both[0], both[1] if cut < len(dense) else []


def prune_layer(
    arrays: Arrays,
    layer: Layer,
    moments: Sequence[Moments],
    fresh: Sequence[Moments],
    pattern: ColumnPattern,
    options: Options,
) -> tuple[Floats, Floats, LayerResult]:
    """New weight and added bias of one layer, from the moments of each of its convolution groups."""
    matrix = as_matrix(layer.weight) * _usable(layer)[:, None]
    rows = len(matrix) // layer.groups
    solved, bias, mask = np.zeros_like(matrix), np.zeros(len(matrix), np.float32), np.zeros(matrix.shape, bool)
    tiles, explained, used = 0, 0.0, 0.0
    for group, sums in enumerate(moments):
        part = slice(group * rows, (group + 1) * rows)
        damping = DAMPING if options.damping is None else options.damping
        if fresh:
            damping = choose_damping(matrix[part], sums, fresh[group], pattern, arrays, intercept=layer.intercept)
            sums = sums.plus(fresh[group])
        found = solve(
            matrix[part], sums, pattern, arrays, similar_rows=options.similar_rows, intercept=layer.intercept,
            damping=damping, rounds=options.rounds,
        )  # fmt: skip
        solved[part], bias[part], mask[part] = found.weights, found.bias, found.mask
        tiles += len(found.rows)
        explained += found.explained / len(moments)
        used += damping / len(moments)
    # Back to the unscaled output.
    scale = _usable(layer)
    weight = from_matrix(solved / scale[:, None], layer.weight.shape).astype(np.float32)
    result = LayerResult(layer, from_matrix(mask, layer.weight.shape), tiles, explained, used)
    return weight, bias / scale, result


def _usable(layer: Layer) -> Floats:
    """The scale of each row; rows whose output is scaled to (almost) nothing are fitted as they are."""
    if layer.scale is None:
        return np.ones(len(layer.weight), np.float32)
    scale = np.asarray(layer.scale, np.float32)
    return np.where(np.abs(scale) > 1e-3 * np.abs(scale).max(initial=1e-30), scale, 1).astype(np.float32)


def gather(
    store: Store,
    layer: Layer,
    dense: Sequence[Values],
    pruned: Sequence[Values],
    options: Options,
    images: int | None = None,
) -> list[Moments]:
    """The moments of a layer, one for each convolution group, over sampled positions of all calibration inputs."""
    arrays = store.arrays
    matrix = as_matrix(layer.weight)
    scale = _usable(layer)
    rows, columns = len(matrix) // layer.groups, matrix.shape[1]
    moments = [Moments.empty(arrays, rows, columns) for _ in range(layer.groups)]
    random = np.random.default_rng(options.seed)
    images = images or sum(len(batch[layer.input]) for batch in dense)
    wanted = -(-max(options.samples * columns, LEAST_SAMPLES) // max(images, 1))
    weights = [
        arrays.load(matrix[g * rows : (g + 1) * rows] * scale[g * rows : (g + 1) * rows, None])
        for g in range(layer.groups)
    ]
    for before, after in zip(dense, pruned, strict=True):
        same = before[layer.input] is after[layer.input]
        x = arrays.single(store.get(before[layer.input]))
        x_pruned = x if same else arrays.single(store.get(after[layer.input]))
        shift = None
        if layer.residual is not None and before[layer.residual] is not after[layer.residual]:
            shift = arrays.single(store.get(before[layer.residual])) - arrays.single(store.get(after[layer.residual]))
            if not _same_shape(layer, x.shape, shift.shape):
                shift = None  # it is spread over the output; nothing a weight could follow
        picks = _positions(layer, x.shape, wanted, random)
        block = max(1, BLOCK_BYTES // (4 * 3 * columns * layer.groups))
        for first in range(0, len(picks[0]), block):
            chosen = tuple(arrays.index(part[first : first + block]) for part in picks)
            inputs = _samples(arrays, layer, x_pruned, chosen)
            wants = inputs if same else _samples(arrays, layer, x, chosen)
            moved = None if shift is None else _at(layer, shift, chosen)
            for group in range(layer.groups):
                y = wants[group] @ weights[group].T
                if moved is not None:
                    y = y + moved[:, group * rows : (group + 1) * rows]
                moments[group].add(inputs[group], y, arrays)
    if not all(np.isfinite(float(part.gram.sum())) for part in moments):
        raise UserError(f"layer {layer.name}: its calibration inputs hold NaN or infinity")
    return moments


def _same_shape(layer: Layer, inputs: Sequence[int], added: Sequence[int]) -> bool:
    """Whether what is added to a layer's output has the output's own shape."""
    rows = len(layer.weight)
    if not _is_map(layer):
        return tuple(added) == (*inputs[:-1], rows)
    size = _output(layer, inputs)
    return tuple(added) == (inputs[0], rows, *(size if len(inputs) == 4 else size[1:]))


def _is_map(layer: Layer) -> bool:
    return layer.weight.ndim > 2


def _positions(
    layer: Layer, shape: Sequence[int], wanted: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], ...]:
    """Sampled positions, `wanted` of each input at most: (input, output row, output column), or rows of a product."""
    if not _is_map(layer):
        inner = int(np.prod(shape[1:-1]))
        count = min(inner, wanted)
        picked = np.concatenate([np.sort(random.permutation(inner)[:count]) + inner * i for i in range(shape[0])])
        return (picked.astype(np.int64),)
    height, width = _output(layer, shape)
    pixels = height * width
    count = min(pixels, wanted)
    picked = np.concatenate([np.sort(random.permutation(pixels)[:count]) for _ in range(shape[0])]).astype(np.int64)
    return np.repeat(np.arange(shape[0]), count), picked // width, picked % width


def _kernel(layer: Layer) -> tuple[int, int]:
    kernel = layer.weight.shape[2:]
    return (1, kernel[0]) if len(kernel) == 1 else (kernel[0], kernel[1])


def _output(layer: Layer, shape: Sequence[int]) -> tuple[int, int]:
    top, left, bottom, right = layer.padding
    (kh, kw), (sh, sw), (dh, dw) = _kernel(layer), layer.strides, layer.dilation
    size = (1, shape[2]) if len(shape) == 3 else (shape[2], shape[3])
    return (size[0] + top + bottom - dh * (kh - 1) - 1) // sh + 1, (
        size[1] + left + right - dw * (kw - 1) - 1
    ) // sw + 1


def _samples(arrays: Arrays, layer: Layer, x: Array, picks: tuple[Array, ...]) -> list[Array]:
    """Inputs at the sampled positions, [n, K] for each group, K in the order (kh, kw, ic)."""
    if not _is_map(layer):
        flat = x.reshape(-1, x.shape[-1])[picks[0]]
        return [flat]
    if x.ndim == 3:
        x = x[:, :, None]
    x = arrays.pad(x, *layer.padding) if any(layer.padding) else x
    image, row, column = picks
    kh, kw = _kernel(layer)
    (sh, sw), (dh, dw) = layer.strides, layer.dilation
    taps = [x[image, :, row * sh + i * dh, column * sw + j * dw] for i in range(kh) for j in range(kw)]
    if layer.groups == 1:
        return [taps[0] if len(taps) == 1 else arrays.join(taps, 1)]
    width = x.shape[1] // layer.groups
    return [
        arrays.join([tap[:, group * width : (group + 1) * width] for tap in taps], 1) for group in range(layer.groups)
    ]


def _at(layer: Layer, maps: Array, picks: tuple[Array, ...]) -> Array:
    """Values of the output's shape at the sampled positions, [n, OC]."""
    if not _is_map(layer):
        return maps.reshape(-1, maps.shape[-1])[picks[0]]
    if maps.ndim == 3:
        maps = maps[:, :, None]
    return maps[picks[0], :, picks[1], picks[2]]
