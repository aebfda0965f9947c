"""3x3 convolutions at stride 1 with fewer multiplications: Winograd's minimal filtering F(m x m, 3 x 3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). A tile of m x m output pixels
takes (m + 2)^2 products instead of 9 m^2. Input tiles are transformed into (m + 2)^2 planes a channel, one lane a
tile; on these the product is a 1x1 convolution a plane, done by the same kernel as every other one; what comes out
is transformed back under the epilogue. Zeros of pruned weights do not survive the transform, so this is a dense
candidate, worth it where little was pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import numpy.typing as npt

from colonnade.kernels.call import Arena, Call, Const, Field, Scratch, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import pairs, panels, strips
from colonnade.kernels.ops.shared import LEAD_MEMBERS, f32, lead, u32
from colonnade.kernels.registry import Candidate, Operands, Variant
from colonnade.kernels.structs import Member, Struct
from colonnade.layout import LINE, round_up
from colonnade.workload import Conv2d

Matrix = tuple[tuple[float, ...], ...]

# B: input transform [m+2, m+2], G: weights [m+2, 3], A: output [m, m+2]; points 0, 1, -1 (, 2, -2) and infinity
B: dict[int, Matrix] = {
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
G: dict[int, Matrix] = {
    2: ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}
A: dict[int, Matrix] = {
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}

TILES = (
    Member("images", "u32"),
    Member("tile_rows", "u32"),
    Member("tile_columns", "u32"),
    Member("pitch", "u32", "lanes from row to row of the planes"),
    Member("image_rows", "u32", "rows from image to image of the planes"),
    Member("channels", "u32"),
    Member("tiles_plane", "u32", "lanes from one plane of tiles to the next"),
)
INPUT = Struct(
    "cn_winograd_input",
    "Tiles of haloed planes, transformed: tiles[position][channel][lane], a lane a tile. Rows of `room` lanes.",
    (
        Member("arena", "const char *", "base of planes"),
        Member("planes", "const uint32_t *", "offset of every channel's plane"),
        Member("tiles", "float *"),
        Member("scratch", "char *", "scratch_bytes a thread"),
        *TILES,
        Member("top", "u32", "rows of padding above"),
        Member("left", "u32", "columns of padding on the left"),
        Member("room", "u32", "lanes of a row in scratch"),
        Member("scratch_bytes", "u32"),
    ),
)
OUTPUT = Struct(
    "cn_winograd_output",
    "Transformed tiles back into planes: clip(bias + residual + pixel).",
    (
        Member("arena", "char *", "base of planes and residual"),
        Member("planes", "const uint32_t *", "offset of every channel's plane"),
        Member("residual", "const uint32_t *", "likewise of the plane to add, or null"),
        Member("bias", "const float *"),
        Member("tiles", "const float *"),
        Member("scratch", "char *", "scratch_bytes a thread"),
        *LEAD_MEMBERS,
        *TILES,
        Member("height", "u32", "rows of pixels"),
        Member("width", "u32", "pixels of a row"),
        Member("plane", "u32", "lanes of a whole plane, all of them written"),
        Member("room", "u32", "lanes of a row in scratch"),
        Member("scratch_bytes", "u32"),
        Member("low", "f32"),
        Member("high", "f32"),
    ),
)
STRUCTS = (INPUT, OUTPUT)
SLACK = 64  # lanes behind a row in scratch: whole vectors, read with step 2


def variants(isa: Isa) -> Iterator[Variant]:
    """The transforms of both tile sizes; the product between them is the convolution's own kernel."""
    for m in (2, 4):
        same: dict[str, object] = {"M": m, "N": m + 2, "NV": 1, "combine": combine}
        yield Variant(f"f32_winograd{m}_input_1v__{isa.name}", "winograd_input.c.in", {**same, "B": B[m]})
        yield Variant(f"f32_winograd{m}_output_1v__{isa.name}", "winograd_output.c.in", {**same, "A": A[m]})


