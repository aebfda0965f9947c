"""Layout assignment: drafts → tensors with pitch, rows and lead, so that convolutions read them in place.

A stride-1 convolution reads element ``k`` of lane ``l`` of its output at lane ``l + (kh*dh - top) * pitch + kw*dw -
left`` of its input: both must have the same pitch and image_rows. Pointwise operators, residuals and planes that one
reader sees as one list are tied likewise. Ties are only ever lower bounds on pitch and rows, so a region (all that
is tied together) takes the largest. A strided convolution reads a copy of its input stored as phases, and it is that
copy that is tied to its output; the model's input is imported into phases directly. A depthwise one of stride 2 takes
every second pixel of planes as they are, which ties nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from colonnade.frontend.draft import Draft, Tensor, Value, is_import, whole
from colonnade.frontend.feeding import LayoutCosts, copy_ns, fuse_prologues, gather_ns, panels_for_strides
from colonnade.frontend.ties import Ties
from colonnade.layout import Layout, Panels, Planes, Rows
from colonnade.workload import (
    Affine,
    Binary,
    ChannelNorm,
    ChannelSoftmax,
    Conv2d,
    Convert,
    ConvTranspose2d,
    Interleave,
    Lrn,
    Precision,
    Reach,
    Unary,
    is_depthwise,
    takes_every_second,
)

# read and write the same lanes of their planes
POINTWISE = (Affine, Binary, Unary, Lrn, ChannelNorm, ChannelSoftmax, Precision)


class Regions(Ties):
    """Ties of tensors in planes, with the pitch and image rows that each region needs."""

    def __init__(self) -> None:
        super().__init__()
        self._need: dict[Tensor, tuple[int, int]] = {}

    def tie(self, *tensors: Tensor) -> None:
        """All of them get one pitch and one number of image rows."""
        planes = [tensor for tensor in tensors if not tensor.is_rows]
        needs = [self._need.get(self.find(tensor), (1, 1)) for tensor in planes]
        super().tie(*planes)
        for tensor, need in zip(planes, needs, strict=True):
            self.need(tensor, *need)

    def need(self, tensor: Tensor, pitch: int, rows: int) -> None:
        """At least these."""
        root = self.find(tensor)
        old = self._need.get(root, (1, 1))
        self._need[root] = (max(old[0], pitch), max(old[1], rows))

    def size(self, tensor: Tensor) -> tuple[int, int]:
        """(pitch, image_rows) of the tensor's region."""
        return self._need[self.find(tensor)]


def arrange(steps: list[Draft], costs: LayoutCosts) -> list[Draft]:
    """The steps with all that layouts need: copies into phases and wide halos, or panels where these cost less."""
    steps = fuse_prologues(_join_phases(steps), costs)
    panels_for_strides(steps, costs)
    return insert_phases(isolate(steps, costs))


def _join_phases(steps: list[Draft]) -> list[Draft]:
    """Transposed convolutions with a stride write phases, which a step of its own puts together."""
    result = []
    for step in steps:
        result.append(step)
        conv, output = step.workload, step.output
        if isinstance(conv, ConvTranspose2d) and conv.stride != (1, 1):
            assert output is not None
            step.output = Tensor(f"{step.name}.phases", output.shape, conv.stride, itemsize=output.itemsize)
            join = Interleave(output.shape, conv.stride)
            result.append(Draft(f"{step.name}.join", join, [whole(step.output)], output))
    return result


WASTE = 1.5  # lanes with halo over lanes without, from which on two copies cost less than what the region would compute
REGION = 4  # tensors that a convolution's region must exceed: a smaller one does not gain from being left alone


