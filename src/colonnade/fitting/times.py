"""How long every layer takes at every pattern, from the tuner's records; what they lack is measured, within a budget.

A layer's time depends on its pattern and not on which columns are kept, so the network is pruned by magnitude, once for
each pattern, and only the layers' workloads are looked at. The same records serve the build. Tiles are of rows from
anywhere, as they are where rows are grouped by what they need: neighbours write to planes side by side, in half of the
time where a layer has large outputs, and with them another kernel wins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.arranging import arranged
from colonnade.bench import layouts
from colonnade.build.toolchain import Toolchain
from colonnade.frontend import imported
from colonnade.kernels.isa import Isa
from colonnade.kernels.ops import then
from colonnade.onnx_io import node_name
from colonnade.onnx_winograd import rewrite
from colonnade.pattern import ColumnPattern
from colonnade.plan import Step
from colonnade.sparsify.calibrate_onnx import Target as Layer
from colonnade.sparsify.select import as_matrix, from_matrix, select
from colonnade.sparsify.transformed import transformable
from colonnade.targets import Target
from colonnade.tune.database import Database
from colonnade.tune.search import decide, duel, times
from colonnade.tune.tuner import Chooser, estimate, place
from colonnade.tune.tuner import tune as measure

if TYPE_CHECKING:
    import onnx

    from colonnade.bundle import Bundle

ESTIMATED = "estimated"
# In tiles twice as large a layer keeps so many times the columns for the same loss, up to tiles of 8 rows and beyond
# (ResNet-18's layers, docs/accuracy-probes.md); so it must be quicker by as much at the same sparsity.
TWICE, TWICE_LARGE, LARGE = 1.25, 1.14, 8
GAIN = 0.05  # share of a layer's time by which another tile is worth measuring as well


@dataclass(frozen=True)
class Time:
    """seconds of one layer in one inference; source: ``measured``, ``modelled on …``, or ``estimated``: the static
    ranking beside what was measured of this layer."""

    seconds: float
    source: str


@dataclass(frozen=True)
class LayerTimes:
    """dense: of every layer by name; pruned: by name and pattern; rest: seconds of all other steps; untimed: layers
    that no step of the network is known to compute, which stay dense."""

    dense: Mapping[str, Time]
    pruned: Mapping[str, Mapping[ColumnPattern, Time]]
    rest: float
    untimed: Sequence[str] = ()

    @property
    def total(self) -> float:
        """Seconds of the dense network, step by step."""
        return self.rest + sum(time.seconds for time in self.dense.values())


@dataclass(frozen=True)
class _Steps:
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Place:
    """Where is measured, with what, and for how long at most (seconds; 0: not at all). isa: for convolutions in float16
    as ``Isa.of(2)``."""

    target: Target
    isa: Isa
    threads: int
    toolchain: Toolchain
    db: Path | None = None
    budget: float = 0.0
    batch: int | None = None

    @property
    def dtype(self) -> str:
        """What convolutions compute with: ``f32`` or ``f16``."""
        return self.isa.prefix

    def build(self, model: Path | onnx.ModelProto, out: Path, **options: Any) -> Bundle:
        """A bundle for this place; options: more of those that `api.build` has."""
        from colonnade.api import build

        chosen = self.target.probe().cpus
        return build(
            model, self.target.name, threads=self.threads, cpus=",".join(map(str, chosen)) if chosen else None,
            isa=self.isa.name, dtype=self.dtype, batch=self.batch, out=out, db=self.db, cc=self.toolchain.cc, **options,
        )  # fmt: skip


def layer_times(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    patterns: Mapping[str, Sequence[ColumnPattern]],
    where: Place,
    progress: Callable[[float, str], None] | None = None,
) -> LayerTimes:
    """Times of every layer, dense and at each of its `patterns` (by the layer's name).

    Raises UserError for a model that cannot be imported, a target whose times mean nothing, or an unusable database.
    """
    machine = where.target.probe()
    costs = layouts.known(machine, where.isa, where.db)
    made = arranged(imported(model, batch=where.batch), machine, where.isa, where.db)
    whole = made.plan()
    steps = {step.name: step for step in whole.steps}
    names = {name: step for name, step in step_names(layers, steps).items() if step is not None}
    half = then.FUNCTIONS if where.isa.itemsize == 2 else None
    own: dict[tuple[str, ColumnPattern], Step] = {}
    for pattern in dict.fromkeys(p for row in patterns.values() for p in row):
        copy = imported(pruned_alike(model, layers, pattern), batch=where.batch).arrange(costs, half).plan()
        # what goes in is nearly as large as in the whole network
        alike = {step.name: replace(step, rms=made.rms.get(step.name)) for step in copy.steps}
        for name in [name for name in names if pattern in patterns.get(name, ())]:
            if names[name] in alike:
                own[name, pattern] = alike[names[name]]
    # A pruned copy may be fused in another way; a layer that is lost there stays dense.
    names = {name: step for name, step in names.items() if all((name, p) in own for p in patterns.get(name, ()))}
    wanted = {step.key(): step for step in (*whole.steps, *own.values())}
    if where.budget:
        measure(
            _Steps(tuple(wanted.values())), where.target, where.isa, where.threads, where.budget, where.db, progress,
            where.toolchain,
        )  # fmt: skip
    found = _known(wanted, where, where.target.modelled or "measured")
    dense = {name: found[steps[step].key()] for name, step in names.items()}
    pruned = {name: {p: found[own[name, p].key()] for p in patterns.get(name, ())} for name in names}
    mine = set(names.values())
    rest = sum(found[step.key()].seconds for step in whole.steps if step.name not in mine)
    return LayerTimes(dense, pruned, rest, [layer.name for layer in layers if layer.name not in names])


def pruned_alike(model: onnx.ModelProto, layers: Sequence[Layer], pattern: ColumnPattern) -> onnx.ModelProto:
    """A copy of the model with every layer pruned by magnitude in tiles of rows from anywhere; only for its times."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if pattern.winograd:
        layers = [layer for layer in layers if transformable(model, layer.node, layer.tensor, pattern.winograd)]
        outputs = {layer.node.output[0] for layer in layers}
        rewrite(copy, [node for node in copy.graph.node if node.output[0] in outputs], pattern.winograd)
    tensors = _tensors(copy)
    for layer in layers:
        tensor = tensors[layer.tensor.name]
        stored = onnx.numpy_helper.to_array(tensor)
        rows_first = stored.T if layer.rows_last else stored
        order = _shuffled(len(rows_first), layer.groups)
        chosen = select(as_matrix(rows_first[order]), pattern, groups=layer.groups, similar_rows=False)
        mask = np.empty(rows_first.shape, bool)
        mask[order] = from_matrix(chosen.mask, rows_first.shape)
        # Zeros that are there by accident would look like a pattern of their own.
        full = np.where(rows_first == 0, np.float32(1e-6), rows_first)
        kept = np.where(mask, full, np.float32(0)).astype(np.float32)
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(np.ascontiguousarray(kept.T if layer.rows_last else kept), tensor.name)
        )
    return copy


