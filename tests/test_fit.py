"""`colonnade fit` and `colonnade plan` on the bundled digits, and the choice of the next point."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import colonnade as cn
from colonnade import accuracy
from colonnade.bench.ours import Ours
from colonnade.bench.run import random_inputs
from colonnade.cli import run_verb
from colonnade.cli_fit import NOT_MET, parse_latency
from colonnade.demo.network import SmallResNet, digits
from colonnade.errors import UserError
from colonnade.fitting import plans
from colonnade.fitting.clock import Clock
from colonnade.fitting.goal import Goal, Point, next_budget
from colonnade.fitting.plans import Settings, falling
from colonnade.fitting.road import split
from colonnade.fitting.times import LayerTimes, Time, best_tiles, layer_times, pruned_alike
from colonnade.fitting.within import merged, within
from colonnade.pattern import ColumnPattern, discover
from colonnade.sparsify.allocate import Choice, PrunePlan
from colonnade.sparsify.onnx_file import prune_file, read_targets
from colonnade.workload.conv import matrix

QUICK = (
    "--budget",
    "4s",
    "--calibration-images",
    "96",
    "--test-images",
    "200",
    "--tiles",
    "8",
    "--sparsities",
    "0.5,0.75",
)


def simulate(goal: Goal, loss_at: object, limit: int, factor: float = 1.15, fastest: float = 0.2) -> list[Point]:
    """The points of a network that takes `factor` times the sum of its layers, and a little more the more is pruned."""
    points = [Point("dense", 1.0, factor, 0.0, {})]
    for _ in range(limit):
        wanted = next_budget(goal, points, fastest)
        if wanted is None:
            break
        assert fastest <= wanted < 1
        latency = wanted * factor * (1 + 0.1 * (1 - wanted))
        points.append(Point(f"{wanted:.3f}", wanted, latency, loss_at(wanted), {}))  # type: ignore[operator]
    return points


def test_the_search_for_a_latency() -> None:
    goal = Goal(latency=0.5)
    points = simulate(goal, lambda budget: (1 - budget) ** 2 / 10, 4)
    best = goal.best(points)
    assert best is not None and 0.95 * 0.5 <= best.latency <= 0.5
    assert len(points) == 5  # what is left of the limit fills the gaps
    assert max(a.budget / b.budget for a in points for b in points if a.budget > b.budget) <= 5


@pytest.mark.parametrize("drop", [0.002, 0.01, 0.03])
def test_the_search_for_a_drop(drop: float) -> None:
    goal = Goal(max_drop=drop)
    points = simulate(goal, lambda budget: (1 - budget) ** 3 / 10, 7)
    best = goal.best(points)
    exact = max(1 - (10 * drop) ** (1 / 3), 0.2)
    assert best is not None and exact <= best.budget <= exact * 1.12


def test_a_frontier_without_a_goal_is_even() -> None:
    points = simulate(Goal(), lambda budget: 0.0, 3)
    marks = sorted(math.log(p.budget) for p in points)
    assert np.diff(marks).max() / np.diff(marks).min() < 2.1
    assert Goal().best(points) is None


def test_what_cannot_be_reached() -> None:
    goal = Goal(latency=0.1)
    points = simulate(goal, lambda budget: 1 - budget, 3)
    assert goal.best(points) is None
    assert goal.closest(points) is min(points, key=lambda p: p.latency)
    assert min(p.budget for p in points) == pytest.approx(0.2)
    assert next_budget(Goal(latency=0.1), points[:1], 0.99) is None  # nothing can be pruned


def test_goals_and_times_that_are_none() -> None:
    for wrong in ({"latency": 0.0}, {"latency": 1.0, "max_drop": 0.1}, {"max_drop": 1.0}, {"max_drop": -0.1}):
        with pytest.raises(UserError):
            Goal(**wrong)
    assert parse_latency("40ms") == pytest.approx(0.04) and parse_latency("1.5s") == 1.5
    for text in ("40", "fast", "0ms", "-1ms"):
        with pytest.raises(UserError, match="such as 40ms"):
            parse_latency(text)
    with pytest.raises(UserError, match="'obs' or 'magnitude'"):
        Settings("best")


def test_images_are_shared_out() -> None:
    from colonnade.accuracy import Samples

    x = np.arange(100, dtype=np.float32)[:, None]
    for count, calibration, test, sizes in ((100, 40, 50, (40, 50)), (100, 90, 90, (50, 50)), (30, 256, 500, (15, 15))):
        a, b, notes = split(Samples(x[:count], np.arange(count)), calibration, test, 0)
        assert (len(a), len(b)) == sizes
        assert not set(a.inputs.ravel()) & set(b.inputs.ravel())
        assert a.labels is not None and np.array_equal(a.labels, a.inputs.ravel())
        assert notes
    with pytest.raises(UserError, match="15 images are too few"):
        split(Samples(x[:15]), 8, 8, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network that knows the digits, images with labels, and a tuning database."""
    folder = tmp_path_factory.mktemp("fit")
    (x, y), (tx, ty) = digits()
    torch.manual_seed(0)
    model = SmallResNet((16, 16, 24))
    train = DataLoader(TensorDataset(x[:600], y[:600]), 50, shuffle=True)
    cn.finetune(model, train, epochs=3, lr=0.1, progress=False)
    cn.export(model, x[:1], folder / "digits.onnx")
    np.savez(folder / "digits.npz", inputs=tx[:300].numpy(), labels=ty[:300].numpy())
    return folder / "digits.onnx", folder / "digits.npz", folder / "tuning.db"