def isolate(steps: list[Draft], costs: LayoutCosts) -> list[Draft]:
    """Give convolutions that need far wider halos than sizes (strong dilation) a copy of their input to read.

    Otherwise all that is tied to them would be computed with that pitch. Their output is copied back where it would
    tie them to others again. Or they gather panels, if that costs less than the copies.
    """
    importers = imports(steps)
    regions = tie_all(steps)
    members = Counter(regions.find(t) for step in steps for t in _output(step) if not t.is_rows)
    tying = {
        tensor
        for step in steps
        for value in step.inputs
        if isinstance(step.workload, (*POINTWISE, Conv2d)) or len(value.tensors) > 1
        for tensor in value.tensors
    }
    back: dict[Tensor, Tensor] = {}
    result: list[Draft] = []
    for step in steps:
        step.inputs = [replace(v, tensors=tuple(back.get(t, t) for t in v.tensors)) for v in step.inputs]
        conv, output = step.workload, step.output
        if (
            not isinstance(conv, Conv2d)
            or output is None
            or conv.stride != (1, 1)
            or conv.dilation == (1, 1)  # on tiny maps any halo is wide, and all neighbours have the same
            or step.panels
            or waste(conv) <= WASTE
        ):
            result.append(step)
            continue
        copied = [step.inputs[0].placed_shape, *([output.shape] if output in tying else [])]
        halo_ns = copy_ns(copied, costs) + (waste(conv) - 1) * conv.macs * costs.mac
        if not is_depthwise(conv) and gather_ns(step, costs) < halo_ns:
            step.panels = True
        if step.panels or conv.epilogue.residual or members[regions.find(output)] <= REGION:
            result.append(step)
            continue
        x = step.inputs[0]
        haloed = Tensor(f"{step.name}.haloed", x.placed_shape, itemsize=x.itemsize)
        result += [copy_step(x, haloed, importers), step]
        step.inputs[0] = whole(haloed)
        if output in tying:
            back[output] = Tensor(output.name, output.shape, itemsize=output.itemsize)
            output.name = f"{step.name}.wide"
            result.append(Draft(f"{step.name}.back", Convert("planes", output.shape), [whole(output)], back[output]))
    return result


def waste(conv: Conv2d) -> float:
    """Lanes that a stride-1 convolution makes its region compute, over those of its larger side without any halo."""
    down, right = Reach.of(conv, 0), Reach.of(conv, 1)
    height, width = max(conv.height, conv.out_height), max(conv.width, conv.out_width)
    pitch = max(conv.width + right.before, conv.out_width + right.after)
    rows = max(conv.height + down.before, conv.out_height + down.after)
    return Planes(conv.batch, height, width, pitch, rows).lanes / Planes(conv.batch, height, width, width, height).lanes


def imports(steps: list[Draft]) -> dict[Tensor | None, Draft]:
    """The steps that bring the model's inputs in as they are, by what they write."""
    return {step.output: step for step in steps if is_import(step)}


def copy_step(x: Value, target: Tensor, importers: Mapping[Tensor | None, Draft]) -> Draft:
    """The step that writes ``x`` in the layout of ``target``: an import of its own for the model's input."""
    source = importers.get(x.tensor) if x.tensor is not None else None
    if source is not None:
        return Draft(target.name, Convert("import", x.placed_shape), [], target, external=source.external)
    return Draft(target.name, Convert("planes", x.placed_shape), [x], target)


def insert_phases(steps: list[Draft]) -> list[Draft]:
    """Let every strided convolution read a copy of its input in phases, written just before it.

    Convolutions with the same input and strides whose outputs are tied share one copy, which keeps the phases of both.
    """
    importers = imports(steps)
    regions = tie_all(steps)
    shared: dict[object, Tensor] = {}
    result: list[Draft] = []
    for step in steps:
        conv = step.workload
        if isinstance(conv, Conv2d) and conv.stride != (1, 1) and not step.panels and not takes_every_second(conv):
            assert step.output is not None
            x = step.inputs[0]
            kept = {(py, px) for py in Reach.of(conv, 0).phases for px in Reach.of(conv, 1).phases}
            key = (x.identity(), conv.stride, regions.find(step.output))
            phases = shared.get(key)
            if phases is None:
                phases = shared[key] = Tensor(f"{step.name}.phases", x.placed_shape, conv.stride, (), x.itemsize)
                result.append(copy_step(x, phases, importers))
            phases.kept_phases = tuple(sorted({*(phases.kept_phases or ()), *kept}))
            step.inputs[0] = whole(phases)
        result.append(step)
    return result


def tie_all(steps: list[Draft]) -> Regions:
    """The regions that follow from who reads and writes what."""
    regions = Regions()
    for step in steps:
        for value in step.inputs:
            regions.tie(*value.read)
        if isinstance(step.workload, POINTWISE):
            regions.tie(*_tensors(step.inputs), *_output(step))
        elif isinstance(step.workload, Conv2d):
            conv = step.workload
            if step.panels:  # one run of lanes a row where a pixel is read once and input and output are alike
                direct = (conv.kernel, conv.stride) == ((1, 1), (1, 1)) and not any(conv.padding)
            else:
                direct = conv.stride == (1, 1) or step.inputs[0].tensors[0].phases != (1, 1)
            regions.tie(*_tensors(step.inputs if direct else step.inputs[1:]), *_output(step))
        elif isinstance(step.workload, ConvTranspose2d):
            regions.tie(*_tensors(step.inputs), *_output(step))
        elif step.output is not None and step.output.shifted and step.output.phases == (1, 1):
            # lanes are copied as they stand, and what was tied through the convolution stays so
            regions.tie(*_tensors(step.inputs), step.output)
    return regions


