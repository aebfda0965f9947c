"""Which tensors could stand in panels instead of planes: those between convolutions, read by pointwise ones or added,
and what a scale and shift (a BatchNorm in front of its convolution) writes for such.

Both ends of an edge must agree, and what one step reads, writes and adds is best alike; so tensors that meet at a step
are decided together: an ``Edges``. In a network of bottlenecks that is everything in a stage but what its 3x3
convolutions read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from colonnade.frontend.draft import Draft, Tensor, Value
from colonnade.frontend.feeding import LayoutCosts, is_clip
from colonnade.frontend.ties import Ties
from colonnade.workload import Affine, Conv2d, is_depthwise

VECTORS = 2  # registers of a strip: every ISA has kernels of this width, and on RVV they are the best ones ...
WIDE, FEW = 4, 2  # ... but for tiles of so few rows, which are done with a column before the next one is there


@dataclass(frozen=True, eq=False)
class Edges:
    """Tensors that go into panels together, with strips of ``vectors`` registers, and the names of the steps that this
    concerns."""

    tensors: frozenset[Tensor]
    steps: tuple[str, ...]
    macs: int  # multiply-adds on kept weights of those that read them
    vectors: int = VECTORS


def edges(steps: list[Draft], windows: bool = False) -> list[Edges]:
    """All that could be in panels, in the order of the steps, whose tiles are known by now.

    ``windows``: see ``LayoutCosts``. It is true where the length of vectors is known at run time only; so any number of
    them makes strips of one width.
    """
    readers: dict[Tensor, list[tuple[Draft, int, Value]]] = {}
    for step in steps:
        for index, value in enumerate(step.inputs):
            for tensor in value.read:
                readers.setdefault(tensor, []).append((step, index, value))
    able = [step.output for step in steps if step.output is not None and _writes(step)]
    able = [tensor for tensor in able if _all_read(tensor, readers.get(tensor, []), windows)]
    found = [tensor for tensor in able if any(index == 0 for _, index, _ in readers[tensor])]
    for tensor in able[::-1]:  # what is only added to something that is in panels follows that
        if tensor not in found and all(step.output in found for step, _, _ in readers[tensor]):
            found.append(tensor)
    found.sort(key=able.index)
    ties = Ties()
    for step in steps:
        ties.tie(*(t for t in (step.output, *(v.tensor for v in step.inputs)) if t is not None and t in found))
    groups: dict[Tensor, list[Tensor]] = {}
    for tensor in found:
        groups.setdefault(ties.find(tensor), []).append(tensor)
    result = []
    for tensors in groups.values():
        mine = frozenset(tensors)
        concerned = [s for s in steps if s.output in mine or any(v.tensor in mine for v in s.inputs)]
        reading = [s for s in concerned if s.inputs and s.inputs[0].tensor in mine]
        wide = windows and _kept(filter(_low, concerned)) * 2 > _kept(concerned)
        names = tuple(s.name for s in concerned)
        result.append(Edges(mine, names, _kept(reading), WIDE if wide else VECTORS))
    return result


def chosen(found: list[Edges], costs: LayoutCosts) -> frozenset[int]:
    """Those that gain by the costs: what a plane costs more to read, over the multiply-adds of its readers."""
    return frozenset(i for i, edge in enumerate(found) if costs.plane * edge.macs > 0)


def _writes(step: Draft) -> bool:
    """Can the step store panels?"""
    conv, output = step.workload, step.output
    if isinstance(conv, Affine):
        return is_clip(conv.activation) and output is not None and not output.is_rows and output.phases == (1, 1)
    return (
        isinstance(conv, Conv2d)
        and not is_depthwise(conv)
        and conv.epilogue.activation.function is None  # it works on planes, in place
        and output is not None
        and step.channels is None  # a part of a map, which others write too
        and output.phases == (1, 1)
    )


def _all_read(tensor: Tensor, readers: list[tuple[Draft, int, Value]], windows: bool) -> bool:
    """Does every reader take the whole tensor, by pointwise convolution or as a residual, and is there one?"""
    return bool(readers) and all(
        value.tensor is tensor and (index == 1 or _pointwise(step) or (windows and _strided(step)))
        and isinstance(step.workload, Conv2d) and not is_depthwise(step.workload)
        for step, index, value in readers
    )  # fmt: skip


def _pointwise(step: Draft) -> bool:
    conv = step.workload
    return (
        isinstance(conv, Conv2d)
        and not step.panels
        and conv.prologue is None
        and (conv.kernel, conv.stride) == ((1, 1), (1, 1))
        and not any(conv.padding)
    )


def _strided(step: Draft) -> bool:
    """A pointwise convolution with a stride that gathers its input."""
    conv = step.workload
    return (
        isinstance(conv, Conv2d)
        and step.panels
        and conv.prologue is None
        and conv.kernel == (1, 1)
        and conv.stride != (1, 1)
        and not any(conv.padding)
    )


def _low(step: Draft) -> bool:
    """Are its tiles of few rows?"""
    conv = step.workload
    return isinstance(conv, Conv2d) and 0 < conv.tile <= FEW


def _kept(steps: Iterable[Draft]) -> int:
    return sum(step.workload.kept_macs for step in steps)
