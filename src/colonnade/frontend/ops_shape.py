"""Operators that move nothing, or only say where things stand: views of planes and rows."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting, exact
from colonnade.frontend.draft import Draft, Tensor, Value, joined, whole
from colonnade.frontend.importer import Handler, Importer
from colonnade.frontend.ops_tokens import concat_tokens
from colonnade.frontend.tokens import Tokens
from colonnade.workload import FILL, Convert, Elementwise, Join, Lookup, Zeros
from colonnade.workload.typed import F32, WIDE, as_lanes, lanes

Table = np.typing.NDArray[np.int64]
# what reads planes for certain: an array that channels-last models transpose for them goes there at once; and what
# would have planes written as dense arrays again
PLANE_READERS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
DENSE_READERS = {"Flatten", "Gather", "Gemm", "LayerNormalization", "MatMul", "Reshape", "Softmax", "Transpose"}


def _read_as_planes(value: ir.Value) -> bool:
    kinds = {node.op_type for node, _ in value.uses()}
    return bool(kinds & PLANE_READERS) and not kinds & DENSE_READERS and not value.is_graph_output()


def identity(importer: Importer, node: ir.Node) -> None:
    """Identity, Dropout in inference mode."""
    training, ratio = importer.constant(node, 2), importer.constant(node, 1)
    kept = ratio is not None and not np.asarray(ratio, np.float32).any()  # nothing is dropped in training either
    trained = importer.has(node, 2) and (training is None or bool(np.asarray(training).any()))
    if node.op_type == "Dropout" and trained and (training is None or ratio is None):
        raise Unsupported("its ratio and mode must be constant; export the model with .eval()")
    if node.op_type == "Dropout" and trained and not kept:
        raise Unsupported("it drops at random in training mode; export the model with .eval()")
    x = importer.raw(node, 0)
    if importer.more_outputs(node):  # the mask: all is kept
        importer.set(node, importer.brought(node.outputs[1].name or "mask", np.ones(x.shape, np.float32)), 1)
    importer.set(node, x)


def view(importer: Importer, node: ir.Node, x: Value | Tokens, shape: tuple[int, ...]) -> None:
    """``x`` seen with another ONNX shape of as many elements: planes regrouped, or a dense array."""
    if prod(shape) != prod(x.shape):
        raise Unsupported(f"cannot see {list(x.shape)} as {list(shape)}; export the model with fixed shapes")
    if isinstance(x, Tokens) or not x.is_rows:
        seen = (x if isinstance(x, Tokens) else Tokens.of(x)).reshaped(shape)
        if seen is not None:
            importer.set(node, seen)
            return
        x = importer.ordinary(x)
    if x.channels is not None and shape[:1] == x.shape[:1] and len(shape) >= 4 and shape[-2:] == x.shape[-2:]:
        channels = x.channels.reshape(*shape[1:-2], 2)
        importer.set(node, Value(shape, x.tensors, channels, x.sole))
        return
    importer.set(node, importer.dense(x, node.outputs[0].name or "").seen(shape))


def reshape(importer: Importer, node: ir.Node) -> None:
    """Reshape."""
    x = importer.raw(node, 0)
    target = importer.ints(node, "shape", 1)
    if target is None:
        raise Unsupported("its shape is missing; export the model with fixed shapes")
    if not node.attributes.get_int("allowzero", 0):
        target = [x.shape[i] if d == 0 and i < len(x.shape) else d for i, d in enumerate(target)]
    if -1 in target:
        rest = -prod(target)
        target[target.index(-1)] = prod(x.shape) // rest if rest > 0 else 0
    view(importer, node, x, tuple(target))


def flatten(importer: Importer, node: ir.Node) -> None:
    """Flatten."""
    x = importer.raw(node, 0)
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    view(importer, node, x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def squeeze(importer: Importer, node: ir.Node) -> None:
    """Squeeze."""
    x = importer.raw(node, 0)
    axes = importer.ints(node, "axes", 1)
    drop = {i for i, d in enumerate(x.shape) if d == 1} if axes is None else {a % len(x.shape) for a in axes}
    view(importer, node, x, tuple(d for i, d in enumerate(x.shape) if i not in drop))


def unsqueeze(importer: Importer, node: ir.Node) -> None:
    """Unsqueeze."""
    x = importer.raw(node, 0)
    axes = importer.ints(node, "axes", 1) or []
    rank = len(x.shape) + len(axes)
    old = iter(x.shape)
    new = {a % rank for a in axes}
    view(importer, node, x, tuple(1 if i in new else next(old) for i in range(rank)))


def transpose(importer: Importer, node: ir.Node) -> None:
    """Transpose: channel axes of planes (channel shuffle) are another list; axes of length 1 a view; else a move."""
    x = importer.raw(node, 0)
    rank = len(x.shape)
    order = importer.ints(node, "perm") or list(reversed(range(rank)))
    shape = tuple(x.shape[i] for i in order)
    if isinstance(x, Value) and not x.is_rows and order[-1] not in (rank - 2, rank - 1):
        x = Tokens.of(x)  # features behind pixels: another way to see the planes
    if isinstance(x, Tokens):
        importer.set(node, x.transposed(order))
        return
    if order == [0, 3, 1, 2] and x.is_rows and x.dtype == F32 and _read_as_planes(node.outputs[0]):
        n, h, w, c = x.shape
        planes = Tensor(node.outputs[0].name or node.op_type, shape)
        tables = counting(x.shape)
        importer.reorder(x, x.shape, (n, c, h, w), [tables[i] for i in order], planes)
        importer.set(node, whole(planes))
        return
    longer = [i for i in order if x.shape[i] > 1]
    if x.channels is not None and order[0] == 0 and order[-2:] == [rank - 2, rank - 1]:
        axes = [i - 1 for i in order[1:-2]]
        importer.set(node, Value(shape, x.tensors, x.channels.transpose(*axes, len(axes)), x.sole))
    elif longer == sorted(longer):
        view(importer, node, x, shape)
    else:
        tables = counting(x.shape)
        importer.take(node, x, [tables[i] for i in order])


def concat(importer: Importer, node: ir.Node) -> None:
    """Concat: over channels a longer list of planes, else a join of dense arrays."""
    rank = len(importer.shape(node, 0))
    axis = node.attributes["axis"].as_int() % rank
    if concat_tokens(importer, node, axis):
        return
    computed = [importer.constant(node, i) is None for i in range(len(node.inputs))]
    values = [importer.value(node, i) for i, c in enumerate(computed) if c]
    if len(node.inputs) == 1:
        importer.set(node, values[0])
        return
    spatial = rank == 4 and any(not v.is_rows for v in values)
    if all(computed) and 0 < axis < rank - 2 and (spatial or not any(v.is_rows for v in values)):
        values = [importer.in_planes(v) for v in values]
        shapes = [v.shape[:axis] + v.shape[axis + 1 :] for v in values]
        if any(shape != shapes[0] for shape in shapes):
            raise Unsupported(f"shapes {', '.join(str(list(v.shape)) for v in values)} do not fit together")
        importer.set(node, joined(values, axis))
        return
    parts = [importer.array(node, i) for i in range(len(node.inputs))]
    shapes = [part.shape for part in parts]
    total = sum(shape[axis] for shape in shapes)
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    if any(s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise Unsupported(f"shapes {', '.join(str(list(s)) for s in shapes)} do not fit together")
    kind = next((part.dtype for part in parts if part.dtype != F32), F32)
    if kind != F32:  # as lanes, one or two an element
        parts = [importer.converted(part, kind, node.outputs[0].name or "") for part in parts]
        shapes = [(*part, lanes(kind)) for part in shapes]
    importer.dense_step(node, Join(tuple(shapes), axis), parts, shape, dtype=kind)


def split(importer: Importer, node: ir.Node) -> None:
    """Split: over channels parts of the list of planes, else moves."""
    x = importer.raw(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    sizes = importer.ints(node, "split", 1)
    if sizes is None:
        size = -(-x.shape[axis] // len(node.outputs))
        sizes = [min(size, x.shape[axis] - size * i) for i in range(len(node.outputs))]
    if sum(sizes) != x.shape[axis]:
        raise Unsupported(f"parts of {sizes} are not the {x.shape[axis]} that there are")
    start = 0
    for index, size in enumerate(sizes):
        if size:
            _pick(importer, node, x, axis, np.arange(start, start + size), index)
        elif node.outputs[index].uses() or node.outputs[index].is_graph_output():
            raise Unsupported(f"its part {index} is empty; remove it from the model")
        start += size


def gather(importer: Importer, node: ir.Node) -> None:
    """Gather: constant indices pick (channels: another list of planes), computed ones look up."""
    axis = node.attributes.get_int("axis", 0)
    indices = importer.constant(node, 1)
    if indices is None:
        _lookup(importer, node, axis)
        return
    x = importer.raw(node, 0)
    axis %= len(x.shape)
    size = x.shape[axis]
    picked = np.asarray(indices, np.int64)
    if not ((picked >= -size) & (picked < size)).all():
        raise Unsupported(f"indices beyond the {size} entries of axis {axis}")
    shape = (*x.shape[:axis], *picked.shape, *x.shape[axis + 1 :])
    _pick(importer, node, x, axis, (picked % size).reshape(-1), 0, None if picked.ndim == 1 else shape)


def _lookup(importer: Importer, node: ir.Node, axis: int) -> None:
    index, table = importer.narrowed(importer.array(node, 1)), importer.constant(node, 0)
    data = None if table is not None else importer.array(node, 0)
    kind = data.dtype if data is not None else str(table.dtype) if table is not None else ""
    kind = kind if kind in WIDE else F32
    shape = tuple(table.shape) if table is not None else data.shape if data is not None else ()
    axis %= len(shape)
    outer, inner = prod(shape[:axis]), prod(shape[axis + 1 :]) * lanes(kind)
    work = Lookup(outer, shape[axis], inner, prod(index.shape), table is not None)
    constants = {} if table is None else {"table": exact(table) if kind == F32 else as_lanes(table, kind)}
    inputs = [index] if data is None else [index, data]
    importer.dense_step(node, work, inputs, (*shape[:axis], *index.shape, *shape[axis + 1 :]), constants, dtype=kind)


def _pick(
    importer: Importer, node: ir.Node, x: Value | Tokens, axis: int, indices: Table, index: int = 0,
    shape: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Entries ``indices`` of ``axis``: the node's output ``index``."""
    if isinstance(x, Tokens):
        part = x.picked(axis, indices)
        part = part if shape is None or part is None else part.reshaped(shape)
        if part is not None:
            importer.set(node, part, index)
            return
        x = importer.ordinary(x)
    if shape is None and x.channels is not None and 0 < axis < len(x.shape) - 2:
        importer.set(node, _take(x, axis, indices), index)
        return
    tables = counting(x.shape)
    tables[axis] = tables[axis][indices]
    importer.take(node, x, tables, 0.0, index, shape)


