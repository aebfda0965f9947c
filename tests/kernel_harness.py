"""Run one kernel, in this process or under QEMU, in memory that shows every stray read and write.

The arena and every array a kernel sees end at a page that cannot be touched (and the arena starts behind one), all
of it is poisoned beforehand, and afterwards everything but the output must be as it was.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import INSTALLED, MISSING, RVV, Emulated, run_calls

from colonnade.build.toolchain import Toolchain, host
from colonnade.kernels import registry, render
from colonnade.kernels.call import Arena, Call, Const, External, Scratch, Shared
from colonnade.kernels.isa import ISAS, Isa, available, isa
from colonnade.layout import (
    LINE,
    Layout,
    Panels,
    Placed,
    Planes,
    Rows,
    elements,
    fitting,
    panel_lanes,
    place,
    read_planes,
    round_up,
    write_planes,
)
from colonnade.workload import Cast, Conv2d, Workload, evaluate
from colonnade.workload.base import NONE

# ISAs that kernels run for in tests: the host's, and RISC-V's by vector length, of which one is quick
NAMES = [
    *(i.name for i in ISAS if i.arch in ("any", "x86_64")),
    *(row.label if row.label.endswith("256") else pytest.param(row.label, marks=pytest.mark.slow) for row in RVV),
]
SLACK = 4096  # bytes after the last plane that a strip of several vectors may read, never write
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def values(shape: int | tuple[int, ...], seed: int) -> np.ndarray:
    """Random float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Case:
    """``registry.Operands`` and the arena they stand in (bytes, without slack)."""

    workload: Workload
    inputs: tuple[Placed, ...]
    output: Placed | None
    arena: int
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    external: str = ""
    rms: float | None = None


class Arranger:
    """Places tensors one after the other, a poisoned cache line between them."""

    def __init__(self) -> None:
        self.end = 0

    def put(self, name: str, shape: tuple[int, ...], layout: Layout) -> Placed:
        """A tensor in a buffer of its own."""
        tensor = place(name, shape, layout, self.end)
        self.end += round_up(layout.buffer_bytes(shape[1]), LINE) + LINE
        return tensor

    def case(
        self,
        workload: Workload,
        inputs: Sequence[Placed],
        output: Placed | None,
        constants: Mapping[str, np.ndarray] | None = None,
        external: str = "",
    ) -> Case:
        """The operands, in an arena that ends with the last tensor."""
        return Case(workload, tuple(inputs), output, max(self.end - LINE, 0), constants or {}, external)


def machines() -> list[Isa]:
    """Rows of this machine as if additions had pipes of their own; AVX-512 also as if load ports broadcast. The kernels
    run wherever their instructions are."""
    rows = [replace(row, adders=True) for row in ISAS if machine_has(row.name)]
    return rows + [replace(row, broadcasts=True) for row in rows if row.broadcast_flags]


def label(row: Isa) -> str:
    """How a parameter of a test is called."""
    return row.name + "-broadcasts" * row.broadcasts


def machine_has(name: str) -> bool:
    """Can this machine run kernels of the ISA called ``name``?"""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags.update(line.split(":", 1)[1].split())
    return name in {row.name for row in available(host(), frozenset(flags))}


def need(name: str) -> Isa:
    """The ISA called ``name``, or ``rvv-256`` and the like, emulated; or a skipped test."""
    for row in RVV:
        if row.label == name:
            if not INSTALLED:
                pytest.skip(MISSING)
            return row
    if not machine_has(name):
        pytest.skip(f"this machine has no {name}")
    return isa(name)


@functools.cache
def library(name: str, broadcasts: bool = False) -> ctypes.CDLL:
    """All kernels of one ISA, compiled once and kept in the build cache; or those that ``broadcasts`` makes others."""
    target = replace(isa(name), broadcasts=broadcasts)
    every = registry.variants(target).values()
    chosen = [v for v in every if not broadcasts or any(one.params.get("pairs") for one in (v, *v.needs))]
    files = render.library(target, chosen)
    files["exports.c"] = (
        f"extern const char cn_kernels_{name}[];\n"
        '__attribute__((visibility("default"))) const void *cn_table(void) { return cn_kernels_' + name + "; }\n"
    )
    return ctypes.CDLL(str(Toolchain().compile(files, "shared", host())))


@functools.cache
def _kernels(target: Isa) -> dict[str, int]:
    """Symbol → address; of a machine whose load ports broadcast, with the kernels that it has in another form."""
    return _exported(target.name) | (_exported(target.name, True) if target.broadcasts else {})


@functools.cache
def _exported(name: str, broadcasts: bool = False) -> dict[str, int]:
    """Likewise, from the table that a library exports."""
    export = library(name, broadcasts).cn_table
    export.restype = ctypes.c_void_p
    table = export()
    found: dict[str, int] = {}
    while symbol := ctypes.c_char_p.from_address(table).value:
        address = ctypes.c_void_p.from_address(table + 8).value
        assert address
        found[symbol.decode()] = address
        table += 16
    return found


