"""Layouts over a whole Plan: copies or panels, prologues, transposed convolutions; run by the kernels themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import LINE, _run_call, guarded, machine_has
from models import Builder, bottlenecks, onnxruntime_outputs

from colonnade import frontend
from colonnade.frontend import reference
from colonnade.frontend.feeding import LayoutCosts
from colonnade.kernels.isa import ISAS
from colonnade.kernels.registry import bind, candidates
from colonnade.layout import Panels, Planes
from colonnade.plan import Plan
from colonnade.workload import RELU, Affine, Conv2d, Convert, ConvTranspose2d, Interleave

COPIES = LayoutCosts(gather=1e6, pick=1e6, scaled=1e6)  # panels never pay
PANELS = LayoutCosts(gather=0, pick=0, scaled=0)  # they always do
MACHINE = [pytest.param(row, id=row.name) for row in ISAS if machine_has(row.name)]


def computed(plan: Plan, inputs: Mapping[str, np.ndarray], isa: Any, threads: int = 2) -> dict[str, np.ndarray]:
    """The model's outputs by its kernels, in an arena that starts full of NaN between two guard pages."""
    outputs = {}
    with guarded(plan.arena, LINE) as (base, _):
        for step in plan.steps:
            calls = bind(step, candidates(step, isa, threads)[0])
            given = np.ascontiguousarray(inputs.get(step.external, np.zeros(1)), np.float32)
            if step.external and step.output is None:
                (port,) = [p for p in plan.outputs if p.name == step.external]
                given = np.full(port.shape, np.nan, np.float32)
            with guarded(max(call.shared for call in calls), LINE) as (shared, _):
                for call in calls:
                    _run_call(call, isa, threads, base, given.ctypes.data, shared, np.nan, False)
            if step.external and step.output is None:
                outputs[step.external] = given
    return outputs


def check(model: onnx.ModelProto, isa: Any = ISAS[-1], **options: Any) -> Plan:
    plan = frontend.load(model, **options)
    rng = np.random.default_rng(0)
    inputs = {port.name: rng.standard_normal(port.shape).astype(np.float32) for port in plan.inputs}
    ours, theirs = computed(plan, inputs, isa), onnxruntime_outputs(model, inputs)
    for name, wanted in theirs.items():
        largest = max(float(np.abs(wanted).max()), 1e-30)
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=2e-5 * largest, err_msg=name)
    return plan


def workloads(plan: Plan, kind: type) -> list[Any]:
    return [step.workload for step in plan.steps if isinstance(step.workload, kind)]


def copies(plan: Plan) -> int:
    return sum(c.kind == "planes" for c in workloads(plan, Convert))


def residual_block() -> onnx.ModelProto:
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 11, 10)), 3, 9, 3, pads=(1, 1, 1, 1)))
    main = b.op("Relu", b.conv(x, 9, 8, 3, strides=(2, 2), pads=(1, 1, 1, 1)))
    main = b.conv(main, 8, 8, 3, pads=(1, 1, 1, 1))
    return b.build(b.op("Relu", b.op("Add", main, b.conv(x, 9, 8, 1, strides=(2, 2)))))


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("costs, expected", [(COPIES, 1), (PANELS, 0)], ids=["copies", "panels"])
def test_strides_by_phases_or_by_panels(isa, costs, expected):
    assert copies(check(residual_block(), isa, layout_costs=costs)) == expected


