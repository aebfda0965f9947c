"""Two processes compute what one does: batches, random samples, BatchNorm, gradients, accuracy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from colonnade.errors import UserError
from colonnade.sparsify.parallel import Batches, synchronized_batchnorm

SCRIPT = Path(__file__).with_name("train_digits.py")
# Loopback only, CPU only; idle threads must not fight for two cores.
ALONE = {
    "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
LAUNCH = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples drawn by all three generators that data sets use."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import random

        return torch.tensor([torch.rand(()).item(), random.random(), float(np.random.rand())]), index


def batches(processes: int, rank: int, epoch: int, workers: int = 0) -> list[tuple[Any, Any, int]]:
    loader = DataLoader(Noisy(), 5, shuffle=True, num_workers=workers)
    made = Batches(loader, "training", rank=rank, processes=processes, device=torch.device("cpu"), seed=3)
    return list(made.epoch(epoch))


def samples(parts: list[list[tuple[Any, Any, int]]]) -> list[dict[int, list[float]]]:
    """Of each step: index -> values, all processes together, repeated samples left out."""
    return [
        {
            int(i): x.tolist()
            for inputs, targets, count in step
            for x, i in list(zip(inputs, targets, strict=True))[:count]
        }
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_sample_does_not_depend_on_processes(processes: int) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = samples([batches(1, 0, 1)])
    assert torch.equal(torch.get_rng_state(), state)  # the model's own random numbers are left alone
    assert sorted(index for step in whole for index in step) == list(range(23))
    assert samples([batches(processes, rank, 1) for rank in range(processes)]) == whole
    assert samples([batches(1, 0, 2)]) != whole


def test_a_sample_does_not_depend_on_workers() -> None:
    assert samples([batches(1, 0, 4, workers=1)]) == samples([batches(1, 0, 4)])


def test_lists_of_batches_are_shared_out() -> None:
    given = [(torch.arange(5), torch.arange(5)), (torch.arange(1), torch.arange(1))]
    parts = [
        list(Batches(given, "training", rank=rank, processes=2, device=torch.device("cpu"), seed=0).epoch(0))
        for rank in range(2)
    ]
    assert [[(inputs.tolist(), count) for inputs, _, count in part] for part in parts] == [
        [([0, 2, 4], 3), ([0], 1)],
        [([1, 3], 2), ([0], 0)],
    ]
    with pytest.raises(UserError, match="has no length"):
        Batches(iter(given), "training", rank=0, processes=1, device=torch.device("cpu"), seed=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batchnorm_is_batchnorm(
    momentum: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one process, through the same code: outputs, gradients, statistics, and nothing left behind."""
    import copy

    import torch.distributed as dist

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU()).double()
    other = copy.deepcopy(plain)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64) * 3 + 5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with synchronized_batchnorm(other, 2):
            for _ in range(2):
                out = other(x)
                out.square().mean().backward()
    finally:
        dist.destroy_process_group()
    for _ in range(2):
        wanted = plain(x)
        wanted.square().mean().backward()
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-10, atol=1e-12)
    assert "forward" not in vars(other[1])


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("kind", "near", "rich"), [("float64", 1e-10, False), ("float32", 1e-3, False), ("float64", 1e-10, True)]
)
def test_two_processes_give_the_curve_of_one(tmp_path: Path, kind: str, near: float, rich: bool) -> None:
    """In float64 to the last digits: whatever differs in float32 is rounding.

    rich: also with a teacher, its blocks, a moving average and masks that move.
    """
    results = []
    for name, words in (("one", (sys.executable,)), ("two", LAUNCH)):
        out = tmp_path / f"{name}.json"
        done = subprocess.run(
            [*words, str(SCRIPT), str(out), kind], env=os.environ | ALONE | ({"RICH": "1"} if rich else {}),
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["returned"] == two["returned"] == 0
    # The sparsity rises meanwhile, where masks move.
    assert rich or one["loss"][-1] < one["loss"][0]
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=near)
    if kind == "float64":
        assert two["accuracy"] == one["accuracy"]
        for key, value in one["weights"].items():
            np.testing.assert_allclose(two["weights"][key], value, rtol=1e-7, atol=1e-9, err_msg=key)
