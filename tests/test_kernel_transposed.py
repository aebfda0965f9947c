"""Transposed convolution and the joining of its phases against their definitions, on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convolutions import FUNCTIONS, LIMITS, patterns
from emulated import INSTALLED, MISSING, RVV
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, machine_has, run

from colonnade.kernels.isa import ISAS
from colonnade.kernels.registry import bind, candidates
from colonnade.layout import Planes
from colonnade.pattern import ColumnPattern
from colonnade.workload import RELU, ConvTranspose2d, Epilogue, Interleave, Repeat, matrix, unmatrix

TOLERANCE = 2e-5  # of the largest magnitude
MACHINE = [
    *(pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)),
    *(pytest.param(row, id=row.label, marks=pytest.mark.skipif(not INSTALLED, reason=MISSING)) for row in RVV),
]


@st.composite
def transposed(draw: st.DrawFn) -> ConvTranspose2d:
    """Transposed convolutions of any kernel, stride, padding, dilation and group count that have an output."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pads = [draw(st.integers(0, 3)) for _ in range(4)]
    conv = ConvTranspose2d(
        batch=draw(st.sampled_from([1, 1, 2])),
        in_channels=draw(st.integers(1, 20)) * groups,
        out_channels=draw(st.integers(1, 20)) * groups,
        height=draw(st.integers(1, 15)),
        width=draw(st.integers(1, 20)),
        kernel=kernel,
        stride=stride,
        padding=(pads[0], pads[1], pads[2], pads[3]),
        output_padding=(
            draw(st.integers(0, max(stride[0], dilation[0]) - 1)),
            draw(st.integers(0, max(stride[1], dilation[1]) - 1)),
        ),
        dilation=dilation,
        groups=groups,
        epilogue=Epilogue(False, draw(st.sampled_from(LIMITS + FUNCTIONS))),
    )
    assume(conv.out_height > 0 and conv.out_width > 0 and conv.macs <= 1_000_000)
    return conv


