"""Reconstruction of a pruned torch model on calibration inputs, towards the dense model's outputs. No labels; masks
stay as they are.

A block lies between two places where a single value carries everything (after every residual block, say). First each
one is trained by itself, on the inputs it gets from the blocks already reconstructed, towards what the dense model has
there; then all of them at once, which also mends what errors of several blocks make together (joint.py).

Some inputs are not trained on but judge, by the model's answers: a block that comes nearer to the dense one's outputs
may still be worse for what comes behind it (it gives less than it should where it is unsure, and of that the next ReLU
passes less), and a fit to these few inputs may be none to others.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colonnade.errors import UserError
from colonnade.sparsify.joint import Span, Views, distance, held_out, run_block, spans, train_jointly, train_judged
from colonnade.sparsify.masks import evaluating
from colonnade.sparsify.torch_graph import Runner, Weighted, batches, trace

# A block with this relative error lost nothing (half precision of what is held makes up to so much).
EXACT = 1e-5


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; chosen on training images (docs/accuracy-probes.md). An eighth of the inputs is left
    out of both steps and judges: what it likes best of the start and all epochs' ends stays (`joint.train_judged`).

    epochs, lr: over the calibration inputs for every block by itself; Adam's highest rate, relative to the root mean
                square of each weight's layer.
    joint_epochs, joint_lr: the same for all blocks at once.
    answers:    weight of the answers' divergence in the joint step, beside the blocks' relative errors.
    zoom, mirror: in the joint step a photo loses up to this share of its area, and half of them are mirrored (inputs of
                four axes; 0 and False for those that are not photos).
    side:       of those photos, as a share of the inputs' height and width: work falls with its square.
    """

    epochs: int = 8
    lr: float = 0.03
    batch: int = 32
    joint_epochs: int = 6
    joint_lr: float = 0.01
    answers: float = 0.0
    zoom: float = 0.0
    mirror: bool = True
    side: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class BlockResult:
    """before, after: mean squared error of the block's output, relative to the dense output's variance."""

    name: str
    before: float
    after: float


def reconstruct_(
    model: nn.Module,
    dense: nn.Module,
    calibration: Any,
    schedule: Schedule | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> list[BlockResult]:
    """Train the kept weights of ``model`` in place towards ``dense`` (the same architecture).

    calibration: a tensor of inputs, or batches as `sparsify_` takes them; labels are not looked at.
    progress:    hears (share done of the step, block).

    Norms stay in evaluation mode: their statistics do not move, their gain and bias do. Weights without a mask
    (`sparsify_` puts one on what it prunes) keep no zeros. Returns what the step for single blocks did.
    """
    schedule = schedule or Schedule()
    inputs = torch.cat([batch[0] for batch in batches(calibration, dense)])
    device = next(model.parameters()).device
    runner, reference = Runner(model, trace(model)), Runner(dense, trace(dense))
    if [node.name for node in runner.nodes] != [node.name for node in reference.nodes]:
        raise UserError("the dense and the pruned model do not have the same architecture")
    cuts = _cuts(runner)
    generator = torch.Generator().manual_seed(schedule.seed)
    results: list[BlockResult] = []
    blocks = spans(runner, cuts)
    unseen, seen = held_out(inputs, generator)
    with evaluating(model, dense):
        if schedule.epochs:
            results = _block_by_block(runner, reference, blocks, unseen, seen, schedule, generator, progress)
        learned = [p for part in blocks for p in _parameters(runner, *part[0])]
        if schedule.joint_epochs and learned:
            train_jointly(
                (runner, blocks), (reference, blocks), unseen, seen,
                _groups(list(dict.fromkeys(learned)), schedule.joint_lr), epochs=schedule.joint_epochs,
                batch=schedule.batch, answers=schedule.answers,
                views=Views(schedule.zoom, schedule.mirror, schedule.side), generator=generator, device=device,
                progress=(lambda done: progress(done, "all blocks")) if progress else None,
            )  # fmt: skip
    return results


def _block_by_block(
    runner: Runner,
    reference: Runner,
    blocks: Sequence[Span],
    unseen: Tensor,
    seen: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    progress: Callable[[float, str], None] | None,
) -> list[BlockResult]:
    device = next(runner.model.parameters()).device
    x = [part.to(device) for part in torch.split(seen, schedule.batch)]
    judges = [part.to(device) for part in torch.split(unseen, schedule.batch)]
    target, results = x, []
    with torch.no_grad():
        answers = [_through(reference, blocks, value) for value in judges]
    for number, block in enumerate(blocks):
        name = _title(runner, *block[0])
        if progress:
            progress(number / len(blocks), name)
        part = functools.partial(run_block, runner, block)
        with torch.no_grad():
            target = [_held(run_block(reference, block, value)) for value in target]
        judged = functools.partial(_answer_error, runner, blocks[number:], judges, answers)
        if learned := _parameters(runner, *block[0]):
            before, after = _train(part, learned, x, target, judged, schedule, generator)
            results.append(BlockResult(name, before, after))
        with torch.no_grad():
            x, judges = [_held(part(value)) for value in x], [_held(part(value)) for value in judges]
    return results


@torch.no_grad()
def _answer_error(runner: Runner, rest: Sequence[Span], values: Sequence[Tensor], answers: Sequence[Tensor]) -> float:
    """How far the answers that the rest of the blocks makes of these values are from the dense model's."""
    return distance([_through(runner, rest, value) for value in values], answers)


def _through(runner: Runner, blocks: Sequence[Span], value: Tensor) -> Tensor:
    """What these blocks make of a value, one after the other."""
    return functools.reduce(lambda held, block: run_block(runner, block, held), blocks, value)


def _cuts(runner: Runner) -> list[int]:
    """Where blocks begin and end: positions at which one value is alive, each block with weights and, unless the graph
    is a plain chain there, with the whole of what runs in parallel."""
    count = len(runner.nodes)
    single = [at for at in range(1, count) if len(runner.live(at)) == 1 and _plain(runner, at)]
    cuts = [0]
    for at in single:
        if _weighted(runner, cuts[-1], at) and not _goes_on(runner, at):
            cuts.append(at)
    while len(cuts) > 1 and not _weighted(runner, cuts[-1], count):
        cuts.pop()
    return [*cuts, count]


def _plain(runner: Runner, at: int) -> bool:
    """Whether the live value is a tensor that is made before the cut, not the bare input."""
    return runner.live(at)[0].op != "placeholder"


def _goes_on(runner: Runner, at: int) -> bool:
    """Whether the next operator belongs to the block before: a norm or an activation."""
    node = runner.nodes[at]
    if node.op == "call_module":
        return not isinstance(runner.model.get_submodule(str(node.target)), (*Weighted, nn.Identity))
    if node.op == "call_function":
        return len(node.all_input_nodes) == 1
    return node.op == "call_method" and len(node.all_input_nodes) == 1


def _weighted(runner: Runner, first: int, stop: int) -> bool:
    return any(
        node.op == "call_module" and isinstance(runner.model.get_submodule(str(node.target)), Weighted)
        for node in runner.nodes[first:stop]
    )


def _title(runner: Runner, first: int, stop: int) -> str:
    names = [str(node.target) for node in runner.nodes[first:stop] if node.op == "call_module"]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}" if names else "block"


