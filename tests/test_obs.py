"""Second-order pruning: the solver against plain linear algebra; ONNX files and torch modules on real digits."""

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn

from colonnade.errors import UserError
from colonnade.pattern import ColumnPattern, consecutive_rows, discover
from colonnade.sparsify.arrays import HostArrays, NotPositive, NumpyArrays, TorchArrays, host_arrays
from colonnade.sparsify.calibrate_onnx import OnnxChain
from colonnade.sparsify.held import Store
from colonnade.sparsify.joint import distance, held_out, view
from colonnade.sparsify.masks import masks, remove_masks, sparsify_
from colonnade.sparsify.moments import Damping, Moments
from colonnade.sparsify.onnx_file import prune_file, read_targets
from colonnade.sparsify.reconstruct import Schedule, reconstruct_
from colonnade.sparsify.samples import Layer, Rectifier, Samples, gather
from colonnade.sparsify.second_order import DAMPINGS, MOST_GAIN, choose_damping, solve, solve_each, unexplained
from colonnade.sparsify.select import as_matrix, from_matrix, select_by_score
from colonnade.sparsify.sequential import Options, prune_layer, room
from colonnade.sparsify.torch_graph import ordered, trace
from colonnade.sparsify.torch_model import export
from colonnade.sparsify.torch_obs import TorchChain, second_order_

NUMPY = NumpyArrays()


