"""Transformers: tokens in the lanes from the first linear layer to the last, dense and pruned, against onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import machine_has

from colonnade import frontend
from colonnade.codegen.in_process import Program
from colonnade.frontend.draft import Tensor, whole
from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.tokens import Tokens
from colonnade.kernels.isa import isa
from colonnade.pattern import ColumnPattern
from colonnade.plan import Plan
from colonnade.sparsify.onnx_file import prune_file
from colonnade.workload import Conv2d, spread
from tests.models import Builder, onnxruntime_outputs

ALWAYS = LayoutCosts(linear=1.0, sparse=1.0)  # planes for any number of tokens
NEVER = LayoutCosts(linear=0.0, sparse=0.0)
CONVERSIONS = ("reorder", "take", "join")


def ops(plan: Plan) -> Counter[str]:
    return Counter(step.workload.op for step in plan.steps)


def check(model: onnx.ModelProto, feeds: dict[str, np.ndarray] | None = None, **options: Any) -> Plan:
    plan = frontend.load(model, **options)
    rng = np.random.default_rng(0)
    feeds = feeds or {p.name: rng.standard_normal(p.shape).astype(p.dtype) for p in plan.inputs}
    best = next(name for name in ("avx512", "avx2", "portable") if machine_has(name))
    ours, theirs = Program(plan, isa(best)).run(feeds), onnxruntime_outputs(model, feeds)
    for port in plan.outputs:
        wanted = theirs[port.name]
        assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0
        np.testing.assert_allclose(ours[port.name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    return plan


# --- another way to see planes ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_views_are_what_numpy_does(data: st.DataObject) -> None:
    """Transposes, reshapes and parts of planes against numpy; and dense arrays back into these planes."""
    shape = tuple(data.draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3), (4, 6, 12), (1, 2, 3), (1, 2, 4, 6)))
    array = np.arange(np.prod(shape)).reshape(shape)
    tokens, seen = Tokens.of(whole(Tensor("x", shape))), array
    for _ in range(data.draw(st.integers(0, 5))):
        kind = data.draw(st.sampled_from(["transpose", "reshape", "pick"]))
        if kind == "transpose":
            order = data.draw(st.permutations(range(seen.ndim)))
            tokens, seen = tokens.transposed(order), seen.transpose(order)
        elif kind == "reshape":
            sizes = list(seen.shape)
            if data.draw(st.booleans()) and seen.ndim > 1:
                at = data.draw(st.integers(0, seen.ndim - 2))
                sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
            else:
                at = data.draw(st.integers(0, seen.ndim - 1))
                inner = data.draw(st.sampled_from([d for d in range(1, sizes[at] + 1) if sizes[at] % d == 0]))
                sizes[at : at + 1] = [sizes[at] // inner, inner]
            view = tokens.reshaped(sizes)
            if view is not None:
                tokens, seen = view, seen.reshape(sizes)
        else:
            axis = data.draw(st.integers(0, seen.ndim - 1))
            first, step = data.draw(st.integers(0, seen.shape[axis] - 1)), data.draw(st.integers(1, 2))
            indices = np.arange(first, seen.shape[axis], step)
            view = tokens.picked(axis, indices)
            if view is not None:
                tokens, seen = view, seen.take(indices, axis)
    assert tokens.shape == seen.shape
    np.testing.assert_array_equal(array.reshape(-1)[spread(tokens.tables())], seen)
    last = data.draw(st.one_of(st.none(), st.integers(0, seen.ndim - 1)))
    ordered = tokens.ordered(last)
    flat = array[:, ordered.planes.planes[:, 1]]
    np.testing.assert_array_equal(flat.reshape(-1)[spread(ordered.tables())], seen)
    if ordered.covers_lanes:
        sources = ordered.sources(seen.shape)
        if sources is not None:
            np.testing.assert_array_equal(seen.reshape(-1)[spread(sources)], flat)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_channels_last_block_needs_no_conversion() -> None:
    """ConvNeXt's: features behind pixels for LayerNorm and linear layers, and back."""
    b = Builder()
    x = b.conv(b.input("x", (2, 3, 16, 20)), 3, 24, 3, pads=[1, 1, 1, 1])
    y = b.conv(x, 24, 24, 7, groups=24, pads=[3, 3, 3, 3])
    y = b.op("Transpose", y, perm=[0, 2, 3, 1])
    y = b.op("LayerNormalization", y, b.random(24), b.random(24), axis=-1)
    y = b.op("Add", b.op("MatMul", y, b.random(24, 96, scale=0.2)), b.random(96))
    y = b.op("Mul", y, b.op("Sigmoid", y))
    y = b.op("Add", b.op("MatMul", y, b.random(96, 24, scale=0.1)), b.random(24))
    y = b.op("Mul", b.op("Transpose", y, perm=[0, 3, 1, 2]), b.random(24, 1, 1))
    plan = check(b.build(b.op("Add", y, x)))
    counts = ops(plan)
    assert counts["conv2d"] == 4 and counts["channel_norm"] == 1 and counts["binary"] == counts["affine"] == 0
    assert not any(counts[op] for op in CONVERSIONS)