def combine(row: tuple[float, ...], name: str, lmul: int, suffix: str = "") -> str:
    """The C expression of ``sum(row[i] * name<i><suffix>)`` in vector primitives; no products by 0, 1 and -1."""
    vec, text = f"vec{lmul}", ""
    # begin with a factor of 1: it needs no product
    for factor, i in sorted(((f, i) for i, f in enumerate(row) if f), key=lambda term: (term[0] != 1, term[1])):
        term = f"{name}{i}{suffix}"
        if not text:
            text = term if factor == 1 else f"{vec}_mul({vec}_splat({factor:.1f}f, vl), {term}, vl)"
        elif abs(factor) == 1:
            text = f"{vec}_{'add' if factor == 1 else 'sub'}({text}, {term}, vl)"
        else:
            text = f"{vec}_fma({text}, {factor:.1f}f, {term}, vl)"
    return text


def applies(step: Operands) -> bool:
    """Is it a dense-able 3x3 convolution at stride 1 without dilation and groups?"""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    shape = (conv.kernel, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    return shape and min(conv.in_channels, conv.out_channels) >= 8


def candidates(step: Operands, isa: Isa, shapes: list[tuple[int, int]]) -> Iterator[Candidate]:
    """Tile size x shape of the product's kernel."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    for m, (mr, nv) in product((2, 4), shapes):
        lanes = _lanes(conv, m)
        vectors = -(-lanes // (isa.lanes or 8))
        if mr < 6 or nv > vectors:
            continue  # every position has weights of its own: a short block would read them for too few lanes
        waste = -(-vectors // nv) * nv / vectors
        products = (m + 2) ** 2 * conv.in_channels * conv.out_channels * vectors * (1 + 0.5 / nv + 0.5 / mr)
        moves = (m + 2) ** 2 * (conv.in_channels + conv.out_channels) * vectors * 12
        # Unmeasured, the direct convolution is the safer choice: it reads a quarter of the weights.
        rank = 3 * (products * waste + moves)
        yield Candidate(f"f32_winograd{m}_{mr}x{nv}v__{isa.name}", {"winograd": m, "dense": 1}, rank)


def _lanes(conv: Conv2d, m: int) -> int:
    return conv.batch * -(-conv.out_height // m) * -(-conv.out_width // m)


def transform(weight: npt.NDArray[np.float32], m: int) -> npt.NDArray[np.float32]:
    """[OC, IC, 3, 3] → [(m + 2)^2, OC, IC]: G w Gᵀ, computed in float64."""
    g = np.asarray(G[m], np.float64)
    out = np.einsum("ia,ocab,jb->ijoc", g, weight.astype(np.float64), g, optimize=True)
    return np.ascontiguousarray(out.reshape((m + 2) ** 2, *weight.shape[:2]), np.float32)


def bind(step: Operands, candidate: Candidate) -> tuple[Call, ...]:
    """Input transform, product, output transform."""
    conv, output, source = step.workload, step.output, step.inputs[0]
    assert isinstance(conv, Conv2d) and output is not None
    m, isa = candidate.params["winograd"], candidate.kernel.rsplit("__", 1)[1]
    mr, nv = (int(n) for n in candidate.kernel.split("_")[2].removesuffix("v").split("x"))
    kernel = f"f32_spconv_{candidate.kernel.split('_')[2]}__{isa}"
    layout, n2 = output.planes, (m + 2) ** 2
    tile_rows, tile_columns = -(-conv.out_height // m), -(-conv.out_width // m)
    plane = round_up(_lanes(conv, m), LINE // 4)
    plane += LINE // 4 if plane * 4 % 4096 == 0 else 0
    source_bytes = n2 * conv.in_channels * plane * 4
    shared = source_bytes + n2 * conv.out_channels * plane * 4 + 4096
    tiles: dict[str, Field] = {
        "images": conv.batch, "tile_rows": tile_rows, "tile_columns": tile_columns, "pitch": layout.pitch,
        "image_rows": layout.image_rows, "tiles_plane": plane,
    }  # fmt: skip
    room = round_up((tile_columns + 1) * m + SLACK, LINE // 4)
    into = {
        **tiles, "arena": Arena(), "planes": u32(source.offsets), "tiles": Shared(0), "scratch": Scratch(),
        "channels": conv.in_channels, "top": conv.padding[0], "left": conv.padding[1], "room": room,
        "scratch_bytes": 2 * (m + 2) * room * 4,
    }  # fmt: skip
    back = {
        **tiles, **lead(output), "arena": Arena(), "planes": u32(output.offsets),
        "residual": u32(step.inputs[1].offsets) if conv.epilogue.residual else None,
        "bias": f32(step.constants.get("bias", np.zeros(conv.out_channels))), "tiles": Shared(source_bytes),
        "scratch": Scratch(), "channels": conv.out_channels, "height": conv.out_height, "width": conv.out_width,
        "plane": layout.plane, "room": room, "scratch_bytes": (m * m + m) * room * 4,
        "low": float(conv.epilogue.activation.low), "high": float(conv.epilogue.activation.high),
    }  # fmt: skip
    return (
        Call(f"f32_winograd{m}_input_1v__{isa}", INPUT.name, into, 2 * (m + 2) * room * 4, shared),
        Call(kernel, "cn_conv", _product(step, m, (mr, nv), isa, plane, source_bytes), 0, shared),
        Call(f"f32_winograd{m}_output_1v__{isa}", OUTPUT.name, back, (m * m + m) * room * 4, shared),
    )


def _product(
    step: Operands, m: int, shape: tuple[int, int], isa: str, plane: int, source_bytes: int
) -> dict[str, Field]:
    """(m + 2)^2 products of [OC, IC] by [IC, tiles] as one convolution whose tiles each read one position's planes."""
    from colonnade.kernels.ops.conv import OFFSETS_AHEAD, TILE_DTYPE, WEIGHTS_AHEAD

    conv = step.workload
    assert isinstance(conv, Conv2d)
    mr, nv = shape
    ic, oc, n2 = conv.in_channels, conv.out_channels, (m + 2) ** 2
    transformed = transform(step.constants["weight"], m)
    starts = np.arange(0, oc, mr)
    records = np.zeros(n2 * len(starts), TILE_DTYPE)
    heights = np.minimum(mr, oc - starts)
    records["rows"] = np.tile(heights, n2)
    records["columns"] = ic
    position = np.repeat(np.arange(n2), len(starts))
    records["first_row"] = position * oc + np.tile(starts, n2)
    records["first_column"] = position * ic
    records["first_weight"] = (position * oc + np.tile(starts, n2)).astype(np.int64) * ic
    # a tile's weights are [ic][rows]
    weights = [transformed[p, s : s + mr].T.reshape(-1) for p in range(n2) for s in starts]
    offsets = np.arange(n2 * ic, dtype=np.int64) * plane * 4
    rows = source_bytes + np.arange(n2 * oc, dtype=np.int64) * plane * 4
    return {
        "arena": Shared(0),
        "offsets": u32(np.concatenate([offsets, np.zeros(OFFSETS_AHEAD, np.int64)])),
        "weights": f32(np.concatenate([*weights, np.zeros(max(WEIGHTS_AHEAD, 8 * mr))])),
        "bias": f32(np.zeros(n2 * oc)),
        "rows": u32(rows),
        "residual": None,
        "tiles": Const(records),
        "mask": Const(np.full(plane // 8 + 64, 255, np.uint8)),
        "lead": Shared(0),
        "lead_bytes": 0,
        "starts": None,
        "start_count": 0,
        "tile_count": len(records),
        "row_count": n2 * oc,
        "lanes": _lanes(conv, m),
        "plane": plane,
        "strips": strips.whole(_lanes(conv, m), nv, isa_named(isa)).count,
        "tail": 0,
        # a tile's weights stay near while all its lanes pass; threads share out the many tiles
        "strip_block": 0,
        "packed": 0,
        "prefetch": 0,
        "fetch": 1,  # products go through all of the transformed output
        "split_tiles": 1,
        "low": -np.inf,
        "high": np.inf,
        **panels.NONE,
        **pairs.NONE,
    }
