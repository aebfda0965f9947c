"""From a trained ONNX file and images to the bundle that meets a budget: `colonnade fit`.

What was measured is kept: layer times in the tuning database, losses of single layers and finished points in the output
folder. So a second call, or one after Ctrl-C, does only what is left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from colonnade import accuracy
from colonnade.errors import UserError
from colonnade.fitting import answers
from colonnade.fitting.goal import Goal, Point, next_budget
from colonnade.fitting.kept import digest, read_json, write_json
from colonnade.fitting.maker import STATE, Maker
from colonnade.fitting.plans import Progress, Settings, choices_of, input_for, place_of
from colonnade.sparsify import allocate

FORMAT = 1
RECORD, LOSSES = "fit.json", "losses.json"
LEAST_CALIBRATION, LEAST_TEST = 8, 8


@dataclass
class Fit:
    """What came out. points: the dense network first, then by falling latency; best: meets the goal, None where no
    point does or nothing was asked; labelled: whether losses are of top-1 (else: answers unlike the dense network's);
    latency_is: ``measured`` or ``modelled on …``; dtype: what convolutions compute with; notes: remarks for the
    user."""

    folder: Path
    goal: Goal
    points: list[Point] = field(default_factory=list)
    labelled: bool = False
    latency_is: str = "measured"
    dtype: str = "f32"
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Point | None:
        """The point that meets the goal."""
        return self.goal.best(self.points)

    @property
    def closest(self) -> Point:
        """The point that misses the goal by least."""
        return self.goal.closest(self.points)


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
    dtype: str = "f32",
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
        latency: seconds at most; speedup: so many times as fast as the dense network (in ``dtype``); max_drop: points
            of top-1 that may be lost. One of them, or none for the frontier alone.
        out: the folder of points and bundles; ``NAME.fit`` by default. A folder of the same model and images is gone on
            with.
        points: pruned networks to make at most.
        calibration, test: images to use at most for either.
        threads, cpus, isa, dtype, batch, db, cc, preprocess, notice: as for `build`. With ``f16`` the dense network is
            in float16 too, and so are all answers.
        force: replace what another model or other images left in `out`.
        progress: hears (stage, share done, what is at hand).

    Raises:
        UserError: the model, images or an option are at fault.
        TargetError: the target cannot be reached.
    """
    import onnxruntime  # noqa: F401  # what answers and losses come from: missing, it is missed before times are

    from colonnade.onnx_io import load_written_out

    settings = settings or Settings()
    if sum(x is not None for x in (latency, speedup, max_drop)) > 1:
        raise UserError("give one of --latency, --speedup and --max-drop")
    if speedup is not None and not speedup >= 1:
        raise UserError(f"speedup is {speedup:g}: expected at least 1")
    if points < 1:
        raise UserError(f"points is {points}: expected at least 1")
    goal = Goal(latency, None if max_drop is None else max_drop / 100)
    source = Path(model)
    proto = load_written_out(source)
    where = place_of(target, threads, cpus, isa, batch, db, cc, settings.budget, notice, dtype)
    answers.check(where)
    tell = progress or (lambda *_: None)
    tell("images", 0.0, "")
    if preprocess is None and isinstance(images, str | Path) and Path(images).is_dir():
        preprocess = "imagenet"  # as photos are read; the bundles say so. Arrays are the model's inputs as they are
    pictures = accuracy.samples(images, preprocess=preprocess, limit=calibration + test, seed=settings.seed)
    input_name = input_for(source, proto, pictures.inputs)
    calibrating, testing, notes = split(pictures, calibration, test, settings.seed)
    folder = Path(out) if out is not None else Path(source.stem + ".fit")
    key = digest(
        {"model": np.frombuffer(source.read_bytes(), np.uint8), "a": calibrating.inputs, "b": testing.inputs},
        method=settings.method, seed=settings.seed, exclude=list(settings.exclude),
    )  # fmt: skip
    open_folder(folder, key, force)
    tell("images", 1.0, "")
    choices, rest, more = choices_of(
        source, proto, {input_name: calibrating.inputs}, where, settings, progress, folder / LOSSES
    )
    latency_is = where.target.modelled or "measured"
    made = Fit(folder, goal, latency_is=latency_is, dtype=where.dtype, notes=[*notes, *more])
    maker = Maker(source, folder, key, calibrating, testing, input_name, where, settings, preprocess, tell)
    dense = maker.dense(rest + sum(row[0].seconds for row in choices.values()))
    made.labelled = maker.labelled
    made.notes += maker.notes
    quickest = rest + allocate.seconds(allocate.fastest(choices))
    made.points += [dense, *maker.existing()]
    plans = {point.record["plan"] for point in made.points}
    gaps = False  # whether only the frontier's gaps are left to fill
    for number in range(1, points + 1):
        made.points = maker.level(made.points)
        while True:
            search = Goal() if gaps else goal.beside(made.points[0], speedup)
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
            gaps = True
        if wanted is None:
            break
        plans.add(plan.digest)
        made.points.append(maker.point(f"point {number}", plan))
    made.points = maker.timed_together(made.points)
    made.goal = goal.beside(made.points[0], speedup)
    made.points.sort(key=lambda p: -p.budget)
    write_json(folder / RECORD, record(made))
    return made


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
        content = read_json(state)
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
    write_json(state, {"fit": key, "format": FORMAT})


def record(made: Fit) -> dict[str, Any]:
    """Everything about a fit as JSON values; times in seconds, losses and drops as shares."""
    best = made.best
    return {
        "format": FORMAT,
        "goal": {"latency_s": made.goal.latency, "max_drop": made.goal.max_drop},
        "latency_is": made.latency_is,
        "dtype": made.dtype,
        "labelled": made.labelled,
        "best": best.name if best else None,
        "met": best is not None,
        "points": [asdict(point) for point in made.points],
        "notes": made.notes,
    }