def patches(b: Builder, batch: int, width: int) -> str:
    """ViT's: patches as tokens behind a class token, places added."""
    x = b.conv(b.input("x", (batch, 3, 16, 24)), 3, width, 4, strides=[4, 4])
    x = b.op("Reshape", x, b.constant(np.array([batch, width, 24])))
    x = b.op("Transpose", x, perm=[0, 2, 1])
    x = b.op("Concat", b.random(batch, 1, width), x, axis=1)
    return str(b.op("Add", x, b.random(1, 25, width)))


@pytest.mark.parametrize("batch", [1, 2])
def test_patches_are_tokens_at_once(batch: int) -> None:
    b = Builder()
    x = patches(b, batch, 32)
    x = b.op("LayerNormalization", x, b.random(32), b.random(32), axis=-1)
    y = b.op("MatMul", x, b.random(32, 48, scale=0.2))
    first = b.op("Gather", y, b.constant(np.array(0)), axis=1)
    plan = check(b.build(b.op("Gemm", first, b.random(48, 10, scale=0.2))), layout_costs=ALWAYS)
    counts = ops(plan)
    assert counts["constant"] == counts["binary"] == 1, "class token and places are one sum"
    assert counts["reorder"] == 2 and not counts["take"] and not counts["join"], "room for a token, and out at the end"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", [None, "keys", "pairs", "heads"])
def test_attention_stays_in_planes(batch: int, mask: str | None) -> None:
    """Queries in the lanes from their linear layer to the last one; fused projections, masks of every kind."""
    tokens, heads, part = 21, 3, 8
    width = heads * part
    b = Builder()
    x = b.input("x", (batch, tokens, width))
    both = b.op("Add", b.op("MatMul", x, b.random(width, 3 * width, scale=0.3)), b.random(3 * width))
    split = b.op("Reshape", both, b.constant(np.array([0, 0, 3, heads, part])))
    q, k, v = (
        b.op("Gather", b.op("Transpose", split, perm=[2, 0, 3, 1, 4]), b.constant(np.array(i)), axis=0)
        for i in range(3)
    )
    q = b.op("Mul", q, b.constant(np.float32(part**-0.5)))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    shapes = {"keys": (batch, 1, 1, tokens), "pairs": (1, 1, tokens, tokens), "heads": (batch, heads, tokens, tokens)}
    if mask:
        scores = b.op("Add", scores, b.input("mask", shapes[mask]))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    mixed = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant(np.array([0, 0, width])))
    y = b.op("Add", b.op("MatMul", mixed, b.random(width, width, scale=0.3)), x)
    plan = check(b.build(y), layout_costs=ALWAYS)
    counts = ops(plan)
    assert counts["plane_product"] == 2 and counts["channel_softmax"] == 1 and counts["conv2d"] == 2
    assert not (counts["matmul"] or counts["linear"] or counts["affine"] or counts["join"])
    # in and out; a mask of single keys is numbers beside planes, any other goes into planes
    assert counts["reorder"] == 2 + (mask in ("pairs", "heads")) and counts["take"] == (mask == "keys")


@pytest.mark.parametrize("mask", [None, "causal", "add", "keep"])
def test_attention_of_one_operator(mask: str | None) -> None:
    """As torch exports it since opset 23; a query without any key has zeros for an answer."""
    batch, heads, tokens, part = 2, 3, 20, 8
    b = Builder()
    y = b.op("MatMul", b.input("x", (batch, tokens, 24)), b.random(24, 72, scale=0.3))
    y = b.op("Reshape", y, b.constant(np.array([0, 0, 3, heads, part])))
    y = b.op("Transpose", y, perm=[2, 0, 3, 1, 4])
    qkv = [b.op("Gather", y, b.constant(np.array(i)), axis=0) for i in range(3)]
    keep = b.rng.random((batch, 1, tokens, tokens)) > 0.3
    keep[1, 0, 5] = False
    feeds = {}
    if mask == "add":
        feeds["mask"] = np.where(keep, b.rng.standard_normal(keep.shape), -np.inf).astype(np.float32)
        qkv.append(b.input("mask", keep.shape))
    elif mask == "keep":
        feeds["mask"] = keep
        qkv.append(b.input("mask", keep.shape, onnx.TensorProto.BOOL))
    y = b.op("Attention", *qkv, is_causal=int(mask == "causal"), scale=0.3)
    flat = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.constant(np.array([0, 0, 24])))
    model = b.build(b.op("MatMul", flat, b.random(24, 24)), opset=23)
    feeds["x"] = b.rng.standard_normal((batch, tokens, 24)).astype(np.float32)
    plan = check(model, feeds, layout_costs=ALWAYS)
    counts = ops(plan)
    assert counts["plane_product"] == 2 and counts["channel_softmax"] == 1 and counts["conv2d"] == 2
    check(model, feeds, layout_costs=NEVER)