def _shuffled(rows: int, groups: int) -> npt.NDArray[np.int64]:
    """The rows in an order of no meaning, always the same; those of a convolution group stay among themselves."""
    random = np.random.default_rng(0)
    parts = np.split(np.arange(rows), groups)
    return np.concatenate([random.permutation(part) for part in parts])


def _tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[attribute.t.name] = attribute.t
    return found


def step_names(layers: Sequence[Layer], known: Collection[str]) -> dict[str, str | None]:
    """Of the `known` steps the one that computes each layer, called as its weight or its node; None: no step is."""
    found: dict[str, str | None] = {}
    for layer in layers:
        stored = (layer.node.input[1].removesuffix(".weight"), layer.tensor.name.removesuffix(".weight"))
        own = (*stored, node_name(layer.node))
        found[layer.name] = next((name for name in own if name in known), None)
    return found


def _known(wanted: Mapping[str, Step], where: Place, source: str) -> dict[str, Time]:
    """The time of every step by its key: measured, or estimated from the static ranking beside what is measured."""
    database = Database(where.db)
    try:
        spot = place(where.target.probe(), where.isa, where.threads, where.toolchain)
        chooser = Chooser(database, spot, where.isa)
        found: dict[str, Time] = {}
        ranks: dict[str, float] = {}
        scales: dict[str, list[float]] = {}
        for key, step in wanted.items():
            candidates, _ = chooser.listed(step)
            ranks[key] = candidates[0].rank
            ns = chosen_ns(chooser, step)
            if ns is not None:
                found[key] = Time(ns / 1e9, source)
                if candidates[0].rank > 0:
                    scales.setdefault(step.workload.op, []).append(ns / 1e9 / candidates[0].rank)
    finally:
        database.close()
    for key, step in wanted.items():
        if key not in found:
            scale = scales.get(step.workload.op)
            guess = ranks[key] * median(scale) if scale and ranks[key] > 0 else estimate(step)
            found[key] = Time(guess, ESTIMATED)
    return found


def chosen_ns(chooser: Chooser, step: Step) -> float | None:
    """Median ns of the candidate that a build would take for a step; None where nothing was measured."""
    candidates, sources = chooser.listed(step)
    records = chooser.records(step, candidates, sources)
    best = decide(candidates, records)
    if best is None:
        return None
    fought = duel(candidates, records)
    if fought is not None and best == fought.sparse:
        return fought.sparse_ns
    if fought is not None and best == fought.dense:
        return fought.dense_ns
    last = times(records, (2,))
    return last[best.key()] if best.key() in last else times(records, (0, 1))[best.key()]


def best_tiles(times_of: LayerTimes, tiles: Sequence[int], sparsity: float) -> dict[str, tuple[int, ...]]:
    """Tiles of every layer, by the times at this sparsity: the quickest for the same loss, and the quickest if that is
    another one and quicker by GAIN."""

    def kept(tile: int) -> float:
        """How many columns a tile keeps for the loss of a single row, as a multiple of that one's."""
        return float(TWICE ** np.log2(min(tile, LARGE)) * TWICE_LARGE ** np.log2(max(tile / LARGE, 1)))

    chosen: dict[str, tuple[int, ...]] = {}
    for name, row in times_of.pruned.items():
        seconds = {tile: row[ColumnPattern(sparsity, tile)].seconds for tile in sorted(tiles)}
        best = min(seconds, key=lambda tile: seconds[tile] * kept(tile))
        quickest = min(seconds, key=lambda tile: seconds[tile])
        chosen[name] = (best, quickest) if seconds[quickest] < (1 - GAIN) * seconds[best] else (best,)
    return chosen
