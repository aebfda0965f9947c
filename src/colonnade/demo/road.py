"""The demonstration itself: train, prune, train further, export, tune, build, run, and one table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from colonnade.api import build
from colonnade.bundle import Bundle
from colonnade.cli_tune import bar, size_text
from colonnade.demo.network import Shifted, SmallResNet, as_input, digits
from colonnade.pattern import ColumnPattern
from colonnade.runtime.session import Session
from colonnade.sparsify.finetune import finetune
from colonnade.sparsify.masks import sparsify_
from colonnade.sparsify.torch_model import export

BATCH = 64
ROUNDS = 60  # of REPEAT runs of each network
REPEAT = 10


@dataclass(frozen=True)
class Result:
    """Shares of the held-out images that were right, medians of latency in milliseconds, sizes in bytes."""

    images: int
    accuracy_dense: float
    accuracy_pruned: float
    accuracy_retrained: float
    accuracy_compiled_dense: float
    accuracy_compiled: float
    latency_dense: float
    latency_pruned: float
    onnx_bytes: int
    weights_dense: int
    weights_pruned: int
    isa: str
    threads: int

    @property
    def speedup(self) -> float:
        """Latency of compiled dense over that of compiled pruned."""
        return self.latency_dense / self.latency_pruned


def demo(
    folder: Path,
    console: Console,
    *,
    sparsity: float = 0.75,
    threads: int = 1,
    epochs: int = 4,
    retrain: int = 3,
    budget: float = 30.0,
    widths: tuple[int, int, int] = (64, 128, 256),
    db: Path | None = None,
) -> Result:
    """Go the whole road in ``folder``; the same seeds give the same network. ``budget``: seconds of tuning a model."""
    shown = console.is_terminal
    train, test = digits()
    torch.manual_seed(0)
    # This order of memory is the faster one for training convolutions on CPUs; the numbers mean the same.
    model: nn.Module = SmallResNet(widths).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = DataLoader(Shifted(*train), BATCH, shuffle=True, drop_last=True)

    console.print(
        f"1  Training a small ResNet on {len(train[1])} images of handwritten digits, {len(test[1])} held out"
    )
    # Judged once, at the end: choosing the best epoch by the held-out images would flatter the result.
    finetune(model, loader, epochs=epochs, lr=0.05, weight_decay=5e-4, warmup=0.1, progress=shown, title="training")
    dense = accuracy(model, test)
    export(model, test[0][:1], folder / "dense.onnx")

    pattern = ColumnPattern(sparsity, tile=8)
    console.print(
        f"2  Pruning {100 * sparsity:g} % of the columns of every tile of {pattern.tile} rows, similar rows together"
    )
    with console.status("pruning"):
        sparsify_(model, pattern, test[0][:1])
    pruned = accuracy(model, test)

    console.print("3  Training further, zeros kept")
    finetune(model, loader, epochs=retrain, lr=0.02, weight_decay=5e-4, progress=shown, title="training further")
    retrained = accuracy(model, test)
    export(model, test[0][:1], folder / "pruned.onnx")

    console.print("4  Tuning on this machine and building both networks (zeros are found in the ONNX file)")
    bundles = [_build(name, folder, threads, budget, console, db) for name in ("dense", "pruned")]

    console.print("5  Running the held-out images through the bundles, and timing them")
    sessions = [Session(bundle.path, threads) for bundle in bundles]
    try:
        with console.status("running"):
            compiled = [_share(lambda x, s=session: _answer(s, x), test) for session in sessions]  # type: ignore[misc]
            latencies = _latencies(sessions, test[0][:1])
    finally:
        for session in sessions:
            session.close()
    result = Result(
        len(test[1]), dense, pruned, retrained, compiled[0], compiled[1], latencies[0], latencies[1],
        (folder / "pruned.onnx").stat().st_size, bundles[0].weights.stat().st_size, bundles[1].weights.stat().st_size,
        bundles[1].manifest["isa"], threads,
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(asdict(result) | {"speedup": result.speedup}, indent=1) + "\n")
    return result


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of images that torch's own run of ``model`` gets right."""
    model.eval()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(images)).argmax(1)

    return _share(answer, data)


def _share(answer: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
    right = sum(int(answer(image[None])) == int(label) for image, label in zip(*data, strict=True))
    return right / len(data[1])


def _answer(session: Session, image: Tensor) -> Tensor:
    (scores,) = session.run({session.get_inputs()[0].name: as_input(image)}).values()
    return torch.from_numpy(np.asarray(scores)).argmax(1)


def _latencies(sessions: list[Session], image: Tensor) -> list[float]:
    """Median time of one run of each session, in milliseconds, over the calmest third of the rounds.

    A round times all sessions in turn, and is kept or dropped for all of them: a busy moment of the machine flatters
    none, and would weigh most on the slowest.
    """
    feeds = [{session.get_inputs()[0].name: as_input(image)} for session in sessions]
    rounds: list[list[list[float]]] = []
    for _ in range(ROUNDS + 1):
        rounds.append([])
        for session, feed in zip(sessions, feeds, strict=True):
            times = []
            for _ in range(REPEAT):
                began = time.perf_counter_ns()
                session.run(feed)
                times.append((time.perf_counter_ns() - began) / 1e6)
            rounds[-1].append(times)
    # the first round warms up
    calm = sorted(rounds[1:], key=lambda parts: sum(map(statistics.median, parts)))[: ROUNDS // 3]
    return [statistics.median([value for parts in calm for value in parts[index]]) for index in range(len(sessions))]


def _build(name: str, folder: Path, threads: int, budget: float, console: Console, db: Path | None) -> Bundle:
    options: dict[str, Any] = {"threads": threads, "out": folder / f"{name}.bundle", "force": True, "db": db}
    with bar(console, f"tuning {name}") as progress:
        return build(
            folder / f"{name}.onnx", tune=True, budget=budget, progress=progress,
            notice=lambda line: console.print(line, highlight=False), **options,
        )  # fmt: skip


def table(result: Result) -> Table:
    """The result for people."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    rows = Table(title=f"Handwritten digits, {result.images} held-out images ({result.isa}, {result.threads} thread)")
    for heading in ("", "dense", "pruned", "retrained", "compiled dense", "compiled pruned"):
        rows.add_column(heading, justify="left" if not heading else "right")
    rows.add_row(
        "accuracy", percent(result.accuracy_dense), percent(result.accuracy_pruned), percent(result.accuracy_retrained),
        percent(result.accuracy_compiled_dense), percent(result.accuracy_compiled),
    )  # fmt: skip
    rows.add_row("latency", "", "", "", f"{result.latency_dense:.3f} ms", f"{result.latency_pruned:.3f} ms")
    onnx = size_text(result.onnx_bytes)
    rows.add_row("size", onnx, "", onnx, size_text(result.weights_dense), size_text(result.weights_pruned))
    rows.add_row("speed-up", "", "", "", "1.00×", f"{result.speedup:.2f}×")
    return rows
