"""Planes or panels by measurement: sums over the steps of an edge, and what is measured for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import bottlenecks

from colonnade import frontend
from colonnade.build.toolchain import Toolchain
from colonnade.frontend import LayoutCosts
from colonnade.kernels.isa import available
from colonnade.layout import Panels
from colonnade.plan import Plan, Step
from colonnade.targets import Local
from colonnade.tune import choose, tune
from colonnade.tune.database import Database
from colonnade.tune.measure import Measurement
from colonnade.tune.tuner import Chooser
from colonnade.tune.tuner import place as where
from colonnade.tune.variants import alternatives, expected, settle


def stored(plan: Plan) -> int:
    return sum(isinstance(buffer.layout, Panels) for buffer in plan.buffers)


def through(step: Step) -> bool:
    """Does the step touch panels?"""
    return any(isinstance(t.layout, Panels) for t in (*step.inputs, step.output) if t is not None)


@pytest.fixture
def chooser(tmp_path: Path) -> Chooser:
    target = Local()
    machine = target.probe()
    isa = available(machine.arch, machine.flags)[0]
    return Chooser(Database(tmp_path / "db"), where(machine, isa, 1, Toolchain()), isa)


def note(chooser: Chooser, steps: list[Step], ns: int) -> None:
    """A record of the static best of each."""
    for step in steps:
        candidates, sources = chooser.listed(step)
        result = Measurement("ok", "", (ns,) * 5)
        key = candidates[0].kernel
        chooser.database.add(step.key(), chooser.place, candidates[0], sources[key], 0, result)


@pytest.mark.parametrize("default", [0.0, 1.0])
def test_the_faster_sum_wins(chooser, default):
    """Unmeasured or half measured: the default. A little faster: too. Clearly faster: the other, edge by edge."""
    model = frontend.imported(bottlenecks()).arrange(LayoutCosts(plane=default))
    here = stored(model.plan())
    assert (here > 0) == bool(default) and len(model.edges) == 2
    assert stored(settle(model, chooser)) == here
    mine = {s.name: s for s in model.plan().steps}
    others = {s.name: s for s in alternatives(model)}
    concerned = {name for names in model.edges for name in names}
    assert set(others) == concerned and any(map(through, others.values())) == (not default)
    first, second = model.edges
    note(chooser, [mine[name] for name in (*first, *second)], 1000)
    assert stored(settle(model, chooser)) == here
    note(chooser, [others[name] for name in first], 990)
    note(chooser, [others[name] for name in second[1:]], 10)
    assert stored(settle(model, chooser)) == here, "1 % is nothing, and one step of the other edge is not measured"
    note(chooser, [others[second[0]]], 10)
    plan = settle(model, chooser)
    assert stored(plan) != here and expected(others[second[0]], chooser) == 10
    changed = {s.name for s in plan.steps if s.key() != mine[s.name].key()}
    assert changed <= set(second) and changed


@pytest.mark.slow
def test_both_variants_are_measured(tmp_path):
    """With time enough every step of an edge is measured in both layouts, and what is then known is chosen again."""
    target, db = Local(), tmp_path / "db"
    machine = target.probe()
    isa = machine.pick_isa("portable")
    model = frontend.imported(bottlenecks(size=5, blocks=1)).arrange()
    summary = tune(model, target, isa, 1, 240.0, db)
    assert not summary.left and not summary.failures
    chooser = Chooser(Database(db), where(machine, isa, 1, Toolchain()), isa)
    assert all(expected(step, chooser) is not None for step in alternatives(model))
    plan, choices = choose(model, isa, machine, 1, db)
    assert isinstance(summary.plan, Plan) and stored(plan) == stored(summary.plan)
    assert choices == summary.choices and choices.untuned == 0
