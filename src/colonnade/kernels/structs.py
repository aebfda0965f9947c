"""Argument structs of kernels: one declaration gives the C header and the bytes the harness sends to a target.

Fields are naturally aligned, little-endian, pointers of 8 bytes: the same on x86-64 and riscv64.
"""

from __future__ import annotations

import struct as binary
from collections.abc import Mapping
from dataclasses import dataclass

SIZES = {"u32": 4, "i32": 4, "u64": 8, "f32": 4, "ptr": 8}
FORMATS = {"u32": "<I", "i32": "<i", "u64": "<Q", "f32": "<f"}
C_TYPES = {"u32": "uint32_t ", "i32": "int32_t ", "u64": "uint64_t ", "f32": "float "}


@dataclass(frozen=True)
class Member:
    """``kind`` is u32, i32, u64, f32 or a C pointer type such as ``const float *``."""

    name: str
    kind: str
    doc: str = ""

    @property
    def is_pointer(self) -> bool:
        """Does it hold an address?"""
        return self.kind.endswith("*")

    @property
    def size(self) -> int:
        """Bytes."""
        return SIZES["ptr" if self.is_pointer else self.kind]

    @property
    def declaration(self) -> str:
        """The member in C."""
        return f"{C_TYPES.get(self.kind, self.kind)}{self.name};"


@dataclass(frozen=True)
class Struct:
    """A C struct by name, with the contract that stands above it in ops.h."""

    name: str
    doc: str
    members: tuple[Member, ...]

    def offsets(self) -> dict[str, int]:
        """Byte offset of every member."""
        offset, result = 0, {}
        for member in self.members:
            offset = -(-offset // member.size) * member.size
            result[member.name] = offset
            offset += member.size
        return result

    @property
    def size(self) -> int:
        """Bytes, padded to the largest member."""
        last, align = self.members[-1], max(m.size for m in self.members)
        return -(-(self.offsets()[last.name] + last.size) // align) * align

    def pack(self, values: Mapping[str, float]) -> bytes:
        """The struct's bytes with every scalar in place and every pointer 0."""
        image, offsets = bytearray(self.size), self.offsets()
        for member in self.members:
            if not member.is_pointer:
                binary.pack_into(FORMATS[member.kind], image, offsets[member.name], values[member.name])
        return bytes(image)

    def declaration(self) -> str:
        """The struct in C."""
        lines = [f"/* {self.doc} */", "typedef struct {"]
        width = max(len(m.declaration) for m in self.members)
        lines += [f"    {m.declaration:<{width}}" + (f" /* {m.doc} */" if m.doc else "") for m in self.members]
        return "\n".join(line.rstrip() for line in [*lines, f"}} {self.name};"])
