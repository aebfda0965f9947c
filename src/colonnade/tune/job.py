"""A job for ``runtime/harness.c``: one step's tensors in a small arena, candidates as calls, what must come out."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, External, Scratch, Shared
from colonnade.kernels.registry import Operands, structs
from colonnade.layout import Panels, Placed, Planes, elements, fitting, panel_lanes, read_planes, round_up, write_planes
from colonnade.workload import Array, Convert, ConvPool, activation_of, evaluate, without_function

MAGIC = int.from_bytes(b"CNJOB1", "little")
PAGE = 4096
SLACK = 1024  # bytes behind the last tensor that a vector may read, as at the end of a model's arena
TOLERANCE = 1e-4  # of the largest magnitude, the project's promise towards other runtimes
RANGE = 1000.0  # of sums in float16, which ends at 65504: their spread at most
TOLERANCE_HALF = 0.05  # likewise of sums in float16: thousands of them, each rounded to 11 bits
ROUNDED = 8.0  # sums are surely right to so much less than is tolerated
STEEP = 0.1  # a function whose result their rounding moves by more than this share has a pole or an edge there


class Tunable(Operands, Protocol):
    """A step with a name for messages and a key for records; ``plan.Step`` is one."""

    @property
    def name(self) -> str: ...
    def key(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Moved:
    """A step whose tensors were moved into an arena of their own (same geometry, same place within a page)."""

    name: str
    workload: object
    inputs: tuple[Placed, ...]
    output: Placed | None
    constants: object
    external: str
    rms: float | None = None


@dataclass(frozen=True)
class Segment:
    """Bytes at ``offset`` of ``space`` (0: the arena, i + 1: external i)."""

    space: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Expected(Segment):
    """Numbers of ``itemsize`` bytes that must stand there within ``tolerance``; where it is NaN, exactly zero, and
    where it is infinite, anything."""

    tolerance: float = 0.0
    itemsize: int = 4


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything about one step that its candidates share. ``arena`` and ``externals`` in bytes."""

    step: Operands
    arena: int
    externals: tuple[tuple[str, int], ...]
    segments: tuple[Segment, ...]
    expected: tuple[Expected, ...]

    @property
    def size(self) -> int:
        """Bytes of data held."""
        return sum(len(s.data) for s in (*self.segments, *self.expected))


@dataclass(frozen=True)
class Run:
    """One visit to a candidate: check its result first?, at least ``least`` and at most ``most`` repetitions, until
    ``budget_ns`` are spent; ended after ``limit_s`` whole seconds."""

    candidate: int
    check: bool
    least: int
    most: int
    budget_ns: int
    limit_s: int


def expected(step: Operands, inputs: Sequence[Array], itemsize: int) -> tuple[Array, float]:
    """What must come out of ``step``, infinite where anything may, and by how much numbers may differ.

    Anything may where the definition gives no finite number, and where the function behind a sum makes more of the
    sum's rounding than is tolerated: beside a pole, an edge, the end of where it is defined.
    """
    share = TOLERANCE if itemsize == 4 else TOLERANCE_HALF
    function = activation_of(step.workload).function
    with np.errstate(all="ignore"):
        if function is None:
            result = evaluate(step.workload, inputs, step.constants)
            steep = np.zeros(result.shape)
        else:
            sums = evaluate(without_function(step.workload), inputs, step.constants)
            result, off = function(sums), share / ROUNDED * _largest(sums)
            steep = np.maximum(abs(function(sums + off) - result), abs(function(sums - off) - result))
        free = ~np.isfinite(result) | ~np.isfinite(steep)
        # what a few numbers beside a pole reach is no measure for the others
        tolerance = share * max(_largest(result[~free & ~(steep > STEEP * abs(result))]), 1e-30)
        free |= steep > tolerance
        return (np.where(free, np.float32(np.inf), result) if free.any() else result), tolerance


