"""Instruction sets: what a kernel may use, how to compile for it, how a machine shows that it has it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isa:
    """One row of the table below.

    ``lanes``: f32 lanes of one vector register; 0 for a scalable ISA, whose ``vlenb`` is known at run time only.
    ``registers``: architectural vector registers. ``features``: what ``-mcpu=baseline+...`` adds for the kernels'
    file alone; the rest of a bundle stays at the architecture's baseline. ``flags``: the names by which
    ``/proc/cpuinfo`` (x86 ``flags``, RISC-V ``isa``) shows that the machine has it, all needed. ``adder_flags``:
    those by which it shows that additions have pipes of their own beside the multiply-adds'; ``adders``: has it?
    ``broadcast_flags``, ``broadcasts``: likewise, that a scalar of memory reaches all lanes by the load ports alone.
    ``half``: does it compute with float16, in vectors of twice as many lanes? Its name begins with that of the ISA
    whose header it shares. ``emulates``: VLEN of the machine whose vectors it emulates, for the answers; nobody gets
    such an ISA unasked. ``itemsize``: bytes of the elements that kernels are looked for: see ``of``.
    """

    name: str
    arch: str
    lanes: int
    registers: int
    features: tuple[str, ...]
    flags: tuple[str, ...]
    adder_flags: tuple[str, ...] = ()
    adders: bool = False
    broadcast_flags: tuple[str, ...] = ()
    broadcasts: bool = False
    half: bool = False
    emulates: int = 0
    itemsize: int = 4

    @property
    def header(self) -> str:
        """File of its vector primitives under ``kernels/c``."""
        return "vec_emulated.h" if self.emulates else f"vec_{self.name.partition('_')[0]}.h"

    @property
    def scalable(self) -> bool:
        """Is the vector length known at run time only?"""
        return self.lanes == 0

    @property
    def prefix(self) -> str:
        """What the names of its kernels begin with."""
        return f"f{8 * self.itemsize}"

    @property
    def taken(self) -> int:
        """Lanes of a register as rankings take them: those of VLEN 256 where its length is known at run time only."""
        return (self.lanes or 8) * 4 // self.itemsize

    def of(self, itemsize: int) -> Isa:
        """This ISA as far as elements of ``itemsize`` bytes are concerned."""
        assert itemsize == 4 or self.half, f"{self.name} has no kernels for float16"
        return self if itemsize == self.itemsize else replace(self, itemsize=itemsize)

    @property
    def forms(self) -> tuple[Isa, ...]:
        """This ISA for float32, and for float16 where it computes with that."""
        return (self.of(4), self.of(2)) if self.half else (self.of(4),)

    @property
    def group(self) -> int:
        """Registers at a time of a body that runs along arrays. With one of them a core that issues in order waits for
        every link of a chain, such as a polynomial's."""
        return 4 if self.scalable else 1


PORTABLE = "portable"

# best first: the first one that a machine has is its default
ISAS: tuple[Isa, ...] = (
    Isa("avx512", "x86_64", 16, 32, ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma"),
        ("avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"),
        adder_flags=("clzero",), broadcast_flags=("clzero", "avx512_vp2intersect")),  # AMD's: from Zen 4, from Zen 5 on
    Isa("avx2", "x86_64", 8, 16, ("avx2", "fma"), ("avx2", "fma")),
    Isa("rvv", "riscv64", 0, 32, ("v",), ("v",)),
    Isa("rvv_zvfh", "riscv64", 0, 32, ("v", "zfhmin", "zvfh"), ("v", "zvfh"), half=True),
    Isa("portable", "any", 8, 16, (), ()),
    Isa("rvv_emulated", "x86_64", 0, 32, ("avx2", "fma", "f16c"), ("avx2", "fma", "f16c"), half=True, emulates=256),
)  # fmt: skip


def isa(name: str) -> Isa:
    """The row called ``name``."""
    for row in ISAS:
        if row.name == name:
            return row
    raise ValueError(f"unknown ISA {name!r}; known: {', '.join(r.name for r in ISAS)}")


def available(arch: str, flags: frozenset[str]) -> list[Isa]:
    """What a machine of ``arch`` with these cpuinfo ``flags`` can run, best first."""

    def shown(wanted: tuple[str, ...]) -> bool:
        return bool(wanted) and set(wanted) <= flags

    return [
        replace(row, adders=shown(row.adder_flags), broadcasts=shown(row.broadcast_flags))
        for row in ISAS
        if row.arch in (arch, "any") and set(row.flags) <= flags
    ]