def _parameters(runner: Runner, first: int, stop: int) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for node in runner.nodes[first:stop]:
        if node.op == "call_module":
            for parameter in runner.model.get_submodule(str(node.target)).parameters():
                if parameter.requires_grad:
                    found[id(parameter)] = parameter
    return list(found.values())


def _held(value: Tensor) -> Tensor:
    """Half precision for what is only kept."""
    return value.half() if value.dtype == torch.float32 and float(value.abs().max()) < 60_000 else value


def _groups(parameters: Sequence[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Adam moves every weight by about its rate a step: rates in proportion to the weights' size."""
    return [{"params": [p], "lr": lr * _size(p)} for p in parameters]


def _size(parameter: Tensor) -> float:
    kept = parameter.detach()[parameter.detach() != 0]
    return max(float(kept.square().mean().sqrt()), 1e-4) if kept.numel() else 1e-4


def _train(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    x: Sequence[Tensor],
    target: Sequence[Tensor],
    judged: Callable[[], float],
    schedule: Schedule,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Fit run(x) to target as far as the judge likes it. Relative errors before and after."""
    mean = torch.stack([t.float().mean((0, *range(2, t.ndim))) for t in target]).mean(0)
    shape = (1, -1, *([1] * (target[0].ndim - 2)))
    variance = float(torch.stack([(t.float() - mean.view(shape)).square().mean() for t in target]).mean()) or 1.0

    def error() -> float:
        with torch.no_grad():
            total = sum(float(functional.mse_loss(run(a), b.float())) for a, b in zip(x, target, strict=True))
        return total / len(x) / variance

    def steps(groups: list[dict[str, Any]]) -> Iterator[Iterator[float]]:
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=schedule.epochs * len(x) + 1,
            pct_start=0.1, cycle_momentum=False, div_factor=10, final_div_factor=100,
        )  # fmt: skip
        for _ in range(schedule.epochs):
            yield _epoch(run, x, target, variance, optimizer, rates, generator)

    before = error()
    if before < EXACT:
        return before, before
    train_judged(_groups(parameters, schedule.lr), steps, schedule.epochs, judged)
    return before, error()


def _epoch(
    run: Callable[[Tensor], Tensor],
    x: Sequence[Tensor],
    target: Sequence[Tensor],
    variance: float,
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> Iterator[float]:
    """All batches once; yields the share that is done."""
    for done, at in enumerate(torch.randperm(len(x), generator=generator).tolist(), 1):
        optimizer.zero_grad(set_to_none=True)
        loss = functional.mse_loss(run(x[at]), target[at].float()) / variance
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
        yield done / len(x)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model to reconstruct towards, taken before pruning."""
    return copy.deepcopy(model).eval().requires_grad_(False)
