"""Planes or panels: which variant of a model's plan is the faster one, by what its steps measured by themselves.

Both ends of an edge must agree, so the steps that a choice concerns are summed up in either layout and the sums
compared. Where a step was not measured in both, the choice stays what the layout costs say.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from colonnade.plan import Plan, Step, Variants
from colonnade.tune.search import FINAL, decide, screened, times

if TYPE_CHECKING:
    from colonnade.tune.tuner import Chooser

SWITCH = 0.02  # by this share another layout must be faster to be taken instead of the default one


def expected(step: Step, chooser: Chooser) -> float | None:
    """ns of the step's best candidate by itself; None where nothing right was measured. What walks through the network
    say afterwards changes nothing here, for they are made with the variant that was settled on alone."""
    candidates, sources = chooser.listed(step)
    records = chooser.records(step, candidates, sources)
    best = decide(candidates, records)
    if best is None:
        return None
    return times(records, (FINAL,)).get(best.key()) or screened(records).get(best.key())


def settle(model: Variants, chooser: Chooser) -> Plan:
    """The plan with every choice made by measurement where there is one, by default elsewhere."""
    chosen = set(model.default)
    base = model.plan()
    here = {step.name: step for step in base.steps}
    sums = {i: _sum((here[name] for name in names), chooser) for i, names in enumerate(model.edges)}
    measured = {i: ns for i, ns in sums.items() if ns is not None}
    if not measured:
        return base
    there = {step.name: step for step in _opposite(model).steps}
    for i, ns in measured.items():
        other = _sum((there[name] for name in model.edges[i]), chooser)
        if other is not None and other < ns * (1 - SWITCH):
            chosen ^= {i}
    return base if chosen == model.default else model.plan(chosen)


def alternatives(model: Variants) -> list[Step]:
    """Every step that a choice concerns, in the layout that it does not have by default."""
    concerned = {name for names in model.edges for name in names}
    return [step for step in _opposite(model).steps if step.name in concerned] if concerned else []


def _opposite(model: Variants) -> Plan:
    return model.plan(set(range(len(model.edges))) - model.default)


def _sum(steps: Iterable[Step], chooser: Chooser) -> float | None:
    total = 0.0
    for step in steps:
        ns = expected(step, chooser)
        if ns is None:
            return None
        total += ns
    return total
