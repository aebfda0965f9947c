"""All layers of a pruned torch model trained at once towards the dense model, on calibration inputs without labels.

The loss is how far the outputs of every block and the answers (the divergence of the class probabilities) are from
the dense model's on the same input. A few hundred inputs are little: each pass sees another view of each photo, and
the dense model says what it makes of it, so there is more to learn than the photos by heart. Some photos are left out
and judge, so that what stays is no worse than what was given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from colonnade.sparsify.torch_graph import Runner

# One of so many inputs judges the training of the others.
HELD_OUT = 8
# Where the judge's error grows to this multiple of the start's, rates are this factor lower next time.
ASTRAY = 1.2
SLOWER = 4
ATTEMPTS = 4

Span = tuple[tuple[int, int], tuple[str, str]]


def run_block(runner: Runner, span: Span, value: Tensor) -> Tensor:
    """The output of the nodes [first, stop) from the value that enters them. span: ((first, stop), (name, name))."""
    (first, stop), (source, end) = span
    if stop == len(runner.nodes):  # nothing is used after the last node: take its value as the caller's
        runner.last_use[runner.nodes[-1]] = stop
    return cast(Tensor, runner.run(first, stop, {source: value})[end])


def spans(runner: Runner, cuts: Sequence[int]) -> list[Span]:
    """The blocks between these cuts, with the names of what goes in and comes out."""
    found: list[Span] = []
    for number, (first, stop) in enumerate(itertools.pairwise(cuts)):
        source = runner.placeholders[0].name if number == 0 else runner.live(first)[0].name
        end = runner.nodes[stop - 1].name if stop == len(runner.nodes) else runner.live(stop)[0].name
        found.append(((first, stop), (source, end)))
    return found


def view(maps: Tensor, generator: torch.Generator, zoom: float, mirror: bool, side: float = 1.0) -> Tensor:
    """Photos [N, C, H, W] with a random part of each (at least 1 - zoom of its area) scaled to `side` of their height
    and width, half of them mirrored. Other inputs stay as they are."""
    if maps.ndim != 4 or not (zoom > 0 or mirror or side != 1):
        return maps
    count = len(maps)
    draw = torch.rand(5, count, generator=generator)
    length = (1 - zoom * draw[0]).sqrt()
    shape = torch.exp((2 * draw[1] - 1) * 0.3 * zoom)
    width, height = (length * shape).clamp(max=1), (length / shape).clamp(max=1)
    turned = torch.where(draw[4] < 0.5, -1.0, 1.0) if mirror else torch.ones(count)
    none = torch.zeros(count)
    across = torch.stack([width * turned, none, (2 * draw[2] - 1) * (1 - width)], 1)
    down = torch.stack([none, height, (2 * draw[3] - 1) * (1 - height)], 1)
    size = [count, maps.shape[1], *(max(1, round(side * pixels)) for pixels in maps.shape[2:])]
    grid = functional.affine_grid(torch.stack([across, down], 1), size, align_corners=False)
    return functional.grid_sample(maps, grid.to(maps.device), padding_mode="reflection", align_corners=False)


def half_precision(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than single precision there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def rates(steps: int) -> Iterator[float]:
    """A straight rise over the first twentieth, then half a cosine down to 0."""
    for step in range(steps):
        rise = min(1.0, (step + 1) / (0.05 * steps + 1))
        yield rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Views:
    """How photos are seen in training (see `view`)."""

    zoom: float = 0.0
    mirror: bool = False
    side: float = 1.0


def train_jointly(
    pruned: tuple[Runner, Sequence[Span]],
    dense: tuple[Runner, Sequence[Span]],
    unseen: Tensor,
    seen: Tensor,
    groups: list[dict[str, Any]],
    *,
    epochs: int,
    batch: int,
    views: Views,
    answers: float,
    generator: torch.Generator,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
) -> tuple[float, float]:
    """Train the parameters in `groups` (Adam's, with a rate each) of the pruned model.

    answers: weight of the answers' divergence, beside the mean of the blocks' relative squared errors.

    unseen:  inputs that judge (see `train_judged`, which says what is returned) by `distance`.
    """

    def error() -> float:
        with torch.no_grad():
            pairs = [_both(pruned, dense, part.to(device)) for part in torch.split(unseen, batch)]
        return distance([given[-1] for given, _ in pairs], [wanted[-1] for _, wanted in pairs])

    def steps(slower: list[dict[str, Any]]) -> Iterator[Iterator[float]]:
        return _steps(pruned, dense, seen, slower, epochs, batch, views, answers, generator, device)

    return train_judged(groups, steps, epochs, error, progress)


def held_out(inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs that judge, one of HELD_OUT, and those that are trained on, in random order; all for both where there are
    too few."""
    mixed = inputs[torch.randperm(len(inputs), generator=generator)]
    cut = len(inputs) // HELD_OUT if len(inputs) >= 2 * HELD_OUT else 0
    return (mixed[:cut], mixed[cut:]) if cut else (mixed, mixed)


def train_judged(
    groups: list[dict[str, Any]],
    steps: Callable[[list[dict[str, Any]]], Iterator[Iterator[float]]],
    epochs: int,
    error: Callable[[], float],
    progress: Callable[[float], None] | None = None,
) -> tuple[float, float]:
    """Train the parameters in `groups` (Adam's, with a rate each) and keep those of the start or of an epoch's end,
    whichever has the least error; a start that is left far behind begins anew at a quarter of the rates.

    steps: makes the epochs at the given rates, each of which yields the share of it that is done, a step at a time.
    Returns the error at the start and of what stays.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    start = best = error()
    kept = first = [parameter.detach().clone() for parameter in parameters]
    for attempt in range(ATTEMPTS):
        slower = [{**group, "lr": group["lr"] / SLOWER**attempt} for group in groups]
        running = steps(slower)
        astray = False
        for done in range(epochs):
            for share in next(running):
                if progress:
                    progress((done + share) / epochs)
            found = error()
            if found < best:
                best, kept = found, [parameter.detach().clone() for parameter in parameters]
            astray = found > ASTRAY * start and best == start
            if astray:
                break
        if not astray:
            break
        _restore(parameters, first)
    _restore(parameters, kept)
    if progress:
        progress(1.0)
    return start, best


def _steps(
    pruned: tuple[Runner, Sequence[Span]],
    dense: tuple[Runner, Sequence[Span]],
    inputs: Tensor,
    groups: list[dict[str, Any]],
    epochs: int,
    batch: int,
    views: Views,
    answers: float,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[Iterator[float]]:
    """The epochs, each of which yields the share of it that is done, a step at a time."""
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    parts = max(len(inputs) // batch, 1)
    schedule = rates(epochs * parts)
    spread: list[float] = []

    def epoch() -> Iterator[float]:
        order = torch.randperm(len(inputs), generator=generator)
        for number in range(parts):
            rate = next(schedule)
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * rate
            chosen = inputs[order[number * batch : (number + 1) * batch]]
            given, wanted = _both(
                pruned, dense, view(chosen, generator, views.zoom, views.mirror, views.side).to(device)
            )
            if not spread:
                spread.extend(max(float(value.float().var(0, correction=0).mean()), 1e-12) for value in wanted)
            errors = [
                functional.mse_loss(ours.float(), theirs.float()) / size
                for ours, theirs, size in zip(given, wanted, spread, strict=True)
            ]
            loss = cast(Tensor, sum(errors)) / len(errors)
            if answers and given[-1].ndim == 2:
                loss = loss + answers * divergence(given[-1], wanted[-1])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield (number + 1) / parts

    for _ in range(epochs):
        yield epoch()


def _both(
    pruned: tuple[Runner, Sequence[Span]], dense: tuple[Runner, Sequence[Span]], x: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """What the blocks of the pruned and of the dense model give; gradients are for the pruned one."""
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half_precision(x.device)):
        with torch.no_grad():
            wanted = _outputs(*dense, x)
        return _outputs(*pruned, x), wanted


def distance(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far the pruned model's outputs are from the dense one's, batch by batch: the divergence of the answers; the
    squared error relative to the variance where there is no vector of classes."""
    ours, theirs = torch.cat(list(given)).float(), torch.cat(list(wanted)).float()
    if theirs.ndim == 2 and theirs.shape[1] > 1:
        return float(divergence(ours, theirs))
    return float(functional.mse_loss(ours, theirs)) / max(float(theirs.var(correction=0)), 1e-12)


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities, the mean over samples."""
    first, second = (functional.log_softmax(logits.float(), 1) for logits in (ours, theirs))
    return functional.kl_div(first, second, reduction="batchmean", log_target=True)


def _outputs(runner: Runner, parts: Sequence[Span], x: Tensor) -> list[Tensor]:
    found = []
    for span in parts:
        x = run_block(runner, span, x)
        found.append(x)
    return found