def regression(rows, columns, count=400, seed=0):
    """Correlated inputs [n, K], weights [OC, K]."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((columns, columns)) / np.sqrt(columns) + 0.5 * np.eye(columns)
    x = (random.standard_normal((count, columns)) @ mix + random.standard_normal(columns)).astype(np.float32)
    return x, random.standard_normal((rows, columns)).astype(np.float32)


def moments(x, y, arrays=NUMPY):
    sums = Moments.empty(arrays, y.shape[1], x.shape[1])
    for part in np.array_split(np.arange(len(x)), 3):
        sums.add(arrays.load(x[part]), arrays.load(y[part].astype(np.float32)), arrays)
    return sums


def residual(x, y, weights, bias):
    return float(((y - x @ weights.T - bias) ** 2).sum())


@given(
    rows=st.integers(1, 19), columns=st.integers(2, 40), tile=st.integers(1, 8),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.8]), group=st.sampled_from([None, 4, 7]),
    rounds=st.integers(1, 9), similar=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pattern_holds_and_what_is_kept_is_the_least_squares_fit(rows, columns, tile, sparsity, group, rounds, similar):
    x, w = regression(rows, columns)
    y = x @ w.T
    pattern = ColumnPattern(sparsity, tile, group)
    found = solve(w, moments(x, y), pattern, NUMPY, similar_rows=similar, damping=1e-6, rounds=rounds)
    assert sorted(np.concatenate(found.rows).tolist()) == list(range(rows))
    for members in found.rows:
        assert (found.mask[members] == found.mask[members[0]]).all()
        kept = found.mask[members[0]]
        assert kept.sum() == pattern.kept(columns)
        for first, stop, count in pattern.spans(columns):
            assert kept[first:stop].sum() == count
        design = np.column_stack([x[:, kept], np.ones(len(x))]).astype(np.float64)
        best = np.linalg.lstsq(design, y[:, members].astype(np.float64), rcond=None)[0]
        least = ((y[:, members] - design @ best) ** 2).sum()
        error = residual(x, y[:, members], found.weights[members], found.bias[members])
        assert error < 1.001 * least + 1e-4 * len(x)
    assert (found.weights[~found.mask] == 0).all()


@given(
    rows=st.integers(1, 19), columns=st.integers(4, 40), group=st.sampled_from([None, 4, 7]), rounds=st.integers(1, 5)
)
@settings(max_examples=30, deadline=None)
def test_of_several_patterns_at_once_each_is_the_least_squares_fit(rows, columns, group, rounds):
    x, w = regression(rows, columns)
    y = x @ w.T
    sums = moments(x, y)
    patterns = [ColumnPattern(sparsity, 8, group) for sparsity in (0.25, 0.5, 0.8)]
    found = solve_each(w, sums, patterns, NUMPY, grouped_for=patterns[1], damping=1e-6, rounds=rounds)
    for pattern, solution, next_ in zip(patterns, found, [*found[1:], found[-1]], strict=True):
        assert (solution.mask.sum(1) == pattern.kept(columns)).all()
        assert [members.tolist() for members in solution.rows] == [members.tolist() for members in next_.rows]
        for members in solution.rows:
            kept = solution.mask[members[0]]
            design = np.column_stack([x[:, kept], np.ones(len(x))]).astype(np.float64)
            best = np.linalg.lstsq(design, y[:, members].astype(np.float64), rcond=None)[0]
            least = ((y[:, members] - design @ best) ** 2).sum()
            error = residual(x, y[:, members], solution.weights[members], solution.bias[members])
            assert error < 1.001 * least + 1e-4 * len(x)
    alone = solve(w, sums, patterns[0], NUMPY, tiles=found[0].rows, damping=1e-6, rounds=rounds)
    assert (alone.mask == found[0].mask).all() and np.array_equal(alone.weights, found[0].weights)


def test_better_than_magnitude_and_grouping_helps():
    random = np.random.default_rng(1)
    x, _ = regression(32, 48, 2000)
    # Two kinds of rows, mixed: each needs its own half of the columns.
    kind = random.permutation(np.arange(32) % 2)
    w = random.standard_normal((32, 48)).astype(np.float32)
    w[:, :24] *= np.where(kind == 0, 1, 0.2)[:, None]
    w[:, 24:] *= np.where(kind == 1, 1, 0.2)[:, None]
    y = x @ w.T
    pattern = ColumnPattern(0.5, 8)
    errors = []
    for similar in (False, True):
        found = solve(w, moments(x, y), pattern, NUMPY, similar_rows=similar)
        errors.append(residual(x, y, found.weights, found.bias))
    plain = np.where(select_by_score(np.abs(w), pattern).mask, w, 0)
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < 0.5 * residual(x, y, plain, (y - x @ plain.T).mean(0))


def test_numpy_and_torch_solve_alike():
    x, w = regression(16, 40)
    y = x @ w.T
    every = (NUMPY, HostArrays(), TorchArrays(torch.device("cpu")))
    first, *others = [solve(w, moments(x, y, arrays), ColumnPattern(0.5, 4), arrays) for arrays in every]
    for found in others:
        assert (first.mask == found.mask).all()
        np.testing.assert_allclose(first.weights, found.weights, atol=1e-4)


def test_host_arrays_solve_as_numpy_does():
    """Both ways of solving a triangle, and what has no factor."""
    random = np.random.default_rng(0)
    half = random.standard_normal((6, 6)).astype(np.float32)
    matrix = half @ half.T + np.eye(6, dtype=np.float32)
    host = HostArrays()
    lower = host.factor(matrix)
    np.testing.assert_allclose(lower, NUMPY.factor(matrix), atol=1e-5)
    for many in (5, 60):
        right = random.standard_normal((6, many)).astype(np.float32)
        np.testing.assert_allclose(host.forward(lower, right), NUMPY.forward(lower, right), atol=1e-4)
        np.testing.assert_allclose(host.inner(matrix, right), matrix.T @ right, atol=1e-4)
    with pytest.raises(NotPositive):
        host.factor(-matrix)


def test_unexplained_is_the_relative_error_on_these_samples():
    x, w = regression(6, 9)
    y = x @ w.T
    random = np.random.default_rng(2)
    tried, bias = w + 0.1 * random.standard_normal(w.shape).astype(np.float32), np.float32(0.2) * w[:, 0]
    expected = residual(x, y, tried, bias) / ((y - y.mean(0)) ** 2).sum()
    assert unexplained(tried, bias, moments(x, y), NUMPY) == pytest.approx(expected, rel=1e-2)


def test_damping_follows_how_many_samples_there_are():
    """Few noisy samples want more of it than many; the choice fits fresh samples better than no damping would."""
    random = np.random.default_rng(0)
    chosen = []
    for count in (150, 6000):
        x, w = regression(16, 120, 2 * count, seed=1)
        y = x @ w.T + 8 * random.standard_normal((2 * count, 16)).astype(np.float32)
        known, fresh = moments(x[:count], y[:count]), moments(x[count:], y[count:])
        pattern = ColumnPattern(0.25, 4)
        damping = choose_damping(w, known, fresh, pattern, NUMPY).plain
        chosen.append(damping)
        errors = []
        for value in (damping, min(DAMPINGS)):
            found = solve(w, known, pattern, NUMPY, damping=value)
            errors.append(unexplained(found.weights, found.bias, fresh, NUMPY))
        assert errors[0] <= 1.001 * errors[1]
        whole = known.plus(fresh)
        assert whole.count == 2 * count
        np.testing.assert_allclose(whole.gram, moments(x, y).gram, rtol=1e-3)
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize(
    "arrays", [NUMPY, HostArrays(), TorchArrays(torch.device("cpu"))], ids=["numpy", "host", "torch"]
)
def test_damping_by_positions_alike_is_a_kronecker_product(arrays):
    """Dense fit with both parts of the damping, against the formula."""
    taps, channels = 4, 3
    x, w = regression(5, taps * channels, 60)
    random = np.random.default_rng(3)
    y = x @ w.T + random.standard_normal((60, 5)).astype(np.float32)
    found = solve(
        w, moments(x, y, arrays), ColumnPattern(0.0, 5), arrays, damping=Damping(0.05, 0.7), taps=taps, rounds=1
    )  # fmt: skip
    dx, dy = (part - part.mean(0) for part in (x.astype(np.float64), y.astype(np.float64)))
    a, c = dx.T @ dx / 60, dy.T @ dx / 60
    blocks = a.reshape(taps, channels, taps, channels)
    over_taps = sum(blocks[t, :, t] for t in range(taps))
    over_channels = sum(blocks[:, i, :, i] for i in range(channels))
    scale = np.trace(a) / len(a)
    alike = np.kron(over_channels / channels / scale, over_taps / taps / scale)
    assert np.trace(alike) == pytest.approx(len(a))
    damping = scale * (0.05 * np.eye(len(a)) + 0.7 * alike)
    np.testing.assert_allclose(found.weights, (c + w @ damping) @ np.linalg.inv(a + damping), rtol=1e-3, atol=1e-4)


def test_positions_that_are_alike_are_used_where_samples_are_few():
    """Inputs whose channels vary together in one way at all kernel positions: the damping that says so fits unseen
    samples better than any plain one. Where positions are not told apart from channels there is none."""
    random = np.random.default_rng(0)
    taps, channels, count = 9, 10, 130
    near = np.linalg.cholesky(0.8 ** np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    mix = random.standard_normal((channels, channels))
    x = near @ random.standard_normal((5000, taps, channels)) @ mix
    x = x.reshape(5000, -1).astype(np.float32)
    w = random.standard_normal((16, taps * channels)).astype(np.float32)
    y = x @ w.T
    y += random.standard_normal(y.shape).astype(np.float32) * y.std()
    known, fresh, many = (moments(x[part], y[part]) for part in np.split(np.arange(5000), [count, 2 * count]))
    pattern = ColumnPattern(0.5, 4)
    errors = []
    for told in (taps, 1):
        damping = choose_damping(w, known, fresh, pattern, NUMPY, taps=told)
        assert (damping.alike > 0) == (told > 1)
        found = solve(w, known, pattern, NUMPY, damping=damping, taps=told)
        errors.append(unexplained(found.weights, found.bias, many, NUMPY))
    assert errors[0] < 0.97 * errors[1]


def test_values_past_the_limit_wait_in_files_and_change_nothing(digits, monkeypatch):
    dense, calibration, x, _ = digits
    stores = []
    whole = Store.__init__

    def noted(self, *args):
        whole(self, *args)
        stores.append(self)

    most = []
    put = Store.put

    def watched(self, value):
        held = put(self, value)
        most.append(self.used)
        return held

    monkeypatch.setattr(Store, "__init__", noted)
    monkeypatch.setattr(Store, "put", watched)
    answers, limit = [], 600_000
    for memory in (1 << 30, limit):
        model = copy.deepcopy(dense)
        most.clear()
        second_order_(model, {"conv1": ColumnPattern(0.5, 8), "conv2": ColumnPattern(0.5, 8)}, calibration,
                      Options(memory=memory))  # fmt: skip
        answers.append(model(x).detach())
    assert stores[0].spilled == 0 and stores[1].spilled > 10
    assert max(most) <= limit
    assert torch.equal(*answers)
    for store in stores:
        assert store._folder is None or not Path(store._folder.name).exists()


def test_matrices_of_large_layers_leave_less_for_values():
    def layer(channels):
        return Layer("a", np.zeros((8, channels, 4, 4), np.float32), "x")

    assert room(1 << 30, []) == room(1 << 30, [layer(16), layer(288)]) == 1 << 30
    assert room(1 << 30, [layer(320), layer(16)]) == (1 << 30) - 20 * (5120**2 - 4608**2)
    assert room(1 << 30, [layer(512)]) == 1 << 28


def test_store_gives_back_what_it_was_given():
    store = Store(NUMPY, 1000, 1)
    values = [np.arange(100, dtype=np.float32) + at for at in range(4)]
    held = [store.put(value) for value in values]
    assert store.used == 800 and store.put(7) == 7 and store.get(7) == 7
    assert all((store.get(one) == value).all() for one, value in zip(held, values, strict=True))
    del held
    assert store.used == 0
    store.close()


def test_dead_constant_and_doubled_inputs():
    x, w = regression(8, 20)
    x[:, 3] = 0
    x[:, 5] = 2.5
    x[:, 7] = x[:, 6]
    y = x @ w.T
    found = solve(w, moments(x, y), ColumnPattern(0.5, 8), NUMPY)
    assert np.isfinite(found.weights).all() and np.isfinite(found.bias).all()
    assert not found.mask[0, 3] and not found.mask[0, 5] and found.mask[0, [6, 7]].sum() <= 1
    nothing = solve(w, moments(0 * x, 0 * y), ColumnPattern(0.5, 8), NUMPY)
    assert np.isfinite(nothing.weights).all()


def test_single_precision_stays_close_to_double(monkeypatch):
    x, w = regression(16, 120, 300)
    y = x @ w.T
    exact = solve(w, moments(x, y), ColumnPattern(0.75, 8), NUMPY)
    monkeypatch.setattr("colonnade.sparsify.second_order.DOUBLE_COLUMNS", 0)
    single = solve(w, moments(x, y), ColumnPattern(0.75, 8), NUMPY)
    a, b = (residual(x, y, found.weights, found.bias) for found in (exact, single))
    assert b == pytest.approx(a, rel=0.02)


@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 5), (2, 3)]), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4), groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(9, 12), st.integers(9, 12)),  # the widest kernel reaches over 9
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_gathered_moments_are_those_of_the_convolution(kernel, stride, dilation, pads, groups, size):
    random = np.random.default_rng(3)
    weight = random.standard_normal((6, 4, *kernel)).astype(np.float32)
    x = random.standard_normal((5, 4 * groups, *size)).astype(np.float32)
    top, left, bottom, right = pads
    layer = Layer("l", weight, "x", (stride, stride), pads, (dilation, dilation), groups)
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, torch.from_numpy(weight), stride=stride, dilation=dilation, groups=groups)
    store = Store(NUMPY, 0, 2)
    values = [{"x": store.put(x[:2])}, {"x": store.put(x[2:])}]
    found = gather(Samples.of(store, layer, values, values, 10**6, 0))
    assert sum(m.count for m in found) == groups * y.shape[0] * y.shape[2] * y.shape[3]
    outputs = np.concatenate([m.outputs for m in found])
    np.testing.assert_allclose(outputs, y.sum((0, 2, 3)).numpy(), rtol=1e-3, atol=1e-2)
    # Outputs follow from inputs: y = W x for every sample, so Σ y xᵀ = W Σ x xᵀ.
    matrix = as_matrix(weight).reshape(groups, -1, found[0].gram.shape[0])
    for sums, part in zip(found, matrix, strict=True):
        np.testing.assert_allclose(part @ sums.gram, sums.cross, rtol=1e-3, atol=1e-1)
        np.testing.assert_allclose((part @ sums.gram * part).sum(1), sums.squares, rtol=1e-3, atol=1e-1)


def rectified_layer(most, seed=0):
    """A strided grouped convolution before a rectifier, and what both models have as its input and residual."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((16, 6, 3, 3)).astype(np.float32) / 7
    scale, offset = (random.uniform(0.5, 2, 16).astype(np.float32), random.standard_normal(16).astype(np.float32) - 0.5)
    layer = Layer("l", weight, "x", (2, 2), (1, 1, 1, 1), groups=2, scale=scale, residual="r",
                  rectifier=Rectifier(offset, most))  # fmt: skip
    x = random.standard_normal((8, 12, 9, 9)).astype(np.float32)
    r = random.standard_normal((8, 16, 5, 5)).astype(np.float32)
    noise = [0.1 * random.standard_normal(value.shape).astype(np.float32) for value in (x, r)]
    return layer, (x, r), (x + noise[0], r + noise[1])


