"""Convolutions with transformed weights (``workload.winograd``) as regressions.

An output pixel at (r, c) of its tile is a sum over positions (i, j) and channels of weights times
A[r, i] A'[c, j] V[i, j], with V = B d B'ᵀ of the tile's inputs d. So it has (m + 2) (m' + 2) columns a channel where a
plain convolution has nine, and all else is as there: sampled pixels, covariances, columns that a tile of rows shares.

Positions differ in size, and so would what damping does to them. A position is therefore scaled by what G makes of
independent taps: weights are divided by it here, inputs multiplied.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.onnx_winograd import OPSET, fits, opset
from colonnade.pattern import Floats
from colonnade.sparsify.arrays import Array, Arrays
from colonnade.workload.winograd import SIZES, Size, matrices, seen, transform

if TYPE_CHECKING:
    import onnx

    from colonnade.sparsify.samples import Layer

MOST_COLUMNS = 8192  # of a layer: 512 channels behind F(2x2), four minutes and 2 GB of matrices


def sizes(name: str) -> Floats:
    """[m + 2, m' + 2]: the standard deviation of transformed weights of independent taps."""
    m = SIZES[name]
    return np.outer(_rows(m[0]), _rows(m[1])).astype(np.float32)


def _rows(m: int) -> npt.NDArray[np.float64]:
    """[m + 2]: of those in one direction."""
    return np.asarray(np.sqrt(np.square(matrices(m)[1]).sum(1)))


def transformable(
    model: onnx.ModelProto, node: onnx.NodeProto, weight: onnx.TensorProto, name: str, most: int = MOST_COLUMNS
) -> bool:
    """Can a node's weights be transformed, and have they no more than ``most`` columns then?"""
    stored = any(tensor.name == node.input[1] == weight.name for tensor in model.graph.initializer)
    return stored and opset(model) >= OPSET and fits(node, weight) and weight.dims[1] * prod(seen(SIZES[name])) <= most


def variant(layer: Layer, name: str) -> Layer:
    """A 3x3 convolution with its weights transformed."""
    weight = (transform(layer.weight, SIZES[name]) / sizes(name)).astype(np.float32)
    return replace(layer, weight=weight, winograd=name)


def columns(arrays: Arrays, taps: list[list[Array]], m: Size, row: npt.NDArray[Any], column: npt.NDArray[Any]) -> Array:
    """[n, (m + 2) (m' + 2) IC] of pixels at (row, column) of their tiles, from what these see: m + 2 by m' + 2 of
    [n, IC]."""
    down, across = (matrices(one)[0].astype(np.float32) for one in m)
    rows, columns = ((matrices(one)[2] * _rows(one)).astype(np.float32) for one in m)
    below = [_sums(down, [line[at] for line in taps]) for at in range(len(across))]
    found = []
    for i in range(len(down)):
        for j, value in enumerate(_sums(across, [one[i] for one in below])):
            found.append(value * arrays.load(rows[row, i] * columns[column, j])[:, None])
    return arrays.join(found, 1)


def _sums(factors: Floats, values: list[Array]) -> list[Array]:
    """A sum of ``values`` for every row of ``factors``."""
    found = []
    for row in factors:
        first, *rest = np.flatnonzero(row)
        total = values[first] * row[first]
        for at in rest:
            total = total + values[at] * row[at]
        found.append(total)
    return found
