"""Training that does not depend on the number of processes: batches shared out, samples seeded, statistics summed.

With these three a run under ``accelerate launch`` computes what one process computes, up to the order of sums (and up
to the model's own random numbers, as of dropout, which every process draws for its part of a batch).
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from colonnade.errors import UserError


class _Seeded(Dataset[Any]):
    """A data set asked for (epoch, index): whatever a sample draws at random follows from these two and the seed."""

    def __init__(self, samples: Dataset[Any], seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        words = np.random.SeedSequence((self.seed, *place)).generate_state(2, np.uint32)
        generator = torch.default_generator  # torch.manual_seed would seed the GPUs too
        before = generator.get_state(), random.getstate(), np.random.get_state()
        generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        random.seed(int(words[0]))
        np.random.seed(words)
        try:
            return self.samples[place[1]]
        finally:
            generator.set_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])


class _Part:
    """A batch sampler: of every batch this process's share, each index with the epoch."""

    def __init__(self, batches: Iterable[list[int]], rank: int, processes: int) -> None:
        self.batches, self.rank, self.processes, self.epoch = batches, rank, processes, 0
        self.counts: deque[int] = deque()  # of what was asked for and has not arrived: loaders ask ahead, in order

    def __len__(self) -> int:
        return len(cast(Sized, self.batches))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            mine = batch[self.rank :: self.processes]
            self.counts.append(len(mine))
            # Every process takes part in every step; one without a share repeats a sample, which counts for nothing.
            yield [(self.epoch, index) for index in mine or batch[:1]]


class Batches:
    """This process's part of every batch of ``loader``, on ``device``, in an order that follows from (seed, epoch).

    loader: a DataLoader over a data set with indices, or any sized iterable of (inputs, targets) batches, the same in
        every process. Raises UserError when its length is not known.
    """

    def __init__(
        self, loader: Iterable[Any], what: str, *, rank: int, processes: int, device: torch.device, seed: int
    ) -> None:
        self.rank, self.processes, self.device, self.seed = rank, processes, device, seed
        self.whole, self.part = loader, None
        indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if indexed and loader.batch_sampler is not None:  # type: ignore[attr-defined]
            given = cast("DataLoader[Any]", loader)
            self.part = _Part(cast(Iterable[list[int]], given.batch_sampler), rank, processes)
            self.loader: Iterable[Any] = DataLoader(
                _Seeded(given.dataset, seed), batch_sampler=cast(Any, self.part), num_workers=given.num_workers,
                collate_fn=given.collate_fn, pin_memory=given.pin_memory, timeout=given.timeout,
                worker_init_fn=given.worker_init_fn, multiprocessing_context=given.multiprocessing_context,
                prefetch_factor=given.prefetch_factor, persistent_workers=given.persistent_workers,
                generator=torch.Generator().manual_seed(seed),  # of the workers' seeds: else the model's is drawn from
            )  # fmt: skip
        else:
            self.loader = loader
        try:
            self.length = len(cast(Sized, loader))
        except TypeError as error:
            raise UserError(f"the {what} loader has no length: give a DataLoader or a list of batches") from error

    def __len__(self) -> int:
        return self.length

    def epoch(self, number: int) -> Iterator[tuple[Any, Any, int]]:
        """(inputs, targets, how many of them count) of every batch of an epoch, counted from 0."""
        if self.part is not None:
            self.part.epoch = number
            self.part.counts.clear()
            given = cast("DataLoader[Any]", self.whole)
            sampler = getattr(given.batch_sampler, "sampler", given.sampler)
            if hasattr(sampler, "generator"):
                sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        for inputs, targets in self.loader:
            batch = (inputs, targets)
            if self.part is not None:
                count = self.part.counts.popleft()
            else:
                count = len(range(self.rank, len(targets), self.processes))
                batch = (self._share(inputs), self._share(targets))
            moved = send_to_device(batch, self.device, non_blocking=True)
            yield moved[0], moved[1], count

    def _share(self, values: Any) -> Any:
        """This process's part of tensors whose first axis is the batch."""
        if isinstance(values, Tensor):
            return values[self.rank :: self.processes] if len(values) > self.rank else values[:1]
        if isinstance(values, dict):
            return {key: self._share(value) for key, value in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self._share(value) for value in values)
        return values


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; each process's loss depends on the tensors of all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum(value: Tensor, group: Any) -> Tensor:
    return cast(Tensor, _Sum.apply(value, group))  # type: ignore[no-untyped-call]


def _synchronized(module: _BatchNorm, group: Any, x: Tensor) -> Tensor:
    """What ``module`` does to x (batch, channels, …), with statistics of the whole batch instead of this share."""
    if not (module.training or module.running_mean is None):
        return type(module).forward(module, x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    values = x if x.dtype == torch.float64 else x.float()  # under autocast too: statistics need the digits
    sums = _sum(torch.cat([values.sum(axes), values.new_tensor([x.numel() / x.shape[1]])]), group)
    count = sums[-1].detach()
    mean = sums[:-1] / count
    # Squares of what is left after the mean: a difference of large sums would lose it.
    centred = values - mean.view(shape)
    variance = _sum(centred.square().sum(axes), group) / count
    if module.training and module.track_running_stats and module.running_mean is not None:
        assert module.running_var is not None and module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        share = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
        with torch.no_grad():
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), share)
            unbiased = variance * (count / (count - 1).clamp_min(1))
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), share)
    out = centred * (variance + module.eps).rsqrt().view(shape)
    if module.affine:
        out = out * module.weight.view(shape) + module.bias.view(shape)
    return out.to(x.dtype)


@contextlib.contextmanager
def synchronized_batchnorm(model: nn.Module, processes: int) -> Iterator[None]:
    """Inside, every BatchNorm of ``model`` in training mode takes its statistics from the batches of all processes.

    On any device and backend (torch's SyncBatchNorm is for GPUs alone), without other modules in the model's place.
    """
    if processes == 1:
        yield
        return
    # A group of its own: its sums and those of the gradients pass each other.
    group = dist.new_group()
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    try:
        for module in layers:
            module.forward = functools.partial(_synchronized, module, group)  # type: ignore[method-assign]
        yield
    finally:
        for module in layers:
            vars(module).pop("forward", None)
        dist.destroy_process_group(group)