def assign(steps: list[Draft], stored: Mapping[Tensor, int]) -> tuple[dict[Tensor, Layout], int]:
    """The layout of every tensor, and the largest distance in lanes that a convolution reads past a pixel.

    ``stored``: the tensors that are kept in panels, with the registers of a strip (see ``frontend.panels``).
    """
    regions = sizes(steps)
    leads: dict[Tensor, int] = {}
    after = 0
    for step, (down, right, _, _) in _readers(steps):
        for tensor in step.inputs[0].read:
            pitch = regions.size(tensor)[0]
            leads[tensor] = max(leads.get(tensor, 0), down[0] * pitch + right[0])
            after = max(after, down[1] * pitch + right[1])
    for step in steps:
        if step.output is not None and step.output.shifted and not step.external:
            begins = [px for _, px in step.output.kept_phases or ()]
            for tensor in step.inputs[0].tensors:
                leads[tensor] = max(leads.get(tensor, 0), -min(begins))
            after = max(after, *begins)
    layouts: dict[Tensor, Layout] = {}
    for step in steps:
        for tensor in _output(step):
            if tensor.is_rows:
                layouts[tensor] = Rows(*tensor.shape)
                continue
            n, _, h, w = tensor.shape
            pitch, rows = regions.size(tensor)
            if tensor in stored:
                layouts[tensor] = Panels(Planes(n, h, w, pitch, rows, itemsize=tensor.itemsize), stored[tensor])
                continue
            lead, phases = leads.get(tensor, 0), tensor.phases
            layouts[tensor] = Planes(n, h, w, pitch, rows, lead, phases, tensor.kept_phases, tensor.itemsize)
    return layouts, after


def sizes(steps: list[Draft]) -> Regions:
    """The regions with all that they need."""
    regions = tie_all(steps)
    for tensor in (tensor for step in steps for tensor in (*_tensors(step.inputs), *_output(step))):
        if not tensor.is_rows:
            regions.need(tensor, -(-tensor.shape[3] // tensor.phases[1]), -(-tensor.shape[2] // tensor.phases[0]))
    for step, (down, right, out_rows, out_columns) in _readers(steps):
        for tensor in step.inputs[0].read:
            columns, rows = -(-tensor.shape[3] // tensor.phases[1]), -(-tensor.shape[2] // tensor.phases[0])
            # zeros before a pixel row are those behind the row before it; a read behind must not reach the next row
            pitch = max(columns + right[0], out_columns + right[1])
            regions.need(tensor, pitch, max(rows + down[0], out_rows + down[1]))
    return regions


def _readers(steps: list[Draft]) -> list[tuple[Draft, Reaches]]:
    return [(step, reach) for step in steps if (reach := _reach(step)) is not None]


Reaches = tuple[tuple[int, int], tuple[int, int], int, int]


def _reach(step: Draft) -> Reaches | None:
    """How far a step that reads in place reads (before, behind) a pixel, in rows and in columns, and the rows and
    columns that it writes; None for all others."""
    conv = step.workload
    if isinstance(conv, ConvTranspose2d):
        rows, columns = -(-conv.out_height // conv.stride[0]), -(-conv.out_width // conv.stride[1])
        return conv.reach(0), conv.reach(1), rows, columns
    if not isinstance(conv, Conv2d) or step.panels:
        return None
    if takes_every_second(conv):
        (down, rows), (right, columns) = Reach.plain(conv, 0), Reach.plain(conv, 1)
        return (down.before, down.after), (right.before, right.after), rows, columns
    down, right = Reach.of(conv, 0), Reach.of(conv, 1, step.inputs[0].tensors[0].shifted)
    return (down.before, down.after), (right.before, right.after), conv.out_height, conv.out_width


def _tensors(values: list[Value]) -> list[Tensor]:
    return [tensor for value in values for tensor in value.read]


def _output(step: Draft) -> list[Tensor]:
    return [step.output] if step.output is not None else []
