"""Which kernels exist: one row an operator. ``candidates`` and ``bind`` are all that tuner and codegen need.

An operator's file under ``kernels/ops`` declares its argument struct, the variants worth compiling for an ISA, the
legal candidates for one workload, and how a candidate becomes kernel calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Call
from colonnade.kernels.isa import Isa
from colonnade.kernels.structs import Struct
from colonnade.layout import Placed
from colonnade.workload import Workload, activation_of


class Operands(Protocol):
    """What a kernel is bound to; ``plan.Step`` is one."""

    @property
    def workload(self) -> Workload: ...
    @property
    def inputs(self) -> tuple[Placed, ...]: ...
    @property
    def output(self) -> Placed | None: ...
    @property
    def constants(self) -> Mapping[str, npt.NDArray[np.float32]]: ...
    @property
    def external(self) -> str: ...
    @property
    def rms(self) -> float | None: ...


@dataclass(frozen=True)
class Candidate:
    """One legal choice for one workload: a kernel symbol and the values of its run-time dimensions.

    ``params`` are plain ints by name (JSON in database and manifest), e.g. ``strip_block``, ``prefetch``, ``split``,
    ``dense``. ``rank`` is the static ranking: lower is better where nothing was measured.
    """

    kernel: str
    params: Mapping[str, int] = field(default_factory=dict)
    rank: float = 0.0

    def key(self) -> str:
        """Equal exactly for equal choices."""
        return self.kernel + "".join(f" {k}={v}" for k, v in sorted(self.params.items()))


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: its symbol, its body under ``kernels/c``, what the body is rendered with, and the kernels
    that it calls."""

    symbol: str
    body: str
    params: Mapping[str, object]
    needs: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Operator:
    """A registry row. ``op`` is the workload's; ``structs`` in order of their declaration in ops.h."""

    op: str
    structs: tuple[Struct, ...]
    variants: Callable[[Isa], Iterable[Variant]]
    candidates: Callable[[Operands, Isa, int], Iterable[Candidate]]  # (operands, isa, threads)
    bind: Callable[[Operands, Candidate], tuple[Call, ...]]


def rows() -> dict[str, Operator]:
    """All operators by ``Workload.op``."""
    from colonnade.kernels.ops import (
        conv,
        conv_pool,
        convert,
        dense,
        linear,
        pointwise,
        pool,
        resample,
        tokens,
        transposed,
        typed,
        unary,
        winograd,
    )

    table = (*conv.ROWS, *conv_pool.ROWS, *linear.ROWS, *pool.ROWS, *pointwise.ROWS, *convert.ROWS, *unary.ROWS)
    table += (*transposed.ROWS, *dense.ROWS, *resample.ROWS, *tokens.ROWS, *typed.ROWS, *winograd.ROWS)
    return {row.op: row for row in table}


def operator(op: str) -> Operator:
    """The row of ``op``."""
    return rows()[op]


def structs() -> dict[str, Struct]:
    """All argument structs by name, in order of declaration."""
    return {s.name: s for row in rows().values() for s in row.structs}


def variants(isa: Isa) -> dict[str, Variant]:
    """Everything worth compiling for ``isa``, by symbol."""
    return {v.symbol: v for row in rows().values() for v in row.variants(isa.of(4))}


def candidates(operands: Operands, isa: Isa, threads: int) -> list[Candidate]:
    """Legal candidates, best of the static ranking first; never empty."""
    isa = isa.of(4 if operands.output is None else operands.output.layout.itemsize)
    found = sorted(operator(operands.workload.op).candidates(operands, isa, threads), key=lambda c: (c.rank, c.key()))
    assert found, f"no kernel for {operands.workload.key()}"
    return found


def bind(operands: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """The kernel calls that compute ``operands`` by ``candidate``, in order, a barrier between them."""
    calls = operator(operands.workload.op).bind(operands, candidate)
    function = activation_of(operands.workload).function
    if function is None or calls[-1].fields.get("then"):
        return calls
    from colonnade.kernels.ops import unary

    assert operands.output is not None
    return (*calls, unary.call(operands.output, operands.output, function, candidate.kernel.rpartition("__")[2]))
