"""Operators that move nothing, or only say where things stand: views of planes and rows."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.draft import Draft, Tensor, Value, joined, whole
from colonnade.frontend.importer import Handler, Importer, Unsupported, is_vector
from colonnade.workload import Conv2d, Convert, Zeros


def identity(importer: Importer, node: ir.Node) -> None:
    """Identity, Dropout in inference mode."""
    importer.set(node, importer.value(node, 0))


def cast(importer: Importer, node: ir.Node) -> None:
    """Cast to float32 of what is float32."""
    target = ir.DataType(node.attributes["to"].as_int())
    if target != ir.DataType.FLOAT:
        raise Unsupported(f"a cast to {target} is not supported; only float32 is")
    identity(importer, node)


def view(importer: Importer, node: ir.Node, x: Value, shape: tuple[int, ...]) -> None:
    """``x`` seen with another ONNX shape of as many elements."""
    if prod(shape) != prod(x.shape):
        raise Unsupported(f"cannot see {list(x.shape)} as {list(shape)}; export the model with fixed shapes")
    if shape[:1] == x.shape[:1]:
        if x.is_rows and is_vector(shape):
            importer.set(node, Value(shape, x.tensors, sole=x.sole))
            return
        if x.channels is not None and len(shape) >= 4 and shape[-2:] == x.shape[-2:]:
            channels = x.channels.reshape(*shape[1:-2], 2)
            importer.set(node, Value(shape, x.tensors, channels, x.sole))
            return
        if x.channels is not None and is_vector(shape):
            rows = importer.to_rows(node, x)
            importer.set(node, Value(shape, rows.tensors))
            return
    raise Unsupported(
        f"from {list(x.shape)} to {list(shape)}: only regrouping channels, dropping axes of length 1 and flattening to "
        "[N, C*H*W]; cut the model before it with outputs=/--outputs"
    )


def reshape(importer: Importer, node: ir.Node) -> None:
    """Reshape."""
    x = importer.value(node, 0)
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
    x = importer.value(node, 0)
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    view(importer, node, x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def squeeze(importer: Importer, node: ir.Node) -> None:
    """Squeeze."""
    x = importer.value(node, 0)
    axes = importer.ints(node, "axes", 1)
    drop = {i for i, d in enumerate(x.shape) if d == 1} if axes is None else {a % len(x.shape) for a in axes}
    view(importer, node, x, tuple(d for i, d in enumerate(x.shape) if i not in drop))


def unsqueeze(importer: Importer, node: ir.Node) -> None:
    """Unsqueeze."""
    x = importer.value(node, 0)
    axes = importer.ints(node, "axes", 1) or []
    rank = len(x.shape) + len(axes)
    old = iter(x.shape)
    new = {a % rank for a in axes}
    view(importer, node, x, tuple(1 if i in new else next(old) for i in range(rank)))


def transpose(importer: Importer, node: ir.Node) -> None:
    """Transpose of channel axes (channel shuffle), or of axes of length 1."""
    x = importer.value(node, 0)
    rank = len(x.shape)
    order = importer.ints(node, "perm") or list(reversed(range(rank)))
    shape = tuple(x.shape[i] for i in order)
    if x.is_rows and shape[0] == x.shape[0] and (order[0] == 0 or x.shape[0] == 1):
        importer.set(node, Value(shape, x.tensors, sole=x.sole))
    elif x.channels is not None and order[0] == 0 and order[-2:] == [rank - 2, rank - 1]:
        axes = [i - 1 for i in order[1:-2]]
        importer.set(node, Value(shape, x.tensors, x.channels.transpose(*axes, len(axes)), x.sole))
    else:
        raise Unsupported(
            f"perm {order} of {list(x.shape)} moves pixels; only channel axes may change places; export in NCHW order"
        )


def concat(importer: Importer, node: ir.Node) -> None:
    """Concat over channels: a longer list of planes."""
    values = [importer.value(node, index) for index in range(len(node.inputs))]
    rank = len(values[0].shape)
    axis = node.attributes["axis"].as_int() % rank
    if len(values) == 1:
        importer.set(node, values[0])
        return
    if any(v.is_rows for v in values) or not 0 < axis < rank - 2:
        raise Unsupported(f"only over the channels of [N, C, H, W]; got axis {axis} of {list(values[0].shape)}")
    shapes = [v.shape[:axis] + v.shape[axis + 1 :] for v in values]
    if any(shape != shapes[0] for shape in shapes):
        raise Unsupported(f"shapes {', '.join(str(list(v.shape)) for v in values)} do not fit together")
    importer.set(node, joined(values, axis))


def split(importer: Importer, node: ir.Node) -> None:
    """Split over channels: parts of the list of planes."""
    x = importer.value(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    if x.channels is None or not 0 < axis < len(x.shape) - 2:
        raise Unsupported(f"only over the channels of [N, C, H, W]; got axis {axis} of {list(x.shape)}")
    sizes = importer.ints(node, "split", 1)
    if sizes is None:
        size = -(-x.shape[axis] // len(node.outputs))
        sizes = [min(size, x.shape[axis] - size * i) for i in range(len(node.outputs))]
    if sum(sizes) != x.shape[axis]:
        raise Unsupported(f"parts of {sizes} channels are not the {x.shape[axis]} that there are")
    start = 0
    for index, size in enumerate(sizes):
        importer.set(node, _take(x, axis, np.arange(start, start + size)), index)
        start += size


def gather(importer: Importer, node: ir.Node) -> None:
    """Gather of channels with constant indices: another list of planes."""
    x = importer.value(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    indices = importer.constant(node, 1)
    if x.channels is None or indices is None or indices.ndim != 1 or not 0 < axis < len(x.shape) - 2:
        raise Unsupported(f"only channels of [N, C, H, W] by a constant list; got axis {axis} of {list(x.shape)}")
    size = x.shape[axis]
    picked = np.asarray(indices, np.int64)
    if not ((picked >= -size) & (picked < size)).all():
        raise Unsupported(f"indices beyond the {size} channels")
    importer.set(node, _take(x, axis, picked % size))


def _take(x: Value, axis: int, indices: np.typing.NDArray[np.int64]) -> Value:
    assert x.channels is not None
    channels = x.channels.take(indices, axis=axis - 1)
    used = np.unique(channels[..., 0])
    tensors = tuple(x.tensors[i] for i in used)  # drop what is no longer looked at: it need not be tied or kept alive
    channels = np.concatenate([np.searchsorted(used, channels[..., :1]), channels[..., 1:]], axis=-1)
    shape = (x.shape[0], *channels.shape[:-1], *x.shape[-2:])
    return Value(shape, tensors, channels, sole=False)


def slice_(importer: Importer, node: ir.Node) -> None:
    """Slice of channels, or every s-th row and column."""
    x = importer.value(node, 0)
    rank = len(x.shape)
    starts, ends = importer.ints(node, "starts", 1), importer.ints(node, "ends", 2)
    if starts is None or ends is None:
        raise Unsupported("its starts and ends must be constant; export the model with fixed shapes")
    axes = importer.ints(node, "axes", 3) or list(range(len(starts)))
    steps = importer.ints(node, "steps", 4) or [1] * len(starts)
    stride = [1, 1]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= rank
        size = x.shape[axis]
        # ONNX means the position before 0 by an end far below it; Python's slice means None
        picked = range(*slice(start, None if step < 0 and end < -size else end, step).indices(size))
        if picked == range(size):
            continue
        if x.channels is not None and 0 < axis < rank - 2:
            x = _take(x, axis, np.array(picked, np.int64))
        elif x.channels is not None and rank == 4 and axis >= 2 and step > 0 and picked == range(0, size, step):
            stride[axis - 2] = step
        else:
            raise Unsupported(
                f"elements {start}:{end}:{step} of axis {axis} of {list(x.shape)}: only channels, or every s-th row or "
                "column from the first on; cut the model before it with outputs=/--outputs"
            )
    if stride == [1, 1]:
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
    """Pad with zeros: channels by planes of zeros; pixels by a 1x1 convolution of every channel with 1."""
    x = importer.planes(node, 0)
    if (mode := node.attributes.get_string("mode", "constant")) != "constant":
        raise Unsupported(f"mode {mode} is not supported; only constant zeros are")
    constant = importer.constant(node, 2)
    number = node.attributes.get_float("value", 0.0) if constant is None else float(constant.reshape(-1)[0])
    given = importer.ints(node, "pads", 1)
    if given is None or number != 0.0:
        raise Unsupported(f"only a constant number of zeros; got {number}")
    axes = importer.ints(node, "axes", 3) or list(range(4))
    pads = [0] * 8
    for index, axis in enumerate(axes):
        pads[axis % 4], pads[axis % 4 + 4] = given[index], given[index + len(axes)]
    if min(pads) < 0 or pads[0] or pads[4]:
        raise Unsupported(f"pads {pads}: only channels, rows and columns can be added; none removed, no images")
    n, c, h, w = x.shape
    if any((*pads[2:4], *pads[6:8])):
        workload = Conv2d(n, c, c, h, w, (1, 1), padding=(pads[2], pads[3], pads[6], pads[7]), groups=c)
        constants = {"weight": np.ones((c, 1, 1, 1), np.float32), "bias": np.zeros(c, np.float32)}
        out = (n, c, workload.out_height, workload.out_width)
        x = importer.emit(node, workload, [x], out, constants=constants)
    if pads[1] or pads[5]:
        zeros = _zeros(importer, node, (n, 1, *x.shape[2:]))
        assert zeros.channels is not None
        sides = [Value((), zeros.tensors, np.repeat(zeros.channels, count, axis=0)) for count in (pads[1], pads[5])]
        x = joined(
            [Value(x.shape, zeros.tensors, sides[0].channels), x, Value(x.shape, zeros.tensors, sides[1].channels)], 1
        )
    importer.set(node, x)


def _zeros(importer: Importer, node: ir.Node, shape: tuple[int, ...]) -> Value:
    """One plane of zeros that can stand for any number of channels."""
    tensor = Tensor(f"{node.outputs[0].name}.zeros", shape)
    importer.add(Draft(importer.unique(f"{node.name or node.outputs[0].name}.zeros"), Zeros(shape), [], tensor))
    return whole(tensor)


HANDLERS: dict[str, Handler] = {
    "Identity": identity,
    "Dropout": identity,
    "Cast": cast,
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
}