def _largest(values: Array) -> float:
    """Magnitude of the largest finite number, 0 where there is none."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def problem(step: Tunable, vector: int = 0, whole: bool = True) -> Problem:
    """Random inputs for ``step``, its reference result, and where all of it stands. Deterministic by the step's key.

    ``vector``: f32 lanes of a vector register on the target, which steps on panels need; ``whole``: are the last
    vectors of panels written whole, zeros behind the last pixel?
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(step.key().encode()).digest()[:8], "little"))
    moved, arena = _move(step)
    image = np.full(arena, 0xFF, np.uint8)
    externals: list[tuple[str, int]] = []
    segments: list[Segment] = []
    shapes = [x.shape for x in moved.inputs]
    if step.external and step.output is not None:
        assert isinstance(step.workload, (Convert, ConvPool))
        shapes = [step.workload.shape]
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if moved.inputs and moved.inputs[0].layout.itemsize == 2:  # sums must stay in the range of float16
        inputs[0] *= np.float32(min(1.0, RANGE / max(_gain(step), 1e-30)))
    if step.rms is not None:  # kernels for pairs of columns rely on inputs of about this size
        inputs[0] *= np.float32(step.rms)
    if step.external and step.output is not None:
        externals.append((step.external, inputs[0].nbytes))
        segments.append(Segment(1, 0, inputs[0].tobytes()))
    spans = []
    for x, values in zip(moved.inputs, inputs, strict=False):
        spans += _zero_leads(image, x)
        write_planes(image, x, values, vector)
        spans += _extents(x, vector)
    segments += [Segment(0, a, image[a:b].tobytes()) for a, b in _merged(spans)]
    if moved.inputs:  # as they stand there: a convolution may add what it reads
        inputs = [read_planes(image, x, vector) for x in moved.inputs]
    itemsize = 4 if moved.output is None else moved.output.layout.itemsize
    result, tolerance = expected(step, inputs, itemsize)
    if moved.output is None:
        externals.append((step.external, result.nbytes))
        wanted = [Expected(len(externals), 0, result.astype(np.float32).tobytes(), tolerance)]
    else:
        wanted = [
            Expected(0, a, image[a:b].tobytes(), tolerance, itemsize)
            for a, b in _write_expected(image, moved.output, result, vector, whole)
        ]
    return Problem(moved, arena, tuple(externals), tuple(segments), tuple(wanted))


def _gain(step: Operands) -> float:
    """How much larger than its inputs what a step multiplies makes them, at most."""
    weight = step.constants.get("weight", step.constants.get("scale", np.zeros((1, 1), np.float32)))
    return float(np.sqrt(np.square(weight.reshape(len(weight), -1), dtype=np.float64).sum(1)).max())


