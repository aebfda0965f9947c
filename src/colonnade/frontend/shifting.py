"""Which convolutions read shifted planes: where zeros between the rows of small maps cost more than copies.

A convolution computes all lanes of its output up to the last pixel, those between its rows too: of a map of 7x7 that is
55 for 49. They are there for taps beside the first and last column. If every convolution of a region that has such taps
reads copies of its input that are shifted (``layout.Planes``), one for every column that a tap begins at (but its own:
that is the input as it stands), the region needs no zeros behind its rows, and its pointwise convolutions gain as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from math import prod

from colonnade.frontend.draft import Draft, Tensor, whole
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.layouts import Regions, copy_step, imports, sizes
from colonnade.layout import Planes
from colonnade.workload import Conv2d, ConvTranspose2d, Reach, WinogradConv2d, is_depthwise

GAIN = 1.5  # what is saved over what the copies cost, at least
# rows and columns of a map at most, and the share of a 3x3's columns kept past which Winograd's convolution, which
# reads planes alone, is quicker: the larger the map, the fuller its transformed tiles
TRANSFORMED = ((8, 1.0), (16, 0.5), (math.inf, 0.38))


def shift(steps: list[Draft], costs: LayoutCosts) -> list[Draft]:
    """The steps with shifted copies in the regions that gain."""
    if not costs.vector:
        return steps
    regions, result = sizes(steps), list(steps)
    members: dict[Tensor, list[Draft]] = {}
    for step in steps:
        if isinstance(step.workload, (Conv2d, ConvTranspose2d)) and step.output is not None and not step.output.is_rows:
            members.setdefault(regions.find(step.output), []).append(step)
    importers = imports(steps)
    for region in members.values():
        wide = [step for step in region if _beside(step)]
        if wide and all(_can(step) for step in wide) and _saved(region, wide, regions, costs) > GAIN * _ns(wide, costs):
            result = _shifted(result, wide, importers)
    return result


def _beside(step: Draft) -> bool:
    """Does a convolution that reads in place have taps beside its column?"""
    conv = step.workload
    if isinstance(conv, ConvTranspose2d):
        return True
    assert isinstance(conv, Conv2d)
    right = Reach.of(conv, 1)
    return not step.panels and (right.before > 0 or right.after > 0)


def _can(step: Draft) -> bool:
    """Are there kernels for shifted planes, and none that would be much quicker without?"""
    conv = step.workload
    if not isinstance(conv, Conv2d) or is_depthwise(conv) or conv.prologue is not None:
        return False
    if isinstance(conv, WinogradConv2d):
        return False
    plain = (conv.kernel, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    if not plain:
        return True
    most = next(kept for size, kept in TRANSFORMED if max(conv.out_height, conv.out_width) <= size)
    return bool((step.constants["weight"] != 0).mean() <= most)


def _saved(region: list[Draft], wide: list[Draft], regions: Regions, costs: LayoutCosts) -> float:
    """Nanoseconds of multiply-adds on lanes that are no pixels."""
    ns, narrow = 0.0, max(tensor.shape[3] for tensor in _tied(region))
    for step in region:
        conv, output = step.workload, step.output
        if not isinstance(conv, Conv2d) or is_depthwise(conv) or output is None:
            continue
        n, _, height, width = output.shape
        pitch, rows = regions.size(output)
        kept = int((step.constants["weight"] != 0).sum())
        lanes = (Planes(n, height, width, p, rows).lanes for p in (pitch, narrow))
        before, after = (_turns(count, costs.vector) for count in lanes)
        ns += kept * (before - after) * costs.vector * costs.mac
    return ns


def _tied(region: list[Draft]) -> Iterable[Tensor]:
    """Tensors that a region's pitch has to hold: outputs, and inputs that are read without a stride."""
    for step in region:
        assert step.output is not None
        yield step.output
        conv = step.workload
        if isinstance(conv, Conv2d) and conv.stride == (1, 1) and not step.panels:
            yield from step.inputs[0].tensors


def _turns(lanes: int, vector: int) -> float:
    """Vectors that ``lanes`` are computed in; a lane of the rest costs that part of one, until it is cheaper whole."""
    return lanes // vector + min(1.0, lanes % vector * 1.25 / vector)


def _ns(wide: list[Draft], costs: LayoutCosts) -> float:
    """What the copies cost; of those into phases, the planes that they have more."""
    ns, seen = 0.0, set()
    for step in wide:
        conv, x = step.workload, step.inputs[0]
        assert isinstance(conv, Conv2d)
        if (x.identity(), conv.kernel[1]) in seen:
            continue  # one copy for both
        seen.add((x.identity(), conv.kernel[1]))
        down, plain, right = Reach.of(conv, 0), Reach.of(conv, 1), Reach.of(conv, 1, shifted=True)
        planes = len(right.phases) - (len(plain.phases) if conv.stride != (1, 1) else 0)
        ns += 4.0 * prod(x.placed_shape) / prod(conv.stride) * len(down.phases) * planes * costs.copy
    return ns


def _shifted(steps: list[Draft], wide: list[Draft], importers: Mapping[Tensor | None, Draft]) -> list[Draft]:
    """The steps with ``wide`` reading shifted copies; those into phases become such, for all their readers."""
    made: dict[object, Tensor] = {}
    result: list[Draft] = []
    for step in steps:
        if step in wide:
            x = step.inputs[0]
            target = x.tensors[0] if x.tensors[0].phases != (1, 1) else made.get(x.identity())
            if target is None:
                target = Tensor(f"{step.name}.shifted", x.placed_shape, itemsize=x.itemsize)
                result.append(copy_step(x, target, importers))
            made[x.identity()] = target
            copied = target.phases == (1, 1) and x.tensor not in importers
            step.inputs[0] = replace(whole(target), centre=x if copied else None)
        result.append(step)
    for target in made.values():
        kept, known = set[tuple[int, int]](), set[tuple[int, int]]()
        for step in result:
            if isinstance(step.workload, Conv2d) and target in step.inputs[0].tensors:
                down, right = Reach.of(step.workload, 0), Reach.of(step.workload, 1, shifted=True)
                kept |= set(product(down.phases, right.phases))
                known |= {(0, 0)} if step.inputs[0].centre is not None else set()
        target.kept_phases = tuple(sorted(kept - known))
    return result
