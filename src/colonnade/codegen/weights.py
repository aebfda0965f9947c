"""weights.bin: all constants of a model in one file that is mapped, not read.

A header of 64 bytes (magic, format, size of the file, checksum) and the constants, each on a 64-byte boundary, equal
contents once. The checksum is Fletcher's pair of sums over 64-bit words; it also ties the file to its model.c.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from colonnade.layout import LINE, round_up

MAGIC = b"COLONNAD"
FORMAT = 1
HEADER = 64  # bytes; CN_WEIGHTS_HEADER in runtime.h


def checksum(payload: bytes) -> tuple[int, int]:
    """Sum of the 64-bit words and sum of its running values, modulo 2**64. ``payload`` is whole words."""
    words = np.frombuffer(payload, "<u8")
    weights = np.arange(len(words), 0, -1, dtype=np.uint64)
    return int(words.sum(dtype=np.uint64)), int((words * weights).sum(dtype=np.uint64))


class Constants:
    """Collects constants and gives each its place in the file."""

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        self._parts: list[bytes] = []
        self._size = HEADER

    def add(self, data: npt.NDArray[np.generic]) -> int:
        """Byte offset of ``data`` in weights.bin."""
        content = np.ascontiguousarray(data).tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self._places[digest] = self._size
            self._parts.append(content.ljust(round_up(len(content), LINE), b"\0"))
            self._size += len(self._parts[-1])
        return self._places[digest]

    def file(self) -> tuple[bytes, tuple[int, int]]:
        """The whole file and its checksum."""
        payload = b"".join(self._parts)
        sums = checksum(payload)
        header = MAGIC + struct.pack("<QQQQ", FORMAT, HEADER + len(payload), *sums)
        return header.ljust(HEADER, b"\0") + payload, sums