def total(layer, weight, bias, values):
    """Outputs before the rectifier."""
    y = torch.nn.functional.conv2d(
        torch.from_numpy(values[0]), torch.from_numpy(weight), torch.from_numpy(bias), 2, 1, groups=2
    ).numpy()
    return y * layer.scale[:, None, None] + layer.rectifier.offset[:, None, None] + values[1]


@pytest.mark.parametrize("most", [np.inf, 1.5])
def test_refits_bring_what_passes_the_rectifier_nearer(most):
    layer, dense, pruned = rectified_layer(most)
    store = Store(NUMPY, 0, 2)
    held = [
        [{"x": store.put(x[at : at + 4]), "r": store.put(r[at : at + 4])} for at in (0, 4)] for x, r in (dense, pruned)
    ]
    samples = Samples.of(store, layer, *held, 10**6, 0)
    wanted = np.clip(total(layer, layer.weight, np.zeros(16, np.float32), dense), 0, most)
    errors = []
    for refits in (0, 1, 3):
        weight, bias, result = prune_layer(
            samples, ColumnPattern(0.5, 4), Options(damping=1e-4, refits=refits, spread=0.0)
        )
        assert (weight[~result.mask] == 0).all()
        given = np.clip(total(layer, weight, bias, pruned), 0, most)
        errors.append(((given - wanted) ** 2).mean())
    assert errors[1] < 0.97 * errors[0] and errors[2] < 0.99 * errors[1]


