"""Steps before they have places: what the importer writes and the layout assignment reads.

A ``Tensor`` will own a buffer. A ``Value`` is what an ONNX value became: a list of planes of any tensors (so
concat, split, shuffle and channel padding are only other lists), or one matrix of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import numpy.typing as npt

from colonnade.layout import begins_outside
from colonnade.workload import (
    Activation,
    Array,
    Cast,
    Convert,
    WinogradConv2d,
    Workload,
    activation_of,
    with_activation,
)
from colonnade.workload.typed import F32, lanes


@dataclass(eq=False)
class Tensor:
    """``shape`` is (N, C, H, W) for planes and (N, C) for rows; phases and itemsize as in ``layout.Planes``."""

    name: str
    shape: tuple[int, ...]
    phases: tuple[int, int] = (1, 1)
    kept_phases: tuple[tuple[int, int], ...] | None = None
    itemsize: int = 4

    @property
    def is_rows(self) -> bool:
        """A matrix of rows rather than planes?"""
        return len(self.shape) == 2

    @property
    def shifted(self) -> bool:
        """See ``layout.Planes``."""
        return begins_outside(self.phases, self.kept_phases)

    @property
    def channels(self) -> int:
        """Planes (not counting phases) or columns."""
        return self.shape[1]


@dataclass(frozen=True, eq=False)
class Value:
    """``shape`` is the ONNX shape. Planes: (N, \\*dims, H, W), and ``channels`` is an int64 array [\\*dims, 2] of
    (index into ``tensors``, channel). Rows: a dense array in row-major order, all of the one entry of ``tensors``,
    whatever the shape: a view costs nothing. ``dtype``: that of the elements in memory; see ``workload.typed``.
    ``sole``: the chain of ONNX values from the step that wrote it has no other reader. ``centre``: where the one entry
    of ``tensors`` is shifted copies of it, the value that the phase (0, 0) is read from, for it is not copied."""

    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    channels: npt.NDArray[np.int64] | None = None
    sole: bool = True
    dtype: str = F32
    centre: Value | None = None

    @property
    def is_rows(self) -> bool:
        """A matrix of rows rather than planes?"""
        return self.channels is None

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory: planes that are read together have elements of one size."""
        return self.tensors[0].itemsize

    @property
    def read(self) -> tuple[Tensor, ...]:
        """All tensors that a reader needs, ``tensors`` first."""
        return self.tensors + (() if self.centre is None else self.centre.tensors)

    @property
    def width(self) -> int:
        """Channels: planes or columns."""
        return prod(self.shape[1:]) if self.channels is None else self.channels.size // 2

    @property
    def placed_shape(self) -> tuple[int, ...]:
        """(N, C, H, W) or (N, C)."""
        if self.is_rows:
            return (self.shape[0] if self.shape else 1, self.width * lanes(self.dtype))
        return (self.shape[0], self.width, *self.shape[-2:])

    def seen(self, shape: tuple[int, ...]) -> Value:
        """A dense array with another shape of as many elements. Raises ValueError for one that has not."""
        if not self.is_rows or prod(shape) != prod(self.shape):
            raise ValueError(f"{list(self.shape)} is not {list(shape)}")
        return replace(self, shape=shape)

    def matrix(self, axes: int = 1) -> Value:
        """A dense array as a matrix whose rows are its last ``axes`` axes."""
        split = max(len(self.shape) - axes, 0)
        return self.seen((prod(self.shape[:split]), prod(self.shape[split:])))

    @property
    def planes(self) -> npt.NDArray[np.int64]:
        """int64 [C, 2]: the channels in order."""
        assert self.channels is not None
        return self.channels.reshape(-1, 2)

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that this value is all of, channel by channel in order; None when there is no such."""
        if self.is_rows:
            return self.tensors[0]
        if len(self.tensors) != 1 or self.tensors[0].channels != self.width:
            return None
        if not np.array_equal(self.planes[:, 1], np.arange(self.width)):
            return None
        return self.tensors[0]

    def identity(self) -> tuple[tuple[int, ...], bytes]:
        """Equal exactly for values made of the same planes in the same order."""
        return tuple(id(t) for t in self.tensors), b"" if self.channels is None else self.planes.tobytes()


def whole(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Value:
    """All of a tensor, seen with the ONNX ``shape`` (its own when None)."""
    if tensor.is_rows:
        return Value(tensor.shape if shape is None else shape, (tensor,))
    channels = np.zeros((tensor.channels, 2), np.int64)
    channels[:, 1] = np.arange(tensor.channels)
    shape = tensor.shape if shape is None else shape
    return Value(shape, (tensor,), channels.reshape(*shape[1:-2], 2))


def joined(values: list[Value], axis: int) -> Value:
    """Planes of several values one after the other along ``axis`` of the ONNX shape (a channel axis)."""
    tensors: list[Tensor] = []
    parts = []
    for value in values:
        assert value.channels is not None
        index = []
        for tensor in value.tensors:
            if tensor not in tensors:
                tensors.append(tensor)
            index.append(tensors.index(tensor))
        part = value.channels.copy()
        part[..., 0] = np.array(index, np.int64)[part[..., 0]]
        parts.append(part)
    channels = np.concatenate(parts, axis=axis - 1)
    shape = (values[0].shape[0], *channels.shape[:-1], *values[0].shape[-2:])
    return Value(shape, tuple(tensors), channels, sole=False)


@dataclass(eq=False)
class Draft:
    """One step to be: see ``plan.Step``. ``panels``: a convolution that gathers its input, in whatever layout it is.
    ``channels``: those of its output that the step writes, int64; all where None."""

    name: str
    workload: Workload
    inputs: list[Value]
    output: Tensor | None
    constants: dict[str, Array] = field(default_factory=dict)
    external: str = ""
    panels: bool = False
    channels: npt.NDArray[np.int64] | None = None


def is_import(step: Draft) -> bool:
    """Does it bring one of the model's inputs in as it is?"""
    return isinstance(step.workload, Convert | Cast) and step.workload.kind == "import"


def can_activate(step: Draft, activation: Activation) -> bool:
    """Can this step end in an activation, or in one more?"""
    if isinstance(step.workload, WinogradConv2d) and not activation.low <= 0 <= activation.high:
        return False  # it clips its halos too, which must stay zeros
    holder = getattr(step.workload, "epilogue", step.workload)
    return hasattr(holder, "activation") and activation_of(step.workload).function is None


def activate(step: Draft, after: Activation) -> None:
    """Append an activation to a step that can take one; limits behind limits are limits again."""
    before = activation_of(step.workload)
    both = Activation(
        min(max(before.low, after.low), after.high),
        min(max(before.high, after.low), after.high),
        after.function,
    )
    step.workload = with_activation(step.workload, both)
