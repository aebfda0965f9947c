"""What makes the second-order pass quick changes nothing: samples and factors that are held, the order of maps, values
that are worked on in place."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from colonnade.pattern import ColumnPattern
from colonnade.sparsify.arrays import HostArrays, NumpyArrays
from colonnade.sparsify.held import Store
from colonnade.sparsify.samples import Layer, Rectifier, Samples
from colonnade.sparsify.sequential import Options, prune_layer
from colonnade.sparsify.torch_graph import Runner, trace
from colonnade.sparsify.torch_obs import TorchChain, second_order_


def layer_and_values(store, images=6):
    """A padded convolution before a ReLU with a residual, and both models' values in three batches."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 6, 3, 3)).astype(np.float32) / 7
    layer = Layer("l", weight, "x", (1, 1), (1, 1, 1, 1), residual="r", rectifier=Rectifier(np.zeros(16, np.float32)))
    x = random.standard_normal((images, 6, 8, 8)).astype(np.float32)
    r = random.standard_normal((images, 16, 8, 8)).astype(np.float32)
    moved = [value + 0.2 * random.standard_normal(value.shape).astype(np.float32) for value in (x, r)]
    return layer, *(
        [{"x": store.put(a[at : at + 2]), "r": store.put(b[at : at + 2])} for at in range(0, images, 2)]
        for a, b in ((x, r), moved)
    )


@pytest.mark.parametrize("kept", [0, 110_000, 1 << 30])
@pytest.mark.parametrize("factors", [0, 3_000, 1 << 30])
def test_samples_and_factors_that_are_held_change_nothing(monkeypatch, kept, factors):
    store = Store(NumpyArrays(), 1 << 30, 3)
    layer, dense, pruned = layer_and_values(store)
    samples = Samples.of(store, layer, dense, pruned, 10**6, 0)
    options = Options(damping=0.01, refits=2)
    monkeypatch.setattr("colonnade.sparsify.samples.KEPT_BYTES", 1 << 30)
    monkeypatch.setattr("colonnade.sparsify.second_order.FACTOR_BYTES", 1 << 30)
    weight, bias, _ = prune_layer(samples, ColumnPattern(0.5, 4), options)
    monkeypatch.setattr("colonnade.sparsify.samples.KEPT_BYTES", kept)
    monkeypatch.setattr("colonnade.sparsify.second_order.FACTOR_BYTES", factors)
    gathered, factored = [], []
    gather, factor = Samples._gathered, NumpyArrays.factor
    monkeypatch.setattr(Samples, "_gathered", lambda self, *a: gathered.append(a[0]) or gather(self, *a))
    monkeypatch.setattr(NumpyArrays, "factor", lambda self, m: factored.append(len(m)) or factor(self, m))
    again = prune_layer(samples, ColumnPattern(0.5, 4), options)
    np.testing.assert_array_equal(weight, again[0])
    np.testing.assert_array_equal(bias, again[1])
    # Three batches, walked three times; four tiles with 27 of 54 columns, solved three times.
    assert len(gathered) == {0: 9, 110_000: 5, 1 << 30: 3}[kept]
    assert factored.count(27) == {0: 12, 3_000: 12, 1 << 30: 4}[factors]


def test_values_in_files_keep_the_order_of_their_memory():
    maps = torch.randn(2, 5, 4, 3)
    for array in (
        maps.numpy(),
        maps.contiguous(memory_format=torch.channels_last).numpy(),
        maps[0].permute(2, 0, 1).numpy(),
    ):
        store = Store(NumpyArrays(), 0, 1)
        found = store.get(store.put(array))
        assert found.strides == array.strides and (found == array).all()
        store.close()


def test_half_precision_of_maps_in_both_orders():
    host = HostArrays()
    maps = torch.randn(2, 5, 4, 3)
    for array in (maps.numpy(), maps.contiguous(memory_format=torch.channels_last).numpy()):
        small = host.compact(array, 0, 10.0)
        assert small.dtype == np.float16 and small.strides == tuple(stride // 2 for stride in array.strides)
        np.testing.assert_array_equal(small, array.astype(np.float16))
        np.testing.assert_array_equal(host.single(small), array.astype(np.float16).astype(np.float32))
        assert host.compact(array, 0, float(maps.abs().max())) is array
        assert host.compact(array, array.nbytes + 1, 10.0) is array
        array[1, 2, 3, 1] = np.nan
        assert host.compact(array, 0, 10.0) is array


class Views(nn.Module):
    """In-place operators on fresh values and on a view; maps looked at with `view`."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.convs[0](x))
        z = self.convs[1](y)
        z += y
        a = self.convs[2](z)
        part = a[:, :2]
        part = self.relu(part)
        b = self.convs[3](torch.cat([part, a[:, 2:]], 1) + a)
        return b.view(x.size(0), -1) + z.flatten(1)


def test_in_place_operators_touch_only_what_nobody_reads_again(monkeypatch):
    torch.manual_seed(0)
    model, x = Views().eval(), torch.randn(3, 4, 6, 6)
    runner = Runner(model, trace(model))
    last = runner.output.args[0]
    runner.last_use[last] = len(runner.nodes)
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: copies.append(self.shape[1]) or clone(self))
    with torch.no_grad():
        found = runner.run(0, len(runner.nodes), {"x": x})[last.name]
    assert copies == [2]  # of the view alone
    a = model.convs[2](z := (y := torch.relu(model.convs[0](x))) + model.convs[1](y))
    b = model.convs[3](torch.cat([torch.relu(a[:, :2]), a[:, 2:]], 1) + a)
    torch.testing.assert_close(found, b.flatten(1) + z.flatten(1))


def test_models_that_want_maps_in_their_usual_order():
    torch.manual_seed(0)
    model, x = Views().eval(), torch.randn(40, 4, 6, 6)
    names = {f"convs.{at}": ColumnPattern(0.5, 4) for at in range(4)}
    chain = TorchChain(copy.deepcopy(model), names, [(x,)])
    assert chain.order is torch.channels_last
    found = second_order_(model, names, x)
    assert len(found) == 4 and torch.isfinite(model(x)).all()
    values = chain.inputs()[0]
    for stage in range(5):
        values = chain.run(stage, values)
    assert chain.order is torch.contiguous_format
