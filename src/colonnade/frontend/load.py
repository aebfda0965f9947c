"""A model → its Plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colonnade.errors import UserError
from colonnade.frontend import layouts, memory, panels, stems
from colonnade.frontend.clean import CUT, clean, read
from colonnade.frontend.draft import Draft, Tensor, Value
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.half import halve
from colonnade.frontend.images import one_by_one
from colonnade.frontend.importer import Importer
from colonnade.frontend.ordering import order_channels
from colonnade.frontend.parts import part
from colonnade.frontend.rebatch import BATCH
from colonnade.frontend.registry import HANDLERS, TYPED
from colonnade.frontend.shifting import shift
from colonnade.layout import Layout, Panels, Placed, Planes, Rows, place
from colonnade.pattern import discover
from colonnade.plan import Buffer, Plan, Port, Step
from colonnade.workload import Conv2d, ConvTranspose2d, Linear, Workload, is_depthwise, matrix

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

SLACK = 4096  # bytes behind the last plane: a strip of the widest vectors may read on past the last lane


def load(
    model: str | Path | ir.Model | onnx.ModelProto,
    *,
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    outputs: Sequence[str] | None = None,
    layout_costs: LayoutCosts | None = None,
) -> Plan:
    """Import an ONNX model (a file or a model in memory, which stays unchanged).

    ``batch`` replaces the first size of every input (1 where it is free and none is given), ``input_shapes`` the
    whole shape of the inputs it names; ``outputs`` cuts the graph at these values.
    ``layout_costs`` decide between copies, planes and panels; the defaults were measured on one machine.

    Raises:
        UserError: the file cannot be read, a size stays free, a name is unknown, or operators are not supported:
            then all of them are named at once, a line each.
    """
    found = imported(model, batch=batch, input_shapes=input_shapes, outputs=outputs, layout_costs=layout_costs)
    return found.arrange(layout_costs).plan()


def imported(
    model: str | Path | ir.Model | onnx.ModelProto,
    *,
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    outputs: Sequence[str] | None = None,
    layout_costs: LayoutCosts | None = None,
) -> Imported:
    """``load`` up to where layouts are assigned, for which the target should be known.

    ``layout_costs`` decide which linear layers have their tokens in the lanes.
    """
    if batch is not None and (not isinstance(batch, Integral) or batch < 1):
        raise UserError(f"batch {batch!r}: expected a whole number from 1")
    for port, shape in (input_shapes or {}).items():
        if not isinstance(shape, Sequence) or not all(isinstance(size, Integral) for size in shape):
            raise UserError(f"input {port}: shape {shape!r}: expected whole numbers")
    source = read(model)
    name = Path(model).stem if isinstance(model, (str, Path)) else source.graph.name or "model"
    left = ""

    def at(size: int | None) -> Importer:
        nonlocal left
        try:
            cleaned = clean(source, size, input_shapes, outputs, HANDLERS)
            left = cleaned.metadata_props.get(CUT, "")
            importer = Importer(cleaned.graph, HANDLERS, layout_costs, TYPED)
            importer.run()
        except UserError as error:
            old = source.metadata_props.get(BATCH)
            if old is None or "not supported; cut the model" in str(error):
                raise
            raise UserError(
                f"{error}\n(the model was exported for a batch of {old}; for another one export it with a free batch)"
            ) from error
        return importer

    whole = at(batch)
    importer, images, seam = (whole, 1, None) if left else one_by_one(whole, lambda: at(1))
    return Imported(name, importer, left, images, seam)


@dataclass(eq=False)
class Imported:
    """A model as steps without layouts, to be run for ``images`` in turn up to ``seam``; call ``arrange`` once.

    ``cut``: the operators that were left behind the outputs it was cut at, with their numbers; for the host to run.
    """

    name: str
    importer: Importer
    cut: str = ""
    images: int = 1
    seam: Port | None = None

    def arrange(self, costs: LayoutCosts | None = None, half: Collection[str] | None = None) -> Arranged:
        """Assign layouts by what moving data costs; ``LayoutCosts.of(isa)`` knows that of an ISA. ``half``: None, or
        convolutions compute with float16, and apply these functions themselves."""
        costs = costs or LayoutCosts()
        ordered = order_channels(stems.join(self.importer.steps))
        if half is not None:
            ordered = halve(ordered, half)
        steps = layouts.arrange(ordered, costs)
        drafts = part(_needed(shift(steps, costs)))
        for draft in drafts:
            draft.workload = _with_sparsity(draft)
        found = panels.edges(drafts, costs.windows)
        return Arranged(self.name, self.importer, self.images, self.seam, drafts, found, panels.chosen(found, costs))


@dataclass(eq=False)
class Arranged:
    """A model whose layouts are assigned but for the choice between planes and panels; a ``plan.Variants``.

    ``default``: which of ``found`` are in panels where nothing was measured. ``rms``: what ``plan.Step`` knows by this
    name, by step.
    """

    name: str
    importer: Importer
    images: int
    seam: Port | None
    drafts: list[Draft]
    found: list[panels.Edges]
    default: frozenset[int]
    rms: Mapping[str, float] = field(default_factory=dict)

    @property
    def edges(self) -> tuple[tuple[str, ...], ...]:
        """By choice, the steps that it concerns."""
        return tuple(edge.steps for edge in self.found)

    def plan(self, stored: Collection[int] | None = None) -> Plan:
        """The plan with the choices ``stored`` in panels and all others in planes; by the costs where None."""
        wanted = self.default if stored is None else stored
        tensors = {tensor: self.found[i].vectors for i in wanted for tensor in self.found[i].tensors}
        plan = _place_all(self.name, self.importer, self.drafts, tensors)
        inputs, outputs = (tuple(self._port(port) for port in ports) for ports in (plan.inputs, plan.outputs))
        steps = tuple(replace(s, rms=self.rms.get(s.name)) for s in plan.steps) if self.rms else plan.steps
        return replace(plan, inputs=inputs, outputs=outputs, images=self.images, seam=self.seam, steps=steps)

    def _port(self, port: Port) -> Port:
        return replace(port, shape=(self.images * port.shape[0], *port.shape[1:])) if self.images > 1 else port


def examine(
    model: str | Path | ir.Model | onnx.ModelProto,
    *,
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    outputs: Sequence[str] | None = None,
) -> tuple[list[tuple[str, Workload]], list[str]]:
    """(name and workload of every step that can be imported, a line for every part that cannot), without a plan.

    Raises:
        UserError: the file cannot be read, a size stays free, or a name is unknown.
    """
    importer = Importer(clean(read(model), batch, input_shapes, outputs, HANDLERS).graph, HANDLERS, typed=TYPED)
    importer.walk()
    return [(step.name, _with_sparsity(step)) for step in importer.steps], importer.problems


def _needed(steps: list[Draft]) -> list[Draft]:
    """Without steps whose result nobody reads."""
    read_by_someone: set[Tensor] = set()
    result = []
    for step in reversed(steps):
        if step.output is None or step.output in read_by_someone:
            result.append(step)
            read_by_someone.update(tensor for value in step.inputs for tensor in value.read)
    return result[::-1]


def _place_all(name: str, importer: Importer, drafts: list[Draft], stored: Mapping[Tensor, int]) -> Plan:
    """Give every tensor its layout and its place in the arena; those ``stored`` are in panels of so many registers."""
    chosen, reach = layouts.assign(drafts, stored)
    first: dict[Tensor, int] = {}
    last: dict[Tensor, int] = {}
    for index, draft in enumerate(drafts):
        if draft.output is not None:
            first.setdefault(draft.output, index)
            last[draft.output] = index
        for value in draft.inputs:
            last.update(dict.fromkeys(value.read, index))
    held = _in_place_of_residuals(drafts, chosen, last)
    tensors = [tensor for tensor in first if held[tensor] is tensor]
    for tensor in first:
        last[held[tensor]] = max(last[held[tensor]], last[tensor])
    sizes = [chosen[tensor].buffer_bytes(tensor.channels) for tensor in tensors]
    lives = [memory.Life(size, first[tensor], last[tensor]) for tensor, size in zip(tensors, sizes, strict=True)]
    offsets, total = memory.plan(lives)
    at = dict(zip(tensors, offsets, strict=True))
    placed = {t: place(t.name, t.shape, chosen[t], at[held[t]]) for t in first}
    steps = tuple(
        Step(
            draft.name,
            draft.workload,
            tuple(_placed(value, placed, chosen) for value in draft.inputs),
            None if draft.output is None else _written(placed[draft.output], draft, first[draft.output] == index),
            draft.constants,
            draft.external,
        )
        for index, draft in enumerate(drafts)
    )
    buffers = tuple(
        Buffer(t.name, offset, size, chosen[t], first[t], last[t])
        for t, offset, size in zip(tensors, offsets, sizes, strict=True)
    )
    return Plan(name, tuple(importer.inputs), tuple(importer.outputs), steps, buffers, total + SLACK + 4 * reach)


def _in_place_of_residuals(
    drafts: list[Draft], chosen: dict[Tensor, Layout], last: dict[Tensor, int]
) -> dict[Tensor, Tensor]:
    """By tensor, the one whose buffer it lives in: its own, or that of a residual nobody reads afterwards.

    A convolution reads each lane of its residual just before it writes the same lane of its output, so these may be
    one: the lines that it stores to are there already, and the arena is smaller. Layouts get the larger lead of both.
    """
    held: dict[Tensor, Tensor] = {}
    for index, draft in enumerate(drafts):
        output, conv = draft.output, draft.workload
        if output is None:
            continue
        held[output] = output
        if not isinstance(conv, Conv2d) or not conv.epilogue.residual or is_depthwise(conv):
            continue
        addend = draft.inputs[1].tensor
        if addend is None or addend.shape != output.shape or addend in draft.inputs[0].read or last[addend] != index:
            continue
        mine, other = chosen[output], chosen[addend]
        if isinstance(mine, Panels) and mine == other:
            held[output] = held[addend]
        if not isinstance(mine, Planes) or not isinstance(other, Planes):
            continue
        lead = max(mine.lead, other.lead)
        if replace(mine, lead=lead) == replace(other, lead=lead):
            held[output] = held[addend]
            for tensor in (t for t, holder in held.items() if holder is held[output]):
                chosen[tensor] = replace(mine, lead=lead)
    return held


def _written(whole: Placed, draft: Draft, first: bool) -> Placed:
    """What ``draft`` writes of its output; the ``first`` one to write there clears the lead."""
    if draft.channels is None:
        return whole
    offsets = whole.offsets.reshape(whole.shape[1], -1)[draft.channels].reshape(-1)
    shape = (whole.shape[0], len(draft.channels), *whole.shape[2:])
    return replace(whole, shape=shape, offsets=offsets, lead_bytes=whole.lead_bytes if first else 0)


def _placed(value: Value, placed: dict[Tensor, Placed], chosen: dict[Tensor, Layout]) -> Placed:
    """Where the planes of a value stand; they are all alike, being tied."""
    tensor = value.tensors[0]
    if value.is_rows:
        return Placed(tensor.name, value.placed_shape, Rows(*value.placed_shape), placed[tensor].offsets)
    if value.centre is not None:
        return _among(placed[tensor], _placed(value.centre, placed, chosen))
    if value.tensor is tensor:
        return placed[tensor]
    # leads may differ between the parts; a reader needs none of them
    layout = chosen[tensor]
    assert isinstance(layout, Planes) and layout.phases == (1, 1)
    offsets = np.array([placed[value.tensors[i]].offsets[c] for i, c in value.planes], np.int64)
    return Placed(tensor.name, value.placed_shape, layout, offsets)


def _among(shifted: Placed, centre: Placed) -> Placed:
    """The planes of ``shifted`` and, as those that are not, the ones that they were copied from."""
    layout, channels = shifted.planes, shifted.shape[1]
    planes = dict(zip(layout.stored_phases, shifted.offsets.reshape(channels, -1).T, strict=True)) | {
        (0, 0): centre.offsets
    }
    kept = tuple(sorted(planes))
    offsets = np.stack([planes[phase] for phase in kept], axis=1).reshape(-1)
    return Placed(shifted.name, shifted.shape, replace(layout, kept_phases=kept), offsets)


def _with_sparsity(draft: Draft) -> Workload:
    """The workload with the tiles that its weights show; a depthwise convolution stays dense."""
    workload = draft.workload
    if not isinstance(workload, (Conv2d, ConvTranspose2d, Linear)):
        return workload
    weight = draft.constants["weight"]
    groups = 1 if isinstance(workload, Linear) else workload.groups
    if weight.all() or (groups > 1 and groups == workload.in_channels):
        return workload
    tiled = discover(matrix(weight) if weight.ndim == 4 else weight, groups)
    if tiled.is_dense:
        return workload
    return replace(workload, tile=max(tile.rows.size for tile in tiled.tiles), columns=tiled.kept)
