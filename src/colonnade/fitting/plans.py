"""What every layer may become, with its measured time and loss; and the plan that meets a latency: `colonnade plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from colonnade import accuracy
from colonnade.errors import UserError
from colonnade.fitting.kept import digest, read_json, write_json
from colonnade.fitting.times import ESTIMATED, Place, Time, best_tiles, layer_times
from colonnade.fitting.within import within
from colonnade.onnx_io import check_samples, check_writable, graph_inputs, load_written_out
from colonnade.pattern import ColumnPattern
from colonnade.sparsify import allocate
from colonnade.sparsify.allocate import Choice, PrunePlan
from colonnade.sparsify.transformed import transformable

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str, float, str], None]  # stage, share done (0 .. 1), what is at hand

SPARSITIES = (0.25, 0.5, 0.625, 0.75, 0.875)
TILES = (2, 4, 8, 16)
TILE_SPARSITY = 0.75  # at which tiles are compared
# Transformed weights lose less at the same sparsity with tiles of 2x2, somewhat more with 4x1, and more with 4x4:
# the time over that of weights as they are up to which they are worth looking at.
PAYS = {"2x2": 1.1, "4x1": 1.0, "4x4": 0.85}
LARGEST = 2304  # transformed columns of a layer whose losses are measured: of more it takes minutes a layer
USUAL = 8


@dataclass(frozen=True)
class Settings:
    """How points are made. method: ``obs`` or ``magnitude``; tiles, sparsities: what layers may get; budget: seconds of
    tuning for the layers' times, and for each bundle what they leave open."""

    method: str = "obs"
    tiles: Sequence[int] = TILES
    sparsities: Sequence[float] = SPARSITIES
    exclude: Sequence[str] = ()
    budget: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("obs", "magnitude"):
            raise UserError(f"method is {self.method!r}: expected 'obs' or 'magnitude'")
        if not self.tiles or not self.sparsities:
            raise UserError("expected at least one tile and one sparsity to choose from")
        for tile in self.tiles:
            for sparsity in self.sparsities:
                ColumnPattern(sparsity, tile)


def choices_of(
    source: Path,
    model: onnx.ModelProto,
    inputs: Mapping[str, npt.NDArray[Any]],
    where: Place,
    settings: Settings,
    progress: Progress | None = None,
    keep: Path | None = None,
) -> tuple[dict[str, list[Choice]], float, list[str]]:
    """Every prunable layer's choices, the seconds of everything else, and remarks.

    inputs: calibration samples by input name; for obs all of them, as many as the work allows are answered.
    keep:   a file that losses are read from and written to.

    Raises UserError for a model without prunable layers.
    """
    from colonnade.frontend.load import load
    from colonnade.sparsify.onnx_file import read_targets
    from colonnade.sparsify.sensitivity import inputs_for, second_order, sensitivities

    tell = progress or (lambda *_: None)
    targets = read_targets(source, model, settings.exclude)
    if not targets:
        raise UserError(f"{source}: no layer can be pruned; `colonnade inspect {source}` says why")
    tell("layer times", 0.0, "reading the model")
    alike = USUAL if USUAL in settings.tiles else max(settings.tiles)  # the tile in which transforms are compared
    first = {t.name: [ColumnPattern(TILE_SPARSITY, tile) for tile in settings.tiles] for t in targets}
    # what is pruned behind a transform is computed in float32, between conversions
    if settings.method == "obs" and where.dtype == "f32":
        for t in targets:
            sizes = [m for m in PAYS if transformable(model, t.node, t.tensor, m, LARGEST)]
            first[t.name] += [ColumnPattern(TILE_SPARSITY, alike, winograd=m) for m in sizes]
    half = Place(**{**vars(where), "budget": where.budget / 2})
    coarse = layer_times(model, targets, first, half, lambda done, text: tell("layer times", done / 2, text))
    tiles = best_tiles(coarse, settings.tiles, TILE_SPARSITY)
    kinds = {name: [(tile, "") for tile in mine] for name, mine in tiles.items()}
    for name, row in first.items():
        if name in kinds:
            timed = coarse.pruned[name]
            plain = timed[ColumnPattern(TILE_SPARSITY, alike)].seconds
            kinds[name] += [
                (alike, one.winograd) for one in row if one.winograd and _pays(timed[one], one.winograd, plain)
            ]
    wanted = {
        name: [ColumnPattern(s, tile, winograd=m) for tile, m in mine for s in settings.sparsities]
        for name, mine in kinds.items()
    }
    times = layer_times(model, targets, wanted, half, lambda done, text: tell("layer times", 0.5 + done / 2, text))
    times = within(model, targets, times, where, lambda done, text: tell("in network", done, text))

    macs = sum(float(step.workload.macs) for step in load(model, batch=where.batch).steps)
    some = inputs_for(macs, len(targets), max(map(len, wanted.values())))

    def lost(done: float, text: str) -> None:
        tell("layer losses", done, text)

    if settings.method == "obs":
        losses = _losses(keep, inputs, "obs", wanted, lambda: second_order(model, targets, inputs, wanted, some, lost))
    else:
        few = {name: array[:some] for name, array in inputs.items()}
        losses = _losses(keep, few, "magnitude", wanted, lambda: sensitivities(model, targets, few, wanted, lost))
    tell("layer losses", 1.0, "")
    choices: dict[str, list[Choice]] = {}
    for name, dense in times.dense.items():
        if name not in wanted:
            continue
        choices[name] = [Choice(None, dense.seconds, 0.0, dense.source)]
        for kind in kinds[name]:
            chosen = [(p, times.pruned[name][p]) for p in wanted[name] if (p.tile, p.winograd) == kind]
            pruned = [Choice(p, time.seconds, losses[name][p], time.source) for p, time in chosen]
            choices[name] += falling([choices[name][0], *pruned])[1:]
    notes = []
    guessed = sum(choice.source == ESTIMATED for row in choices.values() for choice in row)
    if guessed:
        count = sum(map(len, choices.values()))
        notes.append(f"{guessed} of {count} layer times are estimated, not measured: a larger --budget measures them")
    if times.untimed:
        notes.append(f"stay dense, as no step of the program is known to compute them: {', '.join(times.untimed)}")
    return choices, times.rest, notes


