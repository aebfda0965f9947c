"""Pools and sums of planes of float16 against their numpy definitions, every VLEN; which steps become float16."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import test_kernels_other
from emulated import emulated
from everywhere import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Arranger, Case, run
from models import Builder
from test_kernel_half import MACHINE, POISON, ROUNDED, half
from test_kernels_other import (
    ANY_POOL,
    activations,
    batches,
    channels,
    halos,
    planes,
    pools,
    seeds,
    sizes,
    squares,
    stems,
    threads_,
    values,
)

from colonnade.frontend.load import imported
from colonnade.kernels.ops import then
from colonnade.kernels.ops.pool import GROUPS, SQUARES
from colonnade.kernels.registry import candidates
from colonnade.layout import Placed, Rows
from colonnade.plan import Plan
from colonnade.workload import NONE, RELU6, Binary, Convert, GlobalPool, Pool2d, Precision

SOME = settings(max_examples=60, deadline=None)
NEAR = 1.01 * ROUNDED  # relative error of a number that is rounded to float16 once
pooling = partial(test_kernels_other.pooling, itemsize=2)


def rounded(x: np.ndarray) -> np.ndarray:
    """What stands in planes of float16."""
    return x.astype(np.float16).astype(np.float32)


def check(case: Case, isa, inputs, threads: int, tolerance: float, **options) -> list[np.ndarray]:
    """Every legal candidate; none of these kernels reads a byte past the last tensor."""
    found = candidates(case, isa, threads)
    assert all(c.kernel.startswith("f16_") for c in found)
    return [
        run(case, each, isa, inputs, threads, tolerance=tolerance, poison=POISON, slack=0, **options) for each in found
    ]


@pytest.mark.parametrize("isa", MACHINE)
@SOME
@ANY_POOL
def test_pool(isa, pool, before, after, threads, seed, shift):
    """Maxima are exact, means are rounded once: no sum is one of float16."""
    case = pooling(pool, before, after)
    x = rounded(values(case.inputs[0].shape, seed) + np.float32(shift))
    for result in check(case, isa, [x], threads, 0 if pool.kind == "max" else NEAR, magnitude=1):
        np.testing.assert_allclose(result, pool.reference(x), NEAR, 1e-5)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("value", [60000.0, -0.1])
def test_means_of_large_windows(isa, value):
    """Float16 would overflow, or lose four of its bits."""
    for size, edge in ((7, 0), (14, 3)):
        pool = Pool2d("avg", 1, 3, 14, 33, (size, size), (1, 2), (edge,) * 4)
        case = pooling(pool)
        x = rounded(np.full(case.inputs[0].shape, value, np.float32) + values(case.inputs[0].shape, 1) / 8)
        for result in check(case, isa, [x], 2, NEAR):
            np.testing.assert_allclose(result, pool.reference(x), NEAR, 0)


class Compared(Pool2d):
    """A maximum as kernels of float32 compute it, down and then across: of two numbers the first one where it is
    larger, so the second one beside NaN."""

    def reference(self, x: np.ndarray, *_: Any) -> np.ndarray:
        down = np.full((self.batch, self.channels, self.out_height, self.width), -np.inf, np.float32)
        across = np.full((*down.shape[:3], self.out_width), -np.inf, np.float32)
        padded = np.pad(down, ((0, 0),) * 3 + ((self.padding[1], 99),), constant_values=-np.inf)
        for row in range(self.out_height):
            for tap in self.window(row, 0, self.height)[0]:
                down[:, :, row] = np.where(down[:, :, row] > x[:, :, tap], down[:, :, row], x[:, :, tap])
        padded[..., self.padding[1] : self.padding[1] + self.width] = down
        for column in range(self.out_width):
            for t in range(self.kernel[1]):
                new = padded[..., column * self.stride[1] + t * self.dilation[1]]
                across[..., column] = np.where(across[..., column] > new, across[..., column], new)
        return across


@pytest.mark.parametrize("isa", MACHINE)
@SOME
@given(pool=pools() | stems() | squares(), threads=threads_, seed=seeds)
def test_a_maximum_beside_what_is_no_number(isa, pool, threads, seed):
    pool = Compared(**{**pool.__dict__, "kind": "max"})
    case = pooling(pool)
    x = rounded(values(case.inputs[0].shape, seed))
    x[np.random.default_rng(seed).random(x.shape) < 0.1] = np.nan
    check(case, isa, [x], threads, 0)
    case = pooling(pool, itemsize=4)
    for candidate in candidates(case, isa, threads):
        run(case, candidate, isa, [x], threads, tolerance=0)


@pytest.mark.parametrize("isa", MACHINE)
@SOME
@given(
    kind=st.sampled_from(["avg", "sum", "max"]), n=batches, c=channels, h=sizes, w=sizes, halo=halos, threads=threads_,
    seed=seeds, shift=st.sampled_from([0, -5, 3000]),
)  # fmt: skip
def test_global_pool(isa, kind, n, c, h, w, halo, threads, seed, shift):
    """Rows of float32 from planes of float16: of their numbers, nothing is rounded to 11 bits again."""
    shape, arrange = (n, c, h, w), Arranger()
    x, y = arrange.put("x", shape, half(planes(shape, halo))), arrange.put("y", (n, c), Rows(n, c))
    inputs = [rounded(values(shape, seed) + np.float32(shift))]
    case = arrange.case(GlobalPool(kind, *shape), [x], y)
    check(case, isa, inputs, threads, 4e-6, magnitude=h * w if kind == "sum" else 1)


@pytest.mark.parametrize("isa", MACHINE)
@SOME
@given(
    kind=st.sampled_from(["add", "sub", "mul", "max", "min"]), n=batches, c=channels, h=sizes, w=sizes, halo=halos,
    act=activations, threads=threads_, seed=seeds, broadcast=st.booleans(), split=st.booleans(),
)  # fmt: skip
def test_binary_planes(isa, kind, n, c, h, w, halo, act, threads, seed, broadcast, split):
    """A number a channel is one of float32, in rows, and is rounded as it is taken."""
    shape, arrange = (n, c, h, w), Arranger()
    layout = half(planes(shape, halo, (2, 3) if split else (1, 1)))
    a = arrange.put("a", shape, layout)
    b = arrange.put("b", shape[:2], Rows(n, c)) if broadcast else arrange.put("b", shape, layout)
    case = arrange.case(Binary(kind, shape, broadcast, act), [a, b], arrange.put("y", shape, layout))
    inputs = [rounded(values(shape, seed)), values(b.shape, seed + 1)]
    if not broadcast:
        inputs[1] = rounded(inputs[1])
    wanted = case.workload.reference(*inputs)
    for result in check(case, isa, inputs, threads, 2 * NEAR, magnitude=4):
        np.testing.assert_allclose(result, wanted, 2 * NEAR, 5 * ROUNDED if broadcast else 1e-7)


@pytest.mark.parametrize("isa", MACHINE)
def test_values_that_are_not_numbers_pass_through_and_stay_out_of_halos(isa):
    shape = (2, 2, 5, 7)
    for kind, broadcast in (("add", False), ("mul", True), ("sub", False)):
        arrange = Arranger()
        a, y = (arrange.put(name, shape, half(planes(shape))) for name in "ay")
        b = arrange.put("b", shape[:2], Rows(2, 2)) if broadcast else arrange.put("b", shape, half(planes(shape)))
        data = [rounded(values(shape, 0)), rounded(values(b.shape, 1))]
        data[0][0, 0, 2, 6], data[0][0, 1, 4, 6] = np.nan, np.inf
        for act in (NONE, RELU6):
            (result,) = check(arrange.case(Binary(kind, shape, broadcast, act), [a, b], y), isa, data, 2, 3 * NEAR)
            assert np.isnan(result[0, 0, 2, 6])


@pytest.mark.parametrize("isa", MACHINE)
def test_channels_of_several_buffers(isa):
    """The planes of a concatenation, in another order, as one operand."""
    shape, arrange = (1, 6, 4, 5), Arranger()
    layout = half(planes(shape))
    parts = [arrange.put(name, (1, 3, 4, 5), layout) for name in "ab"]
    offsets = np.concatenate([p.offsets for p in parts])[[4, 0, 2, 5, 1, 3]]
    x, data = Placed("x", shape, layout, offsets), [rounded(values(shape, 0))]
    y, z = arrange.put("y", (1, 6, 2, 2), half(planes((1, 6, 2, 2)))), arrange.put("z", (1, 6), Rows(1, 6))
    check(arrange.case(Pool2d("max", *shape, (3, 3), (2, 2), ceil_mode=True), [x], y), isa, data, 2, 0)
    check(arrange.case(GlobalPool("max", *shape), [x], z), isa, data, 2, 0)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize(("size", "stride"), SQUARES)
def test_maps_larger_than_scratch(isa, size, stride):
    """Some rows after the other, and the last ones less than there is room for."""
    pool = Pool2d("max", 1, 2, 133, 171, (size, size), (stride, stride), (size // 2,) * 4)
    case = pooling(pool)
    check(case, isa, [rounded(values(case.inputs[0].shape, 3))], 2, 0)


@pytest.mark.parametrize(("itemsize", "groups"), [(2, (1, 1, 2, 2)), (4, (1, 2, 4, 4))])
def test_which_kernel_a_pool_takes(itemsize, groups):
    """Those of squares where there is nothing between rows; where not, as many registers as rows fill."""
    isa = emulated("rvv_zvfh", 256)
    for width, nv in zip((7, 14, 28, 112), groups, strict=True):
        pool = Pool2d("max", 1, 2, width, width, (3, 3), padding=(1,) * 4)
        (square,) = candidates(pooling(pool, itemsize=itemsize), isa, 1)
        assert square.kernel == f"f{8 * itemsize}_maxpool3s1__rvv_zvfh"
        kernels = [c.kernel for c in candidates(pooling(pool, after=(0, 0, 0), itemsize=itemsize), isa, 1)]
        assert kernels[0] == f"f{8 * itemsize}_maxpool_{nv}v__rvv_zvfh" and len(kernels) == len(GROUPS[itemsize])


def arranged(b: Builder, *outputs: str) -> Plan:
    return imported(b.build(*outputs)).arrange(half=then.FUNCTIONS).plan(())


def sizes_of(plan: Plan) -> dict[str, int]:
    """By step, the bytes of an element that it writes, but for imports, exports and conversions."""
    left = (Convert, Precision)
    return {s.name: s.output.layout.itemsize for s in plan.steps if s.output and not isinstance(s.workload, left)}


def conversions(plan: Plan) -> list[tuple[str, int]]:
    return [(s.inputs[0].name, s.workload.itemsize) for s in plan.steps if isinstance(s.workload, Precision)]


def convolved(b: Builder, x: str, ins: int, outs: int = 8) -> str:
    return b.op("Relu", b.conv(x, ins, outs, 3, pads=(1, 1, 1, 1)))


POOL = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}


def branches() -> tuple[Builder, str]:
    """A stem and its pool, a pool beside a convolution, squeeze and excite, a sum, and a mean."""
    b = Builder()
    stem = b.op("MaxPool", convolved(b, b.input("x", (1, 3, 24, 26)), 3), name="stem_pool", strides=(2, 2), **POOL)
    x = convolved(b, stem, 8)
    y = b.op("Concat", convolved(b, x, 8), b.op("MaxPool", x, name="pool", **POOL), axis=1)
    z = convolved(b, y, 16)
    mean = b.op("GlobalAveragePool", z, name="squeeze")
    gate = b.op("Sigmoid", b.conv(b.op("Relu", b.conv(mean, 8, 4)), 4, 8))
    y = convolved(b, b.op("Mul", z, gate, name="excite"), 8)
    y = b.op("Add", b.op("AveragePool", y, name="mean", strides=(1, 1), **POOL), z, name="sum")
    y = b.op("MaxPool", convolved(b, y, 8), name="last_pool", kernel_shape=(2, 2), strides=(2, 2))
    return b, b.op("Flatten", b.op("Softsign", y, name="softsign"))


def test_steps_between_convolutions_are_of_float16():
    """One conversion, of what a pool writes for a step that knows float32 alone; the stem changes over by itself."""
    plan = arranged(branches()[0], branches()[1])
    sizes = sizes_of(plan)
    halves = {"pool", "excite", "mean", "sum", "last_pool"}
    assert {name for name in sizes if sizes[name] == 2 and "conv" not in name} == halves
    assert sizes["conv0"] == 2 and sizes["squeeze"] == sizes["softsign"] == 4
    by_name = {step.name: step for step in plan.steps}
    assert by_name["squeeze"].inputs[0].layout.itemsize == 2
    assert [x.layout.itemsize for x in by_name["excite"].inputs] == [2, 4]  # maps, and rows of numbers a channel
    assert conversions(plan) == [(by_name["last_pool"].output.name, 4)]


def test_what_would_convert_more_stays_in_float32():
    """A sum with a large map of float32, for a reader of float32; a quotient; a step behind no convolution."""
    b = Builder()
    x = b.input("x", (1, 8, 12, 12))
    first = b.op("MaxPool", x, name="behind_none", **POOL)
    y = convolved(b, b.op("Softsign", x, name="softsign"), 8)
    total = b.op("Add", y, first, name="sum")
    ratio = b.op("Div", y, y, name="ratio")
    plan = arranged(b, b.op("Softsign", total, name="left"), b.op("Softsign", ratio, name="right"))
    sizes = sizes_of(plan)
    assert [name for name in sizes if sizes[name] == 2] == [name for name in sizes if name.startswith("conv")]
    assert [itemsize for _, itemsize in conversions(plan)] == [2, 4]


def test_a_map_that_is_converted_anyway_costs_nothing():
    """Both pools read what another step wants in float32 too; the one whose result is wanted like that does as well."""
    b = Builder()
    y = convolved(b, b.op("Softsign", b.input("x", (1, 8, 12, 12))), 8)
    other = b.op("Softsign", y, name="other")
    inner = convolved(b, b.op("MaxPool", y, name="inner", **POOL), 8)
    plan = arranged(b, other, b.op("Softsign", b.op("AveragePool", y, name="outer", **POOL)), inner)
    sizes = sizes_of(plan)
    assert (sizes["inner"], sizes["outer"]) == (2, 4)


def test_a_network_with_pools_answers_as_onnxruntime_does(half_qemu, tmp_path):
    b, y = branches()
    model = b.build(y)
    onnx.save(model, tmp_path / "model.onnx")
    compare(tmp_path / "model.onnx", tmp_path, (1, 3, 24, 26), 0.01, "f16")
