"""Random convolutions with weights, pruned tiles and the planes they need: shared by all kernel tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from kernel_harness import Case

from colonnade.layout import Placed, Planes, place, round_up
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, Epilogue, Function, matrix, unmatrix


def halo(size: int, out: int, before: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zero pixels that taps reach (before, after) the pixels of a phase along one axis."""
    stored = -(-size // stride)
    reach = ((kernel - 1) * dilation - before) // stride
    return max(0, -((-before) // stride)), max(0, out - 1 + reach - (stored - 1))


def places(
    conv: Conv2d, extra: int = 0, all_phases: bool = False, shifted: bool = False, plain: bool = False
) -> tuple[Placed, Placed, Placed, int]:
    """Input, output and residual of ``conv`` one behind the other, and the bytes of all three.

    ``extra`` widens pitch and image rows beyond need, as a shared region does. ``shifted``: a plane of the input for
    every column that a tap begins at, and no halo beside its rows. ``plain``: the input is not in phases."""
    if plain and conv.stride != (1, 1):
        apart = replace(conv, stride=(1, 1))  # its lanes are those of another convolution's output
        x, _, _, at = places(apart, extra)
        oh, ow = conv.out_height, conv.out_width
        target = Planes(conv.batch, oh, ow, ow + extra, oh + extra, lead=extra * (ow + extra))
        shape = (conv.batch, conv.out_channels, oh, ow)
        y, r = (
            place(name, shape, target, round_up(at, 64) + i * target.buffer_bytes(conv.out_channels))
            for i, name in enumerate("yr")
        )
        return x, y, r, r.lead_offset + target.buffer_bytes(conv.out_channels)
    (kh, kw), (sy, sx), (dy, dx) = conv.kernel, conv.stride, conv.dilation
    oh, ow = conv.out_height, conv.out_width
    above, below = halo(conv.height, oh, conv.padding[0], kh, sy, dy)
    before, after = halo(conv.width, ow, conv.padding[1], kw, sx, dx)
    if shifted:
        before, after = 0, 0
    pitch = max(-(-conv.width // sx) + max(before, after), ow) + extra
    rows = max(-(-conv.height // sy) + max(above, below), oh) + extra
    used = {((i * dy - conv.padding[0]) % sy, (j * dx - conv.padding[1]) % sx) for i in range(kh) for j in range(kw)}
    if shifted:
        used = {((i * dy - conv.padding[0]) % sy, j * dx - conv.padding[1]) for i in range(kh) for j in range(kw)}
    kept = None if all_phases or (conv.stride == (1, 1) and not shifted) else tuple(sorted(used))
    source = Planes(conv.batch, conv.height, conv.width, pitch, rows, above * pitch + before, conv.stride, kept)
    target = Planes(conv.batch, oh, ow, pitch, rows, lead=extra * pitch)
    x = place("x", (conv.batch, conv.in_channels, conv.height, conv.width), source, 0)
    shape = (conv.batch, conv.out_channels, oh, ow)
    at = round_up(source.buffer_bytes(conv.in_channels), 64)
    y = place("y", shape, target, at)
    r = place("r", shape, target, at + target.buffer_bytes(conv.out_channels))
    return x, y, r, r.lead_offset + target.buffer_bytes(conv.out_channels)


def weights(conv: Conv2d, pattern: ColumnPattern | None, rng: np.random.Generator) -> np.ndarray:
    """[OC, IC/g, KH, KW]; each tile of ``pattern.tile`` rows keeps the same random columns."""
    shape = conv.weight_shape
    rows = matrix(rng.standard_normal(shape).astype(np.float32) / np.sqrt(conv.k))
    if pattern is not None:
        per_group = conv.out_channels // conv.groups
        for group in range(conv.groups):
            for start in range(0, per_group, pattern.tile):
                mine = slice(group * per_group + start, group * per_group + min(start + pattern.tile, per_group))
                rows[mine, rng.permutation(conv.k)[pattern.kept(conv.k) :]] = 0
    return unmatrix(rows, shape)


def operands(
    conv: Conv2d, pattern: ColumnPattern | None, seed: int, extra: int = 0, shifted: bool = False, plain: bool = False
) -> tuple[Case, list[np.ndarray]]:
    """A placed call and the arrays for its inputs."""
    rng = np.random.default_rng(seed)
    x, y, r, size = places(conv, extra, shifted=shifted, plain=plain)
    inputs = [rng.standard_normal(x.shape).astype(np.float32)]
    if conv.epilogue.residual:
        inputs.append(rng.standard_normal(r.shape).astype(np.float32))
    constants = {
        "weight": weights(conv, pattern, rng),
        "bias": rng.standard_normal(conv.out_channels).astype(np.float32),
    }
    return Case(conv, (x, r) if conv.epilogue.residual else (x,), y, size, constants), inputs


LIMITS = [NONE, RELU, RELU6]
# three that kernels apply themselves, one that they do not
FUNCTIONS = [Activation(function=Function.of(name)) for name in ("silu", "hard_swish", "leaky_relu", "gelu")]


@st.composite
def convs(
    draw: st.DrawFn, max_channels: int = 70, max_size: int = 40, max_macs: int = 2_000_000, functions: bool = False
) -> Conv2d:
    """Convolutions of any kernel, stride, padding, dilation and group count that have an output."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = st.integers(1, max_channels // groups)
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    conv = Conv2d(
        batch=draw(st.sampled_from([1, 1, 2, 3])),
        in_channels=draw(channels) * groups,
        out_channels=draw(channels) * groups,
        height=draw(st.integers(1, max_size)),
        width=draw(st.integers(1, max_size)),
        kernel=kernel,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=(
            draw(st.integers(0, kernel[0])),
            draw(st.integers(0, kernel[1])),
            draw(st.integers(0, kernel[0])),
            draw(st.integers(0, kernel[1])),
        ),
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        groups=groups,
        epilogue=Epilogue(draw(st.booleans()), draw(st.sampled_from(LIMITS + FUNCTIONS * functions))),
    )
    assume(conv.out_height > 0 and conv.out_width > 0 and conv.macs <= max_macs)
    return conv


patterns = st.one_of(
    st.none(),
    st.builds(
        ColumnPattern,
        sparsity=st.sampled_from([0.1, 0.25, 0.5, 0.625, 0.75, 0.875, 0.95]),
        tile=st.integers(1, 32),
        group=st.sampled_from([None, None, 4, 8]),
    ),
)
