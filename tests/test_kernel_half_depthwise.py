"""Depthwise kernels of float16 against their definition: any kernel, stride, dilation and multiplier, every VLEN."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from convolutions import operands
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_harness import run
from models import Builder
from test_kernel_depthwise import blocks, depthwise_convs, mine
from test_kernel_half import MACHINE, POISON, check, halved
from test_rvv_code import assembly

from colonnade.frontend import imported
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import depthwise, then
from colonnade.kernels.registry import Candidate, candidates, structs
from colonnade.workload import RELU, RELU6, Conv2d, Epilogue


def limited(conv: Conv2d) -> Conv2d:
    """The same one, with a limit for a function that kernels have no place for."""
    function = conv.epilogue.activation.function
    if function is None or function.name in then.FUNCTIONS:
        return conv
    return replace(conv, epilogue=replace(conv.epilogue, activation=RELU))


def own(case, isa, threads: int) -> list[Candidate]:
    """The candidates that are depthwise kernels."""
    found = [c for c in candidates(case, isa, threads) if depthwise.known(c.kernel)]
    assert all(c.kernel.startswith("f16_") for c in found)
    return found


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=depthwise_convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_depthwise_convolution_equals_its_definition(isa, conv, seed, extra, data):
    case, inputs = halved(*operands(limited(conv), None, seed, extra))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    check(case, inputs, data.draw(st.sampled_from(own(case, isa, threads))), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@given(conv=depthwise_convs(), seed=st.integers(0, 2**31), extra=st.integers(0, 2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_stride_of_two_reads_planes_as_they_stand(isa, conv, seed, extra, data):
    """Of any size; behind the slack that vectors may read lies a page nobody may touch."""
    conv = replace(limited(conv), stride=(2, 2))
    assume(conv.out_height > 0 and conv.out_width > 0)
    case, inputs = halved(*operands(conv, None, seed, extra, plain=True))
    threads = data.draw(st.sampled_from([1, 2, 3]))
    found = [c for c in own(case, isa, threads) if depthwise.strided(c.kernel)]
    check(case, inputs, data.draw(st.sampled_from(found)), isa, threads)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize(
    "size, taps, stride",
    [(7, 3, 1), (23, 3, 1), (133, 3, 1), (39, 5, 1), (70, 7, 1), (15, 3, 2), (91, 3, 2), (130, 5, 2), (126, 4, 2)],
)
def test_every_depthwise_kernel_of_the_library(isa, size, taps, stride):
    """Each (R, NV), with blocks of rows and strips that do not come out even."""
    pad = (taps // 2,) * 4
    conv = Conv2d(2, 5, 5, size, size, (taps,) * 2, (stride,) * 2, pad, groups=5, epilogue=Epilogue(True, RELU6))
    case, inputs = halved(*operands(conv, None, seed=3, plain=True))
    found = own(case, isa, 2)
    known = [v for v in depthwise.variants(isa) if v.params["S"] == stride and v.params.get("half")]
    window = max(v.params["WINDOW"] for v in known if v.params["WINDOW"] in (0, taps))
    assert {c.kernel for c in found} == {v.symbol for v in known if v.params["WINDOW"] == window}
    for candidate in found:
        check(case, inputs, candidate, isa, threads=2)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("taps", depthwise.WINDOWS)
@pytest.mark.parametrize("stride", [1, 2])
def test_windows_in_blocks_of_any_height(isa, taps, stride):
    for conv, rows, nv in blocks(taps, stride):
        case, inputs = halved(*operands(conv, None, seed=7, extra=rows % 2, plain=True))
        check(case, inputs, mine(case, isa, rows, nv), isa, threads=2)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_value_that_is_no_number_reaches_the_output_and_no_halo(isa, stride):
    conv = Conv2d(
        1, 4, 4, 13, 29, (3, 3), (stride,) * 2, (1, 1, 1, 1), groups=4, epilogue=Epilogue(False, RELU6)
    )  # fmt: skip
    case, (x,) = halved(*operands(conv, None, seed=5, plain=True))
    x[0, :, 2, 28], x[0, 1, 5, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        for candidate in own(case, isa, 1):
            assert np.isnan(run(case, candidate, isa, [x], tolerance=0.02, poison=POISON)).any()


def test_single_precision_has_kernels_of_its_own():
    """An ISA with both has both, under names that tell."""
    names = [v.symbol for v in depthwise.variants(isa_named("rvv_zvfh"))]
    assert len(set(names)) == len(names) and {name.partition("_")[0] for name in names} == {"f16", "f32"}
    single = [v.symbol.replace("rvv", "rvv_zvfh") for v in depthwise.variants(isa_named("rvv"))]
    assert [name for name in names if name.startswith("f32")] == single
    assert not depthwise.known("f16_spconv_8x2v__rvv_zvfh") and depthwise.DWCONV.name in structs()


@pytest.mark.parametrize("window", depthwise.WINDOWS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rows, nv", [(7, 1), (4, 2), (1, 1)])
def test_an_order_holds_every_sum_once_behind_what_it_reads(rows, nv, window, stride):
    steps, cycles = depthwise.order(rows, window, nv, 32, stride)
    there: set[tuple[int, int]] = set()
    begun: set[int] = set()
    for what, k, q, t in steps:
        if what not in ("first", "sum"):
            there |= {(k, q)} if what != "wide" else set()
            continue
        assert (k, q) in there
        row = (q - t) // stride
        assert (what == "first") == (row not in begun)
        begun.add(row)
    sums = sorted(((q - t) // stride, t, k) for what, k, q, t in steps if what in ("first", "sum"))
    assert sums == [(i, t, k) for i in range(rows) for t in range(window) for k in range(window)]
    assert cycles >= nv * len(sums)


def test_windows_keep_vectors_and_weights_in_registers(tmp_path):
    """From a block's first sum to its last one, nothing is moved to or from memory but what is read, and no vector type
    is set: ours would meet another. Of both sizes of elements; and all lines are asked for."""
    isa = isa_named("rvv_zvfh")
    windows = [v for v in depthwise.variants(isa) if v.body == "dwwindow.c.in"]
    text = assembly(windows, tmp_path, isa)
    bodies = dict(
        re.findall(r"^(f\d\d_dwconv\w+v__rvv_zvfh_\d+):[^\n]*\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    )
    asked = {
        f"{v.symbol}_{r}": (v.params["asks"] + v.params["asks_out"]) * (r == v.params["R"])
        for v in windows
        for r in v.params["row_counts"]
    }
    assert set(bodies) == set(asked)
    for name, body in bodies.items():
        lines = [line.strip() for line in body.splitlines()]
        sums = [at for at, line in enumerate(lines) if line.startswith("vfmacc")]
        block = lines[sums[0] : sums[-1]]
        assert [x for x in block if re.match(r"vset|v[ls][1248]r\.|vmv|.*Folded (Spill|Reload)", x)] == [], name
        assert sum(line.split()[:2] == ["lw", "zero,"] for line in lines) == asked[name]


def test_depthwise_layers_are_float16_where_their_kernels_apply_their_function():
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (1, 3, 20, 20)), 3, 8, 3, pads=(1, 1, 1, 1)))
    y = b.op("HardSwish", b.conv(b.conv(x, 8, 8), 8, 8, 3, groups=8, pads=(1, 1, 1, 1)))
    y = b.op("Tanh", b.conv(b.conv(y, 8, 8), 8, 8, 5, groups=8, pads=(2, 2, 2, 2), strides=(2, 2)))
    plan = imported(b.build(b.conv(y, 8, 8), opset=18)).arrange(half=then.FUNCTIONS).plan(())
    found = [
        (step.workload.epilogue.activation.function, step.output.layout.itemsize)
        for step in plan.steps
        if isinstance(step.workload, Conv2d) and step.workload.groups > 1
    ]
    assert [(f and f.name, size) for f, size in found] == [("hard_swish", 2), ("tanh", 4)]
