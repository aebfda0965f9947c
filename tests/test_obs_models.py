"""Second-order pruning of torch models whose graphs say less than their modules do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import colonnade as cn
from colonnade.errors import UserError
from colonnade.sparsify.reconstruct import Schedule

PATTERN = cn.ColumnPattern(0.5, 8)


def fitted(model: nn.Module, x: Tensor, others: Tensor) -> float:
    """The share of the answers' variance on ``others`` that obs loses."""
    pruned = copy.deepcopy(model)
    cn.sparsify_(pruned, PATTERN, x[:1], method="obs", calibration=x)
    pruned.eval()
    with torch.no_grad():
        wanted = model(others)
        return float(((pruned(others) - wanted) ** 2).mean() / ((wanted - wanted.mean(0)) ** 2).mean())


def maps(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


class Rectified(nn.Module):
    """Its input is read again behind an operator that may work in place: then what is read was rectified."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 10)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == "module":
            y = self.relu(x)
        elif self.way == "statement":
            y = x
            self.relu(x)
        elif self.way == "method":
            y = x.relu_()
        else:
            x = y = x.relu()
        y = self.a(y) + x
        return self.last(self.b(y).mean((2, 3)))


@pytest.mark.parametrize("way", ["module", "statement", "method"])
def test_what_works_in_place_is_seen_by_all_that_read_it_later(way: str) -> None:
    torch.manual_seed(0)
    plain = Rectified("plain").eval()
    model = Rectified(way).eval()
    model.load_state_dict(plain.state_dict())
    x, others = maps(128, 1), maps(64, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(others), plain(others))
    assert fitted(model, x, others) == pytest.approx(fitted(plain, x, others), rel=0.02)


class Shared(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(i, 32, 3, padding=1, bias=False) for i in (3, 32))
        self.c, self.last = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.Linear(32, 10)
        self.norm = nn.BatchNorm2d(32)
        self.other = self.norm if shared else nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu()
        return self.last(self.other(self.c(x)).relu().mean((2, 3)))


def test_a_norm_behind_two_layers_takes_the_mean_of_none() -> None:
    torch.manual_seed(0)
    shared, apart = Shared(True), Shared(False)
    apart.load_state_dict({**shared.state_dict(), **{k: v for k, v in shared.state_dict().items() if "other" in k}})
    x, others = maps(128, 1), maps(64, 2)
    for model in (shared, apart):
        model.train()
        with torch.no_grad():
            model(x)
        model.eval()
    before = shared.norm.running_mean.clone()
    assert fitted(shared, x, others) < 2 * fitted(apart, x, others) + 0.1
    pruned = copy.deepcopy(shared)
    cn.sparsify_(pruned, PATTERN, x[:1], method="obs", calibration=x)
    torch.testing.assert_close(pruned.norm.running_mean, before)


@pytest.mark.parametrize("tokens", [8, 32])
def test_a_norm_over_tokens_is_none_over_features(tokens: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.norm = nn.BatchNorm1d(tokens)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.a(self.first(x).relu())).relu())

    torch.manual_seed(0)
    model = Tokens()
    x, others = torch.randn(256, tokens, 16), torch.randn(64, tokens, 16)
    model.norm.running_var.uniform_(0.1, 3)
    model.norm.running_mean.uniform_(-1, 1)
    assert fitted(model.eval(), x, others) < 0.35


def test_a_parametrized_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    nn.utils.parametrizations.weight_norm(model[1])
    x = torch.randn(32, 16)
    with pytest.raises(UserError, match="layer 1: a parametrization computes its weight"):
        cn.sparsify_(model, PATTERN, x, method="obs", calibration=x)


def test_what_stood_still_stands_still_afterwards() -> None:
    """Parts in evaluation mode, and parameters that are not learned."""
    torch.manual_seed(0)
    dense = Shared(False)
    model = copy.deepcopy(dense)
    x = maps(64, 1)
    cn.sparsify_(model, PATTERN, x[:1])
    model.train()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    cn.reconstruct_(model, dense, x, Schedule(epochs=1, joint_epochs=1))
    cn.evaluate(model, (x.numpy(), [0] * len(x)))
    assert model.training and model.a.training and not model.norm.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["obs", "balance", "reconstruct"])
def test_inputs_that_do_not_fit(method: str) -> None:
    """One line for all that calibrates. Floats of another precision are as good; a layer may be called by keyword."""

    class Keyword(Shared):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.b(input=self.a(x).relu())).relu()
            return self.last(self.other(self.c(x)).relu().mean((2, 3)))

    dense = Keyword(False)

    def calibrate(x: Tensor | list[Tensor]) -> nn.Module:
        model = copy.deepcopy(dense)
        if method == "obs":
            cn.sparsify_(model, PATTERN, None, method="obs", calibration=x)
        elif method == "balance":
            cn.balance(model, PATTERN, x)
        else:
            cn.sparsify_(model, PATTERN)
            cn.reconstruct_(model, dense, x, Schedule(epochs=1, joint_epochs=0))
        return model

    x = maps(16, 1)
    for (name, one), other in zip(
        calibrate(x.double()).state_dict().items(), calibrate(x).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)
    with pytest.raises(UserError, match=r"a calibration input \(1x.*, float32\) does not fit Keyword: .*channels"):
        calibrate(torch.cat([x, x], 1))
    with pytest.raises(UserError, match=r"\(1x.*, int64\) does not fit"):
        calibrate(x.long())
    for nothing in ([], x[:0]):
        with pytest.raises(UserError, match="calibration holds no input"):
            calibrate(nothing)
