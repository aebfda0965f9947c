"""Planes seen in any order of axes: what transformers pass from layer to layer, a plane a feature, tokens in the lanes.

A linear layer on [batch, tokens, features] is a 1x1 convolution on planes [batch, features, 1, tokens], so that is how
the value stands in memory. What ONNX does with its axes in between (transposes, heads split off and joined, parts
taken) moves nothing: it is another way to see the same planes. Whoever knows dense arrays alone gets a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from colonnade.frontend.draft import Value
from colonnade.workload import spread

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """``size`` entries, ``step`` planes apart, or (``lanes``) as many pixels, counted over images, rows and columns."""

    size: int
    step: int
    lanes: bool


Axis = tuple[Run, ...]  # outermost first; none for an axis of length 1


def joined_runs(runs: Iterable[Run]) -> Axis:
    """The same entries in as few runs as can be."""
    result: list[Run] = []
    for run in runs:
        if run.size == 1:
            continue
        if result and result[-1].lanes == run.lanes and result[-1].step == run.size * run.step:
            result[-1] = Run(result[-1].size * run.size, run.step, run.lanes)
        else:
            result.append(run)
    return tuple(result)


def row_major(sizes: Sequence[int]) -> list[int]:
    """Entries from one index to the next, by axis."""
    return [prod(sizes[i + 1 :]) for i in range(len(sizes))]


@dataclass(frozen=True, eq=False)
class Tokens:
    """``planes`` (N, C, H, W) with the axes of an ONNX value, from plane ``plane`` and pixel ``pixel`` on."""

    planes: Value
    axes: tuple[Axis, ...]
    plane: int = 0
    pixel: int = 0

    @staticmethod
    def of(value: Value) -> Tokens:
        """Planes (N, \\*dims, H, W) as they are."""
        n, *dims, h, w = value.shape
        middle = [joined_runs([Run(d, s, False)]) for d, s in zip(dims, row_major(dims), strict=True)]
        axes = (
            joined_runs([Run(n, h * w, True)]),
            *middle,
            joined_runs([Run(h, w, True)]),
            joined_runs([Run(w, 1, True)]),
        )
        assert value.channels is not None
        shape = (n, prod(dims), h, w)
        return Tokens(Value(shape, value.tensors, value.channels.reshape(-1, 2), value.sole), axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the ONNX value."""
        return tuple(prod(run.size for run in axis) for axis in self.axes)

    @property
    def sole(self) -> bool:
        """As ``Value.sole``."""
        return self.planes.sole

    @property
    def image(self) -> int:
        """Pixels of an image."""
        return self.planes.shape[2] * self.planes.shape[3]

    @property
    def covers_lanes(self) -> bool:
        """Is every pixel an entry?"""
        seen = prod(run.size for axis in self.axes for run in axis if run.lanes)
        return seen == self.planes.shape[0] * self.image

    def has_planes(self, axis: int) -> bool:
        """Do planes alone make up the axis? (An axis of length 1 is nothing.)"""
        return bool(self.axes[axis]) and not any(run.lanes for run in self.axes[axis])

    def has_lanes(self, axis: int) -> bool:
        """Do pixels alone make up the axis?"""
        return bool(self.axes[axis]) and all(run.lanes for run in self.axes[axis])

    def on(self, planes: Value) -> Tokens:
        """Other planes of the same shape seen likewise."""
        assert planes.placed_shape == self.planes.placed_shape, (planes.placed_shape, self.planes.placed_shape)
        return replace(self, planes=planes)

    def transposed(self, order: Sequence[int]) -> Tokens:
        """Axis i is the ``order[i]``-th of now."""
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def reshaped(self, shape: Sequence[int]) -> Tokens | None:
        """With another shape of as many elements; None where an axis would not be runs."""
        left = [run for axis in self.axes for run in axis][::-1]
        axes = []
        for d in shape:
            axis: list[Run] = []
            while d > 1:
                if not left:
                    return None
                run = left.pop()
                if d % run.size == 0:
                    axis.append(run)
                    d //= run.size
                    continue
                if run.size % d:
                    return None
                inner = run.size // d
                step = run.step * inner
                # images and pixels must not mix in such a way that two axes carry over into each other
                if run.lanes and step % self.image and self.image % step:
                    return None
                axis.append(Run(d, step, run.lanes))
                left.append(Run(inner, run.step, run.lanes))
                d = 1
            axes.append(joined_runs(axis))
        return None if left else replace(self, axes=tuple(axes))

    def picked(self, axis: int, indices: Table) -> Tokens | None:
        """Entries of an axis; None where they are not one run again."""
        runs = self.axes[axis]
        steps = np.diff(indices)
        if len(runs) > 1 or (steps.size and ((steps != steps[0]).any() or steps[0] < 1)):
            return None
        if not runs:
            return self if len(indices) == 1 else None
        (run,) = runs
        first = int(indices[0]) * run.step
        new = joined_runs([Run(len(indices), run.step * int(steps[0] if steps.size else 1), run.lanes)])
        if run.lanes and run.step < self.image < run.step * run.size:
            return None  # images and pixels in one
        axes = (*self.axes[:axis], new, *self.axes[axis + 1 :])
        return replace(self, axes=axes, plane=self.plane + (0 if run.lanes else first),
                       pixel=self.pixel + (first if run.lanes else 0))  # fmt: skip

    def value(self) -> Value | None:
        """As ordinary planes (N, \\*dims, H, W), if that is what they are."""
        n, _, h, w = self.planes.shape
        if len(self.axes) < 4 or self.pixel:
            return None
        ends = (self.axes[0], self.axes[-2], self.axes[-1])
        if ends != tuple(joined_runs([Run(size, step, True)]) for size, step in ((n, h * w), (h, w), (w, 1))):
            return None
        middle = self.axes[1:-2]
        if any(run.lanes for axis in middle for run in axis):
            return None
        dims = self.shape[1:-2]
        channels = self.planes.planes[self._planes(middle)].reshape(*dims, 2)
        return Value(self.shape, self.planes.tensors, channels, self.sole)

    def _planes(self, axes: Iterable[Axis]) -> Table:
        """Planes in the order of these axes."""
        runs = [run for axis in axes for run in axis if not run.lanes]
        return self.plane + spread([np.arange(run.size) * run.step for run in runs]).reshape(-1)

    def ordered(self, last: int | None = None) -> Tokens:
        """The same on a list of just the planes that are seen, in the order of the axes (axis ``last`` at the end)."""
        order = [i for i in range(len(self.axes)) if i != last] + ([] if last is None else [last])
        where = self._planes(self.axes[i] for i in order)
        planes = self.planes
        if not np.array_equal(where, np.arange(planes.width)):
            channels = planes.planes[where]
            used = np.unique(channels[:, 0])
            tensors = tuple(planes.tensors[i] for i in used)
            channels = np.column_stack([np.searchsorted(used, channels[:, 0]), channels[:, 1]])
            shape = (planes.shape[0], len(where), *planes.shape[2:])
            planes = Value(shape, tensors, channels, sole=False)
        axes, step = dict[int, Axis](), len(where)
        for i in order:
            runs = []
            for run in self.axes[i]:
                step //= 1 if run.lanes else run.size
                runs.append(run if run.lanes else Run(run.size, step, False))
            axes[i] = joined_runs(runs)
        return replace(self, planes=planes, axes=tuple(axes[i] for i in range(len(order))), plane=0)

    def all_planes(self) -> Tokens:
        """The same, on a list without planes that are not seen; in whatever order they stand."""
        seen = prod(run.size for axis in self.axes for run in axis if not run.lanes)
        return self if seen == self.planes.width else self.ordered()

    def tables(self) -> list[Table]:
        """By axis, the elements of ``planes`` in row-major order of (N, C, H, W): those of a ``Take``."""
        width = self.planes.width
        result = []
        for index, axis in enumerate(self.axes):
            planes = spread([np.arange(run.size) * (0 if run.lanes else run.step) for run in axis]).reshape(-1)
            pixels = spread([np.arange(run.size) * (run.step if run.lanes else 0) for run in axis]).reshape(-1)
            if index == 0:
                planes, pixels = planes + self.plane, pixels + self.pixel
            images, inside = pixels // self.image, pixels % self.image
            result.append((images * width + planes) * self.image + inside)
        return result

    def sources(self, shape: Sequence[int]) -> list[Table] | None:
        """Tables of (N, C, H, W): the elements of a dense array of ``shape`` (which broadcasts to this one) that stand
        there. None where they are not a sum by axis. All lanes must be seen, and all planes (``all_planes``)."""
        n, c, h, w = self.planes.placed_shape
        shape = (1,) * (len(self.axes) - len(shape)) + tuple(shape)
        planes, pixels = np.zeros(c, np.int64), np.zeros(n * h * w, np.int64)
        lists: dict[bool, list[tuple[Table, Table]]] = {False: [], True: []}
        for axis, size, stride in zip(self.axes, shape, row_major(shape), strict=True):
            inner = row_major([run.size for run in axis])
            for run, step in zip(axis, inner, strict=True):
                entries = np.arange(run.size)
                lists[run.lanes].append((entries * run.step, entries * (step * stride if size > 1 else 0)))
        for lanes, target in ((False, planes), (True, pixels)):
            places = spread([p for p, _ in lists[lanes]]).reshape(-1)
            target[places] = spread([e for _, e in lists[lanes]]).reshape(-1)
        image = pixels.reshape(n, h, w)
        tables = [image[:, 0, 0], planes, image[0, :, 0] - image[0, 0, 0], image[0, 0] - image[0, 0, 0]]
        if not np.array_equal(spread([tables[0], tables[2], tables[3]]), image):
            return None
        return [np.ascontiguousarray(table) for table in tables]