def test_gemm_on_tokens() -> None:
    """Exporters that flatten tokens before a linear layer, and see them apart again behind it."""
    b = Builder()
    x = b.op("Reshape", b.input("x", (2, 30, 16)), b.constant(np.array([60, 16])))
    y = b.op("Gemm", x, b.random(24, 16, scale=0.3), b.random(24), transB=1)
    y = b.op("Gemm", b.op("Relu", y), b.random(24, 8, scale=0.3))
    plan = check(b.build(b.op("Reshape", y, b.constant(np.array([2, 30, 8])))), layout_costs=ALWAYS)
    assert ops(plan)["conv2d"] == 2 and ops(plan)["reorder"] == 2


def test_what_planes_cannot_do_is_done_on_rows() -> None:
    """Sums over tokens, products over tokens, comparisons: each with a copy at its seam, and right."""
    b = Builder()
    y = b.op("MatMul", b.input("x", (2, 20, 16)), b.random(16, 24, scale=0.3))
    mean = b.op("ReduceMean", y, b.constant(np.array([1])), keepdims=1)
    over = b.op("MatMul", b.op("Transpose", y, perm=[0, 2, 1]), y)
    gate = b.op("Where", b.op("Greater", y, mean), y, b.op("Neg", y))
    part = b.op("Slice", gate, b.constant(np.array([3])), b.constant(np.array([11])), b.constant(np.array([1])))
    normal = b.op("LayerNormalization", part, b.random(8, 24), b.random(8, 24), axis=1)
    check(b.build(over, b.op("Sub", mean, y), normal, b.op("Softmax", y, axis=1)), layout_costs=ALWAYS)


def test_few_tokens_stay_rows() -> None:
    b = Builder()
    model = b.build(b.op("MatMul", b.input("x", (1, 4, 64)), b.random(64, 64)))
    assert ops(check(model))["linear"] == 1
    b = Builder()
    model = b.build(b.op("MatMul", b.input("x", (1, 128, 256)), b.random(256, 768)))
    assert ops(check(model))["conv2d"] == 1


# --- networks --------------------------------------------------------------------------------------------------------


def pruned(model: onnx.ModelProto, sparsity: float, folder: Path) -> onnx.ModelProto:
    if not sparsity:
        return model
    onnx.save(model, folder / "dense.onnx")
    report = prune_file(folder / "dense.onnx", folder / "pruned.onnx", ColumnPattern(sparsity))
    names = [layer.op for layer in report.pruned]
    assert names and set(names) <= {"MatMul", "Gemm"}
    return onnx.load(folder / "pruned.onnx")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sparsity, batch", [(0.0, 2), (0.5, 1), (0.75, 2)])
def test_small_bert(sparsity: float, batch: int, fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.transformers_like import Size, bert_feeds, bert_model

    size = Size()
    model = pruned(bert_model(size, batch, 24, fused), sparsity, tmp_path)
    feeds = bert_feeds(size, batch, 24)
    assert len(feeds) == 3 and all(feed.dtype == np.int64 for feed in feeds.values())
    plan = check(model, feeds, layout_costs=ALWAYS)
    counts = ops(plan)
    assert counts["conv2d"] == 6 * size.layers and counts["channel_norm"] == counts["plane_product"] == 2 * size.layers
    assert counts["reorder"] <= 4 and counts["linear"] == 1, "once in, the last states and the pooled token out"
    layers = [step.workload for step in plan.steps if isinstance(step.workload, Conv2d)]
    kept = sum(layer.kept_macs for layer in layers) / sum(layer.macs for layer in layers)
    assert kept == pytest.approx(1 - sparsity, abs=0.01)
    if not sparsity and not fused:
        assert ops(check(model, feeds, layout_costs=NEVER))["linear"] == 6 * size.layers + 1


def test_small_bert_of_opset_23() -> None:
    """Attention is one operator there; what is done is the same."""
    pytest.importorskip("torch")
    from tests.transformers_like import Size, bert_feeds, bert_model

    model = bert_model(Size(), 2, 24, fused=True, opset=23)
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 2
    counts = ops(check(model, bert_feeds(Size(), 2, 24), layout_costs=ALWAYS))
    assert counts["conv2d"] == 12 and counts["plane_product"] == 4 and counts["matmul"] == 0


def test_small_distilbert_of_free_sizes() -> None:
    pytest.importorskip("torch")
    from tests.transformers_like import Size, bert_feeds, bert_model

    size = Size(types=0, layers=1)
    model = bert_model(size, 2, 16, dynamic=True)
    shapes = {name: (3, 21) for name in ("input_ids", "attention_mask")}
    plan = check(model, bert_feeds(size, 3, 21), input_shapes=shapes, layout_costs=ALWAYS)
    assert plan.outputs[0].shape == (3, 21, size.width) and ops(plan)["conv2d"] == 6
