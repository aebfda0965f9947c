"""The Plan: workloads in order on planned memory. Plain data, no behaviour of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from colonnade.layout import Layout, Placed
from colonnade.workload import Workload


@dataclass(frozen=True)
class Buffer:
    """A stretch of the arena. ``offset`` and ``size`` in bytes; alive from step ``first`` to ``last`` inclusive."""

    name: str
    offset: int
    size: int
    layout: Layout
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Step:
    """One workload on placed tensors.

    ``constants`` by role: ``weight`` [OC, IC/g, KH, KW] or [OC, IC] and ``bias`` [OC] (conv2d, linear), ``scale``
    and ``shift`` [C] (affine). The order of ``inputs`` is that of the workload's ``reference``: data first, then
    the residual. An ``import`` step has no inputs and an ``export`` step no output tensor of its own; ``external``
    then names the model's input or output. ``rms``: root mean square of the first input in a run on sample inputs,
    where somebody made one.
    """

    name: str
    workload: Workload
    inputs: tuple[Placed, ...]
    output: Placed | None
    constants: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    external: str = ""
    rms: float | None = None

    def key(self) -> str:
        """What decides this step's speed: the workload and the layouts it reads and writes."""
        places = [*self.inputs, *([self.output] if self.output is not None else [])]
        return " ".join([self.workload.key(), *(p.layout.key() for p in places)])


@dataclass(frozen=True)
class Port:
    """An input or output of the model as its user sees it: a dense array of ``dtype`` (numpy name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Variants(Protocol):
    """One model as plans that differ in what stands in panels instead of planes.

    ``edges``: by choice, the names of the steps that it concerns; ``default``: the choices for panels that are taken
    where nothing was measured.
    """

    @property
    def edges(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def default(self) -> frozenset[int]: ...
    def plan(self, stored: Collection[int] | None = None) -> Plan:
        """The plan with these choices for panels; the default ones where None."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole model. ``arena`` is its size in bytes, with slack for vector reads past the last plane's end.

    ``images``: the steps are run so many times, each time for the next of that many equal parts of the ports' arrays.
    ``seam``: what they hand to those steps that are run once for all images: an array that the former export to, an
    equal part each, and the latter, from the one that imports it on, read whole.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena: int
    images: int = 1
    seam: Port | None = None

    @property
    def once(self) -> int:
        """The first step that is run once for all images."""
        names = (
            i for i, step in enumerate(self.steps) if self.seam and step.external == self.seam.name and not step.inputs
        )
        return next(names, len(self.steps))
