"""Transposed convolution: one offset-gather convolution a phase of the output, and the copy that joins the phases.

Output pixels (y, x) with the same (y % sy, x % sx) take the same taps, from input pixels that stand side by side: each
phase is an ordinary convolution at stride 1 with its share of the kernel, and no product with a zero is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import blocks, feeds, pairs, panels, registers, strips, tables
from colonnade.kernels.ops import conv as gather
from colonnade.kernels.ops.shared import LEAD_MEMBERS, lead, u32
from colonnade.kernels.registry import Candidate, Operands, Operator, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import Placed
from colonnade.pattern import TiledWeights, discover
from colonnade.workload import ConvTranspose2d, Interleave, Repeat

INTERLEAVE = Struct(
    "cn_interleave",
    "Planes in phases to plain planes: out[c, n, y, x] = in[c, y % step_y, x % step_x][n, y / step_y, x / step_x].",
    (
        Member("arena", "char *", "all offsets are bytes from here"),
        Member("in", "const uint32_t *", "offset of every phase of every channel"),
        Member("out", "const uint32_t *", "offset of every plane"),
        *LEAD_MEMBERS,
        Member("channels", "u32"),
        Member("images", "u32"),
        Member("step_y", "u32"),
        Member("step_x", "u32"),
        Member("height", "u32"),
        Member("width", "u32"),
        Member("in_pitch", "u32"),
        Member("in_image", "u32", "lanes from one image to the next"),
        Member("pitch", "u32", "of the output"),
        Member("out_image", "u32"),
        Member("image_rows", "u32", "of the output"),
        Member("tail", "u32", "zero lanes after the last image of a plane"),
    ),
)


def _variants(isa: Isa) -> Iterator[Variant]:
    yield from (v for v in gather.variants(isa) if v.body == "spconv.c.in")


def _candidates(step: Operands, isa: Isa, threads: int) -> Iterator[Candidate]:
    """As of a convolution that reads its input in place."""
    conv = step.workload
    assert isinstance(conv, ConvTranspose2d) and step.output is not None
    lanes = step.output.planes.lanes
    pruned = not all(tiled.is_dense for _, _, tiled in _phases(step, 0))
    for dense in (0, 1) if pruned else (1,):
        for mr, nv in registers.shapes(isa):
            phases = [tiled for _, taps, tiled in _phases(step, mr if dense else 0) if taps]
            if phases and not registers.worth_trying(mr, phases[0], registers.shapes(isa)):
                continue
            yield from feeds.in_place(phases, lanes, mr, nv, dense, isa, threads, held=feeds.read_bytes(step))


Tap = tuple[int, int, int, int]  # kh, kw, and the shift in rows and columns


class _Weight:
    """A weight array and what cuts it into phases, as a cache key: equal when it is the same object."""

    def __init__(self, array: npt.NDArray[np.float32], conv: ConvTranspose2d) -> None:
        self.array, self.conv = array, conv

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Weight) and other.array is self.array and other.conv == self.conv


def _phases(step: Operands, dense_tile: int) -> tuple[tuple[tuple[int, int], tuple[Tap, ...], TiledWeights], ...]:
    conv = step.workload
    assert isinstance(conv, ConvTranspose2d)
    return _tilings(_Weight(step.constants["weight"], conv), dense_tile)


@lru_cache(maxsize=64)
def _tilings(weight: _Weight, dense_tile: int) -> tuple[tuple[tuple[int, int], tuple[Tap, ...], TiledWeights], ...]:
    """(phase, its taps, its tiles), tiles over columns in the order (tap, ic). A phase without taps has a column of
    zeros that nobody reads."""
    conv, result = weight.conv, []
    down, right = conv.taps(0), conv.taps(1)
    for py, px in product(range(conv.stride[0]), range(conv.stride[1])):
        taps = tuple((kh, kw, y, x) for (kh, y), (kw, x) in product(down[py], right[px]))
        parts = [weight.array[:, :, kh, kw] for kh, kw, _, _ in taps] or [np.zeros((conv.out_channels, 1), np.float32)]
        rows = np.ascontiguousarray(np.concatenate(parts, axis=1))
        if dense_tile or not taps:
            tiled = TiledWeights.dense_tiles(rows, dense_tile or 8, conv.groups)
        else:
            tiled = discover(rows, conv.groups)
        result.append(((py, px), taps, tiled))
    return tuple(result)


def _bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """One ``cn_conv`` call a phase, or one a phase and block of K."""
    conv, output = step.workload, step.output
    assert isinstance(conv, ConvTranspose2d) and output is not None
    source, layout = step.inputs[0], output.planes
    if (source.planes.pitch, source.planes.image_rows) != (layout.pitch, layout.image_rows):
        raise ValueError(f"{conv.key()}: input planes {source.planes.key()} do not match output {layout.key()}")
    if layout.phases != conv.stride or source.planes.phases != (1, 1):
        raise ValueError(f"{conv.key()}: output in phases {layout.phases}, needed {conv.stride} from plain planes")
    mr, nv = (int(part.removesuffix("v")) for part in candidate.kernel.split("_")[2].split("x"))
    isa = isa_named(candidate.kernel.rpartition("__")[2]).of(layout.itemsize)
    cut = strips.taken(candidate, layout.lanes, mr, nv, isa)
    stored = layout.stored_phases
    planes = output.offsets.reshape(conv.out_channels, len(stored))
    bias = step.constants.get("bias", np.zeros(conv.out_channels, np.float32))
    calls: list[Call] = []
    key, per_group, ring = conv.key(), conv.out_channels // conv.groups, registers.places(mr, nv, isa)
    for phase, taps, tiled in _phases(step, mr if candidate.params["dense"] else 0):
        order = np.concatenate([tile.rows for tile in tiled.tiles])
        rows = planes[order, stored.index(phase)]
        parts = blocks.cut(tiled, conv, candidate.params.get("blocks", 1)) if taps else [tiled]
        full = _offsets(conv, source, taps)
        for index, part in enumerate(parts):
            filled = tables.tables(key, full, part, per_group, ring, layout.itemsize)
            if not taps:
                filled.tiles["columns"] = 0
            fields: dict[str, Field] = {
                "arena": Arena(),
                "offsets": Const(filled.offsets),
                "weights": Const(filled.weights),
                "weights_ahead": filled.ahead(layout.lanes),
                "rows": u32(tables.beyond(rows, ring)),
                "residual": u32(rows) if index else None,  # sums go on from what stands in the output
                "tiles": Const(filled.tiles),
                "mask": Const(layout.mask(phase)),
                "lead": Arena(output.lead_offset),
                "lead_bytes": 0 if calls else output.lead_bytes,
                "starts": None,
                "start_count": 0,
                "tile_count": len(tiled.tiles),
                "row_count": len(order),
                "fetch": candidate.params["fetch"],
                "packed": 0,
                **strips.fields(cut, layout.lanes, layout.plane, candidate.params),
                **blocks.ends(conv, bias[order], ring, index, len(parts), layout.itemsize),
                **panels.NONE,
                **pairs.NONE,
            }
            calls.append(Call(candidate.kernel, tables.CONV.name, fields))
    return tuple(calls)


def _offsets(conv: ConvTranspose2d, source: Placed, taps: tuple[Tap, ...]) -> list[npt.NDArray[np.int64]]:
    """Per group int64 [taps * IC/groups]: byte offset of every column at lane 0 of the phase."""
    layout, planes = source.planes, source.offsets.reshape(conv.groups, -1)
    shifts = [(y * layout.pitch + x) * layout.itemsize for _, _, y, x in taps] or [0]
    return [np.concatenate([mine + shift for shift in shifts]) for mine in planes]


def _interleave(isa: Isa) -> str:
    """``f32_interleave_2v__rvv``"""
    return f"{isa.prefix}_interleave_{2 if isa.scalable else 1}v__{isa.name}"


def _interleave_variants(isa: Isa) -> Iterator[Variant]:
    for each in isa.forms:
        params = {"NV": 2 if isa.scalable else 1, "half": each.itemsize == 2}
        yield Variant(_interleave(each), "interleave.c.in", params)


def _interleave_candidates(step: Operands, isa: Isa, threads: int) -> Iterable[Candidate]:
    yield Candidate(_interleave(isa))


def _interleave_bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    (x,), y, work = step.inputs, step.output, step.workload
    assert isinstance(work, Interleave | Repeat) and y is not None
    source, target = x.planes, y.planes
    step_y, step_x = work.phases if isinstance(work, Interleave) else work.factors
    assert source.phases == ((step_y, step_x) if isinstance(work, Interleave) else (1, 1))
    assert source.kept_phases is None and target.phases == (1, 1)
    planes = x.offsets if isinstance(work, Interleave) else np.repeat(x.offsets, step_y * step_x)
    fields: dict[str, Field] = {
        "arena": Arena(),
        "in": u32(planes),
        "out": u32(y.offsets),
        **lead(y),
        "channels": y.shape[1],
        "images": target.batch,
        "step_y": step_y,
        "step_x": step_x,
        "height": target.height,
        "width": target.width,
        "in_pitch": source.pitch,
        "in_image": source.image_rows * source.pitch,
        "pitch": target.pitch,
        "out_image": target.image_rows * target.pitch,
        "image_rows": target.image_rows,
        "tail": target.plane - target.batch * target.image_rows * target.pitch,
    }
    return (Call(candidate.kernel, INTERLEAVE.name, fields),)


ROWS: tuple[Operator, ...] = (
    Operator("conv_transpose2d", (tables.TILE, tables.CONV), _variants, _candidates, _bind),
    Operator("interleave", (INTERLEAVE,), _interleave_variants, _interleave_candidates, _interleave_bind),
    Operator("repeat", (), lambda isa: (), _interleave_candidates, _interleave_bind),
)