def test_spread_is_given_back_and_the_mean_stays():
    x, w = regression(16, 40)
    y = x @ w.T + 3
    found = solve(w, moments(x, y), ColumnPattern(0.75, 8), NUMPY)
    assert ((x @ found.weights.T).std(0) < y.std(0)).all()
    for share in (0.0, 0.5, 1.0):
        grown = found.spread(share)
        given = x @ grown.weights.T + grown.bias
        missing = y.std(0) / (x @ found.weights.T).std(0)
        np.testing.assert_allclose(given.std(0), y.std(0) / np.minimum(missing, MOST_GAIN) ** (1 - share)
                                   * np.minimum(MOST_GAIN / missing, 1), rtol=1e-3)  # fmt: skip
        np.testing.assert_allclose(given.mean(0), y.mean(0), atol=1e-3)


class Activated(nn.Module):
    """Rectifiers of all kinds, and activations that are none."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)])
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.six, self.relu = nn.ReLU6(), nn.ReLU()

    def forward(self, x):
        x = self.six(self.convs[0](torch.tanh(self.stem(x))))
        x = self.relu(self.convs[1](x) + x)
        x = torch.sigmoid(self.convs[2](x))
        y = self.convs[3](x)
        return self.head(self.convs[4](torch.relu(y)) + y)


def test_rectifiers_are_found(tmp_path):
    torch.manual_seed(0)
    model = Activated().eval()
    chain = TorchChain(model, [*(f"convs.{at}" for at in range(5)), "head"], [(torch.randn(2, 3, 6, 6),)])
    found = {layer.name: layer.rectifier for layer in chain.layers}
    assert [found[f"convs.{at}"] and found[f"convs.{at}"].most for at in range(5)] == [6, np.inf, None, None, None]
    np.testing.assert_array_equal(found["convs.0"].offset, model.convs[0].bias.detach().numpy())
    export(model, torch.randn(2, 3, 6, 6), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    onnx_chain = OnnxChain(graph, read_targets("model.onnx", graph), {"input": np.zeros((2, 3, 6, 6), np.float32)})
    both = [(layer.weight, layer.rectifier) for layer in onnx_chain.layers]
    assert len(both) == 6
    for weight, rectifier in both:
        name = next(n for n in found if np.array_equal(model.get_submodule(n).weight.detach().numpy(), weight))
        assert (rectifier is None) == (found[name] is None), name
        if rectifier is not None:
            assert rectifier.most == found[name].most
            np.testing.assert_allclose(rectifier.offset, found[name].offset, atol=1e-6)


class Digits(nn.Module):
    """A small residual network: BatchNorm, a strided shortcut, a grouped convolution, a hidden linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, 1, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.short = nn.Conv2d(16, 32, 1, 2)
        self.hidden = nn.Linear(512, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        x = nn.functional.relu(y, inplace=True)
        return self.head(torch.relu(self.hidden(x.view(x.size(0), -1))))


@pytest.fixture(scope="module")
def digits():
    """A trained network, calibration images without labels, and labelled test images."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32))[:, None] / 16
    y = torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for index in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval(), x[:300], x[1000:], y[1000:]


def right(model, x, y):
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def test_torch_model_keeps_its_accuracy(digits):
    dense, calibration, x, y = digits
    scores = {}
    for method, inputs in (("magnitude", None), ("obs", calibration)):
        model = copy.deepcopy(dense)
        layers = sparsify_(model, ColumnPattern(0.75, 8), x[:1], method=method, calibration=inputs)
        pruned = {layer.name for layer in layers if layer.pattern}
        assert pruned == {"conv1", "conv2", "short", "hidden"}
        for name, mask in masks(model):
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            assert (weight[~mask.mask] == 0).all() and float(mask.mask.float().mean()) == 0.25
        scores[method] = right(model, x, y)
    assert right(dense, x, y) > 0.95
    assert scores["obs"] > right(dense, x, y) - 0.06
    assert scores["obs"] > scores["magnitude"] + 0.1


def test_obs_again_on_a_pruned_model_and_after_a_failure(digits):
    dense, calibration, x, y = digits
    model = copy.deepcopy(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="NaN"):
        sparsify_(model, ColumnPattern(0.5, 8), x[:1], method="obs", calibration=calibration * float("nan"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    sparsify_(model, ColumnPattern(0.5, 8), x[:1], method="obs", calibration=[(calibration, None)])
    sparsify_(model, ColumnPattern(0.75, 8), x[:1], method="obs", calibration=calibration)
    assert all(float(mask.mask.float().mean()) == 0.25 for _, mask in masks(model))
    assert right(model, x, y) > right(dense, x, y) - 0.08


def test_shortcut_runs_before_the_branch_that_makes_up_for_it(digits):
    names = [node.name for node in ordered(trace(digits[0]))]
    assert names.index("short") < names.index("conv2")


@pytest.mark.parametrize("installed", [True, False])
def test_onnx_alone_gives_what_torch_gives(digits, tmp_path, monkeypatch, installed):
    """Whether the products are torch's or, where it is not installed, numpy's."""
    dense, calibration, x, y = digits
    export(dense, x[:1], tmp_path / "dense.onnx")
    if not installed:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)
            assert type(host_arrays()) is NumpyArrays
    assert type(host_arrays()) is HostArrays
    monkeypatch.setattr("colonnade.sparsify.calibrate_onnx.host_arrays", HostArrays if installed else NumpyArrays)
    report = prune_file(
        tmp_path / "dense.onnx", tmp_path / "pruned.onnx", ColumnPattern(0.75, 8), method="obs",
        calibration={"input": calibration.numpy()},
    )  # fmt: skip
    assert len(report.pruned) == 4
    assert all(layer.kept == -(-layer.columns // 4) for layer in report.pruned)
    session = onnxruntime.InferenceSession(tmp_path / "pruned.onnx")
    answers = np.concatenate([session.run(None, {"input": part[None].numpy()})[0] for part in x]).argmax(1)
    model = copy.deepcopy(dense)
    sparsify_(model, ColumnPattern(0.75, 8), x[:1], method="obs", calibration=calibration)
    assert (answers == y.numpy()).mean() > right(dense, x, y) - 0.06
    assert (answers == remove_masks(model)(x).argmax(1).numpy()).mean() > 0.97
    for tensor in onnx.load(tmp_path / "pruned.onnx").graph.initializer:
        if len(tensor.dims) == 4 and tensor.dims[1] > 1:
            groups = 2 if tensor.dims[1] == 16 and "conv2" in tensor.name else 1
            tiles = discover(as_matrix(numpy_helper.to_array(tensor)), groups).tiles
            assert all(len(tile.columns) == -(-int(np.prod(tensor.dims[1:])) // 4) for tile in tiles)


def build_odd():
    """A bias shared by two layers, a residual that is spread, weights used twice, a product, a Gemm with a factor."""
    b = Builder()
    x = b.input("x", [4, 3, 9, 8])
    stem = b.op("Relu", b.conv(x, 3, 16, 3, pads=[1, 1, 1, 1]))
    shared = b.random(16, name="shared")
    one = b.op("Conv", stem, b.random(16, 16, 3, 2, scale=0.1, name="w1"), shared, name="one", pads=[2, 0, 0, 1])
    two = b.op("Conv", b.op("Relu", one), b.random(16, 16, 1, 1, scale=0.2, name="w2"), shared, name="two")
    spread = b.op(
        "Add",
        b.op("GlobalAveragePool", stem),
        b.op("Conv", two, b.random(16, 16, 1, 1, scale=0.2, name="w3"), name="three"),
    )
    tied = b.random(16, 16, 1, 1, scale=0.2, name="w4")
    twice = b.op("Conv", b.op("Relu", b.op("Conv", spread, tied, name="tied1")), tied, name="tied2")
    pooled = b.op("Flatten", b.op("GlobalAveragePool", twice))
    product = b.op("MatMul", pooled, b.random(16, 24, scale=0.2, name="w5"), name="product")
    gemm = b.op(
        "Gemm", b.op("Relu", product), b.random(24, 16, scale=0.2, name="w6"), b.random(16), name="gemm", alpha=0.5
    )
    return b.build(b.op("Gemm", gemm, b.random(16, 5, scale=0.3, name="w7"), name="head"))


def test_odd_graphs(tmp_path):
    onnx.save(build_odd(), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((96, 3, 9, 8)).astype(np.float32)
    pattern = ColumnPattern(0.5, 4)
    report = prune_file(tmp_path / "m.onnx", tmp_path / "p.onnx", pattern, method="obs", calibration={"x": x})
    assert {layer.name for layer in report.pruned} == {"one", "two", "three", "tied1", "product", "gemm"}
    assert "shared" not in {tensor.name for tensor in onnx.load(tmp_path / "p.onnx").graph.initializer}

    # Where all layers can be fitted, the outputs are nearer than after magnitude pruning.
    answers = {}
    for name, options in (("q", {}), ("r", {"method": "obs", "calibration": {"x": x}})):
        prune_file(tmp_path / "m.onnx", tmp_path / f"{name}.onnx", pattern, exclude=["tied1", "gemm"], **options)
    for name in "mqr":
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        answers[name] = np.array([session.run(None, {"x": part})[0] for part in x.reshape(24, 4, 3, 9, 8)])
    magnitude, fitted = (((answers[name] - answers["m"]) ** 2).mean() for name in "qr")
    assert fitted < 0.5 * magnitude


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, "needs calibration"),
        ({"method": "magnitude"}, "with balance only"),
        ({"balance": True, "patterns": {"head": None}}, "one pattern"),
        ({"method": "best"}, "expected one of"),
        ({"calibration": {"input": np.zeros((3, 2, 8, 8), np.float32)}}, "3×2×8×8: expected samples × 1×8×8"),
        ({"calibration": {"input": np.zeros((0, 1, 8, 8), np.float32)}}, "expected samples"),
        ({"calibration": {"input": np.full((3, 1, 8, 8), np.nan, np.float32)}}, "NaN"),
        ({"calibration": {"a": np.zeros(3), "b": np.zeros(3)}}, "an array for each input"),
    ],
)
def test_errors_leave_no_file(digits, tmp_path, change, message):
    export(digits[0], digits[1][:1], tmp_path / "dense.onnx")
    options = {"method": "obs", "calibration": {"input": digits[1].numpy()}, **change}
    with pytest.raises(UserError, match=message):
        prune_file(tmp_path / "dense.onnx", tmp_path / "out.onnx", ColumnPattern(0.5), **options)
    assert not (tmp_path / "out.onnx").exists()


def test_reconstruction_brings_blocks_nearer_and_keeps_zeros(digits):
    dense, calibration, x, y = digits
    model = copy.deepcopy(dense)
    sparsify_(model, ColumnPattern(0.75, 8), x[:1])
    zeros = {name: mask.mask.clone() for name, mask in masks(model)}
    start = right(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = reconstruct_(model, dense, calibration, Schedule(epochs=10, joint_epochs=4, mirror=False, zoom=0))
    assert len(blocks) >= 3 and all(block.after <= block.before for block in blocks)
    for name, mask in masks(model):
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(mask.mask, zeros[name]) and (weight[~mask.mask] == 0).all()
    assert right(model, x, y) > max(start, right(dense, x, y) - 0.08)
    assert not model.training


def test_blocks_that_answer_worse_stay_as_they_were(digits):
    """Thirty inputs, and rates that learn them by heart: blocks come nearer on them, answers do not on others."""
    dense, _, x, _ = digits
    model = copy.deepcopy(dense)
    few = x[:34]
    sparsify_(model, ColumnPattern(0.5, 8), few[:1], method="obs", calibration=x[64:256])
    unseen, seen = held_out(few, torch.Generator().manual_seed(0))
    assert len(unseen) == 4 and len(seen) == 30

    def error(judged):
        with torch.no_grad():
            return distance([judged.eval()(unseen)], [dense(unseen)])

    def reconstructed(keep):
        tried = copy.deepcopy(model)
        schedule = Schedule(epochs=8, lr=0.3, batch=10, joint_epochs=0, mirror=False)
        with pytest.MonkeyPatch.context() as patch:
            if not keep:
                patch.setattr("colonnade.sparsify.reconstruct.train_judged", lambda groups, steps, epochs, *_: [
                    list(epoch) for epoch in steps(groups)])  # fmt: skip
            reconstruct_(tried, dense, few, schedule)
        return error(tried)

    start = error(model)
    assert reconstructed(keep=False) > 1.2 * start  # without a judge they are worse
    assert reconstructed(keep=True) <= start * (1 + 1e-3)


def test_all_blocks_at_once_bring_answers_nearer(digits):
    dense, calibration, x, _ = digits
    model = copy.deepcopy(dense)
    sparsify_(model, ColumnPattern(0.5, 8), x[:1])
    norms = {name: value.clone() for name, value in model.named_buffers() if "running" in name}

    def distance():
        with torch.no_grad():
            return float((model.eval()(x) - dense(x)).square().mean() / dense(x).var())

    before = distance()
    heard = []
    reconstruct_(
        model, dense, calibration, Schedule(epochs=0, joint_epochs=12, joint_lr=0.03, zoom=0.1, mirror=False),
        lambda done, _: heard.append(done),
    )  # fmt: skip
    assert distance() < 0.5 * before
    assert heard[-1] == 1.0 and heard == sorted(heard)
    assert all(
        (model.get_submodule(name.rpartition(".")[0]).weight[~mask.mask] == 0).all() for name, mask in masks(model)
    )
    assert all(torch.equal(value, norms[name]) for name, value in model.named_buffers() if "running" in name)


def test_views_of_photos():
    maps = torch.rand(40, 3, 8, 6)
    seen = view(maps, torch.Generator().manual_seed(0), 0.0, mirror=True)
    straight = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, maps, strict=True)]
    turned = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(seen, maps, strict=True)]
    assert all(a != b for a, b in zip(straight, turned, strict=True)) and 8 < sum(turned) < 32
    parts = view(maps, torch.Generator().manual_seed(0), 0.5, mirror=False)
    assert parts.shape == maps.shape and not torch.allclose(parts, maps)
    # A part of a photo holds nothing that the photo does not.
    assert float(parts.min()) >= float(maps.min()) - 1e-5 and float(parts.max()) <= float(maps.max()) + 1e-5
    assert view(maps, torch.Generator(), 0.0, mirror=False) is maps
    small = view(maps, torch.Generator(), 0.0, mirror=False, side=0.5)
    assert torch.allclose(small, nn.functional.avg_pool2d(maps, 2), atol=1e-5)
    flat = torch.rand(4, 7)
    assert view(flat, torch.Generator(), 0.5, mirror=True) is flat


def test_matrix_round_trip():
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 5)).astype(np.float32)
    assert (from_matrix(as_matrix(weight), weight.shape) == weight).all()
    assert len(consecutive_rows(10, 4)) == 3


def test_command_line(digits, tmp_path):
    from typer.testing import CliRunner

    from colonnade.cli import application

    export(digits[0], digits[1][:1], tmp_path / "dense.onnx")
    np.savez(tmp_path / "inputs.npz", digits[1].numpy())
    words = ["prune", str(tmp_path / "dense.onnx"), "-o", str(tmp_path / "out.onnx"), "--sparsity", "0.75"]
    fitted = CliRunner().invoke(
        application("prune"), [*words, "--method", "obs", "--calibration", str(tmp_path / "inputs.npz")]
    )
    assert fitted.exit_code == 0 and "retained output" in fitted.output
    assert (tmp_path / "out.onnx").exists()
    balanced = CliRunner().invoke(
        application("prune"), [*words, "--force", "--balance", "--calibration", str(tmp_path / "inputs.npz")]
    )
    assert balanced.exit_code == 0 and "balanced" in balanced.output
    for more, message in (
        (["--method", "obs"], "--method obs needs --calibration"),
        (["--balance"], "--balance needs --calibration"),
        (["--calibration", "x"], "belongs to"),
    ):
        refused = CliRunner().invoke(application("prune"), [*words, "--force", *more])
        assert isinstance(refused.exception, UserError) and message in str(refused.exception)
