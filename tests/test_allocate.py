"""Which layers lose how much: the knapsack against every combination, the plan file, and losses of single layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import Builder

from colonnade.cli import run_verb
from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern
from colonnade.sparsify import allocate, trials
from colonnade.sparsify.allocate import Choice, PrunePlan
from colonnade.sparsify.onnx_file import prune_file, read_targets
from colonnade.sparsify.sensitivity import divergence, inputs_for, second_order, sensitivities


def random_choices(seed: int, layers: int, count: int) -> dict[str, list[Choice]]:
    rng = np.random.default_rng(seed)
    made = {}
    for index in range(layers):
        dense = float(rng.uniform(1e-4, 3e-3))
        row = [Choice(None, dense, 0.0)]
        for sparsity in np.linspace(0.25, 0.9, count - 1):
            pattern = ColumnPattern(round(float(sparsity), 3), 8)
            row.append(Choice(pattern, dense * float(rng.uniform(0.1, 1.1)), float(rng.exponential(0.1))))
        made[f"layer{index}"] = row
    return made


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_combinations(seed: int) -> None:
    choices = random_choices(seed, layers=5, count=4)
    dense = sum(row[0].seconds for row in choices.values())
    for share in (0.999, 0.8, 0.6, 0.5):
        limit = dense * share
        every = [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]
        possible = [row for row in every if allocate.seconds(row) <= limit]
        if not possible:
            with pytest.raises(UserError, match="cannot be reached"):
                allocate.allocate(choices, limit)
            continue
        found = allocate.allocate(choices, limit)
        assert list(found) == list(choices)
        assert allocate.seconds(found) <= limit * (1 + 1e-6)
        assert allocate.loss(found) <= min(map(allocate.loss, possible)) * (1 + 2e-4) + 1e-6


def test_the_limits() -> None:
    choices = random_choices(9, layers=8, count=5)
    dense = sum(row[0].seconds for row in choices.values())
    assert allocate.loss(allocate.allocate(choices, dense * 1.001)) == 0
    quickest = allocate.fastest(choices)
    assert allocate.allocate(choices, allocate.seconds(quickest)) == quickest
    with pytest.raises(UserError, match=r"ms cannot be reached: the quickest choices of 8 layers take"):
        allocate.allocate(choices, allocate.seconds(quickest) * 0.99)
    assert allocate.allocate({}, 1.0) == {}


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    layers = {
        'odd "name" \\ ünï': ColumnPattern(0.625, 16),
        "b.c": None,
        "/d/Conv": ColumnPattern(0.75, 4, group=4),
    }
    path = tmp_path / "plan.toml"
    PrunePlan(layers, ["a remark"], {"b.c": "2 ms measured"}).write(path)
    assert path.read_text().startswith("# a remark\n")
    assert '"b.c" = "dense"  # 2 ms measured' in path.read_text()
    assert dict(PrunePlan.read(path).layers) == layers
    with pytest.raises(UserError, match="exists already"):
        PrunePlan(layers).write(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 2\n[layers]\na = 'dense'\n", "format 2, expected format = 1"),
        ("format = 1\n", "one line for each layer"),
        ("format = 1\n[layers]\na = 0.5\n", "layer 'a' is 0.5: expected \"dense\""),
        ("format = 1\n[layers]\na = { sparsity = 1.5 }\n", "layer 'a': sparsity is 1.5"),
        ("format = 1\n[layers]\na = { sparsity = 0.5, rows = 2 }\n", "layer 'a'"),
        ("format = 1\n[layers\n", "not a plan"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"plan\.toml") as error:
        PrunePlan.read(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def network(path: Path, softmax: bool = False) -> Path:
    """Stem, two prunable convolutions of which the second hardly matters, a grouped one, and a classifier."""
    b = Builder(3)
    x = b.input("x", ["n", 3, 12, 12])
    x = b.op("Relu", b.conv(x, 3, 16, 3, pads=[1, 1, 1, 1]))
    y = b.op("Relu", b.conv(x, 16, 16, 3, pads=[1, 1, 1, 1]))
    z = b.conv(x, 16, 16, 3, pads=[1, 1, 1, 1])
    z = b.op("Mul", z, b.constant(np.float32(0.01)))
    x = b.op("Add", y, z)
    x = b.op("Relu", b.conv(x, 16, 16, 1, groups=2))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    x = b.op("Gemm", x, b.random(10, 16, name="head.weight"), b.random(10), transB=1)
    model = b.build(b.op("Softmax", x) if softmax else x)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("softmax", [False, True])
def test_losses_of_single_layers_are_those_of_files_pruned_so(tmp_path: Path, softmax: bool) -> None:
    import onnxruntime

    path = network(tmp_path / "net.onnx", softmax)
    model = onnx.load(path)
    targets = read_targets(path, model)
    assert len(targets) == 3
    x = np.random.default_rng(0).standard_normal((24, 3, 12, 12)).astype(np.float32)
    patterns = [ColumnPattern(0.5, 8), ColumnPattern(0.75, 4)]
    before = model.SerializeToString()
    found = sensitivities(model, targets, {"x": x}, {target.name: patterns for target in targets})
    assert model.SerializeToString() == before
    first, second, grouped = (target.name for target in targets)
    assert found[second][patterns[1]] < 0.05 * found[first][patterns[1]]  # its output is scaled down
    assert all(row[patterns[0]] > 0 for row in found.values())

    def answers(file: Path, *names: str) -> list[np.ndarray]:
        # With a convolution's output among those of the file, whatever runtimes fuse.
        copy = onnx.load(file)
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
        return [np.asarray(array) for array in session.run(None, {"x": x})]

    one = tmp_path / "one.onnx"
    for name in (first, grouped):
        value = next(node.output[0] for node in model.graph.node if node.name == name)
        bias_name = next(node.input[2] for node in model.graph.node if node.name == name)
        prune_file(path, one, None, patterns={name: patterns[1]}, force=True)
        dense, before_it = answers(path, value)
        plain, behind_it = answers(one, value)
        without_bias = divergence([[dense]], [[plain]], name)
        assert found[name][patterns[1]] < without_bias
        pruned = onnx.load(one)
        bias = next(tensor for tensor in pruned.graph.initializer if tensor.name == bias_name)
        moved = onnx.numpy_helper.to_array(bias) + (before_it - behind_it).mean((0, 2, 3))
        bias.CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), bias_name))
        onnx.save(pruned, one)
        exact = divergence([[dense]], [answers(one)], name)
        if name == grouped:
            assert found[name][patterns[1]] == pytest.approx(exact, rel=1e-3)
        else:  # where something is padded the mean of the inputs is not quite that of every tap
            assert 0.9 * exact < found[name][patterns[1]] < 0.7 * without_bias


@pytest.mark.parametrize("softmax", [False, True])
def test_losses_by_obs_are_about_those_of_files_pruned_so(tmp_path: Path, softmax: bool) -> None:
    import onnxruntime

    path = network(tmp_path / "net.onnx", softmax)
    model = onnx.load(path)
    targets = read_targets(path, model)
    x = np.random.default_rng(0).standard_normal((96, 3, 12, 12)).astype(np.float32)
    patterns = [ColumnPattern(sparsity, 4) for sparsity in (0.875, 0.25, 0.5, 0.75)]
    wanted = {target.name: patterns for target in targets}
    before = model.SerializeToString()
    found = second_order(model, targets, {"x": x}, wanted, 24)
    assert model.SerializeToString() == before
    assert found.keys() == wanted.keys()
    by_magnitude = sensitivities(model, targets, {"x": x[72:]}, wanted)

    def answers(file: Path) -> np.ndarray:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": x[72:]})[0])

    one = tmp_path / "one.onnx"
    for name, row in found.items():
        assert row.keys() == set(patterns)
        losses = [row[pattern] for pattern in sorted(patterns, key=lambda pattern: pattern.sparsity)]
        assert losses == sorted(losses) and losses[0] > 0
        only = {other: patterns[2] if other == name else None for other in wanted}
        prune_file(path, one, None, patterns=only, method="obs", calibration={"x": x[:72]}, force=True)
        assert row[patterns[2]] == pytest.approx(divergence([[answers(path)]], [[answers(one)]], name), rel=0.5)
        assert row[patterns[2]] < 0.5 * by_magnitude[name][patterns[2]]


def test_losses_by_obs_of_several_tiles_are_those_of_each(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", False)
    model = onnx.load(path)
    targets = read_targets(path, model)
    x = np.random.default_rng(0).standard_normal((96, 3, 12, 12)).astype(np.float32)
    small, large = ([ColumnPattern(sparsity, tile) for sparsity in (0.5, 0.75)] for tile in (2, 8))

    def losses(patterns: list[ColumnPattern]) -> dict[str, dict[ColumnPattern, float]]:
        return second_order(model, targets, {"x": x}, {target.name: patterns for target in targets}, 24)

    both, one, other = losses([*large, *small]), losses(large), losses(small)
    for name, row in both.items():
        assert row == one[name] | other[name]
    # of one small layer the answers may like either better
    assert sum(row[small[1]] for row in both.values()) < sum(row[large[1]] for row in both.values())


def test_losses_in_small_tiles_are_measured_with_some_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(5)
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 10, 10]), 3, 8, 3, pads=[1, 1, 1, 1]))
    x = b.op("Relu", b.conv(x, 8, 256, 3))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    model = b.build(b.op("Gemm", x, b.random(10, 256, name="head.weight"), b.random(10), transB=1))
    onnx.save(model, tmp_path / "net.onnx")
    (target,) = read_targets(tmp_path / "net.onnx", model)
    inputs = {"x": np.random.default_rng(0).standard_normal((64, 3, 10, 10)).astype(np.float32)}
    patterns = [ColumnPattern(sparsity, 2) for sparsity in (0.5, 0.75)]
    pruned: list[int] = []
    solve_each = trials.solve_each

    def spied(*args: object, **options: object) -> object:
        found = solve_each(*args, **options)  # type: ignore[arg-type]
        untouched = np.ones(256, bool)
        untouched[np.concatenate(found[0].rows)] = False
        np.testing.assert_array_equal(found[0].weights[untouched], np.asarray(args[0])[untouched])
        assert not found[0].bias[untouched].any() and found[0].mask[untouched].all()
        pruned.append(int((~untouched).sum()))
        return found

    monkeypatch.setattr(trials, "solve_each", spied)
    some = second_order(model, [target], inputs, {target.name: patterns}, 16)[target.name]
    monkeypatch.setattr(trials, "ENOUGH", 256)
    every = second_order(model, [target], inputs, {target.name: patterns}, 16)[target.name]
    assert pruned == [64, 256]
    for pattern in patterns:
        assert 0.3 < some[pattern] / every[pattern] < 3


def test_losses_by_obs_of_one_batch_are_those_by_magnitude(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "net.onnx", False))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    targets = read_targets("net.onnx", model)
    x = np.random.default_rng(0).standard_normal((31, 3, 12, 12)).astype(np.float32)
    wanted = {target.name: [ColumnPattern(0.5, 8)] for target in targets}
    assert second_order(model, targets, {"x": x}, wanted, 8) == sensitivities(model, targets, {"x": x}, wanted)
    assert second_order(model, targets, {"x": np.tile(x, (2, 1, 1, 1))}, wanted, 8).keys() == wanted.keys()


def test_divergence() -> None:
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    other = logits[:, ::-1].copy()
    q = p[:, ::-1]
    expected = float((p * np.log(p / q)).sum() / 2)
    assert divergence([[logits]], [[other]], "a") == pytest.approx(expected, rel=1e-5)
    assert divergence([[p]], [[q.astype(np.float32)]], "a") == pytest.approx(expected, rel=1e-5)
    assert divergence([[logits]], [[logits]], "a") == 0
    maps = np.random.default_rng(0).standard_normal((2, 4, 5, 5)).astype(np.float32)
    assert divergence([[maps]], [[maps + maps.std()]], "a") == pytest.approx(1, rel=1e-4)
    with pytest.raises(UserError, match="layer a: the model answers NaN"):
        divergence([[maps]], [[maps * np.nan]], "a")


def test_inputs_are_fewer_for_larger_networks() -> None:
    assert inputs_for(1e6, 5, 5) == 128
    assert inputs_for(4e9, 53, 5) == 16
    assert 16 < inputs_for(1.8e9, 19, 5) < 128


def test_pruning_by_plan(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    targets = read_targets(path, onnx.load(path))
    first, second, grouped = (target.name for target in targets)
    plan = tmp_path / "plan.toml"
    PrunePlan({first: ColumnPattern(0.75, 4), second: None}).write(plan)
    out = tmp_path / "out.onnx"
    assert run_verb(["prune", str(path), "-o", str(out), "--plan", str(plan)]) == 0
    weights = {t.name: onnx.numpy_helper.to_array(t.tensor) for t in read_targets(out, onnx.load(out))}
    assert (weights[first] == 0).mean() == 0.75
    assert (weights[second] != 0).all() and (weights[grouped] != 0).all()
    assert run_verb(["prune", str(path), "-o", str(out), "--plan", str(plan), "--sparsity", "0.5", "--force"]) == 2
    stem = next(node.name for node in onnx.load(path).graph.node if node.op_type == "Conv")
    for name, message in ((stem, r"stays dense \(stem\)"), ("nobody", "there is no layer 'nobody'")):
        with pytest.raises(UserError, match=message):
            prune_file(path, tmp_path / "no.onnx", None, patterns={name: ColumnPattern(0.5, 8)})
    assert not (tmp_path / "no.onnx").exists()
