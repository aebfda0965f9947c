"""Layer times inside the whole network, where other layers' weights and activations fill the caches as well.

A layer that is timed by itself finds its weights in the last cache; in a network that is larger than this cache they
come from memory, and a choice that counts on the former loses by the latter. So the network is built dense and with
all of its layers pruned alike, and timed step by step, each in turns with the dense one. What a layer takes by itself
at other sparsities is scaled by what the network made of it, with the same tile and transform, at those next to them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from colonnade.fitting.clock import TURNS, repeats
from colonnade.fitting.times import ESTIMATED, LayerTimes, Place, Time, pruned_alike, step_names
from colonnade.pattern import ColumnPattern
from colonnade.sparsify.calibrate_onnx import Target as Layer

if TYPE_CHECKING:
    import onnx

    from colonnade.bench.ours import Ours

LOOKED_AT = (0.75, 0.5)  # sparsities (or the next ones there are) at which a tile or transform is looked at

Kind = tuple[int, int | None, str]
Seconds = Mapping[str, float]  # by step


def within(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    alone: LayerTimes,
    where: Place,
    progress: Callable[[float, str], None] | None = None,
) -> LayerTimes:
    """Times of layers as they are inside the network; `alone` where nothing can or may be measured.

    It takes about the place's budget; what is not looked at in that time goes by the tiles and transforms that were.

    Raises UserError for a model that cannot be built.
    """
    looked_at = _looked_at({pattern for row in alone.pruned.values() for pattern in row})
    if not looked_at or not where.budget or where.target.modelled:
        return alone
    with tempfile.TemporaryDirectory(prefix="colonnade-") as room:
        network = _Network(_built(model, where, Path(room) / "dense"))
        found: dict[ColumnPattern, Mapping[str, float]] = {}
        began = time.monotonic()
        for number, pattern in enumerate(looked_at):
            if found and time.monotonic() - began > where.budget:
                break
            if progress:
                progress(number / len(looked_at), f"all layers {pattern}")
            at = Path(room) / f"{number}"
            found[pattern] = network.shares(_built(pruned_alike(model, layers, pattern), where, at))
            shutil.rmtree(at)  # as large as the network
        dense = network.dense()
    whole = network.quietest
    pruned = {pattern: {name: share * whole for name, share in row.items()} for pattern, row in found.items()}
    steps = {name: step for name, step in step_names(layers, dense).items() if step is not None and name in alone.dense}
    return merged(alone, steps, dense, pruned)


def merged(
    alone: LayerTimes, steps: Mapping[str, str], dense: Seconds, pruned: Mapping[ColumnPattern, Seconds]
) -> LayerTimes:
    """`alone` with what the network took in its place.

    steps:  of every layer, by name.
    dense:  seconds of every step of the dense network.
    pruned: likewise of networks whose layers all have one pattern; of other patterns `alone` is scaled.
    """
    layers = {}
    for name, row in alone.pruned.items():
        step = steps.get(name)
        seen = {p: inside[step] for p, inside in pruned.items() if p in row and step in inside} if step else {}
        layers[name] = {p: _inside(p, row, seen) for p in row}
    found = {n: Time(dense[steps[n]], "measured") if steps.get(n) in dense else time for n, time in alone.dense.items()}
    mine = {steps.get(name) for name in alone.dense}
    return replace(
        alone, dense=found, pruned=layers, rest=sum(seconds for step, seconds in dense.items() if step not in mine)
    )


def _inside(pattern: ColumnPattern, alone: Mapping[ColumnPattern, Time], seen: Mapping[ColumnPattern, float]) -> Time:
    """Of one layer: as it was seen, or its time alone times what became of that at the sparsities around, of the same
    tile and transform if they were seen, else of all that were."""
    if pattern in seen:
        return Time(seen[pattern], "measured")
    known = [p for p in seen if alone[p].source != ESTIMATED or alone[pattern].source == ESTIMATED]
    alike = [p for p in known if _kind(p) == _kind(pattern)] or known
    if not alike:
        return alone[pattern]
    around = sorted({p.sparsity for p in alike})
    ratios = [median(seen[p] / alone[p].seconds for p in alike if p.sparsity == sparsity) for sparsity in around]
    ratio = float(np.interp(pattern.sparsity, around, ratios))
    return replace(alone[pattern], seconds=alone[pattern].seconds * ratio)


def _kind(pattern: ColumnPattern) -> Kind:
    return pattern.tile, pattern.group, pattern.winograd


def _looked_at(patterns: Collection[ColumnPattern]) -> list[ColumnPattern]:
    """Of every tile and transform the patterns next to LOOKED_AT, those next to its first one before others."""
    kinds: dict[Kind, list[ColumnPattern]] = {}
    for pattern in sorted(patterns, key=str):
        kinds.setdefault(_kind(pattern), []).append(pattern)
    rows = [[min(row, key=lambda p: abs(p.sparsity - wanted)) for row in kinds.values()] for wanted in LOOKED_AT]
    return list(dict.fromkeys(chain(*rows)))


def _built(model: onnx.ModelProto, where: Place, at: Path) -> Ours:
    from colonnade.bench.ours import Ours
    from colonnade.bench.run import random_inputs

    bundle = where.build(model, at)
    return Ours(bundle, where.target, random_inputs(dict(bundle.manifest)), where.threads)


@dataclass
class _Network:
    """The dense network, and how long its steps take. Seconds are of the quietest turn that it had: what disturbs the
    machine for a while disturbs both of a turn."""

    runner: Ours
    quietest: float = float("inf")
    steps: dict[str, list[float]] = field(default_factory=dict)  # shares of the whole, one a turn

    def shares(self, other: Ours) -> dict[str, float]:
        """Of every step of another network, as a share of this one's time in the same turns."""
        mine, others = repeats(self.runner), repeats(other)
        found: dict[str, list[float]] = {}
        for _ in range(TURNS):
            base = _profile(self.runner, mine)
            whole = sum(base.values())
            self.quietest = min(self.quietest, whole)
            for into, row in ((self.steps, base), (found, _profile(other, others))):
                for step, seconds in row.items():
                    into.setdefault(step, []).append(seconds / whole)
        return {step: median(row) for step, row in found.items()}

    def dense(self) -> dict[str, float]:
        """Seconds of every step of this one, as seen in all turns."""
        return {step: median(row) * self.quietest for step, row in self.steps.items()}


def _profile(runner: Ours, times: int) -> dict[str, float]:
    """Seconds of every step."""
    names = [step["name"] for step in runner.bundle.manifest["steps"]]
    return {name: median(ns) / 1e9 for name, ns in zip(names, runner.profile(1, times), strict=True)}