def fit(trained: tuple[Path, Path, Path], out: Path, *words: str) -> int:
    model, images, db = trained
    given = ["fit", str(model), "--images", str(images), "-o", str(out), "--db", str(db), *QUICK, *words]
    return run_verb(given)


@pytest.mark.slow
def test_from_a_file_to_bundles_and_on(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fit(trained, out, "--max-drop", "60", "--points", "2") == 0
    said = capsys.readouterr().out
    assert "at most 60 points lost" in said and "→" in said
    found = json.loads((out / "fit.json").read_text())
    assert found["met"] and found["labelled"] and found["latency_is"] == "measured"
    points = found["points"]
    assert points[0]["name"] == "dense" and len(points) == 3
    assert all(a["budget"] > b["budget"] for a, b in itertools.pairwise(points))
    assert points[0]["record"]["top1"] > 0.7
    # Every row is a bundle that answers as its pruned file does, and the plan beside it is what was pruned.
    from colonnade.accuracy import samples

    pictures = samples(trained[1])
    for point in points[1:]:
        at = point["record"]
        bundle = cn.evaluate(at["bundle"], pictures)
        assert np.array_equal(bundle.answers, cn.evaluate(at["onnx"], pictures).answers)
        assert "preprocess" not in json.loads((Path(at["bundle"]) / "manifest.json").read_text())  # arrays, not photos
        plan = PrunePlan.read(at["plan_file"])
        assert any(pattern is not None for pattern in plan.layers.values())
        again = tmp_path / "again.onnx"
        assert run_verb(
            ["prune", str(trained[0]), "-o", str(again), "--plan", at["plan_file"], "--force", "--method", "obs",
             "--calibration", str(trained[1])]
        ) == 0  # fmt: skip
        assert at["kept"] < 1 and point["loss"] == pytest.approx(points[0]["record"]["top1"] - at["top1"])
    # A second call finds both points there, and makes no third that is not needed.
    times = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*x-*/pruned.onnx")}
    assert len(times) == 2
    assert fit(trained, out, "--latency", "1us", "--points", "1") == NOT_MET
    said = capsys.readouterr().out
    assert "not reachable; closest is" in said
    after = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*x-*/pruned.onnx")}
    assert len(after) == 3 and all(after[name] == time for name, time in times.items())
    # Another method is another fit.
    assert fit(trained, out, "--method", "magnitude") == 2
    assert "--force" in capsys.readouterr().err


def test_a_larger_tile_must_be_worth_its_loss() -> None:
    def row(**ms: float) -> dict[ColumnPattern, Time]:
        return {ColumnPattern(0.75, int(tile[1:])): Time(value, "measured") for tile, value in ms.items()}

    pruned = {
        "two": row(t2=1.0, t4=0.9, t8=0.8, t16=0.75),
        "two alone": row(t2=1.0, t4=0.99, t8=0.98, t16=0.96),
        "four": row(t2=1.0, t4=0.75, t8=0.73, t16=0.7),
        "eight": row(t2=1.0, t4=0.85, t8=0.6, t16=0.58),
        "sixteen": row(t2=1.0, t4=0.85, t8=0.65, t16=0.5),
    }
    times = LayerTimes({}, pruned, 0.0)
    wanted = {"two": (2, 16), "two alone": (2,), "four": (4, 16), "eight": (8,), "sixteen": (16,)}
    assert best_tiles(times, (2, 4, 8, 16), 0.75) == wanted
    assert best_tiles(times, (16, 8), 0.75)["eight"] == (8,)


def test_a_layer_that_keeps_less_is_not_slower() -> None:
    rows = [(0.75, 0.3), (0.25, 1.2), (0.5, 0.6), (0.875, 0.4)]
    row = [Choice(None, 1.0, 0.0, "measured"), *(Choice(ColumnPattern(s, 8), t, s, "measured") for s, t in rows)]
    found = falling(row)
    assert [choice.pattern and choice.pattern.sparsity for choice in found] == [None, 0.25, 0.5, 0.75, 0.875]
    assert [choice.seconds for choice in found] == [1.0, 1.0, 0.6, 0.3, 0.3]
    assert [choice.loss for choice in found] == [0.0, 0.25, 0.5, 0.75, 0.875]
    # An estimate gives way to what was measured, and not the other way round.
    row = [
        Choice(None, 1.0, 0.0, "measured"),
        Choice(ColumnPattern(0.25, 8), 1.2, 0.1, "estimated"),
        Choice(ColumnPattern(0.5, 8), 0.2, 0.2, "estimated"),
        Choice(ColumnPattern(0.75, 8), 0.4, 0.3, "measured"),
    ]
    assert [(c.seconds, c.source) for c in falling(row)] == [
        (1.0, "measured"), (1.0, "measured"), (0.2, "estimated"), (0.4, "measured")
    ]  # fmt: skip


def test_times_alone_follow_what_the_network_made_of_their_neighbours() -> None:
    def taps(s: float) -> ColumnPattern:
        return ColumnPattern(s, 8)

    def seconds(row: dict[ColumnPattern, Time]) -> list[tuple[float, str]]:
        return [(round(time.seconds, 9), time.source) for time in row.values()]

    alone = {0.25: 0.8, 0.5: 0.6, 0.625: 0.4, 0.75: 0.3, 0.875: 0.1}
    row = {taps(s): Time(t, "measured") for s, t in alone.items()}
    behind = ColumnPattern(0.5, 8, winograd="2x2")
    guessed = {
        taps(0.5): Time(0.1, "estimated"),
        taps(0.625): Time(0.3, "measured"),
        taps(0.875): Time(0.2, "estimated"),
    }
    lost = {taps(0.5): Time(0.7, "measured")}
    pruned = {"a": {**row, behind: Time(0.5, "measured")}, "b": guessed, "lost": lost}
    dense = {"a": Time(1.0, "measured"), "b": Time(2.0, "estimated"), "lost": Time(3.0, "measured")}
    known = LayerTimes(dense, pruned, 9.0, ["c"])
    network = {
        taps(0.5): {"A": 0.9, "B": 0.5, "pool": 7.0}, taps(0.75): {"A": 0.3}, taps(0.375): {"A": 77.0},
    }  # fmt: skip
    found = merged(known, {"a": "A", "b": "B", "lost": "L"}, {"A": 1.1, "B": 2.2, "pool": 0.25, "copy": 0.125}, network)
    assert found.dense == {"a": Time(1.1, "measured"), "b": Time(2.2, "measured"), "lost": Time(3.0, "measured")}
    assert found.rest == 0.375 and found.untimed == ["c"]
    # half: 1.5 times as long as alone, three quarters: as long; the transform, which was not seen, as the taps
    assert seconds(found.pruned["a"]) == [(s, "measured") for s in (1.2, 0.9, 0.5, 0.3, 0.1, 0.75)]
    # what was seen beside an estimate says nothing of a measured time, but corrects another estimate
    assert seconds(found.pruned["b"]) == [(0.5, "measured"), (0.3, "measured"), (1.0, "estimated")]
    assert found.pruned["lost"] == lost


@pytest.mark.slow
def test_layers_are_timed_inside_the_network(trained: tuple[Path, Path, Path]) -> None:
    model, _, db = trained
    proto = onnx.load(str(model))
    layers = read_targets(model, proto)
    some = [ColumnPattern(s, 8) for s in (0.5, 0.75, 0.875)]
    where = plans.place_of("local", 1, None, None, 1, db, "zig", 1.0, None)
    alone = layer_times(proto, layers, {layer.name: some for layer in layers}, where)
    found = within(proto, layers, alone, replace(where, budget=600.0))
    bundle = cn.build(proto, out=db.parent / "whole", db=db)
    whole = median(Ours(bundle, where.target, random_inputs(dict(bundle.manifest)), 1).block(1, 50)) / 1e9
    assert 0.5 < found.total / whole < 2 and found.rest > 0
    assert all(time.source == "measured" for row in found.pruned.values() for time in list(row.values())[:2])
    assert all(time.seconds > 0 for row in found.pruned.values() for time in row.values())
    assert sum(row[some[1]].seconds for row in found.pruned.values()) < found.total - found.rest
    assert within(proto, layers, alone, replace(where, budget=0.0)) is alone
    # out of time after the first: three quarters, and by it the others
    told: list[str] = []
    found = within(proto, layers, alone, replace(where, budget=1e-9), lambda done, text: told.append(text))
    assert told == [f"all layers {some[1]}"]
    for name, row in found.pruned.items():
        half, seen = alone.pruned[name][some[0]], alone.pruned[name][some[1]]
        if half.source == seen.source:  # a busy machine may not have measured both of them alone
            assert row[some[0]].seconds == pytest.approx(half.seconds * row[some[1]].seconds / seen.seconds)


def test_layers_are_timed_with_tiles_of_rows_from_anywhere(trained: tuple[Path, Path, Path]) -> None:
    model, _, _ = trained
    proto = onnx.load(str(model))
    layers = read_targets(model, proto)
    graph = pruned_alike(proto, layers, ColumnPattern(0.75, 8)).graph
    made = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    apart = 0
    for layer in layers:
        rows = matrix(made[layer.tensor.name])
        tiled = discover(rows, layer.groups)
        assert not tiled.is_dense and all(tile.rows.size == 8 for tile in tiled.tiles)
        assert {tile.columns.size for tile in tiled.tiles} == {math.ceil(0.25 * rows.shape[1])}
        apart += sum(int(np.ptp(tile.rows)) >= 8 for tile in tiled.tiles)
    assert apart >= len(layers)


class Paced:
    """A network of so many ns an inference, on a machine that is slowed down for its first `busy` blocks of all."""

    blocks = 0

    def __init__(self, ns: int, busy: int) -> None:
        self.ns, self.busy = ns, busy

    def block(self, warmup: int, repeat: int) -> list[int]:
        del warmup
        Paced.blocks += 1
        return [self.ns * (2 if Paced.blocks <= self.busy else 1)] * repeat


@pytest.mark.parametrize("busy", [0, 2, 5, 6, 10, 1000])
def test_a_pruned_network_is_timed_beside_the_dense_one(busy: int) -> None:
    Paced.blocks = 0
    clock = Clock(Paced(20_000_000, busy))
    clock.look("pruned", Paced(12_000_000, busy))
    clock.look("more", Paced(8_000_000, busy))
    dense = clock.seconds("dense")
    assert dense == (0.04 if busy == 1000 else 0.02)
    assert clock.seconds("pruned") == pytest.approx(0.6 * dense) and clock.seconds("more") == pytest.approx(0.4 * dense)
    points = [Point(name, 1.0, clock.seconds(name), 0.0, {}) for name in ("dense", "pruned", "more")]
    goal = Goal().beside(points[0], 2.0)
    assert [goal.met(point) for point in points] == [False, False, True]
    assert Goal(latency=0.5).beside(points[0], None) == Goal(latency=0.5)


@pytest.mark.slow
def test_a_modelled_core_is_said_to_be_modelled(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--target", "model:x60", "--speedup", "1.3", "--points", "1", "--budget", "0s")
    assert fit(trained, out, *words) in (0, NOT_MET)
    said = capsys.readouterr().out
    assert "ms, modelled on" in said and "are estimated, not measured" in said
    dense, pruned = json.loads((out / "fit.json").read_text())["points"]
    assert pruned["latency"] < dense["latency"] and pruned["record"]["kept"] < 1
    plan = Path(pruned["record"]["plan_file"]).read_text()
    assert "ms estimated" in plan and "ms measured" not in plan


@pytest.mark.slow
def test_only_the_plan(trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, images, db = trained
    plan = tmp_path / "plan.toml"
    words = ["plan", str(model), "--images", str(images), "-o", str(plan), "--db", str(db), "--budget", "0s"]
    assert run_verb([*words, "--speedup", "1.3", "--tiles", "8", "--sparsities", "0.5,0.75"]) == 0
    assert "layers pruned, layer times" in capsys.readouterr().out
    assert PrunePlan.read(plan).layers
    assert run_verb([*words, "--latency", "1us", "--force"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(errors) == 1 and "cannot be reached" in errors[0]
    assert run_verb([*words, "--force"]) == 2
    assert "either --latency" in capsys.readouterr().err
    for wrong in (("--speedup", "-1"), ("--speedup", "0.5")):
        assert run_verb([*words, *wrong, "--force"]) == 2
        assert f"speedup is {wrong[1]}: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--latency", "40"), "expected a time such as 40ms"),
        (("--latency", "1ms", "--speedup", "2"), "one of --latency, --speedup and --max-drop"),
        (("--speedup", "0.5"), "expected at least 1"),
        (("--tiles", "a,b"), "expected numbers with commas"),
        (("--sparsities", "0.5,1.5"), "sparsity is 1.5"),
        (("--target", "qemu"), "model:x60"),
    ],
)
def test_wrong_options_are_one_line(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    assert fit(trained, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert fit(trained, out, "--force") == 2
    assert "no folder of `colonnade fit`" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("verb", ["fit", "plan"])
def test_images_of_another_size_are_refused_before_anything_is_timed(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    images, out = tmp_path / "wide.npz", tmp_path / "out"
    model = onnx.load(trained[0])
    size = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    np.savez(images, inputs=np.zeros((40, *size[:-1], size[-1] + 4), np.float32))
    words = ["--speedup", "2", "--db", str(tmp_path / "none.db"), "--budget", "4s"]
    assert run_verb([verb, str(trained[0]), "--images", str(images), "-o", str(out), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"expected samples × {'×'.join(map(str, size))}" in error and f"×{size[-1] + 4}" in error
    assert not out.exists() and not (tmp_path / "none.db").exists()


def test_layers_behind_winograds_transform_are_choices_where_they_pay(
    trained: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where they may take any time, every 3x3 layer at stride 1 has them; where none, none; a plan is carried out."""
    model, images, db = trained
    proto, x = onnx.load(str(model)), accuracy.samples(images, limit=96, seed=0)
    where = plans.place_of("local", 1, None, None, 1, db, "zig", 0, None)
    inputs = {plans.input_for(model, proto, x.inputs): x.inputs}
    settings = Settings(tiles=(8,), sparsities=(0.5, 0.75), budget=0)

    def kinds(pays: dict[str, float]) -> dict[str, set[str]]:
        monkeypatch.setattr(plans, "PAYS", pays)
        monkeypatch.setattr(plans, "ESTIMATED", "nothing")  # estimates will do here
        choices, _, _ = plans.choices_of(model, proto, inputs, where, settings)
        assert all(choice.seconds > 0 and choice.loss >= 0 for row in choices.values() for choice in row)
        for row in choices.values():
            by = {choice.pattern: choice.loss for choice in row}
            for m in {p.winograd for p in by if p is not None}:
                assert 0 < by[ColumnPattern(0.5, 8, winograd=m)] < by[ColumnPattern(0.75, 8, winograd=m)]
        return {name: {c.pattern.winograd for c in row if c.pattern} for name, row in choices.items()}

    plain = kinds({"2x2": 0.0})
    assert set(map(frozenset, plain.values())) == {frozenset({""})}
    found = kinds({"2x2": math.inf, "4x1": math.inf})
    assert {frozenset(row) for row in found.values()} == {frozenset({""}), frozenset({"", "2x2", "4x1"})}
    layers = {name: ColumnPattern(0.5, 8, winograd=max(row)) for name, row in found.items()}
    prune_file(model, tmp_path / "w.onnx", None, method="obs", calibration=inputs, patterns=layers)
    assert sum(node.domain == "colonnade" for node in onnx.load(str(tmp_path / "w.onnx")).graph.node) >= 2
