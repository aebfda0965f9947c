"""Where the elements of a tensor stand in memory: channel planes with shared zero halos, panels, or rows.

Planes (``CNHW`` order: channel, image, row, column) feed convolutions without im2col. One plane
holds all images of one channel (or of one phase of it)::

    lane = image * image_rows * pitch + row * pitch + column

``pitch - columns`` lanes at the end of every row and ``image_rows - rows`` rows at the end of every
image are zero. The right halo of a row is the left halo of the next one, and the bottom halo of an
image (or plane) is the top halo of the next; the first plane of a buffer has ``lead`` zero lanes in
front of it. Whoever writes a tensor writes all ``plane`` lanes of its planes, zeros included, and
clears the lead: the arena is reused, nothing may rely on what lay there before.

Panels have the same lanes, cut into strips: ``[strip][channel][lanes of a strip]``. One block of memory holds all
that a pointwise convolution reads for a strip, where planes are a memory page each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

LINE = 64  # bytes: planes start and end on whole cache lines
ALIAS = 4096  # bytes: a plane stride that is a multiple of this maps all planes to the same L1 sets
VECTOR_LANES = 32  # f32 lanes of a register at VLEN 1024, the longest that memory is laid out for
ELEMENTS: dict[int, np.dtype[Any]] = {4: np.dtype(np.float32), 2: np.dtype(np.float16)}  # by their bytes


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def begins_outside(phases: tuple[int, int], kept: tuple[tuple[int, int], ...] | None) -> bool:
    """Are some of the ``kept`` phases those of ``Planes.shifted``?"""
    return any(not 0 <= px < phases[1] for _, px in kept or ())


def fitting(lanes: int, itemsize: int) -> int:
    """Elements of ``itemsize`` bytes where there is room for so many of float32, as in vector registers."""
    return lanes * 4 // itemsize


@dataclass(frozen=True)
class Planes:
    """Geometry shared by all planes of one tensor. Lengths in elements (lanes) unless said otherwise.

    ``height`` and ``width`` are those of the tensor. With ``phases = (sy, sx)`` each channel is kept as
    ``sy * sx`` planes; plane ``(py, px)`` holds the pixels ``[py::sy, px::sx]``. ``kept_phases`` names the
    phases that are stored at all (a 1x1 stride-2 reader needs only ``(0, 0)``); None means all of them,
    ordered ``py`` outer, ``px`` inner.

    A kept phase may begin outside: plane ``(py, px)`` holds pixel ``column * sx + px`` at ``column``, and a zero where
    there is none. Planes that are ``shifted`` like this, one for every column that a tap begins at, need no zeros
    behind their rows: on maps of 7x7, 49 lanes are computed and not 55.
    """

    batch: int
    height: int
    width: int
    pitch: int
    image_rows: int
    lead: int = 0
    phases: tuple[int, int] = (1, 1)
    kept_phases: tuple[tuple[int, int], ...] | None = None
    itemsize: int = 4  # bytes of an element: 4 is float32, 2 float16

    def __post_init__(self) -> None:
        if self.pitch < self.columns or self.image_rows < self.rows:
            raise ValueError(f"{self.rows} x {self.columns} pixels do not fit {self.image_rows} rows of {self.pitch}")

    @property
    def rows(self) -> int:
        """Rows of one stored plane (the largest phase)."""
        return -(-self.height // self.phases[0])

    @property
    def columns(self) -> int:
        """Columns of one stored plane (the largest phase)."""
        return -(-self.width // self.phases[1])

    @property
    def stored_phases(self) -> tuple[tuple[int, int], ...]:
        """Phases in the order in which their planes stand."""
        if self.kept_phases is not None:
            return self.kept_phases
        return tuple((py, px) for py in range(self.phases[0]) for px in range(self.phases[1]))

    @property
    def shifted(self) -> bool:
        """Do some of the stored phases begin outside?"""
        return begins_outside(self.phases, self.kept_phases)

    def held(self, phase: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a plane of ``phase`` that hold pixels."""
        (sy, sx), (py, px) = self.phases, phase
        first = min(max(0, -(px // sx)), self.pitch)
        last = max(first, min(first + len(range(first * sx + px, self.width, sx)), self.pitch))
        return slice(0, len(range(py, self.height, sy))), slice(first, last)

    @property
    def lanes(self) -> int:
        """Lanes up to and including the last pixel of the last image: what has to be computed."""
        return ((self.batch - 1) * self.image_rows + self.rows - 1) * self.pitch + self.columns

    @cached_property
    def plane(self) -> int:
        """Lanes from one plane to the next: whole cache lines, never a multiple of 4,096 bytes."""
        line = LINE // self.itemsize
        lanes = round_up(self.batch * self.image_rows * self.pitch, line)
        return lanes + line if lanes * self.itemsize % ALIAS == 0 else lanes

    @property
    def lead_lanes(self) -> int:
        """``lead`` rounded up to whole cache lines."""
        return round_up(self.lead, LINE // self.itemsize)

    def buffer_bytes(self, channels: int) -> int:
        """Bytes of a buffer of ``channels`` channels: lead and planes."""
        return (self.lead_lanes + channels * len(self.stored_phases) * self.plane) * self.itemsize

    def valid(self, phase: tuple[int, int] = (0, 0)) -> npt.NDArray[np.bool_]:
        """bool [plane]: which lanes hold pixels; all the others are zero."""
        rows, columns = self.held(phase)
        lanes = np.zeros(self.plane, bool)
        images = lanes[: self.batch * self.image_rows * self.pitch].reshape(self.batch, self.image_rows, self.pitch)
        images[:, rows, columns] = True
        return lanes

    def picked(self, images: npt.NDArray[np.float32], phase: tuple[int, int]) -> npt.NDArray[np.float32]:
        """A view of those pixels of ``images`` [N, H, W] that a plane of ``phase`` holds."""
        (sy, sx), (py, px), columns = self.phases, phase, self.held(phase)[1]
        first = columns.start * sx + px
        return images[:, py::sy, first : first + max(columns.stop - columns.start, 0) * sx : sx]

    def mask(self, phase: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8]:
        """``valid`` as bits, lane 0 in bit 0 of byte 0; padded with zero bits to 64 bytes beyond the plane."""
        bits = np.packbits(self.valid(phase), bitorder="little")
        return np.concatenate([bits, np.zeros(64, np.uint8)])

    def key(self) -> str:
        """Short text that is equal exactly for equal geometry (part of a tuning key)."""
        phases = "" if self.phases == (1, 1) else f"s{self.phases[0]}x{self.phases[1]}n{len(self.stored_phases)}"
        if self.shifted:
            phases = f"s{self.phases[0]}x{self.phases[1]}at" + "".join(f"{px:+d}" for _, px in self.stored_phases)
        half = "f16" if self.itemsize == 2 else ""
        return f"n{self.batch}h{self.height}w{self.width}p{self.pitch}r{self.image_rows}{phases}{half}"


@dataclass(frozen=True)
class Rows:
    """Plain row-major matrix ``[batch, width]``: classifier inputs, outputs, squeezed vectors (H = W = 1)."""

    batch: int
    width: int
    itemsize: int = 4

    def buffer_bytes(self, channels: int) -> int:
        """Bytes of the whole matrix (``channels`` must equal ``width``), in whole cache lines."""
        assert channels == self.width
        return round_up(self.batch * self.width * self.itemsize, LINE)

    def key(self) -> str:
        """Short text that is equal exactly for equal geometry (part of a tuning key)."""
        return f"rows{self.batch}x{self.width}"


@dataclass(frozen=True)
class Panels:
    """The lanes of ``planes`` strip by strip: ``[strip][channel][lanes of a strip]``, without lead and phases.

    A strip is ``vectors`` vector registers wide, the same as in the kernels that write and read it, so where a lane
    stands depends on the machine; lanes beyond the last pixel's vector are neither written nor read. The room is
    enough for every vector length up to VLEN 1024: one plan serves them all.
    """

    planes: Planes
    vectors: int

    def __post_init__(self) -> None:
        if self.vectors not in (1, 2, 4):
            raise ValueError(f"panels of {self.vectors} registers: expected 1 or 2")
        if self.planes.lead or self.planes.phases != (1, 1):
            raise ValueError("panels have neither lead nor phases")

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.planes.itemsize

    def buffer_bytes(self, channels: int) -> int:
        """Bytes of a buffer of ``channels`` channels, for the longest strips."""
        strip = self.vectors * fitting(VECTOR_LANES, self.itemsize)
        return round_up(channels * round_up(self.planes.lanes, strip) * self.itemsize, LINE)

    def key(self) -> str:
        """Short text that is equal exactly for equal geometry (part of a tuning key)."""
        return f"{self.planes.key()}panels{self.vectors}"


Layout = Planes | Panels | Rows


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor with its place in the arena.

    ``offsets`` int64: byte offset from the arena's base of lane 0 (row 0, column 0 of image 0) of every
    plane, channel-major, stored phases inner; any planes of any buffers may stand in the list, so concat,
    channel split and shuffle cost nothing. For ``Rows`` and ``Panels`` there is one offset: that of the buffer.
    ``shape`` is the logical shape (N, C, H, W) or (N, C). ``lead_offset`` is the first byte of the zero
    lead that the writer of this tensor clears (``lead_bytes`` long; 0 when there is none).
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    offsets: npt.NDArray[np.int64] = field(repr=False)
    lead_offset: int = 0
    lead_bytes: int = 0

    @property
    def planes(self) -> Planes:
        """The layout, which must be planes."""
        assert isinstance(self.layout, Planes), f"{self.name} is not in planes"
        return self.layout

    @property
    def grid(self) -> Planes:
        """Which pixel each lane holds, in planes or in panels."""
        return self.layout.planes if isinstance(self.layout, Panels) else self.planes

    @property
    def rows(self) -> Rows:
        """The layout, which must be rows."""
        assert isinstance(self.layout, Rows), f"{self.name} is not in rows"
        return self.layout


def place(name: str, shape: tuple[int, ...], layout: Layout, offset: int) -> Placed:
    """A tensor that fills a buffer of its own, whose first byte stands at ``offset`` in the arena."""
    if isinstance(layout, Rows | Panels):
        return Placed(name, shape, layout, np.array([offset], np.int64))
    lead = layout.lead_lanes * layout.itemsize
    count = shape[1] * len(layout.stored_phases)
    offsets = offset + lead + np.arange(count, dtype=np.int64) * layout.plane * layout.itemsize
    return Placed(name, shape, layout, offsets, offset, lead)


def write_planes(
    arena: npt.NDArray[np.uint8], tensor: Placed, values: npt.NDArray[np.float32], vector: int = 0
) -> None:
    """Put ``values`` [N, C, H, W] (or [N, C] for rows) into ``arena``, zeros in halos and lead, as writers do.

    ``vector``: f32 lanes of a vector register, on which panels depend.
    """
    layout = tensor.layout
    if isinstance(layout, Rows):
        _lanes(arena, int(tensor.offsets[0]), layout.batch * layout.width)[:] = values.reshape(-1)
        return
    if isinstance(layout, Panels):
        for channel, lanes in enumerate(panel_lanes(tensor, vector)):
            whole = np.zeros(layout.planes.plane, np.float32)
            whole[layout.planes.valid()] = values[:, channel].reshape(-1)
            elements(arena, layout)[lanes] = whole[: len(lanes)]
        return
    arena[tensor.lead_offset : tensor.lead_offset + tensor.lead_bytes] = 0
    phases = layout.stored_phases
    for index, offset in enumerate(tensor.offsets):
        channel, (py, px) = index // len(phases), phases[index % len(phases)]
        lanes = _lanes(arena, int(offset), layout.plane, layout.itemsize)
        lanes[:] = 0
        lanes[layout.valid((py, px))] = layout.picked(values[:, channel], (py, px)).reshape(-1)


def read_planes(arena: npt.NDArray[np.uint8], tensor: Placed, vector: int = 0) -> npt.NDArray[np.float32]:
    """The values [N, C, H, W] (or [N, C]) that stand in ``arena``; pixels of phases that are not stored read as 0."""
    layout = tensor.layout
    if isinstance(layout, Rows):
        return _lanes(arena, int(tensor.offsets[0]), layout.batch * layout.width).reshape(tensor.shape).copy()
    grid = tensor.grid
    values = np.zeros((grid.batch, tensor.shape[1], grid.height, grid.width), np.float32)
    if isinstance(layout, Panels):
        for channel, lanes in enumerate(panel_lanes(tensor, vector)):
            pixels = lanes[grid.valid()[: len(lanes)]]
            values[:, channel] = elements(arena, layout)[pixels].reshape(values[:, channel].shape)
        return values
    phases = layout.stored_phases
    for index, offset in enumerate(tensor.offsets):
        channel, (py, px) = index // len(phases), phases[index % len(phases)]
        part = layout.picked(values[:, channel], (py, px))
        lanes = _lanes(arena, int(offset), layout.plane, layout.itemsize)
        part[...] = lanes[layout.valid((py, px))].reshape(part.shape)
    return values


def panel_lanes(tensor: Placed, vector: int) -> npt.NDArray[np.int64]:
    """int64 [C, lanes]: index into the arena's ``elements`` of every lane up to the last pixel, where registers have
    ``vector`` f32 lanes."""
    layout = tensor.layout
    assert isinstance(layout, Panels) and vector > 0, f"{tensor.name}: panels of registers with {vector} lanes"
    strip, channels = layout.vectors * fitting(vector, layout.itemsize), tensor.shape[1]
    number, lane = np.divmod(np.arange(layout.planes.lanes), strip)
    start = int(tensor.offsets[0]) // layout.itemsize
    return start + number * channels * strip + lane + np.arange(channels)[:, None] * strip


def elements(arena: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[Any]:
    """The arena as numbers of the layout's kind."""
    return arena.view(ELEMENTS[layout.itemsize])


def _lanes(arena: npt.NDArray[np.uint8], offset: int, count: int, itemsize: int = 4) -> npt.NDArray[Any]:
    return arena[offset : offset + itemsize * count].view(ELEMENTS[itemsize])