def _take(x: Value, axis: int, indices: np.typing.NDArray[np.int64]) -> Value:
    assert x.channels is not None
    channels = x.channels.take(indices, axis=axis - 1)
    used = np.unique(channels[..., 0])
    tensors = tuple(x.tensors[i] for i in used)  # drop what is no longer looked at: it need not be tied or kept alive
    channels = np.concatenate([np.searchsorted(used, channels[..., :1]), channels[..., 1:]], axis=-1)
    shape = (x.shape[0], *channels.shape[:-1], *x.shape[-2:])
    return Value(shape, tensors, channels, sole=False)


def slice_(importer: Importer, node: ir.Node) -> None:
    """Slice: of channels another list, of every s-th row and column a copy, else a move."""
    x = importer.raw(node, 0)
    rank = len(x.shape)
    starts, ends = importer.ints(node, "starts", 1), importer.ints(node, "ends", 2)
    if starts is None or ends is None:
        raise Unsupported("its starts and ends must be constant; export the model with fixed shapes")
    axes = importer.ints(node, "axes", 3) or list(range(len(starts)))
    steps = importer.ints(node, "steps", 4) or [1] * len(starts)
    stride, moved = [1, 1], dict[int, Table]()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= rank
        size = x.shape[axis]
        # ONNX means the position before 0 by an end far below it; Python's slice means None
        start = max(start, -size)
        picked = range(*slice(start, None if step < 0 and end < -size else end, step).indices(size))
        if picked == range(size):
            continue
        if not picked:  # nothing is a constant
            shape = [0 if a % rank == axis else d for a, d in enumerate(x.shape)]
            node.outputs[0].const_value = ir.tensor(np.zeros(shape, importer.type_of(node)))
            return
        if isinstance(x, Tokens):
            x = x.picked(axis, np.array(picked, np.int64)) or importer.ordinary(x)
            if isinstance(x, Tokens):
                continue
        if x.channels is not None and 0 < axis < rank - 2:
            x = _take(x, axis, np.array(picked, np.int64))
        elif x.channels is not None and rank == 4 and axis >= 2 and step > 0 and picked == range(0, size, step):
            stride[axis - 2] = step
        else:
            moved[axis] = np.array(picked, np.int64)
    if isinstance(x, Tokens):
        importer.set(node, x)
    elif moved:
        for axis in (0, 1):
            if stride[axis] != 1:
                moved[axis + 2] = np.arange(0, x.shape[axis + 2], stride[axis])
        tables = counting(x.shape)
        importer.take(node, x, [table[moved[i]] if i in moved else table for i, table in enumerate(tables)])
    elif stride == [1, 1]:
        importer.set(node, x)
    else:
        _every(importer, node, x, (stride[0], stride[1]))