def operands(conv: ConvTranspose2d, pattern: ColumnPattern | None, seed: int, extra: int) -> tuple[Case, np.ndarray]:
    """The smallest planes in which it finds its halos, ``extra`` lanes and rows more."""
    rng = np.random.default_rng(seed)
    (above, below), (before, behind) = conv.reach(0), conv.reach(1)
    rows, columns = -(-conv.out_height // conv.stride[0]), -(-conv.out_width // conv.stride[1])
    pitch = max(conv.width + before, columns + behind) + extra
    image_rows = max(conv.height + above, rows + below) + extra
    source = Planes(conv.batch, conv.height, conv.width, pitch, image_rows, above * pitch + before)
    target = Planes(conv.batch, conv.out_height, conv.out_width, pitch, image_rows, extra, conv.stride)
    arranger = Arranger()
    x = arranger.put("x", (conv.batch, conv.in_channels, conv.height, conv.width), source)
    y = arranger.put("y", (conv.batch, conv.out_channels, conv.out_height, conv.out_width), target)
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
    weight = rng.standard_normal(shape).astype(np.float32)
    if pattern is not None:
        flat, per_group = matrix(weight), conv.out_channels // conv.groups
        for start in range(0, conv.out_channels, per_group):
            for row in range(start, start + per_group, pattern.tile):
                mine = slice(row, min(row + pattern.tile, start + per_group))
                flat[mine, rng.permutation(flat.shape[1])[pattern.kept(flat.shape[1]) :]] = 0
        weight = unmatrix(flat, shape)
    constants = {"weight": weight, "bias": rng.standard_normal(conv.out_channels).astype(np.float32)}
    return arranger.case(conv, [x], y, constants), rng.standard_normal(x.shape).astype(np.float32)


@given(conv=transposed(), seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_definition_is_that_of_torch(conv, seed):
    case, x = operands(conv, None, seed, 0)
    weight, bias = case.constants["weight"], case.constants["bias"]
    top, left = conv.padding[:2]
    per_group = conv.out_channels // conv.groups
    theirs = weight.reshape(conv.groups, per_group, -1, *conv.kernel).swapaxes(1, 2)
    theirs = np.ascontiguousarray(theirs.reshape(conv.in_channels, per_group, *conv.kernel))
    # without padding, a bias that is added after zeros, and cut by hand: torch pads both sides alike
    full = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(x), torch.from_numpy(theirs), None, conv.stride, 0, 0, conv.groups, conv.dilation
    ).numpy()
    room = np.zeros((*full.shape[:2], full.shape[2] + 8, full.shape[3] + 8), np.float32)
    room[:, :, : full.shape[2], : full.shape[3]] = full
    wanted = room[:, :, top : top + conv.out_height, left : left + conv.out_width] + bias[:, None, None]
    wanted = conv.epilogue.activation(wanted)
    np.testing.assert_allclose(conv.reference(x, weight, bias), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=transposed(), pattern=patterns, seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_transposed_convolution_equals_its_definition(isa, conv, pattern, seed, extra, data):
    case, x = operands(conv, pattern, seed, extra)
    threads = data.draw(st.sampled_from([1, 2, 3]))
    candidate = data.draw(st.sampled_from(candidates(case, isa, threads)))
    run(case, candidate, isa, [x], threads=threads, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
def test_pixels_that_no_tap_reaches_hold_the_bias_even_beside_nan(isa):
    conv = ConvTranspose2d(1, 3, 8, 4, 4, (1, 1), (2, 2))
    case, x = operands(conv, None, 0, 0)
    x[:] = np.nan
    calls = bind(case, candidates(case, isa, 1)[0])
    assert [int(call.fields["tiles"].data["columns"].max()) for call in calls] == [3, 0, 0, 0]
    result = run(case, candidates(case, isa, 1)[0], isa, [x], tolerance=TOLERANCE)
    assert (result[0, :, 1::2] == case.constants["bias"][:, None, None]).all()


@pytest.mark.parametrize("isa", [row for row in MACHINE if row.id.startswith("rvv")])
@pytest.mark.parametrize("pattern", [None, ColumnPattern(0.25, 8)])
def test_many_channels_come_in_blocks(isa, pattern):
    """A phase with taps in several calls, one without any in one; limits apply to the last."""
    conv = ConvTranspose2d(1, 248, 11, 6, 17, (2, 3), (2, 4), epilogue=Epilogue(False, RELU))
    case, x = operands(conv, pattern, 0, 1)
    found = [c for c in candidates(case, isa, 1) if c.params.get("blocks", 1) > 1]
    assert found
    for candidate in found[:4]:
        calls = bind(case, candidate)
        assert len(calls) == 6 * candidate.params["blocks"] + 2
        run(case, candidate, isa, [x], threads=2, tolerance=TOLERANCE)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 5), height=st.integers(1, 20), width=st.integers(1, 70),
    phases=st.tuples(st.integers(1, 4), st.integers(1, 4)), extra=st.integers(0, 3), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_phases_become_planes(isa, batch, channels, height, width, phases, extra, threads):
    shape = (batch, channels, height, width)
    rows, columns = -(-height // phases[0]), -(-width // phases[1])
    arranger = Arranger()
    x = arranger.put("x", shape, Planes(batch, height, width, columns + extra, rows + extra, phases=phases))
    y = arranger.put("y", shape, Planes(batch, height, width, width + extra, height + extra, lead=extra))
    case = arranger.case(Interleave(shape, phases), [x], y)
    (candidate,) = candidates(case, isa, threads)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    run(case, candidate, isa, [values], threads=threads, tolerance=0)


@pytest.mark.parametrize("isa", MACHINE)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 5), height=st.integers(1, 20), width=st.integers(1, 70),
    factors=st.tuples(st.integers(1, 4), st.integers(1, 4)), fewer=st.integers(0, 3), extra=st.integers(0, 3),
    threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_pixels_are_repeated(isa, batch, channels, height, width, factors, fewer, extra, threads):
    """Also where the last ones come less often."""
    out = [max(size * factor - fewer % factor, 1) for size, factor in zip((height, width), factors, strict=True)]
    shape = (batch, channels, out[0], out[1])
    arranger = Arranger()
    x = arranger.put("x", (batch, channels, height, width), Planes(batch, height, width, width + extra, height + extra))
    y = arranger.put("y", shape, Planes(batch, *out, out[1] + extra, out[0] + extra, lead=extra))
    case = arranger.case(Repeat(shape, factors), [x], y)
    (candidate,) = candidates(case, isa, threads)
    values = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    wanted = run(case, candidate, isa, [values], threads=threads, tolerance=0)
    assert np.array_equal(wanted[..., 0, 0], values[..., 0, 0]) and wanted.shape == shape