@contextmanager
def guarded(size: int, align: int, poison: float = np.nan) -> Iterator[tuple[int, np.ndarray]]:
    """(address, uint8 [size]) that ends at a page nobody may touch, less what alignment takes; poisoned."""
    page = mmap.PAGESIZE
    room = max(round_up(size, page), page)
    base = _libc.mmap(None, room + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    whole = _view(base + page, room)
    whole.view(np.float32)[:] = poison
    for guard in (base, base + page + room):
        assert _libc.mprotect(guard, page, 0) == 0
    start = room - round_up(size, align)
    before = whole[:start].copy()
    yield base + page + start, whole[start : start + size]
    np.testing.assert_array_equal(whole[:start], before, "something in front of the buffer was written")
    _libc.munmap(base, room + 2 * page)  # not after a failure: the report still shows these arrays


def _view(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def expected(case: Any, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The workload's reference on ``inputs`` and the case's constants."""
    return evaluate(case.workload, inputs, case.constants)


def run(
    case: Any,
    candidate: registry.Candidate,
    target: Isa,
    inputs: Sequence[np.ndarray],
    threads: int = 1,
    poison: float = np.nan,
    tolerance: float = 2e-6,
    slack: int = SLACK,
    magnitude: float = 0.0,
    view: str = "float32",
) -> np.ndarray:
    """Run ``candidate`` on ``inputs`` (data first, then residual; of an import step the user's array).

    ``magnitude`` is that of the terms where sums may cancel.
    ``view``: the type of what stands in the output's lanes.
    ``slack`` bytes follow the last tensor, then comes the page that cannot be touched.
    Checked: the result (within ``tolerance`` of the largest magnitude, plus ``tolerance`` relative), zeros in every
    halo and the lead of the output, and that no other byte of arena, constants or inputs has changed.
    """
    calls = registry.bind(case, candidate)
    wanted = expected(case, inputs)
    vector = target.vlen // 32 if isinstance(target, Emulated) else target.lanes or target.emulates // 32
    if case.output is not None:
        wanted = wanted.reshape(case.output.shape)  # dense arrays have any shape
    with guarded(case.arena + slack, LINE, poison) as (base, arena):
        for tensor, values in zip(case.inputs, inputs, strict=False):
            write_planes(arena, tensor, np.asarray(values, np.float32).reshape(tensor.shape), vector)
        before = arena.copy()
        external = _external(case, inputs, wanted)
        with guarded(external.nbytes, 4, poison) as (user, user_bytes):
            user_bytes[:] = external.reshape(-1).view(np.uint8)
            backwards = case.arena // LINE % 2 == 1
            if isinstance(target, Emulated):
                run_calls(target, calls, threads, arena, user_bytes, poison, backwards)
            else:
                with guarded(max(call.shared for call in calls), LINE, poison) as (shared, _):
                    for call in calls:
                        _run_call(call, target, threads, base, user, shared, poison, backwards)
            user_after = user_bytes.copy().view(external.dtype).reshape(external.shape)
        result = user_after
        if case.output is not None:
            result = read_planes(arena, case.output, vector)
            if case.external:
                same = user_after.tobytes() == external.tobytes()
                assert same, "the user's input was written"
            _check_zeros(arena, case.output, vector)
            _forget(before, arena, case.output, vector)
        changed = np.flatnonzero(before != arena)
        assert not changed.size, f"{candidate.key()} wrote {changed.size} bytes it does not own, first at {changed[0]}"
    if view != "float32":
        result, wanted = (np.ascontiguousarray(x, np.float32).reshape(-1).view(view) for x in (result, wanted))
    elif wanted.dtype != np.float32:
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(result.astype(np.float64), wanted.astype(np.float64), candidate.key())
        return result
    with np.errstate(invalid="ignore"):
        finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(magnitude, float(finite.max()) if finite.size else 0.0, _unclipped(case, inputs))
    np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance * scale, err_msg=candidate.key())
    return result


def check(
    case: Case,
    isa: Isa,
    inputs: Sequence[np.ndarray],
    threads: int,
    tolerance: float = 2e-6,
    magnitude: float = 0.0,
    slack: int = 0,
) -> None:
    """`run` of every legal candidate; none of them may read past the last tensor, but for ``slack`` bytes."""
    for candidate in registry.candidates(case, isa, threads):
        assert candidate.kernel.endswith(f"__{isa.name}")
        run(case, candidate, isa, inputs, threads, tolerance=tolerance, slack=slack, magnitude=magnitude)


def _unclipped(case: Any, inputs: Sequence[np.ndarray]) -> float:
    """The largest finite magnitude of a convolution before its limits: what ReLU cuts off is as inexact as the rest."""
    work = case.workload
    if not isinstance(work, Conv2d) or work.epilogue.activation.function is not None:
        return 0.0
    sums = replace(work, epilogue=replace(work.epilogue, activation=NONE))
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(evaluate(sums, inputs, case.constants))
    return float(found[np.isfinite(found)].max(initial=0.0))


def _external(case: Any, inputs: Sequence[np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """What stands at the external pointer before the call: the user's input, or room for his output."""
    if not case.external:
        return np.zeros(1, np.float32)
    if case.output is None:
        return np.full(wanted.nbytes, 0xFF, np.uint8).view(wanted.dtype).reshape(wanted.shape)
    typed = isinstance(case.workload, Cast)
    return np.ascontiguousarray(inputs[0], None if typed else np.float32)


def _run_call(
    call: Call, target: Isa, threads: int, base: int, user: int, shared: int, poison: float, backwards: bool
) -> None:
    """All threads of one call, one after the other."""
    struct = registry.structs()[call.struct]
    assert set(call.fields) == {m.name for m in struct.members}, f"{call.kernel}: fields do not match {call.struct}"
    scalars = {k: v for k, v in call.fields.items() if isinstance(v, int | float)}
    image = np.frombuffer(bytearray(struct.pack(scalars)), np.uint8)
    offsets = struct.offsets()
    with ExitStack() as stack:
        constants: list[tuple[np.ndarray, np.ndarray, str]] = []
        for member in struct.members:
            if not member.is_pointer:
                continue
            value, address = call.fields[member.name], 0
            if isinstance(value, Arena):
                address = base + value.offset
            elif isinstance(value, External):
                address = user
            elif isinstance(value, Shared):
                address = shared + value.offset
            elif isinstance(value, Scratch):
                address, _ = stack.enter_context(guarded(call.scratch * threads, LINE, poison))
            elif isinstance(value, Const):
                data = np.ascontiguousarray(value.data).reshape(-1).view(np.uint8)
                address, place = stack.enter_context(guarded(data.nbytes, LINE, poison))
                place[:] = data
                constants.append((data, place, member.name))
            else:
                assert value is None, f"{member.name}: {value!r}"
            at = offsets[member.name]
            image[at : at + 8] = np.frombuffer(address.to_bytes(8, "little"), np.uint8)
        address, place = stack.enter_context(guarded(struct.size, LINE))
        place[:] = image
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(_kernels(target)[call.kernel])
        # either order is legal: one shows a thread that tramples on the next one's share, the other on the last one's
        for thread in reversed(range(threads)) if backwards else range(threads):
            kernel(address, thread, threads)
        np.testing.assert_array_equal(place, image, "the arguments were written")
        for data, place, name in constants:
            np.testing.assert_array_equal(place, data, f"constant {name} was written")


def _check_zeros(arena: np.ndarray, output: Placed, vector: int) -> None:
    """Every lane of the output that is no pixel is exactly zero."""
    layout = output.layout
    if isinstance(layout, Rows):
        return
    lead = arena[output.lead_offset : output.lead_offset + output.lead_bytes].view(np.float32)
    assert not np.count_nonzero(lead), "the lead is not zero"
    if isinstance(layout, Panels):
        holes = panel_lanes(output, vector)[:, ~layout.planes.valid()[: layout.planes.lanes]]
        assert not np.count_nonzero(elements(arena, layout)[holes]), "halo lanes of panels are not zero"
        return
    phases = layout.stored_phases
    for index, offset in enumerate(output.offsets):
        lanes = elements(arena[offset : offset + layout.itemsize * layout.plane], layout)
        wrong = np.flatnonzero(lanes[~layout.valid(phases[index % len(phases)])])
        assert not wrong.size, f"plane {index}: {wrong.size} halo lanes are not zero"


def _forget(before: np.ndarray, after: np.ndarray, output: Placed, vector: int) -> None:
    """Make ``before`` equal to ``after`` where the output may be written."""
    layout = output.layout
    if isinstance(layout, Panels):
        lanes = panel_lanes(output, vector)
        register = fitting(vector, layout.itemsize)
        whole = -(-layout.planes.lanes // register) * register  # the last vector may be written as a whole
        lanes = np.concatenate([lanes, lanes[:, -1:] + np.arange(1, whole - layout.planes.lanes + 1)], axis=1)
        elements(before, layout)[lanes] = elements(after, layout)[lanes]
        return
    stretches = [(output.lead_offset, output.lead_bytes)]
    size = layout.itemsize * (layout.plane if isinstance(layout, Planes) else layout.batch * layout.width)
    stretches += [(int(offset), size) for offset in output.offsets]
    for start, length in stretches:
        before[start : start + length] = after[start : start + length]