def _every(importer: Importer, node: ir.Node, x: Value, stride: tuple[int, int]) -> None:
    before = importer.writer(x)
    if before is not None and isinstance(before.workload, Convert) and before.workload.kind == "planes":
        # exporters write [:, :, ::2, ::2] as two slices: one copy is enough
        importer.steps.remove(before)
        stride = (stride[0] * before.workload.stride[0], stride[1] * before.workload.stride[1])
        x = before.inputs[0]
    n, c, h, w = x.placed_shape
    out = (n, c, -(-h // stride[0]), -(-w // stride[1]))
    importer.emit(node, Convert("planes", (n, c, h, w), stride), [x], out)


def pad(importer: Importer, node: ir.Node) -> None:
    """Pad: channels by planes of zeros, else a move with repeated, mirrored or filled in entries."""
    mode = node.attributes.get_string("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"mode {mode} is not known")
    x = importer.value(node, 0)
    rank = len(x.shape)
    constant = importer.constant(node, 2)
    if importer.has(node, 2) and constant is None:
        raise Unsupported("its value must be constant; export the model in inference mode")
    number = node.attributes.get_float("value", 0.0) if constant is None else float(constant.reshape(-1)[0])
    given = importer.ints(node, "pads", 1) or importer.ints(node, "paddings")
    if given is None:
        raise Unsupported("its pads must be constant; export the model with fixed shapes")
    axes = [a % rank for a in importer.ints(node, "axes", 3) or range(rank)]
    pads = {axis: (given[i], given[i + len(axes)]) for i, axis in enumerate(axes)}
    pads = {axis: both for axis, both in pads.items() if any(both)}
    if rank == 4 and not x.is_rows and set(pads) == {1} and min(pads[1]) >= 0 and mode == "constant" and number == 0:
        n, _, h, w = x.shape
        zeros = _zeros(importer, node, (n, 1, h, w))
        assert zeros.channels is not None
        first, last = (Value(x.shape, zeros.tensors, np.repeat(zeros.channels, count, axis=0)) for count in pads[1])
        importer.set(node, joined([first, x, last], 1))
        return
    tables = counting(x.shape)
    for axis, (before, after) in pads.items():
        size = x.shape[axis]
        where = np.arange(-before, size + after)
        if mode == "reflect":
            period = max(2 * size - 2, 1)
            where = np.abs((where + size - 1) % period - (size - 1)) if size > 1 else where * 0
        elif mode == "edge":
            where = np.clip(where, 0, size - 1)
        elif mode == "wrap":  # what negative pads leave, again and again
            begin, end = max(-before, 0), size + min(after, 0)
            where = begin + (where - begin) % (end - begin) if end > begin else where
        inside = (where >= 0) & (where < size)
        tables[axis] = np.where(inside, tables[axis][np.where(inside, where, 0)], FILL)
    importer.take(node, x, tables, number)


def expand(importer: Importer, node: ir.Node) -> None:
    """Expand: entries of axes of length 1 repeated."""
    target = importer.ints(node, "shape", 1)
    if target is None:
        raise Unsupported("its shape must be constant; export the model with fixed shapes")
    x = importer.array(node, 0)
    shape = np.broadcast_shapes(x.shape, tuple(target))
    if shape == x.shape:
        importer.set(node, x)
        return
    x = x.seen((1,) * (len(shape) - len(x.shape)) + x.shape)
    sizes = zip(counting(x.shape), x.shape, shape, strict=True)
    importer.take(node, x, [t if d > 1 else np.zeros(full, np.int64) for t, d, full in sizes])


def tile(importer: Importer, node: ir.Node) -> None:
    """Tile: every axis repeated."""
    x = importer.array(node, 0)
    repeats = importer.ints(node, "repeats", 1)
    if repeats is None:
        raise Unsupported("its repeats must be constant; export the model with fixed shapes")
    importer.take(node, x, [np.tile(table, count) for table, count in zip(counting(x.shape), repeats, strict=True)])


def _regroup(
    importer: Importer, node: ir.Node, split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """[N, C, H, W] seen as ``split``, its axes in ``order``, seen as ``shape``."""
    x = importer.dense(importer.value(node, 0), node.outputs[0].name or "").seen(split)
    tables = counting(split)
    importer.take(node, x, [tables[i] for i in order], shape=shape)


def depth_to_space(importer: Importer, node: ir.Node) -> None:
    """DepthToSpace, either mode."""
    n, c, h, w = importer.shape(node, 0)
    b = node.attributes["blocksize"].as_int()
    shape = (n, c // (b * b), h * b, w * b)
    if node.attributes.get_string("mode", "DCR") == "DCR":
        _regroup(importer, node, (n, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2), shape)
    else:
        _regroup(importer, node, (n, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3), shape)


def space_to_depth(importer: Importer, node: ir.Node) -> None:
    """SpaceToDepth."""
    n, c, h, w = importer.shape(node, 0)
    b = node.attributes["blocksize"].as_int()
    order = (0, 3, 5, 1, 2, 4) if node.attributes.get_string("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    _regroup(importer, node, (n, c, h // b, b, w // b, b), order, (n, c * b * b, h // b, w // b))


def trilu(importer: Importer, node: ir.Node) -> None:
    """Trilu: zeros above or below a diagonal."""
    x, k = importer.array(node, 0), importer.constant(node, 1)
    if importer.has(node, 1) and k is None:
        raise Unsupported("its diagonal must be constant")
    first = 0 if k is None else int(k.reshape(-1)[0])
    keep = (np.triu if node.attributes.get_int("upper", 1) else np.tril)(np.ones(x.shape[-2:], np.float32), first)
    name = node.outputs[0].name or ""
    operands = [importer.brought(name, keep), x, importer.brought(name, np.zeros(1, np.float32))]
    work = Elementwise("where", tuple(value.shape for value in operands))
    importer.dense_step(node, work, operands, work.shape)


def _zeros(importer: Importer, node: ir.Node, shape: tuple[int, ...]) -> Value:
    """One plane of zeros that can stand for any number of channels."""
    tensor = Tensor(f"{node.outputs[0].name}.zeros", shape)
    importer.add(Draft(importer.unique(f"{node.name or node.outputs[0].name}.zeros"), Zeros(shape), [], tensor))
    return whole(tensor)


HANDLERS: dict[str, Handler] = {
    "Identity": identity,
    "Dropout": identity,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Pad": pad,
    "Expand": expand,
    "Tile": tile,
    "Trilu": trilu,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