def _pays(time: Time, size: str, plain: float) -> bool:
    """Are transformed weights worth looking at? An estimate knows nothing of what the transforms take."""
    return time.source != ESTIMATED and time.seconds <= PAYS[size] * plain


def falling(row: Sequence[Choice]) -> list[Choice]:
    """A layer's choices by sparsity, dense first, none slower than one that keeps more: that is more of the same work,
    and what was measured otherwise was disturbed. An estimate says nothing against what was measured."""
    found: list[Choice] = []
    for choice in sorted(row, key=lambda c: c.pattern.sparsity if c.pattern else 0.0):
        rivals = [c for c in found if c.source != ESTIMATED or choice.source == ESTIMATED]
        quickest = min([choice, *rivals], key=lambda c: c.seconds)
        found.append(replace(choice, seconds=quickest.seconds, source=quickest.source))
    return found


def _losses(
    keep: Path | None,
    inputs: Mapping[str, npt.NDArray[Any]],
    method: str,
    wanted: Mapping[str, Sequence[ColumnPattern]],
    make: Callable[[], dict[str, dict[ColumnPattern, float]]],
) -> dict[str, dict[ColumnPattern, float]]:
    """Losses as kept, where the kept ones are of these inputs, method and patterns; else made, and kept beside those
    of other patterns. They are of what is pruned away, whatever the rest is computed with."""
    key = digest(inputs)
    content = read_json(keep) if keep is not None else {}
    known: dict[str, dict[str, float]] = {}
    if (content.get("inputs"), content.get("method")) == (key, method):
        known = content["losses"]
        if all(str(p) in known.get(n, {}) for n, row in wanted.items() for p in row):
            return {name: {p: known[name][str(p)] for p in row} for name, row in wanted.items()}
    made = make()
    if keep is not None:
        rows = {name: known.get(name, {}) | {str(p): loss for p, loss in row.items()} for name, row in made.items()}
        write_json(keep, {"inputs": key, "method": method, "losses": rows})
    return made


@dataclass(frozen=True)
class MadePlan:
    """A plan that was written. pruned of layers; seconds of the layer times with it and dense; notes: remarks."""

    plan: PrunePlan
    pruned: int
    layers: int
    seconds: float
    dense: float
    notes: Sequence[str]