def small_maps(batch: int) -> onnx.ModelProto:
    """A residual block behind a stride, taps beside their columns of several widths, with and without padding."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (batch, 3, 14, 13)), 3, 9, 3, pads=(1, 1, 1, 1)))
    main = b.op("Relu", b.conv(x, 9, 17, 3, strides=(2, 2), pads=(1, 1, 1, 1)))
    main = b.conv(main, 17, 8, 3, pads=(1, 1, 1, 1))
    y = b.op("Relu", b.op("Add", main, b.conv(x, 9, 8, 1, strides=(2, 2))))
    z = b.op("Concat", b.conv(y, 8, 6, (1, 5), pads=(0, 2, 0, 2)), b.conv(y, 8, 5, 3, pads=(1, 1, 1, 1)), axis=1)
    return b.build(b.conv(z, 11, 4, 3), b.conv(z, 11, 4, 1), b.op("GlobalAveragePool", y))


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("batch", [1, 2])
def test_small_maps_by_shifted_planes(isa, batch):
    """Nothing of that region has a zero between its rows, and the columns of every convolution are in place."""
    model = small_maps(batch)
    plain, plan = (check(model, isa, layout_costs=costs) for costs in (COPIES, replace(COPIES, vector=16, copy=0.0)))
    shifted = [
        s
        for s in plan.steps
        if s.output is not None and isinstance(s.output.layout, Planes) and s.output.planes.shifted
    ]
    assert not any(isinstance(s.output.layout, Planes) and s.output.planes.shifted for s in plain.steps if s.output)
    assert len(shifted) >= 3 and any(s.output.planes.phases == (2, 2) for s in shifted)
    # what stands at its own column is read where it was
    assert all((0, 0) not in s.output.planes.stored_phases for s in shifted if s.output.planes.phases == (1, 1))
    small = [s.output.planes for s in plan.steps if s.output is not None and s.output.shape[2:] == (7, 7)]
    assert small and {p.pitch for p in small} == {7}
    rng = np.random.default_rng(1)
    inputs = {port.name: rng.standard_normal(port.shape).astype(np.float32) for port in plan.inputs}
    reference.run(plan, inputs, check_feeding=True)


@pytest.mark.parametrize("isa", MACHINE)
def test_shifted_planes_into_panels(isa):
    """What reads the ones and writes the others has the direct kernels alone, and they are right."""
    costs = replace(COPIES, vector=16, copy=0.0, plane=1.0)
    plan = check(bottlenecks(size=7), isa, layout_costs=costs)
    both = [
        s for s in plan.steps if isinstance(s.workload, Conv2d) and isinstance(s.output.layout, Panels)
        and isinstance(s.inputs[0].layout, Planes) and s.inputs[0].planes.shifted
    ]  # fmt: skip
    assert both
    for step in both:
        found = candidates(step, isa, 1)
        assert found and not any("winograd" in c.params for c in found)


def test_shifted_planes_are_for_what_gains():
    """Not where a copy costs more, where depthwise kernels have taps beside their columns, or where Winograd's
    convolution is likely to be chosen."""

    def shifted(model: onnx.ModelProto, **costs: float) -> int:
        plan = frontend.load(model, layout_costs=replace(COPIES, vector=16, **costs))
        return sum(isinstance(s.output.layout, Planes) and s.output.planes.shifted for s in plan.steps if s.output)

    def twice(channels: int, size: int, groups: int = 1) -> onnx.ModelProto:
        b = Builder()
        x = b.input("x", (1, channels, size, size))
        for _ in range(2):
            x = b.conv(x, channels, channels, 3, pads=(1, 1, 1, 1), groups=groups)
        return b.build(x)

    assert shifted(twice(64, 7)) == 2 and not shifted(twice(64, 7), copy=10.0)
    assert not shifted(twice(64, 7, groups=64), copy=0.0) and not shifted(twice(64, 14), copy=0.0)


def dense_block() -> onnx.ModelProto:
    """Every layer normalises all that came before in its own way."""
    b = Builder()
    x, channels = b.conv(b.input("x", (1, 3, 9, 9)), 3, 8, 3, pads=(1, 1, 1, 1)), 8
    for _ in range(3):
        y = b.op("Relu", b.batch_norm(x, channels))
        y = b.op("Relu", b.conv(y, channels, 6, 1))
        y = b.conv(y, 6, 4, 3, pads=(1, 1, 1, 1))
        x, channels = b.op("Concat", x, y, axis=1), channels + 4
    y = b.op("Relu", b.batch_norm(x, channels))
    return b.build(b.conv(y, channels, 5, 3, pads=(1, 1, 1, 1)))


@pytest.mark.parametrize("isa", MACHINE)
def test_a_batch_norm_and_relu_in_front_become_a_prologue(isa):
    plan = check(dense_block(), isa, layout_costs=PANELS)
    assert not workloads(plan, Affine)
    assert sum(c.prologue == RELU for c in workloads(plan, Conv2d)) == 4
    plan = check(dense_block(), isa, layout_costs=COPIES)
    assert len(workloads(plan, Affine)) == 4
    assert not any(c.prologue for c in workloads(plan, Conv2d))


def test_what_others_read_too_stays_a_step():
    b = Builder()
    x = b.conv(b.input("x", (1, 3, 9, 9)), 3, 8, 3, pads=(1, 1, 1, 1))
    y = b.op("Relu", b.batch_norm(b.op("Concat", x, x, axis=1), 16))
    model = b.build(b.conv(y, 16, 4, 1), b.op("MaxPool", y, kernel_shape=(2, 2)))
    assert len(workloads(check(model, layout_costs=PANELS), Affine)) == 1


@pytest.mark.parametrize("costs, expected", [(COPIES, 2), (PANELS, 0)], ids=["copies", "panels"])
def test_strong_dilation_by_copies_or_by_panels(costs, expected):
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (1, 3, 12, 12)), 3, 4, 3, pads=(1, 1, 1, 1)))
    wide = b.conv(x, 4, 4, 3, dilations=(9, 9), pads=(9, 9, 9, 9))
    y = b.conv(b.op("Concat", x, wide, axis=1), 8, 4, 3, pads=(1, 1, 1, 1))
    plan = check(b.build(b.op("Relu", b.op("Add", x, b.conv(y, 4, 4)))), layout_costs=costs)
    assert copies(plan) == expected
    if not expected:
        assert {s.output.planes.pitch for s in plan.steps if s.output is not None} == {13}


@pytest.mark.parametrize("strides, expected", [((2, 2), 0), ((1, 2), 1), ((3, 3), 1)])
def test_depthwise_reads_in_place_whatever_it_costs(strides, expected):
    """From planes as they stand at stride 2, else from a copy in phases."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (1, 3, 12, 12)), 3, 8, 3, pads=(1, 1, 1, 1)))
    model = b.build(b.conv(x, 8, 8, 3, groups=8, strides=strides, pads=(1, 1, 1, 1)))
    assert copies(check(model, layout_costs=PANELS)) == expected


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("batch", [1, 2])
def test_bottlenecks_through_panels(isa, batch):
    """What lies between pointwise convolutions stands in panels, residuals too; all else in planes as before."""
    model = bottlenecks(batch)
    planes, plan = (check(model, isa, layout_costs=costs) for costs in (None, LayoutCosts(plane=1.0)))
    convs = [s for s in plan.steps if isinstance(s.workload, Conv2d)]
    stored = [s for s in convs if s.output is not None and isinstance(s.output.layout, Panels)]
    # outputs of every 3x3, of the first projection, and of two blocks: a stride reads what the third one writes
    assert [s.workload.kernel for s in stored].count((3, 3)) == 5 and len(stored) == 8
    for s in convs:
        read, *added = (isinstance(x.layout, Panels) for x in s.inputs)
        assert not read or (s.workload.kernel == (1, 1) and s.workload.stride == (1, 1))
        assert s.workload.epilogue.residual == bool(added)
    assert not any(isinstance(b.layout, Panels) for b in planes.buffers)
    inputs = {"x": np.random.default_rng(1).standard_normal(plan.inputs[0].shape).astype(np.float32)}
    (one,), (other,) = (reference.run(p, inputs).values() for p in (planes, plan))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", MACHINE)
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_only_added_follows_what_it_is_added_to(isa, kernel):
    """A chain of additions stands in panels as far as its end does."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 6, 7, 7)), 6, 12))
    y = b.conv(x, 12, 10)
    for _ in range(2):
        y = b.op("Relu", b.op("Add", y, b.conv(x, 12, 10, 3, pads=(1, 1, 1, 1))))
    model = b.build(b.conv(y, 10, 4, kernel, pads=[kernel // 2] * 4))
    plan = check(model, isa, layout_costs=LayoutCosts(plane=1.0))
    stored = [s.output.shape[1] for s in plan.steps if s.output is not None and isinstance(s.output.layout, Panels)]
    assert stored == ([10, 10, 10] if kernel == 1 else [])


@pytest.mark.parametrize("isa", MACHINE)
def test_a_batch_norm_in_front_of_pointwise_convolutions_writes_panels(isa):
    """As in a DenseNet: all maps so far, scaled, shifted and clipped, for one convolution each."""
    b = Builder()
    maps = [b.conv(b.input("x", (2, 3, 9, 11)), 3, 6, 3, pads=(1, 1, 1, 1))]
    for _ in range(2):
        wide = 6 * len(maps)
        y = b.op("Concat", *maps, axis=1) if len(maps) > 1 else maps[0]
        y = b.conv(b.op("Relu", b.batch_norm(y, wide)), wide, 8)
        maps.append(b.conv(b.op("Relu", y), 8, 6, 3, pads=(1, 1, 1, 1)))
    model = b.build(b.op("Concat", *maps, axis=1))
    plan = check(model, isa, layout_costs=LayoutCosts(plane=1.0, scaled=9.0))
    scaled = [s for s in plan.steps if isinstance(s.workload, Affine)]
    assert len(scaled) == 2 and all(isinstance(s.output.layout, Panels) for s in scaled)


def test_edges_that_stay_planes():
    """Read by anything but a pointwise convolution as a whole, a tensor is no edge; choices are independent."""
    b = Builder()
    x = b.conv(b.input("x", (1, 8, 6, 6)), 8, 16)
    left, right = b.op("Split", b.op("Relu", x), outputs=2, axis=1, num_outputs=2)
    y = b.conv(left, 8, 8)  # reads half of a tensor
    y = b.op("Concat", y, right, axis=1)
    y = b.op("HardSwish", b.conv(y, 16, 12))  # the function works on planes
    y = b.conv(y, 12, 12)  # an edge
    y = b.conv(y, 12, 12, groups=12)  # depthwise reads planes
    y = b.conv(b.conv(y, 12, 9), 9, 7)  # an edge
    arranged = frontend.imported(b.build(b.conv(y, 7, 5, 3))).arrange()
    assert not arranged.default and all(len(names) == 2 for names in arranged.edges)
    for chosen in ((), (0,), (1,), (0, 1))[: 1 << len(arranged.edges)]:
        plan = arranged.plan(chosen)
        assert sum(isinstance(b.layout, Panels) for b in plan.buffers) == len(chosen)


@pytest.mark.parametrize("isa", MACHINE)
def test_up_and_down_again(isa):
    """A small U-Net: the upsampled map stands beside the one from before."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (2, 3, 12, 14)), 3, 8, 3, pads=(1, 1, 1, 1)))
    y = b.op("Relu", b.conv(b.op("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2)), 8, 10, 3, pads=(1, 1, 1, 1)))
    up = b.op("ConvTranspose", y, b.random(10, 8, 2, 2), b.random(8), strides=(2, 2))
    up = b.op("Relu", b.batch_norm(up, 8))
    plan = check(b.build(b.conv(b.op("Concat", x, up, axis=1), 16, 4, 3, pads=(1, 1, 1, 1))), isa)
    (workload,) = workloads(plan, ConvTranspose2d)
    assert workload.epilogue.activation == RELU and len(workloads(plan, Interleave)) == 1
    assert not workloads(plan, Affine)


@given(
    kernel=st.integers(1, 5), stride=st.integers(1, 3), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]),
    pads=st.integers(0, 2), extra=st.integers(0, 2), size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_transposed_convolutions_of_onnx(kernel, stride, dilation, groups, pads, extra, size):
    attributes: dict[str, Any] = {"output_padding": (min(extra, stride - 1),) * 2}
    sizes = [(n - 1) * stride + (kernel - 1) * dilation + 1 + attributes["output_padding"][0] - 2 * pads for n in size]
    if min(sizes) < 1 or max(sizes) < 2:
        return
    b = Builder()
    x = b.op("Relu", b.input("x", (1, 4, *size)))
    y = b.op(
        "ConvTranspose", x, b.random(4, 3, kernel, kernel), b.random(3 * groups), strides=(stride,) * 2, group=groups,
        dilations=(dilation,) * 2, pads=(pads,) * 4, **attributes,
    )  # fmt: skip
    check(b.build(b.op("Relu", y)))


@pytest.mark.parametrize(
    "attributes",
    [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}, {"output_shape": (10, 13)}],
    ids=str,
)
def test_transposed_padding_by_name(attributes):
    b = Builder()
    x = b.op("Relu", b.input("x", (1, 3, 5, 6)))
    y = b.op("ConvTranspose", x, b.random(3, 4, 3, 4), strides=(2, 2), **attributes)
    check(b.build(b.op("Relu", y)))


def test_groups_of_four_rows_have_tiles_of_four():
    """ResNeXt: tiles never cross a group, pruned or not, and what is pruned is found in every group."""
    from colonnade.kernels.ops.tables import tiling

    b = Builder()
    weight = np.zeros((64, 4, 3, 3), np.float32)
    for group in range(16):
        for k in b.rng.permutation(36)[:9]:
            weight[4 * group : 4 * group + 4, k % 4, k // 12, k // 4 % 3] = b.rng.standard_normal(4)
    y = b.op("Conv", b.input("x", (1, 64, 9, 9)), b.constant(weight, "w.weight"), group=16, pads=(1, 1, 1, 1))
    plan = check(b.build(y))
    (step,) = [s for s in plan.steps if isinstance(s.workload, Conv2d)]
    assert step.workload.tile == 4 and step.workload.columns == int((weight != 0).sum())
    for dense in (0, 8):
        for tile in tiling(step, dense).tiles:
            assert len(tile.rows) == 4 and len({int(row) // 4 for row in tile.rows}) == 1
