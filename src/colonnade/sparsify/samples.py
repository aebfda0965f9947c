"""What a layer is, and the samples it is fitted to: its inputs at pixels of the calibration inputs, and what the dense
model has there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError
from colonnade.pattern import Floats
from colonnade.sparsify import transformed
from colonnade.sparsify.arrays import Array, Arrays
from colonnade.sparsify.held import Store
from colonnade.sparsify.moments import Moments
from colonnade.sparsify.select import as_matrix
from colonnade.workload.winograd import SIZES, TAPS, seen

# Samples (pixels of calibration images) a column of the regression; more is slower and hardly better.
SAMPLES_A_COLUMN = 16
LEAST_SAMPLES = 32_768
# Samples that are multiplied at once: bounds the memory of the gathered inputs.
BLOCK_BYTES = 128 << 20
# Of a layer's gathered samples, those that are held for its refits; the others are gathered once more for each.
KEPT_BYTES = 384 << 20


@dataclass(frozen=True, eq=False)
class Rectifier:
    """offset: [OC], what is added to the scaled output (and the residual) before everything below 0 becomes 0, and
    everything above `most` becomes `most`."""

    offset: Floats
    most: float = math.inf


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer to be pruned.

    weight:  [OC, IC/groups, *kernel] (kernel of 0 to 2 axes); strides, dilation and padding (top, left, bottom, right)
             belong to two axes.
    input:   name of the value it reads; channels are its axis 1 for a convolution, its last for a matrix product.
    scale:   [OC]: its output is multiplied by this before anything else happens (BatchNorm), else None.
    residual: the value, known before this layer runs, that is added to the scaled output; None: nothing is.
    intercept: whether a bias can be added to the output.
    rectifier: what the scaled output, and the residual with it, goes through next; None: something else.
    winograd: of a convolution with transformed weights, over `transformed.sizes`, their name in `SIZES`; else "".
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
    rectifier: Rectifier | None = None
    winograd: str = ""

    @property
    def columns(self) -> int:
        return int(np.prod(self.weight.shape[1:]))

    @property
    def taps(self) -> int:
        """Kernel positions; the columns of one follow those of another."""
        return int(np.prod(self.weight.shape[2:]))


Values = dict[str, Array]


def usable_scale(layer: Layer) -> Floats:
    """The scale of each row; rows whose output is scaled to (almost) nothing are fitted as they are."""
    if layer.scale is None:
        return np.ones(len(layer.weight), np.float32)
    scale = np.asarray(layer.scale, np.float32)
    return np.where(np.abs(scale) > 1e-3 * np.abs(scale).max(initial=1e-30), scale, 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Block:
    """Some samples. inputs: x̃ [n, K] of every convolution group in the pruned model; outputs: [n, OC], the dense
    layer's scaled ones without bias or residual; before, after: the residual [n, OC] in the dense and in the pruned
    model (None: there is none that a weight could follow)."""

    inputs: list[Array]
    outputs: Array
    before: Array | None
    after: Array | None

    @property
    def bytes(self) -> int:
        parts = [*self.inputs, self.outputs, self.before, self.after]
        return sum(int(part.nbytes) for part in parts if part is not None)


@dataclass(eq=False)
class _Kept:
    """Blocks by the number of their batch, and the bytes that are still free for more."""

    free: int = 0
    blocks: dict[int, list[Block]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Samples:
    """One layer's samples. dense, pruned: the values of both models, batch by batch, the first of which is number
    `first`; wanted: samples of each input at most. Every walk meets the same pixels of a batch."""

    store: Store
    layer: Layer
    dense: Sequence[Values]
    pruned: Sequence[Values]
    wanted: int
    seed: int = 0
    first: int = 0
    kept: _Kept = field(default_factory=_Kept)

    @classmethod
    def of(
        cls, store: Store, layer: Layer, dense: Sequence[Values], pruned: Sequence[Values], a_column: int, seed: int
    ) -> Samples:
        """With `a_column` samples a column in all."""
        images = sum(len(batch[layer.input]) for batch in dense)
        wanted = -(-max(a_column * layer.columns, LEAST_SAMPLES) // max(images, 1))
        return cls(store, layer, dense, pruned, wanted, seed)

    def part(self, first: int, stop: int) -> Samples:
        """Those of the batches [first, stop)."""
        return replace(self, dense=self.dense[first:stop], pruned=self.pruned[first:stop], first=self.first + first)

    def follows(self) -> bool:
        """Whether what is added to the output, if anything, has the output's own shape: no weight could follow what is
        spread over it."""
        layer = self.layer
        if layer.residual is None:
            return True
        return _same_shape(layer, self.dense[0][layer.input].shape, self.dense[0][layer.residual].shape)

    def weights(self) -> list[Array]:
        """The layer's scaled dense weights [OC, K] of every convolution group."""
        matrix = as_matrix(self.layer.weight) * usable_scale(self.layer)[:, None]
        return [self.store.arrays.load(part) for part in np.split(matrix, self.layer.groups)]

    def keep(self) -> Samples:
        """The same ones, gathered only once as far as memory goes."""
        return replace(self, kept=_Kept(KEPT_BYTES))

    def blocks(self) -> Iterator[Block]:
        """Samples, some at a time."""
        weights = self.weights()
        for number, (before, after) in enumerate(zip(self.dense, self.pruned, strict=True), self.first):
            if number in self.kept.blocks:
                yield from self.kept.blocks[number]
                continue
            found, free = [], self.kept.free
            for block in self._gathered(number, before, after, weights):
                free -= block.bytes
                if free >= 0:
                    found.append(block)
                yield block
            if free >= 0:
                self.kept.blocks[number], self.kept.free = found, free

    def _gathered(self, number: int, before: Values, after: Values, weights: list[Array]) -> Iterator[Block]:
        """Those of one batch."""
        store, layer = self.store, self.layer
        arrays = store.arrays
        followed = layer.residual if self.follows() else None
        same = before[layer.input] is after[layer.input]
        x_pruned, x = store.get(after[layer.input]), store.get(before[layer.input])
        added = [None, None] if followed is None else [store.get(values[followed]) for values in (before, after)]
        picks = _positions(layer, x.shape, self.wanted, np.random.default_rng((self.seed, number)))
        block = max(1, BLOCK_BYTES // (4 * 3 * layer.columns * layer.groups))
        for first in range(0, len(picks[0]), block):
            chosen = tuple(part[first : first + block] for part in picks)
            inputs = _samples(arrays, layer, x_pruned, chosen)
            wants = inputs if same else _samples(arrays, layer, x, chosen)
            parts = [part @ w.T for part, w in zip(wants, weights, strict=True)]
            outputs = parts[0] if len(parts) == 1 else arrays.join(parts, 1)
            there = [None if maps is None else _at(arrays, layer, maps, chosen) for maps in added]
            yield Block(inputs, outputs, there[0], there[1])


def gather(samples: Samples) -> list[Moments]:
    """The moments of a layer, one for each convolution group.

    Raises UserError for inputs that hold NaN or infinity.
    """
    layer, arrays = samples.layer, samples.store.arrays
    rows, columns = len(layer.weight) // layer.groups, layer.columns
    moments = [Moments.empty(arrays, rows, columns) for _ in range(layer.groups)]
    for block in samples.blocks():
        y = block.outputs
        if block.before is not None and block.after is not None:
            y = y + (block.before - block.after)
        for group, inputs in enumerate(block.inputs):
            moments[group].add(inputs, y[:, group * rows : (group + 1) * rows], arrays)
    if not all(np.isfinite(float(part.gram.sum())) for part in moments):
        raise UserError(f"layer {layer.name}: its calibration inputs hold NaN or infinity")
    return moments


def rectified(
    samples: Samples, rectifier: Rectifier, weights: Sequence[Floats], bias: Sequence[Floats]
) -> list[tuple[Array, Array]]:
    """Sums Σ z x̃ᵀ [OC, K] and Σ z [OC], of every group, of the outputs z that a fit with these weights and bias should
    try to give next. Where the dense model's output passes the rectifier, that is z; where it is cut off, it is enough
    to be cut off too, so z is what the fit gives already, or else the edge."""
    layer, arrays = samples.layer, samples.store.arrays
    rows = len(layer.weight) // layer.groups
    tried = [arrays.load(part) for part in weights]
    parts = [slice(group * rows, (group + 1) * rows) for group in range(layer.groups)]
    offset, shift = arrays.load(rectifier.offset), [arrays.load(part) for part in bias]
    sums = [(arrays.zeros(rows, layer.columns), arrays.zeros(rows)) for _ in parts]
    for block in samples.blocks():
        for inputs, part, matrix, added, (cross, outputs) in zip(block.inputs, parts, tried, shift, sums, strict=True):
            y = block.outputs[:, part] + offset[part]
            ahead = offset[part]
            if block.before is not None and block.after is not None:
                y, ahead = y + block.before[:, part], ahead + block.after[:, part]
            given = inputs @ matrix.T + added + ahead
            low, high = y <= 0, y >= rectifier.most
            z = y * ~(low | high) + given.clip(None, 0) * low - ahead
            if rectifier.most < math.inf:
                z = z + given.clip(rectifier.most, None) * high
            cross += z.T @ inputs
            outputs += z.sum(0)
    return sums


def _same_shape(layer: Layer, inputs: Sequence[int], added: Sequence[int]) -> bool:
    """Whether what is added to a layer's output has the output's own shape."""
    rows = len(layer.weight)
    if not _is_map(layer):
        return tuple(added) == (*inputs[:-1], rows)
    size = _output(layer, inputs)
    return tuple(added) == (inputs[0], rows, *(size if len(inputs) == 4 else size[1:]))


def multiply_adds(layer: Layer, shape: Sequence[int]) -> float:
    """Of a dense layer for each of its inputs, which together have this shape."""
    pixels = _output(layer, shape) if _is_map(layer) else shape[1:-1]
    return float(len(layer.weight) * math.prod(pixels) * layer.columns) / math.prod(SIZES.get(layer.winograd, (1,)))


def refuse_transformed(layers: Sequence[Layer]) -> None:
    """Raises UserError if magnitudes would have to say what transformed weights give."""
    found = next((layer.name for layer in layers if layer.winograd), None)
    if found is not None:
        raise UserError(f"layer {found} has transformed weights, of which magnitudes say little: use method obs")


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
    if layer.winograd:
        return TAPS, TAPS
    kernel = layer.weight.shape[2:]
    return (1, kernel[0]) if len(kernel) == 1 else (kernel[0], kernel[1])


def _output(layer: Layer, shape: Sequence[int]) -> tuple[int, int]:
    top, left, bottom, right = layer.padding
    (kh, kw), (sh, sw), (dh, dw) = _kernel(layer), layer.strides, layer.dilation
    size = (1, shape[2]) if len(shape) == 3 else (shape[2], shape[3])
    return (size[0] + top + bottom - dh * (kh - 1) - 1) // sh + 1, (
        size[1] + left + right - dw * (kw - 1) - 1
    ) // sw + 1


