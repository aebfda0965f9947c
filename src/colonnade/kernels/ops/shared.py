"""What the binders of several operators need: names, offset tables, masks, and the fields of a plane writer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.structs import Member
from colonnade.layout import ELEMENTS, Placed, Planes

# every struct of a plane writer has these: the writer clears the lead and zeroes what is no pixel
LEAD_MEMBERS = (
    Member("lead", "char *", "zero lanes in front of the output's first plane"),
    Member("lead_bytes", "u32"),
)


def symbol(name: str, isa: Isa, nv: int = 1) -> str:
    """Of a kernel that takes ``nv`` registers at a time: ``f32_maxpool_2v__rvv``."""
    return f"{isa.prefix}_{name}_{nv}v__{isa.name}"


def u32(values: npt.ArrayLike) -> Const:
    """A table of uint32; values that do not fit are our mistake, never wrapped."""
    wide = np.asarray(values, np.int64)
    if wide.size and not (wide.min() >= 0 and wide.max() < 2**32):
        raise OverflowError(f"{wide.max()} does not fit an offset of 32 bits")
    return Const(wide.astype(np.uint32))


def f32(values: npt.ArrayLike) -> Const:
    """A table of float32."""
    return Const(np.ascontiguousarray(values, np.float32))


def slots(values: npt.ArrayLike, itemsize: int) -> Const:
    """A table of float32, or of float16 in the first bytes of as many places of four bytes."""
    if itemsize == 4:
        return f32(values)
    table = np.zeros((np.size(values), 4 // itemsize), ELEMENTS[itemsize])
    table[:, 0] = np.reshape(values, -1)
    return Const(table)


def lead(output: Placed) -> dict[str, Field]:
    """The fields of ``LEAD_MEMBERS``."""
    return {"lead": Arena(output.lead_offset), "lead_bytes": output.lead_bytes}


def masks(layout: Planes) -> tuple[Const, int, int]:
    """(bits of all stored phases one after the other, bytes from one phase's to the next, number of phases)."""
    bits = [layout.mask(phase) for phase in layout.stored_phases]
    return Const(np.concatenate(bits)), len(bits[0]), len(bits)


def extents(layout: Planes) -> Const:
    """uint32 [phases, 2]: rows and columns of pixels in a plane of every stored phase."""
    return u32([(rows.stop, columns.stop) for rows, columns in map(layout.held, layout.stored_phases)])


def same_places(*tensors: Placed) -> bool:
    """Does every pixel stand on the same lane in planes of all these tensors?"""
    keys = {t.planes.key() for t in tensors}
    return len(keys) == 1 and len({t.planes.stored_phases for t in tensors}) == 1


class Identity:
    """A weight array as a cache key: equal when it is the same object."""

    def __init__(self, array: npt.NDArray[np.float32]) -> None:
        self.array = array

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.array is self.array
