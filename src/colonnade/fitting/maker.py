"""The points of a frontier: plan → pruned file → bundle → answers and latency; what is there is taken as it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade import accuracy
from colonnade.fitting.answers import answer, emulated
from colonnade.fitting.clock import Clock
from colonnade.fitting.goal import Point
from colonnade.fitting.kept import digest, read_json, write_json
from colonnade.fitting.plans import Progress, Settings, plan_head
from colonnade.fitting.times import Place
from colonnade.sparsify import allocate
from colonnade.sparsify.allocate import Choice, PrunePlan

if TYPE_CHECKING:
    from colonnade.bundle import Bundle

STATE = "point.json"
BLOCKS = 3  # of each network, when they are timed in turns


@dataclass(frozen=True)
class Planned:
    """A plan before anything is made of it. digest: equal for equal patterns; name: of its folder; seconds, loss: sums
    over layers (and over all other steps)."""

    plan: PrunePlan
    digest: str
    name: str
    seconds: float
    loss: float


class Maker:
    """Makes points: plan → pruned file → bundle → answers and latency; what is there already is taken as it is."""

    def __init__(
        self, source: Path, folder: Path, key: str, calibrating: accuracy.Samples, testing: accuracy.Samples,
        input_name: str, where: Place, settings: Settings, preprocess: str | Mapping[str, Any] | None, tell: Progress,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.key, self.tell = source, folder, key, tell
        self.calibrating, self.testing, self.input_name = calibrating, testing, input_name
        self.where, self.settings, self.preprocess = where, settings, preprocess
        self.local = where.target.name == "local"
        # a folder may hold points of both: pruned files may be alike, but not what they are planned by and turn into
        self.ending = "" if where.dtype == "f32" else f"-{where.dtype}"
        self.labelled = testing.labels is not None
        self.notes: list[str] = []
        self.reference: accuracy.Accuracy | None = None
        self.bundles: dict[str, Bundle] = {}
        self.clock: Clock | None = None  # begins with the dense network; none where times are modelled

    def dense(self, budget: float) -> Point:
        """The network as it is."""
        at = self.folder / f"dense{self.ending}"
        bundle = self._build(self.source, at, "dense")
        answers = self._answers(at, {**read_json(at / STATE), "dtype": self.where.dtype}, bundle, self.source, "dense")
        self._check_labels(answers)
        self.reference = answers
        latency = self._latency("dense", bundle)
        record = {
            "plan": "dense", "bundle": str(bundle.path), "kept": 1.0, "predicted_s": budget,
            **self._judged(answers, answers),
        }  # fmt: skip
        if self.where.dtype != "f32":
            record["beside_f32"] = self._beside_float32(at, answers)
        return Point("dense", budget, latency, 0.0, record)

    def plan(self, choices: allocate.Choices, chosen: Mapping[str, Choice], rest: float) -> Planned:
        """What was chosen, as a plan with its name."""
        total = rest + allocate.seconds(chosen)
        dense = rest + sum(row[0].seconds for row in choices.values())
        plan = PrunePlan.of(
            choices, chosen, plan_head(self.source, choices, chosen, rest, self.where, self.settings.method)
        )
        name = digest({}, layers={name: str(pattern) for name, pattern in plan.layers.items()})
        return Planned(plan, name, f"{dense / total:.2f}x-{name[:4]}{self.ending}", total, allocate.loss(chosen))

    def existing(self) -> list[Point]:
        """The points of this dtype that an earlier call left in the folder."""
        found = []
        for state in sorted(self.folder.glob(f"*x-*/{STATE}")):
            content = read_json(state)
            mine = content.get("dtype", "f32") == self.where.dtype  # there was only one at first
            if content and mine and (state.parent / "pruned.onnx").is_file():
                found.append(self._finish(state.parent, content, state.parent.name))
        return found

    def point(self, stage: str, planned: Planned) -> Point:
        """One pruned network by its plan."""
        began = time.monotonic()
        at = self.folder / planned.name
        shutil.rmtree(at, ignore_errors=True)  # what a call that was stopped left
        at.mkdir()
        planned.plan.write(at / "plan.toml")
        self._prune(planned.plan, at / "pruned.onnx", stage)
        content = {"plan": planned.digest, "dtype": self.where.dtype, "budget": planned.seconds,
                   "predicted_loss": planned.loss, "seconds": time.monotonic() - began}  # fmt: skip
        write_json(at / STATE, content)
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
        from colonnade.bench.ours import Ours
        from colonnade.bench.protocol import Contender, alternate
        from colonnade.targets.peak import measure_peak

        if self.where.target.modelled:
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
            ),
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
        from colonnade.bundle import Bundle

        path = at / "bundle"
        if (at / STATE).is_file() and path.is_dir() and stage not in self.bundles:
            known = Bundle.load(path)
            wanted = {
                "target": self.where.target.name, "isa": self.where.isa.name, "dtype": self.where.dtype,
                "threads": self.where.threads, "compiler": self.where.toolchain.version,
            }  # fmt: skip
            same = self.where.batch in (None, known.manifest["inputs"][0]["shape"][0])
            if same and all(known.manifest.get(word) == value for word, value in wanted.items()):
                self.bundles[stage] = known
        if stage not in self.bundles:
            self.tell(stage, 0.8, "building")
            self.bundles[stage] = self.where.build(
                onnx_file, path, tune=self.settings.budget > 0, budget=self.settings.budget / 3, force=True,
                preprocess=self.preprocess, progress=lambda done, text: self.tell(stage, 0.8 + 0.1 * done, text),
            )  # fmt: skip
        return self.bundles[stage]

    def _bundle(self, point: Point) -> Bundle:
        return next(b for b in self.bundles.values() if str(b.path) == point.record["bundle"])

    def _answers(
        self, at: Path, content: dict[str, Any], bundle: Bundle, onnx_file: Path, stage: str
    ) -> accuracy.Accuracy:
        """As `answer` gets them; written down in the folder."""
        labels = self.testing.labels
        if "answers" in content:
            return accuracy.Accuracy(np.array(content["answers"], np.int64), labels)
        found = answer(
            bundle, onnx_file, self.where, self.testing,
            lambda done, count: self.tell(stage, 0.9 + 0.1 * done / count, "answering"),
        )  # fmt: skip
        write_json(at / STATE, {**content, "answers": found.answers.tolist()})
        return found

    def _beside_float32(self, at: Path, dense: accuracy.Accuracy) -> dict[str, Any]:
        """What float16 alone changes, judged and remarked on; float32's answers are written down in the folder."""
        content = read_json(at / STATE)
        if "answers_f32" not in content:
            single = accuracy.evaluate(self.source, self.testing, threads=self.where.threads)
            content["answers_f32"] = single.answers.tolist()
            write_json(at / STATE, content)
        base = accuracy.Accuracy(np.array(content["answers_f32"], np.int64), self.testing.labels)
        judged = self._judged(base, dense)
        text = f"dense, float16 answers as float32 does on {100 * judged['agreement']:.1f} % of the images"
        if self.labelled:
            text += f" (top-1 {100 * dense.top1:.1f} % and {100 * base.top1:.1f} %)"
        self.notes.append(text)
        if emulated(self.where):
            self.notes.append("answers in float16 are emulated on this machine; the target may add up in another order")
        return judged

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
        """Seconds of an inference by a short look (see Clock); of a modelled target, its own."""
        from colonnade.bench.ours import Ours

        self.tell(stage, 0.99, "timing")
        runner = Ours(bundle, self.where.target, self._feeds(), self.where.threads)
        if self.where.target.modelled:
            return runner.block(0, 1)[0] / 1e9
        if self.clock is None:
            self.clock = Clock(runner)
        else:
            self.clock.look(str(bundle.path), runner)
        return self.clock.seconds(str(bundle.path))

    def level(self, points: Sequence[Point]) -> list[Point]:
        """The points with latencies of one pace, the quietest that the machine had while any of them was looked at."""
        if self.clock is None:
            return list(points)
        return [replace(point, latency=self.clock.seconds(point.record["bundle"])) for point in points]


def _kept(bundle: Bundle) -> float:
    """Share of the multiply-adds that are left."""
    steps = bundle.manifest["steps"]
    return float(sum(step["kept_macs"] for step in steps) / max(sum(step["macs"] for step in steps), 1))
