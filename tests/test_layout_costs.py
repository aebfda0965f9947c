"""What moving data costs, measured and kept: it decides layouts from then on, for that machine and ISA alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from models import bottlenecks

from colonnade import frontend
from colonnade.bench import layouts
from colonnade.errors import UserError
from colonnade.frontend import LayoutCosts
from colonnade.kernels.isa import isa
from colonnade.layout import Panels
from colonnade.plan import Step
from colonnade.targets import Local, Qemu
from colonnade.workload import Affine, Conv2d, Convert


@pytest.mark.parametrize("plane", [0.003, 0.0002])
def test_costs_follow_from_times(plane: float) -> None:
    """Times that were made up give the numbers that they were made of; panels that gain 2 % make no difference."""
    made = LayoutCosts(copy=0.03, scale=0.02, gather=0.04, pick=0.07, scaled=0.05, mac=0.01, plane=plane)

    def ns(step: Step, feed: int | None) -> float:
        work, x = step.workload, step.inputs[0]
        if not isinstance(work, Conv2d):
            assert isinstance(work, (Convert, Affine)) and feed is None
            size = 4.0
            for n in work.shape:
                size *= n
            return 2 * size * (made.copy if isinstance(work, Convert) else made.scale)
        time = work.macs * made.mac
        if feed == 0 and work.in_channels == 1024:
            time += work.macs * made.plane
        if feed == 1:
            price = made.scaled if work.prologue else made.pick if work.stride != (1, 1) else made.gather
            time += 4 * work.in_channels * work.out_height * work.out_width * price
        assert (feed == 2) == isinstance(x.layout, Panels)
        return time

    found = layouts._costs(ns, LayoutCosts())
    assert asdict(found) == pytest.approx(asdict(replace(made, plane=plane if plane > 0.001 else 0.0)))


@pytest.mark.slow
def test_measured_once_and_taken_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "RUN", (1, 2, 1_000_000))
    db, target = tmp_path / "db", Local()
    machine = target.probe()
    portable, best = isa("portable"), machine.isas[0]
    assert layouts.known(machine, portable, db) == LayoutCosts.of(portable.name, portable.lanes)
    costs = layouts.measure(target, portable, db)
    assert all(ns > 0 for name, ns in asdict(costs).items() if name not in ("plane", "windows"))
    assert costs != LayoutCosts.of(portable.name, portable.lanes)
    assert layouts.known(machine, portable, db) == costs
    if best != portable:
        assert layouts.known(machine, best, db) == LayoutCosts.of(best.name, best.lanes)
    assert layouts.known(replace(machine, cpu="another"), portable, db) == LayoutCosts.of(portable.name, portable.lanes)


def test_a_target_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a machine of its own"):
        layouts.measure(Qemu(), isa("rvv"), tmp_path / "db")


def test_panels_are_the_default_where_planes_cost_more() -> None:
    def stored(costs: LayoutCosts) -> Any:
        plan = frontend.imported(bottlenecks()).arrange(costs).plan()
        return sum(isinstance(buffer.layout, Panels) for buffer in plan.buffers)

    assert stored(LayoutCosts.of("rvv")) > 0 == stored(LayoutCosts.of("avx512")) == stored(LayoutCosts.of("portable"))
