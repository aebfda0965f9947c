"""All layers of a pruned torch model trained at once towards the dense model, on calibration inputs without labels.

The loss is how far the outputs of every block and the answers (the divergence of the class probabilities) are from
the dense model's on the same input. A few hundred inputs are little: each pass sees another view of each photo, and
the dense model says what it makes of it, so there is more to learn than the photos by heart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from colonnade.sparsify.torch_obs import Runner

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


def view(maps: Tensor, generator: torch.Generator, zoom: float, mirror: bool) -> Tensor:
    """Photos [N, C, H, W] with a random part of each (at least 1 - zoom of its area) scaled to its size, half of them
    mirrored. Other inputs stay as they are."""
    if maps.ndim != 4 or not (zoom > 0 or mirror):
        return maps
    count = len(maps)
    draw = torch.rand(5, count, generator=generator)
    side = (1 - zoom * draw[0]).sqrt()
    shape = torch.exp((2 * draw[1] - 1) * 0.3 * zoom)
    width, height = (side * shape).clamp(max=1), (side / shape).clamp(max=1)
    turned = torch.where(draw[4] < 0.5, -1.0, 1.0) if mirror else torch.ones(count)
    none = torch.zeros(count)
    across = torch.stack([width * turned, none, (2 * draw[2] - 1) * (1 - width)], 1)
    down = torch.stack([none, height, (2 * draw[3] - 1) * (1 - height)], 1)
    grid = functional.affine_grid(torch.stack([across, down], 1), list(maps.shape), align_corners=False)
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


def train_jointly(
    pruned: tuple[Runner, Sequence[Span]],
    dense: tuple[Runner, Sequence[Span]],
    inputs: Tensor,
    groups: list[dict[str, Any]],
    *,
    epochs: int,
    batch: int,
    zoom: float,
    mirror: bool,
    answers: float,
    generator: torch.Generator,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Train the parameters in `groups` (Adam's, with a rate each) of the pruned model.

    answers: weight of the answers' divergence, beside the mean of the blocks' relative squared errors.
    """
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    parts = max(len(inputs) // batch, 1)
    schedule = rates(epochs * parts)
    spread: list[float] = []
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for number in range(parts):
            rate = next(schedule)
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * rate
            x = view(inputs[order[number * batch : (number + 1) * batch]], generator, zoom, mirror).to(device)
            if x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device)):
                with torch.no_grad():
                    wanted = _outputs(*dense, x)
                given = _outputs(*pruned, x)
            if not spread:
                spread = [max(float(value.float().var(0, correction=0).mean()), 1e-12) for value in wanted]
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
            if progress:
                progress((epoch * parts + number + 1) / (epochs * parts))


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
