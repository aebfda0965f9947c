"""From a trained ONNX file and images to the bundle that meets a budget: `colonnade fit`, `colonnade plan`.

What was measured is kept: layer times in the tuning database, losses of single layers and finished points in the output
folder. So a second call, or one after Ctrl-C, does only what is left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade import accuracy
from colonnade.errors import UserError
from colonnade.fitting.goal import Goal, Point, next_budget
from colonnade.fitting.times import Place, best_tiles, layer_times
from colonnade.pattern import ColumnPattern
from colonnade.sparsify import allocate
from colonnade.sparsify.allocate import Choice, PrunePlan

if TYPE_CHECKING:
    import onnx

    from colonnade.bundle import Bundle
    from colonnade.targets import Target

Progress = Callable[[str, float, str], None]  # stage, share done (0 .. 1), what is at hand

SPARSITIES = (0.25, 0.5, 0.625, 0.75, 0.875)
TILES = (4, 8, 16)
TILE_SPARSITY = 0.75  # at which tiles are compared
FORMAT = 1
STATE, RECORD, LOSSES = "point.json", "fit.json", "losses.json"
LEAST_CALIBRATION, LEAST_TEST = 8, 8
BLOCKS = 3


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


@dataclass
class Fit:
    """What came out. points: the dense network first, then by falling latency; best: meets the goal, None where no
    point does or nothing was asked; labelled: whether losses are of top-1 (else: answers unlike the dense network's);
    latency_is: ``measured`` or ``modelled on …``; notes: remarks for the user."""

    folder: Path
    goal: Goal
    points: list[Point] = field(default_factory=list)
    labelled: bool = False
    latency_is: str = "measured"
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Point | None:
        """The point that meets the goal."""
        return self.goal.best(self.points)

    @property
    def closest(self) -> Point:
        """The point that misses the goal by least."""
        return self.goal.closest(self.points)


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

    inputs: calibration samples by input name; as many as the work allows are used for the losses.
    keep:   a file that losses are read from and written to.

    Raises UserError for a model without prunable layers.
    """
    from colonnade.frontend.load import load
    from colonnade.sparsify.onnx_file import read_targets
    from colonnade.sparsify.sensitivity import inputs_for, sensitivities

    tell = progress or (lambda *_: None)
    targets = read_targets(source, model, settings.exclude)
    if not targets:
        raise UserError(f"{source}: no layer can be pruned; `colonnade inspect {source}` says why")
    tell("layer times", 0.0, "reading the model")
    first = {t.name: [ColumnPattern(TILE_SPARSITY, tile) for tile in settings.tiles] for t in targets}
    half = Place(**{**vars(where), "budget": where.budget / 2})
    coarse = layer_times(model, targets, first, half, lambda done, text: tell("layer times", done / 2, text))
    tiles = best_tiles(coarse, settings.tiles, TILE_SPARSITY)
    wanted = {name: [ColumnPattern(s, tile) for s in settings.sparsities] for name, tile in tiles.items()}
    times = layer_times(model, targets, wanted, half, lambda done, text: tell("layer times", 0.5 + done / 2, text))

    macs = sum(float(step.workload.macs) for step in load(model, batch=where.batch).steps)
    some = inputs_for(macs, len(targets), len(settings.sparsities))
    few = {name: array[:some] for name, array in inputs.items()}
    losses = _losses(keep, few, wanted, lambda: sensitivities(
        model, targets, few, wanted, lambda done, text: tell("layer losses", done, text)
    ))  # fmt: skip
    tell("layer losses", 1.0, "")
    choices = {
        name: [Choice(None, dense.seconds, 0.0, dense.source)]
        + [
            Choice(
                pattern, times.pruned[name][pattern].seconds, losses[name][pattern], times.pruned[name][pattern].source
            )
            for pattern in wanted[name]
        ]
        for name, dense in times.dense.items()
        if name in wanted
    }
    notes = []
    guessed = sum(choice.source == "estimated" for row in choices.values() for choice in row)
    if guessed:
        count = sum(map(len, choices.values()))
        notes.append(f"{guessed} of {count} layer times are estimated, not measured: a larger --budget measures them")
    if times.untimed:
        notes.append(f"stay dense, as no step of the program is known to compute them: {', '.join(times.untimed)}")
    return choices, times.rest, notes


def _losses(
    keep: Path | None,
    inputs: Mapping[str, npt.NDArray[Any]],
    wanted: Mapping[str, Sequence[ColumnPattern]],
    make: Callable[[], dict[str, dict[ColumnPattern, float]]],
) -> dict[str, dict[ColumnPattern, float]]:
    """Losses as kept, where the kept ones are of these inputs and patterns; else made, and kept."""
    key = _digest({name: array for name, array in inputs.items()})
    content = _read_json(keep) if keep is not None else {}
    if content.get("inputs") == key:
        known = content["losses"]
        if all(str(p) in known.get(n, {}) for n, row in wanted.items() for p in row):
            return {name: {p: known[name][str(p)] for p in row} for name, row in wanted.items()}
    made = make()
    if keep is not None:
        rows = {name: {str(p): loss for p, loss in row.items()} for name, row in made.items()}
        _write_json(keep, {"inputs": key, "losses": rows})
    return made


def fit(
    model: str | Path,
    images: Any,
    target: str = "local",
    *,
    latency: float | None = None,
    speedup: float | None = None,
    max_drop: float | None = None,
    out: str | Path | None = None,
    points: int = 4,
    settings: Settings | None = None,
    calibration: int = 256,
    test: int = 500,
    preprocess: str | Mapping[str, Any] | None = None,
    threads: int | None = None,
    cpus: str | None = None,
    isa: str | None = None,
    batch: int | None = None,
    db: str | Path | None = None,
    cc: str = "zig",
    force: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Fit:
    """An accuracy-latency frontier of ready bundles, without training, and the one that meets a budget.

    Args:
        model: an ONNX file with one input.
        images: as `accuracy.samples` takes them; a random part calibrates, others are answered and compared. Labels are
            optional: without, or where the folders are not the model's classes, the share of changed answers stands for
            the loss, which it is never smaller than.
        target: as for `build`; not ``qemu``, whose times mean nothing.
        latency: seconds at most; speedup: so many times as fast as the dense network; max_drop: points of top-1 that
            may be lost. One of them, or none for the frontier alone.
        out: the folder of points and bundles; ``NAME.fit`` by default. A folder of the same model and images is gone on
            with.
        points: pruned networks to make at most.
        calibration, test: images to use at most for either.
        threads, cpus, isa, batch, db, cc, preprocess, notice: as for `build`.
        force: replace what another model or other images left in `out`.
        progress: hears (stage, share done, what is at hand).

    Raises:
        UserError: the model, images or an option are at fault.
        TargetError: the target cannot be reached.
    """
    from colonnade.onnx_io import load_onnx

    settings = settings or Settings()
    if sum(x is not None for x in (latency, speedup, max_drop)) > 1:
        raise UserError("give one of --latency, --speedup and --max-drop")
    if speedup is not None and not speedup >= 1:
        raise UserError(f"speedup is {speedup:g}: expected at least 1")
    if points < 1:
        raise UserError(f"points is {points}: expected at least 1")
    goal = Goal(latency, None if max_drop is None else max_drop / 100)
    source = Path(model)
    proto = load_onnx(source)
    where = place_of(target, threads, cpus, isa, batch, db, cc, settings.budget, notice)
    tell = progress or (lambda *_: None)
    tell("images", 0.0, "")
    pictures = accuracy.samples(images, preprocess=preprocess, limit=calibration + test, seed=settings.seed)
    calibrating, testing, notes = split(pictures, calibration, test, settings.seed)
    folder = Path(out) if out is not None else Path(source.stem + ".fit")
    input_name = _only_input(source, proto)
    key = _digest(
        {"model": np.frombuffer(source.read_bytes(), np.uint8), "a": calibrating.inputs, "b": testing.inputs},
        method=settings.method, seed=settings.seed, exclude=list(settings.exclude),
    )  # fmt: skip
    open_folder(folder, key, force)
    tell("images", 1.0, "")
    choices, rest, more = choices_of(
        source, proto, {input_name: calibrating.inputs}, where, settings, progress, folder / LOSSES
    )
    made = Fit(folder, goal, latency_is=getattr(where.target, "modelled", "") or "measured", notes=[*notes, *more])
    maker = _Maker(source, folder, key, calibrating, testing, input_name, where, settings, preprocess, tell)
    dense = maker.dense(rest + sum(row[0].seconds for row in choices.values()))
    made.labelled = maker.labelled
    made.notes += maker.notes
    if speedup is not None:
        goal = made.goal = Goal(dense.latency / speedup)
    quickest = rest + allocate.seconds(allocate.fastest(choices))
    made.points += [dense, *maker.existing()]
    search, plans = goal, {point.record["plan"] for point in made.points}
    for number in range(1, points + 1):
        while True:
            wanted = next_budget(search, made.points, quickest)
            if wanted is None:
                break
            plan = maker.plan(choices, allocate.allocate(choices, wanted - rest), rest)
            if plan.digest not in plans:
                break
            # The choices are too coarse for what was asked; the frontier may still have gaps.
            wanted = None
            if search == Goal():
                break
            search = Goal()
        if wanted is None:
            break
        plans.add(plan.digest)
        made.points.append(maker.point(f"point {number}", plan))
    made.points = maker.timed_together(made.points)
    made.points.sort(key=lambda p: -p.budget)
    _write_json(folder / RECORD, record(made))
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
    batch: int | None = None,
    db: str | Path | None = None,
    cc: str = "zig",
    force: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> MadePlan:
    """Only the plan of `fit`, written to `out`: layer times that add up to `latency` seconds, or to the dense network's
    divided by `speedup`, with the smallest sum of losses. Arguments and errors as there."""
    from colonnade.onnx_io import check_writable, load_onnx

    if (latency is None) == (speedup is None) or not (speedup or latency or 0) > 0:
        raise UserError(f"latency is {latency}, speedup {speedup}: expected one of them, above 0")
    settings = settings or Settings()
    check_writable(Path(out), force=force)
    source = Path(model)
    proto = load_onnx(source)
    where = place_of(target, threads, cpus, isa, batch, db, cc, settings.budget, notice)
    pictures = accuracy.samples(images, preprocess=preprocess, limit=calibration, seed=settings.seed)
    inputs = {_only_input(source, proto): pictures.inputs}
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
    plan = PrunePlan.of(choices, chosen, plan_head(source, choices, chosen, rest, where))
    plan.write(out, force=force)
    pruned = sum(pattern is not None for pattern in plan.layers.values())
    return MadePlan(plan, pruned, len(plan.layers), rest + allocate.seconds(chosen), dense, notes)


def plan_head(
    source: Path, choices: allocate.Choices, chosen: Mapping[str, Choice], rest: float, where: Place
) -> list[str]:
    """What a plan says about itself."""
    total, dense = rest + allocate.seconds(chosen), rest + sum(row[0].seconds for row in choices.values())
    return [
        f"Which layers of {source.name} lose how much. Edit it and pass it back:",
        f"    colonnade prune {source.name} --plan THIS -o OUT.onnx",
        f"Layer times add up to {1e3 * total:.2f} ms of {1e3 * dense:.2f} ms dense on {where.target.name} "
        f"({where.isa.name}, {where.threads} thread(s)).",
        "loss: divergence of the answers when only this layer is pruned, by magnitude (nats an image).",
    ]


def place_of(
    target: str, threads: int | None, cpus: str | None, isa: str | None, batch: int | None, db: str | Path | None,
    cc: str, budget: float, notice: Callable[[str], None] | None,
) -> Place:  # fmt: skip
    """Where layers are timed. Raises UserError for a target whose times mean nothing."""
    from colonnade import targets
    from colonnade.build.toolchain import Toolchain

    place = targets.parse(target)
    if place.untimed:
        raise UserError(f"{place.name}: {place.untimed}; take a board (ssh://…), local, or a machine model (model:x60)")
    place, count = targets.settle(place, threads, cpus)
    toolchain = Toolchain(cc, notice=notice)
    return Place(place, place.probe().pick_isa(isa), count, toolchain, Path(db) if db else None, budget, batch)


def split(
    pictures: accuracy.Samples, calibration: int, test: int, seed: int
) -> tuple[accuracy.Samples, accuracy.Samples, list[str]]:
    """Images to calibrate with and others to compare answers on, at random; and remarks.

    Few images are shared out evenly. Raises UserError for too few.
    """
    count = len(pictures)
    if count < LEAST_CALIBRATION + LEAST_TEST:
        raise UserError(f"{count} images are too few: expected at least {LEAST_CALIBRATION + LEAST_TEST}, better 500")
    used = min(calibration, max(count // 2, count - test))
    order = np.random.default_rng(seed + 1).permutation(count)
    parts = []
    for index in (np.sort(order[:used]), np.sort(order[used : used + test])):
        labels = None if pictures.labels is None else pictures.labels[index]
        parts.append(accuracy.Samples(pictures.inputs[index], labels, pictures.classes))
    notes = []
    if used < 64:
        notes.append(f"only {used} images calibrate: a few hundred give a better fit")
    return parts[0], parts[1], notes


def open_folder(folder: Path, key: str, force: bool) -> None:
    """Make the folder of a fit, or go on with one of the same model and images. Raises UserError for any other."""
    state = folder / STATE
    if folder.exists():
        content = _read_json(state)
        ours = "fit" in content
        if not ours and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is no folder of `colonnade fit`: choose another -o")
        if ours and content["fit"] != key and not force:
            raise UserError(
                f"{folder}: of another model, other images or another method: choose another -o, or add --force"
            )
        if ours and content["fit"] != key:
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    _write_json(state, {"fit": key, "format": FORMAT})


@dataclass(frozen=True)
class _Planned:
    """A plan before anything is made of it. digest: equal for equal patterns; name: of its folder; seconds, loss: sums
    over layers (and over all other steps)."""

    plan: PrunePlan
    digest: str
    name: str
    seconds: float
    loss: float


class _Maker:
    """Makes points: plan → pruned file → bundle → answers and latency; what is there already is taken as it is."""

    def __init__(
        self, source: Path, folder: Path, key: str, calibrating: accuracy.Samples, testing: accuracy.Samples,
        input_name: str, where: Place, settings: Settings, preprocess: str | Mapping[str, Any] | None, tell: Progress,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.key, self.tell = source, folder, key, tell
        self.calibrating, self.testing, self.input_name = calibrating, testing, input_name
        self.where, self.settings, self.preprocess = where, settings, preprocess
        self.local = where.target.name == "local"
        self.labelled = testing.labels is not None
        self.notes: list[str] = []
        self.reference: accuracy.Accuracy | None = None
        self.bundles: dict[str, Bundle] = {}

    def dense(self, budget: float) -> Point:
        """The network as it is."""
        at = self.folder / "dense"
        bundle = self._build(self.source, at, "dense")
        answers = self._answers(at, _read_json(at / STATE), bundle, self.source, "dense")
        self._check_labels(answers)
        self.reference = answers
        latency = self._latency("dense", bundle)
        record = {
            "plan": "dense", "bundle": str(bundle.path), "kept": 1.0, "predicted_s": budget,
            **self._judged(answers, answers),
        }  # fmt: skip
        return Point("dense", budget, latency, 0.0, record)

    def plan(self, choices: allocate.Choices, chosen: Mapping[str, Choice], rest: float) -> _Planned:
        """What was chosen, as a plan with its name."""
        total = rest + allocate.seconds(chosen)
        dense = rest + sum(row[0].seconds for row in choices.values())
        plan = PrunePlan.of(choices, chosen, plan_head(self.source, choices, chosen, rest, self.where))
        digest = _digest({}, layers={name: str(pattern) for name, pattern in plan.layers.items()})
        return _Planned(plan, digest, f"{dense / total:.2f}x-{digest[:4]}", total, allocate.loss(chosen))

    def existing(self) -> list[Point]:
        """The points that an earlier call left in the folder."""
        found = []
        for state in sorted(self.folder.glob(f"*x-*/{STATE}")):
            if (state.parent / "pruned.onnx").is_file() and (content := _read_json(state)):
                found.append(self._finish(state.parent, content, state.parent.name))
        return found

    def point(self, stage: str, planned: _Planned) -> Point:
        """One pruned network by its plan."""
        began = time.monotonic()
        at = self.folder / planned.name
        shutil.rmtree(at, ignore_errors=True)  # what a call that was stopped left
        at.mkdir()
        planned.plan.write(at / "plan.toml")
        self._prune(planned.plan, at / "pruned.onnx", stage)
        content = {"plan": planned.digest, "budget": planned.seconds, "predicted_loss": planned.loss,
                   "seconds": time.monotonic() - began}  # fmt: skip
        _write_json(at / STATE, content)
        return self._finish(at, content, stage)

    def _finish(self, at: Path, content: dict[str, Any], stage: str) -> Point:
        """The point in a folder that holds a pruned file: what is missing of bundle, answers and latency is made."""
        bundle = self._build(at / "pruned.onnx", at, stage)
        answers = self._answers(at, content, bundle, at / "pruned.onnx", stage)
        assert self.reference is not None
        judged = self._judged(self.reference, answers)
        record = {
            "plan": content["plan"], "plan_file": str(at / "plan.toml"), "onnx": str(at / "pruned.onnx"),
            "bundle": str(bundle.path), "kept": _kept(bundle), "predicted_s": content["budget"],
            "predicted_loss": content["predicted_loss"], "seconds": content["seconds"], **judged,
        }  # fmt: skip
        loss = -judged["points"] if self.labelled else 1 - judged["agreement"]
        point = Point(at.name.partition("-")[0], content["budget"], self._latency(stage, bundle), loss, record)
        self.tell(stage, 1.0, f"{1e3 * point.latency:.2f} ms")
        return point

    def timed_together(self, points: Sequence[Point]) -> list[Point]:
        """The points with latencies measured in turns, so that the machine's weather is the same for all of them."""
        from dataclasses import replace

        from colonnade.bench.ours import Ours
        from colonnade.bench.protocol import Contender, alternate
        from colonnade.targets.peak import measure_peak

        if getattr(self.where.target, "modelled", ""):
            return list(points)
        feeds = self._feeds()
        runners = {
            p.record["bundle"]: Ours(self._bundle(p), self.where.target, feeds, self.where.threads) for p in points
        }
        results = alternate(
            [Contender(name, runner) for name, runner in runners.items()],
            lambda: measure_peak(
                self.where.target, self.where.isa, self.where.threads, self.where.toolchain, memory=False,
                milliseconds=20,
            ).gflops,
            BLOCKS, local=self.local, progress=lambda done, text: self.tell("latency", done, text),
        )  # fmt: skip
        self.tell("latency", 1.0, "")
        if any(result.disturbed for result in results):
            self.notes.append("other programs disturbed every block of a measurement: latencies are unreliable")
        timed = []
        for point, result in zip(points, results, strict=True):
            ms = result.summary()
            timed.append(replace(point, latency=ms["median"] / 1e3, record={**point.record, "ms": ms}))
        return timed

    def _prune(self, plan: PrunePlan, onnx_file: Path, stage: str) -> None:
        from colonnade.sparsify.onnx_file import prune_file

        fitted = self.settings.method == "obs"
        prune_file(
            self.source, onnx_file, None, patterns=plan.layers, exclude=self.settings.exclude,
            method=self.settings.method, calibration={self.input_name: self.calibrating.inputs} if fitted else None,
            progress=lambda done, total, layer: self.tell(stage, 0.8 * done / max(total, 1), f"pruning {layer}"),
            force=True,
        )  # fmt: skip

    def _build(self, onnx_file: Path, at: Path, stage: str) -> Bundle:
        from colonnade.api import build
        from colonnade.bundle import Bundle

        path = at / "bundle"
        if (at / STATE).is_file() and path.is_dir() and stage not in self.bundles:
            known = Bundle.load(path)
            wanted = {
                "target": self.where.target.name, "isa": self.where.isa.name, "threads": self.where.threads,
                "compiler": self.where.toolchain.version,
            }  # fmt: skip
            if all(known.manifest.get(word) == value for word, value in wanted.items()):
                self.bundles[stage] = known
        if stage not in self.bundles:
            self.tell(stage, 0.8, "building")
            self.bundles[stage] = build(
                onnx_file, self.where.target.name, threads=self.where.threads, cpus=_cpus(self.where.target),
                isa=self.where.isa.name, batch=self.where.batch, out=path, tune=self.settings.budget > 0,
                budget=self.settings.budget / 3, db=self.where.db, cc=self.where.toolchain.cc, force=True,
                preprocess=self.preprocess, progress=lambda done, text: self.tell(stage, 0.8 + 0.1 * done, text),
            )  # fmt: skip
        return self.bundles[stage]

    def _bundle(self, point: Point) -> Bundle:
        return next(b for b in self.bundles.values() if str(b.path) == point.record["bundle"])

    def _answers(
        self, at: Path, content: dict[str, Any], bundle: Bundle, onnx_file: Path, stage: str
    ) -> accuracy.Accuracy:
        """Through the bundle where it runs here, else through onnxruntime; written down in the folder."""
        labels = self.testing.labels
        if "answers" in content:
            return accuracy.Accuracy(np.array(content["answers"], np.int64), labels)
        count = len(self.testing)
        found = accuracy.evaluate(
            bundle.path if self.local else onnx_file, self.testing, threads=self.where.threads,
            progress=lambda done, _: self.tell(stage, 0.9 + 0.1 * done / count, "answering"),
        )  # fmt: skip
        _write_json(at / STATE, {**content, "answers": found.answers.tolist()})
        return found

    def _check_labels(self, dense: accuracy.Accuracy) -> None:
        """Folders that are not the model's classes say nothing about its answers."""
        classes = len(self.testing.classes)
        if not self.labelled:
            self.notes.append("the images have no labels: changed answers stand for lost ones, which are never more")
            return
        scores = self.bundles["dense"].manifest["outputs"][0]["shape"]
        known = int(np.prod(scores[1:]))
        if classes and classes != known:
            self.labelled = False
            self.notes.append(
                f"{classes} folders of images are not the {known} classes of the model: taken as images without labels"
            )

    def _judged(self, base: accuracy.Accuracy, other: accuracy.Accuracy) -> dict[str, Any]:
        agreement = float((base.answers == other.answers).mean())
        found: dict[str, Any] = {"agreement": agreement, "images": other.images}
        if self.labelled:
            change = accuracy.compare(base, other)
            found |= {"top1": other.top1, "points": change.points, "low": change.low, "high": change.high}
        else:
            low, high = accuracy.wilson(int((base.answers == other.answers).sum()), other.images)
            found |= {"agreement_low": low, "agreement_high": high}
        return found

    def _feeds(self) -> dict[str, npt.NDArray[Any]]:
        from colonnade.bench.run import random_inputs

        return random_inputs(dict(self.bundles["dense"].manifest))

    def _latency(self, stage: str, bundle: Bundle) -> float:
        """Seconds of an inference by a short look; of a modelled target, its own."""
        from colonnade.bench.ours import Ours

        self.tell(stage, 0.99, "timing")
        runner = Ours(bundle, self.where.target, self._feeds(), self.where.threads)
        if getattr(self.where.target, "modelled", ""):
            return runner.block(0, 1)[0] / 1e9
        one = median(runner.block(1, 3)) / 1e9
        return median(runner.block(2, max(5, min(200, int(0.5 / max(one, 1e-6)))))) / 1e9


def _cpus(target: Target) -> str | None:
    """Cores that were chosen, as `build` takes them."""
    chosen = target.probe().cpus
    return ",".join(map(str, chosen)) if chosen else None


def _kept(bundle: Bundle) -> float:
    """Share of the multiply-adds that are left."""
    steps = bundle.manifest["steps"]
    return float(sum(step["kept_macs"] for step in steps) / max(sum(step["macs"] for step in steps), 1))


def _only_input(source: Path, model: onnx.ModelProto) -> str:
    stored = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    if len(names) != 1:
        raise UserError(f"{source}: takes {len(names)} inputs ({', '.join(names)}): fit supports one")
    return names[0]


def _digest(arrays: Mapping[str, npt.NDArray[Any]], **values: Any) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or it is broken."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Any) -> None:
    from colonnade.onnx_io import writing_aside

    with writing_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(made: Fit) -> dict[str, Any]:
    """Everything about a fit as JSON values; times in seconds, losses and drops as shares."""
    best = made.best
    return {
        "format": FORMAT,
        "goal": {"latency_s": made.goal.latency, "max_drop": made.goal.max_drop},
        "latency_is": made.latency_is,
        "labelled": made.labelled,
        "best": best.name if best else None,
        "met": best is not None,
        "points": [asdict(point) for point in made.points],
        "notes": made.notes,
    }