def make_plan(
    model: str | Path,
    images: Any,
    out: str | Path,
    target: str = "local",
    *,
    latency: float | None = None,
    speedup: float | None = None,
    settings: Settings | None = None,
    calibration: int = 128,
    preprocess: str | Mapping[str, Any] | None = None,
    threads: int | None = None,
    cpus: str | None = None,
    isa: str | None = None,
    dtype: str = "f32",
    batch: int | None = None,
    db: str | Path | None = None,
    cc: str = "zig",
    force: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> MadePlan:
    """Only the plan of `fit`, written to `out`: layer times that add up to `latency` seconds, or to the dense network's
    divided by `speedup`, with the smallest sum of losses. Arguments and errors as there."""
    import onnxruntime  # noqa: F401  # what losses are measured with: missing, it is missed before times are

    if (latency is None) == (speedup is None):
        raise UserError("give either --latency or --speedup")
    if latency is not None and not latency > 0:
        raise UserError(f"latency is {1e3 * latency:g} ms: expected more than 0")
    if speedup is not None and not speedup >= 1:
        raise UserError(f"speedup is {speedup:g}: expected at least 1")
    settings = settings or Settings()
    check_writable(Path(out), force=force)
    source = Path(model)
    proto = load_written_out(source)
    where = place_of(target, threads, cpus, isa, batch, db, cc, settings.budget, notice, dtype)
    pictures = accuracy.samples(images, preprocess=preprocess, limit=calibration, seed=settings.seed)
    inputs = {input_for(source, proto, pictures.inputs): pictures.inputs}
    choices, rest, notes = choices_of(source, proto, inputs, where, settings, progress)
    dense = rest + sum(row[0].seconds for row in choices.values())
    wanted = latency if latency is not None else dense / (speedup or 1)
    least = rest + allocate.seconds(allocate.fastest(choices))
    if least > wanted:
        raise UserError(
            f"{1e3 * wanted:.3g} ms cannot be reached: layer times add up to {1e3 * dense:.3g} ms dense and "
            f"{1e3 * least:.3g} ms at the least, of which {1e3 * rest:.3g} ms are layers that stay dense"
        )
    chosen = allocate.allocate(choices, wanted - rest)
    plan = PrunePlan.of(choices, chosen, plan_head(source, choices, chosen, rest, where, settings.method))
    plan.write(out, force=force)
    pruned = sum(pattern is not None for pattern in plan.layers.values())
    return MadePlan(plan, pruned, len(plan.layers), rest + allocate.seconds(chosen), dense, notes)


def plan_head(
    source: Path, choices: allocate.Choices, chosen: Mapping[str, Choice], rest: float, where: Place, method: str
) -> list[str]:
    """What a plan says about itself."""
    total, dense = rest + allocate.seconds(chosen), rest + sum(row[0].seconds for row in choices.values())
    how = " --method obs --calibration PHOTOS/" if method == "obs" else ""
    return [
        f"Which layers of {source.name} lose how much. Edit it and pass it back:",
        f"    colonnade prune {source.name} --plan THIS -o OUT.onnx{how}",
        f"Layer times add up to {1e3 * total:.2f} ms of {1e3 * dense:.2f} ms dense on {where.target.name} "
        f"({where.isa.name}, {'float16, ' if where.dtype == 'f16' else ''}{where.threads} thread(s)).",
        f"loss: divergence of the answers when only this layer is pruned, by {method} (nats an image).",
    ]


def place_of(
    target: str, threads: int | None, cpus: str | None, isa: str | None, batch: int | None, db: str | Path | None,
    cc: str, budget: float, notice: Callable[[str], None] | None, dtype: str = "f32",
) -> Place:  # fmt: skip
    """Where layers are timed. Raises UserError for a target whose times mean nothing, or which does not compute with
    ``dtype``."""
    from colonnade import targets
    from colonnade.build.toolchain import Toolchain

    targets.check_dtype(dtype)
    place = targets.parse(target)
    if place.untimed:
        raise UserError(f"{place.name}: {place.untimed}; take a board (ssh://…), local, or a machine model (model:x60)")
    place, count = targets.settle(place, threads, cpus)
    toolchain = Toolchain(cc, notice=notice)
    chosen = place.probe().pick_isa(isa, dtype, timed=True)
    return Place(place, chosen, count, toolchain, Path(db) if db else None, budget, batch)


def input_for(source: Path, model: onnx.ModelProto, images: npt.NDArray[Any]) -> str:
    """The name of the model's only input, which prepared images [N, …] are for. Raises UserError where it has none or
    several, and where they do not fit it."""
    inputs = graph_inputs(model.graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise UserError(f"{source}: takes {len(inputs)} inputs ({names}): fit supports one")
    check_samples(inputs[0], images)
    return str(inputs[0].name)
