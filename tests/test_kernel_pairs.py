"""Convolutions that take two kept columns at a time, for machines that add beside their multiply-adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from convolutions import operands
from kernel_harness import Case, need, run

from colonnade.arranging import sizes
from colonnade.codegen.in_process import Program
from colonnade.frontend import LayoutCosts, imported
from colonnade.kernels import registry, render
from colonnade.kernels.isa import Isa, available, isa
from colonnade.kernels.ops import pairs
from colonnade.kernels.registry import Candidate
from colonnade.layout import Planes
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, Epilogue
from tests.models import export, onnxruntime_outputs

TOLERANCE = 2e-5  # of the largest magnitude, as for every other convolution


@pytest.fixture(scope="module", params=[False, True], ids=["operands", "broadcasts"])
def machine(request: pytest.FixtureRequest) -> Isa:
    """AVX-512 as if additions had pipes of their own, in either way of giving them scalars; the kernels run wherever
    AVX-512 is."""
    return replace(need("avx512"), adders=True, broadcasts=request.param)


def paired(case: Case, machine: Isa, threads: int = 1) -> list[Candidate]:
    """One candidate for each kernel, way to cut the lanes, and pattern used or not."""
    found = [c for c in registry.candidates(case, machine, threads) if pairs.KIND in c.kernel]
    return list({(c.kernel, c.params["dense"], c.params["tail"]): c for c in found}.values())


@pytest.mark.parametrize("tile", [1, 3, 4, 8, 16, 24])
def test_against_the_reference(machine: Isa, tile: int) -> None:
    """Odd counts of columns, tiles with rows left over, groups, images, tails, halos, epilogues, threads."""
    kernels = set()
    for index, width in enumerate((5, 9, 16, 19, 30, 33, 49)):
        activation = (NONE, RELU, RELU6, Activation(-0.5, 0.5))[index % 4]
        conv = Conv2d(
            1 + index % 2, 2 * (3 + index), 2 * (tile + 3), 5 + index % 3, width, (3, 3), padding=(1, 1, 1, 1),
            groups=1 + index % 2, epilogue=Epilogue(index % 3 == 0, activation),
        )  # fmt: skip
        case, inputs = operands(conv, ColumnPattern(0.5, tile=tile), seed=index, extra=index % 3)
        threads = 1 + index % 3
        for candidate in paired(replace(case, rms=1.0), machine, threads):
            run(replace(case, rms=1.0), candidate, machine, inputs, threads=threads, tolerance=TOLERANCE)
            kernels.add(candidate.kernel)
    assert len(kernels) >= min(tile, 3)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 0.1, 10.0, 1e3, 1e6, 1e30])
def test_inputs_of_another_size_than_the_samples(machine: Isa, size: float) -> None:
    """Much larger or smaller than said beforehand: noticed, and computed as usual."""
    conv = Conv2d(1, 40, 16, 6, 21, (3, 3), padding=(1, 1, 1, 1))
    case, (x,) = operands(conv, ColumnPattern(0.5, tile=8), seed=3)
    case = replace(case, rms=1.0)
    case.constants["bias"][:] = 0  # type: ignore[index]
    for candidate in paired(case, machine):
        run(case, candidate, machine, [x * np.float32(size)], tolerance=TOLERANCE)


def test_rows_and_inputs_of_unlike_sizes(machine: Isa) -> None:
    """Rows of weights from 1e-4 to 1e4, a row of zeros, inputs that are never negative: each row is as accurate by
    itself as the whole."""
    conv = Conv2d(1, 64, 24, 7, 16, (3, 3), padding=(1, 1, 1, 1))
    case, (x,) = operands(conv, ColumnPattern(0.75, tile=8), seed=5)
    factors = np.geomspace(1e-4, 1e4, 24).astype(np.float32)
    factors[7] = 0
    case.constants["weight"][:] *= factors[:, None, None, None]  # type: ignore[index]
    case.constants["bias"][:] *= factors  # type: ignore[index]
    x = np.abs(x)
    wanted = conv.reference(x, case.constants["weight"], case.constants["bias"])
    case = replace(case, rms=float(np.sqrt(np.square(x).mean())))
    for candidate in paired(case, machine):
        found = run(case, candidate, machine, [x], tolerance=TOLERANCE)
        error = np.abs(found - wanted).max((0, 2, 3)) / np.maximum(np.abs(wanted).max((0, 2, 3)), 1e-30)
        assert error.max() < TOLERANCE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_stays_none(machine: Isa, value: float) -> None:
    conv = Conv2d(1, 6, 16, 3, 40, (1, 1), epilogue=Epilogue(False, NONE))
    case, (x,) = operands(conv, None, seed=1)
    case = replace(case, rms=1.0)
    x[0, 2, 1, 20] = value
    with np.errstate(invalid="ignore"):
        for candidate in paired(case, machine):
            found = run(case, candidate, machine, [x], tolerance=TOLERANCE)
            assert not np.isfinite(found[0, :, 1, 20]).any() and np.isfinite(found).sum() == found.size - 16


def test_offered_only_where_they_gain(machine: Isa) -> None:
    """Not without pipes for additions, nor where nobody knows how large the inputs are; a machine shows the former."""
    case, _ = operands(Conv2d(1, 64, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1)), ColumnPattern(0.75, tile=8), seed=0)
    known = replace(case, rms=1.0)
    assert paired(known, machine)
    assert not paired(case, machine) and not paired(known, isa("avx512")) and not paired(known, isa("portable"))
    with pytest.raises(AssertionError, match="how large"):
        registry.bind(case, paired(known, machine)[0])
    flags = frozenset(isa("avx512").flags)
    for more, shown in (
        (set(), (False, False)),
        ({"clzero"}, (True, False)),
        ({"avx512_vp2intersect"}, (False, False)),
        ({"clzero", "avx512_vp2intersect"}, (True, True)),
    ):
        row = available("x86_64", flags | more)[0]
        assert (row.adders, row.broadcasts) == shown
    # the static ranking sees the gain, and that few columns do not pay for the ends of a block
    assert pairs.KIND in registry.candidates(known, machine, 1)[0].kernel
    few, _ = operands(Conv2d(1, 32, 64, 14, 14, (1, 1)), ColumnPattern(0.75, tile=8), seed=0)
    assert pairs.KIND not in registry.candidates(replace(few, rms=1.0), machine, 1)[0].kernel


@pytest.mark.parametrize("mr, taken", [(1, 0), (2, 0), (4, 3), (8, 5), (10, 7), (12, 8), (16, 11)])
def test_pipes_are_equally_busy(mr: int, taken: int) -> None:
    """Of all numbers of rows in pairs, the one chosen takes the fewest turns of the busier pipe."""
    assert sum(pairs.rows(mr)) == taken
    turns = [max(2 * mr - n + (n > 0), 2 * n) for n in range(mr + 1)]
    assert 2 * pairs.work(mr) == min(turns)


def test_how_scalars_come_to_the_adders() -> None:
    """In registers for two plain rows where a broadcast takes a turn of them, for all rows where it takes none."""
    plain, free = isa("avx512"), replace(isa("avx512"), broadcasts=True)
    for mr in (4, 8, 12):
        assert sum(pairs.spreads(mr, plain)) == min(2, mr - sum(pairs.rows(mr)))
        assert not any(a and b for a, b in zip(pairs.spreads(mr, plain), pairs.rows(mr), strict=True))
        assert all(pairs.spreads(mr, free))
    bodies = [render.kernel(registry.variants(row)["f32_pairconv_8x2v__avx512"], row) for row in (plain, free)]
    assert "_add_at" in bodies[0] and "vec1_add(x1, q7" in bodies[1]


def test_a_network(machine: Isa) -> None:
    """Sizes from a run on samples, kernels by the static ranking, the network as near to onnxruntime as ever."""
    import torch

    torch.manual_seed(0)
    layers: list[Any] = [torch.nn.Conv2d(3, 24, 3, 2, 1), torch.nn.ReLU()]
    for _ in range(4):
        layers += [torch.nn.Conv2d(24, 24, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(24, 24, 1)]
    model = export(torch.nn.Sequential(*layers).eval(), 1, 3, 40, 40)
    made = imported(model).arrange()
    made.rms = sizes(made.plan(()))
    plan = made.plan()
    convolutions = [s for s in plan.steps if isinstance(s.workload, Conv2d)]
    assert all(s.rms is not None and s.rms > 0 for s in convolutions)
    choices = [registry.candidates(s, machine, 1)[0] for s in plan.steps]
    assert sum(pairs.KIND in c.kernel for c in choices) >= 8
    feeds = {plan.inputs[0].name: np.random.default_rng(1).standard_normal((1, 3, 40, 40), dtype=np.float32)}
    ours, theirs = Program(plan, machine, choices).run(feeds), onnxruntime_outputs(model, feeds)
    for name, wanted in theirs.items():
        assert np.abs(ours[name] - wanted).max() < TOLERANCE * np.abs(wanted).max()


def test_sizes_count_what_is_there() -> None:
    """Of phases that no layer reads nothing is stored, and they do not count as zeros."""
    import torch

    model = export(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1, 2)).eval(), 1, 3, 16, 16)
    made = imported(model).arrange()
    plan = made.plan(())
    first, second = (s for s in plan.steps if isinstance(s.workload, Conv2d))
    found = sizes(plan)
    assert found[first.name] == pytest.approx(1.0, rel=0.1)
    weight, bias = first.constants["weight"].reshape(8, 3), first.constants["bias"]
    assert found[second.name] == pytest.approx(np.sqrt((np.square(weight).sum(1) + bias**2).mean()), rel=0.15)


def test_sizes_count_a_pixel_once() -> None:
    """Shifted planes hold every pixel several times, and inputs are no larger for that."""
    import torch

    layers = [torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, 2, 1)]
    model = export(torch.nn.Sequential(*layers).eval(), 1, 64, 7, 7)
    plain, shifted = (
        imported(model).arrange(LayoutCosts(vector=vector, copy=0.0, pick=1e6)).plan(()) for vector in (0, 16)
    )
    assert any(
        s.output is not None and isinstance(s.output.layout, Planes) and s.output.planes.shifted for s in shifted.steps
    )
    assert sizes(shifted) == pytest.approx(sizes(plain), rel=1e-4)


def test_what_another_run_left_behind_does_not_decide(machine: Isa) -> None:
    """Lanes behind the last pixel hold what was there before: an answer is its input's alone, to the bit."""
    import torch

    torch.manual_seed(0)
    layers: list[Any] = [torch.nn.Conv2d(3, 16, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 1, 1)]
    layers += [torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 24, 3, 1, 1)]
    made = imported(export(torch.nn.Sequential(*layers).eval(), 1, 3, 19, 19)).arrange()
    made.rms = sizes(made.plan(()))
    plan = made.plan()
    choices = [
        next((c for c in registry.candidates(step, machine, 1) if pairs.KIND in c.kernel), None)
        or registry.candidates(step, machine, 1)[0]
        for step in plan.steps
    ]
    assert sum(pairs.KIND in c.kernel for c in choices) >= 3
    program = Program(plan, machine, choices, lean=True)
    x = np.random.default_rng(1).standard_normal((1, 3, 19, 19), dtype=np.float32)
    answers = []
    for before in (1.0, np.nan, 1e6, 1e-6):
        program.run({plan.inputs[0].name: x * np.float32(before)})
        answers += program.run({plan.inputs[0].name: x}).values()
    for other in answers[1:]:
        np.testing.assert_array_equal(answers[0], other)
