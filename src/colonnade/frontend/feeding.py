"""Which convolutions read panels instead of planes: choices over the whole model, by the bytes that they save.

A convolution that cannot read its input as it stands needs a step that writes it once more: in phases for a stride,
with wide halos for a strong dilation, scaled and clipped for a BatchNorm and ReLU in front of it. Or it gathers
panels, which moves more bytes (a pixel once a tap) but in a cache, and needs no step. Costs are nanoseconds a byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from colonnade.frontend.draft import Draft, Tensor, Value, is_import
from colonnade.workload import Activation, Affine, Conv2d, Reach, WinogradConv2d, is_depthwise


@dataclass(frozen=True)
class LayoutCosts:
    """What moving a byte costs, in ns: only their ratios count.

    copy:   a step that copies planes to another layout, per byte read or written.
    scale:  a step that scales, shifts and clips, likewise.
    gather: a panel, per byte written, from pixels that stand side by side ...
    pick:   ... or that are every second or third one of a row ...
    scaled: ... or that are scaled, shifted and clipped on the way.
    mac:    a multiply-add on a kept weight, where a wide halo makes a convolution compute lanes that are no pixels.
    plane:  what a multiply-add of a pointwise convolution costs more where its input stands in planes, a page each,
            than where it stands in panels; 0 where that makes no difference.
    linear: a multiply-add of a linear layer on rows, outputs in the lanes; tokens in the lanes cost ``mac`` ...
    sparse: ... or one on a kept weight where few are kept: tiles are lower than vectors are long.
    reorder: a byte that changes between rows and planes.
    vector: lanes of a vector, where a strip's last lanes may be fewer; 0: lanes are computed in whole strips.
    windows: do the kernels gather what a strided pointwise convolution reads from panels as well?
    """

    copy: float = 0.02
    scale: float = 0.0105
    gather: float = 0.024
    pick: float = 0.065
    scaled: float = 0.05
    mac: float = 0.018
    plane: float = 0.0
    linear: float = 0.024
    sparse: float = 0.055
    reorder: float = 0.25
    vector: int = 0
    windows: bool = False

    @classmethod
    def of(cls, isa: str, lanes: int = 0) -> LayoutCosts:
        """What is known without measuring: ``docs/feeding.md`` says from where. ``lanes`` of the ISA's vectors, 0 where
        their length is known at run time only."""
        costs = cls(plane=0.03, pick=0.03, windows=True) if isa.startswith("rvv") else cls()
        return replace(costs, vector=lanes)


def fuse_prologues(steps: list[Draft], costs: LayoutCosts) -> list[Draft]:
    """Scale, shift and clip in the panels of the convolutions that read them, where that is cheaper than a step."""
    result = []
    for step in steps:
        readers = _readers(steps, step.output) if isinstance(step.workload, Affine) else []
        if readers and all(_takes_prologue(reader, step) for reader in readers):
            assert isinstance(step.workload, Affine)
            moved = 2 * _bytes(step.workload.shape)
            if sum(gather_ns(reader, costs, scaled=True) for reader in readers) < moved * costs.scale:
                for reader in readers:
                    assert isinstance(reader.workload, Conv2d)
                    reader.workload = replace(reader.workload, prologue=step.workload.activation)
                    scale, shift = step.constants["scale"], step.constants["shift"]
                    reader.constants = {**reader.constants, "before_scale": scale, "before_shift": shift}
                    reader.inputs[0] = step.inputs[0]
                    reader.panels = True
                continue
        result.append(step)
    return result


def _takes_prologue(reader: Draft, step: Draft) -> bool:
    conv = reader.workload
    return (
        isinstance(conv, Conv2d)
        and not isinstance(conv, WinogradConv2d)
        and isinstance(step.workload, Affine)
        and is_clip(step.workload.activation)
        and not step.inputs[0].is_rows
        and conv.prologue is None
        and not is_depthwise(conv)
        and reader.inputs[0].tensor is step.output
        and all(step.output not in value.tensors for value in reader.inputs[1:])
    )


def is_clip(activation: Activation) -> bool:
    """Limits alone, which is what panels know."""
    return activation == Activation(activation.low, activation.high)


def panels_for_strides(steps: list[Draft], costs: LayoutCosts) -> None:
    """Mark the strided convolutions that gather from plain planes rather than have them copied into phases.

    Convolutions with one input and stride share the copy, so they decide together. The model's input costs nothing: it
    is imported into phases.
    """
    imported = {step.output for step in steps if is_import(step)}
    groups: dict[object, list[Draft]] = {}
    for step in steps:
        conv = step.workload
        if isinstance(conv, Conv2d) and conv.stride != (1, 1) and not step.panels:
            groups.setdefault((step.inputs[0].identity(), conv.stride), []).append(step)
    for members in groups.values():
        x = members[0].inputs[0]
        if any(is_depthwise(m.workload) for m in members) or x.tensor in imported:
            continue
        if sum(gather_ns(member, costs) for member in members) < _phases_bytes(x, members) * costs.copy:
            for member in members:
                member.panels = True


def _phases_bytes(x: Value, members: Iterable[Draft]) -> float:
    """Read and written by a copy into the phases that ``members`` need."""
    kept: set[tuple[int, int]] = set()
    stride = (1, 1)
    for member in members:
        assert isinstance(member.workload, Conv2d)
        down, right, stride = Reach.of(member.workload, 0), Reach.of(member.workload, 1), member.workload.stride
        kept |= {(py, px) for py in down.phases for px in right.phases}
    written = _bytes(x.placed_shape) * len(kept) / prod(stride)
    # a row is read as a whole, whichever of its pixels are wanted
    return written + _bytes(x.placed_shape) * len({py for py, _ in kept}) / stride[0]


def gather_ns(step: Draft, costs: LayoutCosts, scaled: bool = False) -> float:
    """What the panels of a convolution cost, all strips together."""
    conv = step.workload
    assert isinstance(conv, Conv2d)
    rows = step.constants["weight"].reshape(conv.groups, -1, *step.constants["weight"].shape[1:])
    kept = int((rows != 0).any(axis=1).sum())
    pixels = conv.batch * conv.out_height * conv.out_width
    ns = max(costs.gather if conv.stride[1] == 1 else costs.pick, costs.scaled if scaled else 0.0)
    return 4.0 * kept * pixels * ns


def copy_ns(tensors: Iterable[tuple[int, ...]], costs: LayoutCosts) -> float:
    """What copies of tensors of these shapes cost."""
    return sum(2 * _bytes(shape) * costs.copy for shape in tensors)


def _readers(steps: list[Draft], tensor: Tensor | None) -> list[Draft]:
    return [step for step in steps if any(tensor in value.tensors for value in step.inputs)]


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * prod(shape)
