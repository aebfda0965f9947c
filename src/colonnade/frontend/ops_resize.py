"""Resizing of pixels, and normalisation over neighbouring channels."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from colonnade.frontend.context import Unsupported, counting
from colonnade.frontend.importer import Handler, Importer
from colonnade.workload import Array, Elementwise, Lrn, Repeat, Resample, digest
from colonnade.workload.dense import FILL

Table = npt.NDArray[np.int64]
Wide = npt.NDArray[np.float64]


class Axis(NamedTuple):
    """How one axis is resized: ``scale`` is output over input; ``roi`` where crop and resize begins and ends."""

    size: int
    out: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)


def positions(axis: Axis, mode: str) -> Wide:
    """float64 [out]: where in the input every output element looks (ONNX's coordinate transformation modes).

    Computed in float32, as others do: which pixel is nearest hangs on the last bit. Corners are aligned by whole
    pixels, also where a scale leaves a fraction of one, which ONNX would count (PyTorch and onnxruntime do not).
    """
    i, one, half = np.arange(axis.out, dtype=np.float32), np.float32(1), np.float32(0.5)
    scale, size, out = np.float32(axis.scale), np.float32(axis.size), np.float32(axis.out)
    if mode == "align_corners":
        at = i * (size - one) / (out - one) if axis.out > 1 else i * 0
    elif mode == "asymmetric":
        at = i / scale
    elif mode == "pytorch_half_pixel":
        at = (i + half) / scale - half if axis.out > 1 else i * 0
    elif mode == "half_pixel":
        at = (i + half) / scale - half
    elif mode == "tf_half_pixel_for_nn":
        at = (i + half) / scale
    elif mode == "half_pixel_symmetric":
        at = size * half * (one - out / (scale * size)) + (i + half) / scale - half
    elif mode == "tf_crop_and_resize":
        start, end = map(np.float32, axis.roi)
        if axis.out == 1:
            at = half * (start + end) * (size - one) + i
        else:
            at = start * (size - one) + i * (end - start) * (size - one) / (out - one)
    else:
        raise Unsupported(f"coordinate_transformation_mode {mode} is not known")
    return at.astype(np.float64)


def nearest(at: Wide, size: int, mode: str) -> Table:
    """int64 [out]: the element nearest to every position."""
    rounded = {
        "round_prefer_floor": lambda: np.ceil(at - 0.5),
        "round_prefer_ceil": lambda: np.floor(at + 0.5),
        "floor": lambda: np.floor(at),
        "ceil": lambda: np.ceil(at),
    }.get(mode)
    if rounded is None:
        raise Unsupported(f"nearest_mode {mode} is not known")
    return np.asarray(np.clip(rounded(), 0, size - 1), np.int64)


def taps(axis: Axis, at: Wide, mode: str, cubic: float, exclude: bool, antialias: bool) -> tuple[Table, Array]:
    """(int64 [out, taps], float32 likewise): which elements every output is blended from, and with what weights."""
    reach = 2 if mode == "cubic" else 1
    stretch = max(1.0, 1 / axis.scale) if antialias else 1.0
    radius = int(np.ceil(reach * stretch))
    first = np.floor(at).astype(np.int64) - radius + 1
    index = first[:, None] + np.arange(2 * radius)
    distance = np.abs(at[:, None] - index) / stretch
    if mode == "linear":
        weight = np.maximum(0, 1 - distance)
    else:
        a, d = cubic, distance
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0))
    if exclude:
        weight = np.where((index >= 0) & (index < axis.size), weight, 0)
    if exclude or antialias:
        weight = weight / weight.sum(1, keepdims=True)
    index = np.clip(index, 0, axis.size - 1)
    used = (weight != 0).any(0)
    return np.ascontiguousarray(index[:, used]), np.ascontiguousarray(weight[:, used], np.float32)


def resize(importer: Importer, node: ir.Node) -> None:
    """Resize, Upsample: nearest is a move of any axes; linear and cubic blend rows and columns of [N, C, H, W]. Corners
    are aligned by whole pixels, as PyTorch and onnxruntime do."""
    x = importer.value(node, 0)
    rank = len(x.shape)
    old = node.op_type == "Upsample" or importer.graph.opset_imports.get("", 18) < 11
    mode = node.attributes.get_string("mode", "nearest")
    transform = node.attributes.get_string("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "floor" if old else "round_prefer_floor")
    axes = [a % rank for a in importer.ints(node, "axes") or range(rank)]
    resized = _axes(importer, node, x.shape, axes, old)
    out = tuple(a.out for a in resized)
    if prod(out) == 0:
        raise Unsupported(f"its result {list(out)} is empty")
    crops = transform == "tf_crop_and_resize"
    same = [
        a.out == a.size and (np.array_equal(positions(a, transform), np.arange(a.size)) if crops else a.scale == 1.0)
        for a in resized
    ]
    if all(same):
        importer.set(node, x)
        return
    beyond = node.attributes.get_float("extrapolation_value", 0.0)
    ats = [positions(a, transform) for a in resized]
    # where a crop stays within the input
    inside = [
        (at >= 0) & (at <= a.size - 1) if crops else np.ones(a.out, bool) for at, a in zip(ats, resized, strict=True)
    ]
    if mode == "nearest":
        tables = counting(x.shape)
        for i, axis in enumerate(resized):
            if not same[i]:
                tables[i] = tables[i][nearest(ats[i], axis.size, rounding)]
                tables[i] = np.where(inside[i], tables[i], FILL)
        if not x.is_rows and (factors := _factors(x.shape, tables)) is not None:
            importer.emit(node, Repeat(out, factors), [x], out)
            return
        importer.take(node, x, tables, beyond)
        return
    x = importer.narrowed(x)
    mode = mode.removeprefix("bi") if mode in ("bilinear", "bicubic") else mode
    if mode not in ("linear", "cubic"):
        raise Unsupported(f"mode {mode} is not known")
    moved = [i for i in range(rank) if not same[i]]
    if rank < 2 or moved[0] < rank - 2:
        raise Unsupported(f"{mode} over axes {moved} of {list(x.shape)}: only over the last two")
    cubic, exclude = (
        node.attributes.get_float("cubic_coeff_a", -0.75),
        bool(node.attributes.get_int("exclude_outside", 0)),
    )
    antialias = bool(node.attributes.get_int("antialias", 0))
    both = []
    for i in (rank - 2, rank - 1):
        axis = resized[i]
        one = np.arange(axis.size).reshape(-1, 1), np.ones((axis.size, 1), np.float32)
        if same[i]:
            both.append(one)
            continue
        index, weight = taps(axis, ats[i], mode, cubic, exclude, antialias)
        both.append((index, weight * inside[i][:, None].astype(np.float32)))
    (row, row_weight), (column, column_weight) = both
    if rank != 4:
        x = importer.dense(x)
        x = x.seen((1, prod(x.shape[:-2]), *x.shape[-2:]))
    n, c, h, w = x.shape
    size = (out[-2], out[-1])
    maps = digest([row, column]) + digest([t.view(np.int32).astype(np.int64) for t in (row_weight, column_weight)])
    work = Resample(n, c, (h, w), size, (row.shape[1], column.shape[1]), maps)
    constants = {"row": row, "row_weight": row_weight, "column": column, "column_weight": column_weight}
    done = importer.emit(node, work, [importer.in_planes(x)], (n, c, *size), None, constants)  # type: ignore[arg-type]
    if rank != 4:
        importer.set(node, importer.dense(done).seen(out))
    if beyond and not all(axis.all() for axis in inside):
        rows, columns = inside[-2:]
        outside = np.where(rows[:, None] & columns, np.float32(0), np.float32(beyond))
        name = node.outputs[0].name or ""
        pair = [importer.dense(importer.result(node), name), importer.brought(name, outside)]
        importer.dense_step(node, Elementwise("add", (out, outside.shape)), pair, out)


def _factors(shape: tuple[int, ...], tables: list[Table]) -> tuple[int, int] | None:
    """How often every row and column of [N, C, H, W] comes, where that is all that is done to it."""
    n, c, sy, sx = factors = [-(-len(table) // size) for size, table in zip(shape, tables, strict=True)]
    repeated = (one.repeat(factor) for one, factor in zip(counting(shape), factors, strict=True))
    alike = all(np.array_equal(table, one[: len(table)]) for table, one in zip(tables, repeated, strict=True))
    return (sy, sx) if (n, c) == (1, 1) and alike else None


def _axes(importer: Importer, node: ir.Node, shape: tuple[int, ...], axes: list[int], old: bool) -> list[Axis]:
    """Every axis of the input with its new size."""
    where = 1 if old else 2
    scales = node.attributes.get_floats("scales", None) if "scales" in node.attributes else None
    given = importer.constant(node, where)
    if scales is None and given is not None and given.size:
        scales = [float(s) for s in np.asarray(given, np.float32).reshape(-1)]
    if scales is None and importer.has(node, where) and given is None:
        raise Unsupported("its scales must be constant; export the model with fixed shapes")
    sizes = importer.ints(node, "sizes", 3) if not old else None
    roi = importer.constant(node, 1) if not old else None
    crops = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    if crops and roi is None and importer.has(node, 1):
        raise Unsupported("its roi must be constant; export the model with fixed shapes")
    result = [Axis(d, d, 1.0) for d in shape]
    if sizes:
        policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            pick = min if policy == "not_larger" else max
            factor = pick(size / shape[a] for size, a in zip(sizes, axes, strict=True))
            sizes = [int(np.floor(factor * shape[a] + 0.5)) for a in axes]
            ratios = [factor for _ in axes]
        else:
            ratios = [size / shape[a] for size, a in zip(sizes, axes, strict=True)]
        for size, ratio, a in zip(sizes, ratios, axes, strict=True):
            result[a] = Axis(shape[a], size, ratio)
    elif scales:
        for scale, a in zip(scales, axes, strict=True):
            result[a] = Axis(shape[a], int(np.floor(np.float32(shape[a]) * np.float32(scale))), scale)
    else:
        raise Unsupported("it has neither scales nor sizes; export the model with fixed shapes")
    if roi is not None and roi.size:
        flat = np.asarray(roi, np.float64).reshape(-1)
        for i, a in enumerate(axes):
            result[a] = result[a]._replace(roi=(float(flat[i]), float(flat[i + len(axes)])))
    return result


def lrn(importer: Importer, node: ir.Node) -> None:
    """LRN over the channels of planes."""
    x = importer.planes(node, 0)
    get = node.attributes.get_float
    n, c, h, w = x.shape
    size = node.attributes["size"].as_int()
    work = Lrn((n, c, h, w), size, get("alpha", 1e-4), get("beta", 0.75), get("bias", 1.0))
    importer.emit(node, work, [x], (n, c, h, w))


HANDLERS: dict[str, Handler] = {"Resize": resize, "Upsample": resize, "LRN": lrn}
