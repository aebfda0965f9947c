"""Calibration values that wait for their layer: in memory up to a limit, past it in temporary files.

A second-order pass holds what the dense and the pruned network have at one place for all calibration inputs; of a
ResNet-50 and 512 photos that is 4 GB where it is widest. What does not fit is written to a file and read back when
its batch is worked on, so the pass needs the memory it is given whatever the number of inputs.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.errors import UserError
from colonnade.sparsify.arrays import Array, Arrays

# Values are held in half precision where all their batches take more than this and none is larger.
HALF_BYTES = 128 << 20
HALF_LARGEST = 60_000.0
# Smaller values never go to a file.
SMALLEST = 256


class Held:
    """One value. The same object stands for the same value of both networks. It frees its place when it goes."""

    def __init__(self, shape: tuple[int, ...], value: Any, path: Path | None, axes: tuple[int, ...] = ()) -> None:
        self.shape, self._value, self._path, self._axes = shape, value, path, axes

    def __len__(self) -> int:
        return self.shape[0]


class Store:
    """Where values are held. limit: bytes in memory; batches: of the calibration inputs, to judge what is large."""

    def __init__(self, arrays: Arrays, limit: int, batches: int) -> None:
        self.arrays, self.limit = arrays, limit
        self.least = HALF_BYTES // max(batches, 1)
        self.used = 0
        self.spilled = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, value: Any) -> Any:
        """Hold a value; numbers (sizes) are handed back as they are."""
        if not hasattr(value, "dtype"):
            return value
        kept = self.arrays.compact(value, self.least, HALF_LARGEST)
        shape, size = tuple(kept.shape), int(kept.nbytes)
        if self.used + size > self.limit and size >= SMALLEST:
            path, axes = self._write(kept)
            held = Held(shape, None, path, axes)
            weakref.finalize(held, _unlink, path)
        else:
            self.used += size
            held = Held(shape, kept, None)
            weakref.finalize(held, self._freed, size)
        return held

    def get(self, held: Any) -> Any:
        """The value: what `put` was given, but for its precision."""
        if not isinstance(held, Held):
            return held
        if held._path is None:
            return held._value
        return self.arrays.load(np.load(held._path).transpose(np.argsort(held._axes)))

    def put_all(self, values: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        """Hold values by name; known: (what is held already, what `get` gave for it), which stays the same object."""
        return {
            name: known[name][0] if name in known and known[name][1] is value else self.put(value)
            for name, value in values.items()
        }

    def _freed(self, size: int) -> None:
        self.used -= size

    def _write(self, value: Array) -> tuple[Path, tuple[int, ...]]:
        """Write a value in the order it has in memory; returns its axes in that order too."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="colonnade-")
        path = Path(self._folder.name) / f"{self.spilled}.npy"
        self.spilled += 1
        array = self.arrays.host(value)
        axes = tuple(int(axis) for axis in np.argsort([-stride for stride in array.strides], kind="stable"))
        try:
            np.save(path, array.transpose(axes))
        except OSError as error:
            raise UserError(
                f"{path.parent}: calibration values do not fit on this disk ({error.strerror or error}): give fewer "
                "inputs, or another folder in TMPDIR"
            ) from None
        return path, axes


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