def _samples(arrays: Arrays, layer: Layer, x: Array, picks: tuple[npt.NDArray[np.int64], ...]) -> list[Array]:
    """Inputs at the sampled positions, [n, K] for each group, K in the order (kh, kw, ic), in single precision."""
    if not _is_map(layer):
        return [arrays.single(x.reshape(-1, x.shape[-1])[arrays.index(picks[0])])]
    if x.ndim == 3:
        x = x[:, :, None]
    image, row, column = picks
    kh, kw = _kernel(layer)
    (sh, sw), (dh, dw) = layer.strides, layer.dilation
    top, left, *_ = layer.padding
    if layer.winograd:
        my, mx = m = SIZES[layer.winograd]
        begin, (rows, columns) = (row // my * my - top, column // mx * mx - left), seen(m)
        near = [[_pixels(arrays, x, image, begin[0] + i, begin[1] + j) for j in range(columns)] for i in range(rows)]
        return [transformed.columns(arrays, near, m, row % my, column % mx)]
    taps = [
        _pixels(arrays, x, image, row * sh + i * dh - top, column * sw + j * dw - left)
        for i in range(kh)
        for j in range(kw)
    ]
    if layer.groups == 1:
        return [taps[0] if len(taps) == 1 else arrays.join(taps, 1)]
    width = x.shape[1] // layer.groups
    return [
        arrays.join([tap[:, group * width : (group + 1) * width] for tap in taps], 1) for group in range(layer.groups)
    ]


def _pixels(
    arrays: Arrays,
    maps: Array,
    image: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
) -> Array:
    """All channels [n, C] at these positions, zeros where they lie outside."""
    height, width = maps.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = [arrays.index(part) for part in (image, row.clip(0, height - 1), column.clip(0, width - 1))]
    found = arrays.single(maps[at[0], :, at[1], at[2]])
    if not inside.all():
        found[arrays.index(np.flatnonzero(~inside))] = 0
    return found


def _at(arrays: Arrays, layer: Layer, maps: Array, picks: tuple[npt.NDArray[np.int64], ...]) -> Array:
    """Values of the output's shape at the sampled positions, [n, OC], in single precision."""
    if not _is_map(layer):
        return arrays.single(maps.reshape(-1, maps.shape[-1])[arrays.index(picks[0])])
    if maps.ndim == 3:
        maps = maps[:, :, None]
    return _pixels(arrays, maps, *picks)