def encode(
    problem: Problem, candidates: Sequence[Sequence[Call]], runs: Sequence[Run], threads: int, flush: int
) -> bytes:
    """The job file. ``flush`` in bytes a thread: the near caches that are emptied before each repetition."""
    blobs = _Blobs()
    by_name = structs()
    external = {name: index for index, (name, _) in enumerate(problem.externals)}
    call_rows: list[tuple[int, ...]] = []
    relocation_rows: list[tuple[int, ...]] = []
    candidate_rows: list[tuple[int, ...]] = []
    for calls in candidates:
        candidate_rows.append((len(call_rows), len(calls)))
        for call in calls:
            shape = by_name[call.struct]
            offsets = shape.offsets()
            first = len(relocation_rows)
            scalars: dict[str, float] = {}
            for name, value in call.fields.items():
                match value:
                    case Arena():
                        relocation_rows.append((offsets[name], 0, value.offset))
                    case Const():
                        relocation_rows.append((offsets[name], 1, blobs.array(value.data)))
                    case Scratch():
                        relocation_rows.append((offsets[name], 2, call.shared))
                    case Shared():
                        relocation_rows.append((offsets[name], 2, value.offset))
                    case External():
                        relocation_rows.append((offsets[name], 3, external[value.name]))
                    case None:
                        pass
                    case _:
                        scalars[name] = value
            image = shape.pack(scalars)
            symbol = blobs.add(call.kernel.encode() + b"\0")
            count = len(relocation_rows) - first
            call_rows.append((symbol, blobs.add(image), len(image), first, count, call.scratch, call.shared))
    segment_rows = [(s.space, s.offset, blobs.add(s.data), len(s.data)) for s in problem.segments]
    expect_rows = [
        (e.space, e.offset, blobs.add(e.data), len(e.data), e.itemsize, e.tolerance) for e in problem.expected
    ]
    run_rows = [(r.candidate, int(r.check), r.least, r.most, r.budget_ns, r.limit_s) for r in runs]
    sizes = [(size,) for _, size in problem.externals]
    tables = (sizes, segment_rows, expect_rows, candidate_rows, call_rows, relocation_rows, run_rows)
    # rows are u64, but for the tolerance, a double
    head_bytes = 8 * (5 + len(tables)) + sum(8 * len(row) for rows in tables for row in rows)
    base = round_up(head_bytes, 64)

    def shift(rows: Sequence[tuple[float, ...]], *at: int) -> list[list[float]]:
        return [[value + base if index in at else value for index, value in enumerate(row)] for row in rows]

    relocated = [[at, kind, value + base if kind == 1 else value] for at, kind, value in relocation_rows]
    bodies: list[Sequence[Sequence[float]]] = [
        sizes, shift(segment_rows, 2), shift(expect_rows, 2), candidate_rows, shift(call_rows, 0, 1), relocated,
        run_rows,
    ]  # fmt: skip
    content = blobs.content()
    head = [MAGIC, base + len(content), threads, problem.arena, flush, *(len(rows) for rows in bodies)]
    packed = b"".join(
        struct.pack("<d", value) if isinstance(value, float) else struct.pack("<Q", value & 2**64 - 1)
        for row in [head, *(row for rows in bodies for row in rows)]
        for value in row
    )
    return packed.ljust(base, b"\0") + content


@dataclass
class _Blobs:
    """Equal contents once, each on a 64-byte boundary."""

    parts: list[bytes] = field(default_factory=list)
    length: int = 0
    known: dict[bytes, int] = field(default_factory=dict)
    arrays: dict[int, tuple[npt.NDArray[np.generic], int]] = field(default_factory=dict)

    def add(self, data: bytes) -> int:
        digest = hashlib.blake2b(data, digest_size=20).digest()
        if digest not in self.known:
            padded = data.ljust(round_up(max(len(data), 1), 64), b"\0")
            self.known[digest] = self.length
            self.parts.append(padded)
            self.length += len(padded)
        return self.known[digest]

    def array(self, array: npt.NDArray[np.generic]) -> int:
        # the array is kept beside its place, so its id is not given to another one meanwhile
        if id(array) not in self.arrays:
            self.arrays[id(array)] = (array, self.add(np.ascontiguousarray(array).tobytes()))
        return self.arrays[id(array)][1]

    def content(self) -> bytes:
        # masks and weights may be read a vector beyond their end
        return b"".join(self.parts) + bytes(256)


Span = tuple[int, int]


def _extents(tensor: Placed, vector: int) -> list[Span]:
    """First and last byte of everything the tensor's writer writes: planes and lead; of panels, all up to the last
    pixel."""
    layout = tensor.layout
    if isinstance(layout, Panels):
        lanes = panel_lanes(tensor, vector)
        strip = layout.vectors * fitting(vector, layout.itemsize)
        whole = layout.planes.lanes // strip * strip
        spans = [(int(lanes[0, 0]), int(lanes[0, 0]) + whole * tensor.shape[1])] if whole else []
        if whole < layout.planes.lanes:
            spans += [(int(a), int(b) + 1) for a, b in zip(lanes[:, whole], lanes[:, -1], strict=True)]
        return [(layout.itemsize * a, layout.itemsize * b) for a, b in spans]
    size = (layout.plane if isinstance(layout, Planes) else layout.batch * layout.width) * layout.itemsize
    spans = [(int(o), int(o) + size) for o in tensor.offsets]
    if tensor.lead_bytes:
        spans.append((tensor.lead_offset, tensor.lead_offset + tensor.lead_bytes))
    return spans


