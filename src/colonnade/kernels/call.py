"""A kernel call as data: what codegen prints into model.c and the harness runs on a target.

Every kernel has one signature, ``void kernel(const void *args, unsigned thread, unsigned threads)``, and splits its
own work over threads. ``args`` points to one of the structs of ``runtime/ops.h``; a ``Call`` holds the values of its
fields by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Arena:
    """A pointer into the arena, ``offset`` bytes from its base."""

    offset: int = 0


@dataclass(frozen=True, eq=False)
class Const:
    """A pointer to constant data; codegen places it in weights.bin, once for equal contents, on a 64-byte boundary."""

    data: npt.NDArray[np.generic]


@dataclass(frozen=True)
class Scratch:
    """A pointer to ``Call.scratch * threads`` bytes that nobody else uses during the call."""


@dataclass(frozen=True)
class Shared:
    """A pointer ``offset`` bytes into memory that all calls of one step and all threads share: what the first call
    leaves there the next ones find."""

    offset: int = 0


@dataclass(frozen=True)
class External:
    """A pointer to the user's input or output array ``name``, known only when the model runs."""

    name: str


Field = int | float | Arena | Const | Scratch | Shared | External | None  # None: a null pointer


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call. ``struct`` names its argument struct in ops.h; ``scratch`` is in bytes a thread, ``shared`` in
    bytes, a whole number of cache lines."""

    kernel: str
    struct: str
    fields: Mapping[str, Field]
    scratch: int = 0
    shared: int = 0
