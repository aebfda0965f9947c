"""Functions that a convolution applies to what it has just stored, while that is near.

A step of its own for them reads and writes the whole map once more: from memory, where it is larger than a cache. The
commonest have a place in the kernels themselves; ``registry.bind`` adds a call for all the others.
"""

from __future__ import annotations

from colonnade.kernels.call import Field
from colonnade.kernels.ops.unary import OFF_ZERO, VECTOR
from colonnade.kernels.structs import Member
from colonnade.workload import Conv2d, Function

GROUP = 4  # registers at a time that a function is applied to where their number is free (then.h.in)
FUNCTIONS = ("silu", "hard_swish", "leaky_relu")  # 0 at 0: halos are computed with the pixels
assert not {*FUNCTIONS} & {*OFF_ZERO}

MEMBERS = (
    Member("then", "u32", f"what is done to sums once they are stored: 0 nothing, else one of {', '.join(FUNCTIONS)}"),
    Member("then_a", "f32", "its parameters"),
    Member("then_b", "f32"),
)
PARAMS = {"THEN": [VECTOR[name] for name in FUNCTIONS], "GROUP": GROUP}  # of every body that includes then.h.in
NONE: dict[str, Field] = {"then": 0, "then_a": 0.0, "then_b": 0.0}


def fields(function: Function | None) -> dict[str, Field]:
    """The fields of ``MEMBERS``; those of no function where kernels have no place for this one."""
    if function is None or function.name not in FUNCTIONS:
        return NONE
    return {"then": FUNCTIONS.index(function.name) + 1, "then_a": function.a, "then_b": function.b}


def strips(conv: Conv2d, nv: int) -> int:
    """Strips of ``nv`` registers that fill a group, of a convolution with a function that kernels know."""
    return max(GROUP // nv, 1) if fields(conv.epilogue.activation.function)["then"] else 1