def _room(tensor: Placed) -> list[Span]:
    """Likewise for every vector length."""
    if not isinstance(tensor.layout, Panels):
        return _extents(tensor, 0)
    start = int(tensor.offsets[0])
    return [(start, start + tensor.layout.buffer_bytes(tensor.shape[1]))]


def _needed(tensor: Placed) -> Span:
    """From the first to the last byte of its room, zeros in front of its planes included."""
    lead = tensor.layout.lead_lanes * tensor.layout.itemsize if isinstance(tensor.layout, Planes) else 0
    spans = _room(tensor)
    return min(0 if lead > a else a - lead for a, _ in spans), max(b for _, b in spans)


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _zero_leads(image: npt.NDArray[np.uint8], tensor: Placed) -> list[Span]:
    """Zeros in front of every plane: what its own or its neighbour's writer has put there in a model."""
    if not isinstance(tensor.layout, Planes) or tensor.layout.lead_lanes == 0:
        return []
    lead = tensor.layout.lead_lanes * tensor.layout.itemsize
    spans = [(max(int(o) - lead, 0), int(o)) for o in tensor.offsets]
    for a, b in spans:
        image[a:b] = 0
    return spans


def _shifted(tensor: Placed, by: int) -> Placed:
    return replace(tensor, offsets=tensor.offsets + by, lead_offset=tensor.lead_offset + by)


def _move(step: Operands) -> tuple[Operands, int]:
    """The step in an arena that begins at its first tensor's page. An output that shares memory with an input gets
    a place of its own: repeated calls would change their own input."""
    output = step.output
    tensors = [*step.inputs, *([output] if output is not None else [])]
    if not tensors:
        return step, PAGE
    if output is not None and step.inputs:
        inputs = _merged([s for x in step.inputs for s in _room(x)])
        if any(a < d and c < b for a, b in inputs for c, d in _room(output)):
            end = max(_needed(x)[1] for x in tensors)
            output = _shifted(output, round_up(end + SLACK, PAGE))
            tensors[-1] = output
    base = min(_needed(x)[0] for x in tensors) // PAGE * PAGE
    arena = round_up(max(_needed(x)[1] for x in tensors) - base + SLACK, PAGE)
    return Moved(  # type: ignore[return-value]
        name=getattr(step, "name", ""),
        workload=step.workload,
        inputs=tuple(_shifted(x, -base) for x in step.inputs),
        output=None if output is None else _shifted(output, -base),
        constants=step.constants,
        external=step.external,
        rms=step.rms,
    ), arena


def _write_expected(
    image: npt.NDArray[np.uint8], output: Placed, result: Array, vector: int, whole: bool
) -> list[Span]:
    """Put the expectation into ``image``, halo and lead as NaN (exactly zero); its spans."""
    write_planes(image, output, result, vector)
    layout = output.layout
    if isinstance(layout, Panels):
        lanes = panel_lanes(output, vector)
        size = layout.itemsize
        elements(image, layout)[lanes[:, ~layout.planes.valid()[: layout.planes.lanes]]] = np.nan
        if behind := -layout.planes.lanes % fitting(vector, size) if whole else 0:
            last = lanes[:, -1:] + np.arange(1, behind + 1)
            elements(image, layout)[last] = np.nan
            more = [(size * int(a), size * int(b) + size) for a, b in zip(last[:, 0], last[:, -1], strict=True)]
            return _merged([*_extents(output, vector), *more])
    if isinstance(layout, Planes):
        phases = layout.stored_phases
        valid = {phase: layout.valid(phase) for phase in phases}
        for index, offset in enumerate(output.offsets):
            lanes = elements(image[int(offset) : int(offset) + layout.plane * layout.itemsize], layout)
            lanes[~valid[phases[index % len(phases)]]] = np.nan
        image[output.lead_offset : output.lead_offset + output.lead_bytes] = 0xFF
    return _merged(_extents(output, vector))
