"""What goes into a step that is there already: activations, scales and shifts, sums."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Context, Unsupported
from colonnade.frontend.draft import Draft, Value, activate, can_activate, whole
from colonnade.frontend.tokens import Run, Tokens, joined_runs, row_major
from colonnade.workload import (
    NONE,
    Activation,
    Affine,
    Array,
    Conv2d,
    ConvTranspose2d,
    Epilogue,
    Linear,
    MatMul,
    PlaneProduct,
    Unary,
    activation_of,
)

LANES = 16  # of a vector, about: so many tokens are computed together
SPARSE = 0.8  # kept weights, as a share, from which on a layer counts as dense


class Fusing(Context):
    """A context in which operators become part of the steps before them, where that may be."""

    def activation(self, node: ir.Node, activation: Activation) -> None:
        """``clip`` or a function, in the step that computes its input where that may be."""
        tokens = self.tokens(node, 0)
        if tokens is not None:
            tokens = tokens.all_planes()
            self._activation(node, tokens.planes, activation)
            self.set(node, tokens.on(self.result(node)))
        else:
            self._activation(node, self.value(node, 0), activation)

    def _activation(self, node: ir.Node, value: Value, activation: Activation) -> None:
        step = self.writer(value)
        if step is not None and can_activate(step, activation):
            activate(step, activation)
            self.set(node, value)
        elif activation.function is not None:
            placed = value.placed_shape
            self.emit(node, Unary(activation.function, placed), [value], placed, value.shape)
        else:
            placed = value.placed_shape
            ones = np.ones(placed[1], np.float32)
            self._affine(node, value, placed, ones, ones * 0, activation)

    def affine(self, node: ir.Node, value: Value, scale: Array, shift: Array) -> None:
        """``value * scale[c] + shift[c]``: into the weights before it where that may be, else a step.

        c are the channels of planes, or the last elements of a dense array: as many as ``scale`` has.
        """
        step = self.writer(value)
        count = len(scale)
        if step is not None and step.output is not None and activation_of(step.workload) == NONE:
            constants, workload = step.constants, step.workload
            outs = step.output.channels
            if value.is_rows and count == 1:
                scale, shift = np.broadcast_to(scale, outs), np.broadcast_to(shift, outs)
            foldable = isinstance(workload, (Conv2d, ConvTranspose2d, Linear)) and not workload.epilogue.residual
            if (foldable or isinstance(workload, Affine)) and len(scale) == outs:
                wide = scale.astype(np.float64)
                if isinstance(workload, Affine):
                    constants["shift"] = (constants["shift"] * wide + shift).astype(np.float32)
                    constants["scale"] = (constants["scale"] * wide).astype(np.float32)
                else:
                    weight = constants["weight"]
                    product = weight * wide.reshape(-1, *[1] * (weight.ndim - 1))
                    constants["weight"] = product.astype(np.float32)
                    constants["bias"] = (constants["bias"] * wide + shift).astype(np.float32)
                self.set(node, value)
                return
            scale, shift = scale[:count], shift[:count]
            if self._scale_product(step, scale, shift):
                self.set(node, value)
                return
        placed = value.placed_shape
        if value.is_rows:
            if count == 1:
                count = value.shape[-1] if value.shape else 1
                scale, shift = np.broadcast_to(scale, count), np.broadcast_to(shift, count)
            placed = (prod(value.shape) // count, count)
        self._affine(node, value, placed, scale, shift, NONE)

    def _scale_product(self, step: Draft, scale: Array, shift: Array) -> bool:
        """Let a product of computed operands take one factor."""
        if not isinstance(step.workload, (MatMul, PlaneProduct)) or shift.any() or (scale != scale[0]).any():
            return False
        step.workload = replace(step.workload, factor=step.workload.factor * float(scale[0]))
        return True

    def _affine(
        self, node: ir.Node, value: Value, placed: tuple[int, ...], scale: Array, shift: Array, activation: Activation
    ) -> None:
        assert len(scale) == len(shift) == placed[1], f"{node.name}: {len(scale)} scales for {placed}"
        constants = {"scale": np.ascontiguousarray(scale, np.float32), "shift": np.ascontiguousarray(shift, np.float32)}
        x = value.seen(placed) if value.is_rows else value
        self.emit(node, Affine(placed, activation), [x], placed, value.shape, constants)

    def add_residual(self, node: ir.Node, a: Value, b: Value) -> bool:
        """Fuse ``a + b`` into the convolution or linear layer that computes one of them, if there is one."""
        steps = [(step, other) for value, other in ((a, b), (b, a)) if (step := self.writer(value)) is not None]
        # the later one: what it adds has been computed by then
        for step, other in sorted(steps, key=lambda pair: -self.steps.index(pair[0])):
            workload = step.workload
            if not isinstance(workload, (Conv2d, Linear)) or workload.epilogue != Epilogue():
                continue
            if isinstance(workload, Linear):  # element by element beside its own matrix
                assert step.output is not None
                other = other.seen(step.output.shape)
            step.workload = replace(workload, epilogue=Epilogue(residual=True))
            step.inputs.append(other)
            self.steps.remove(step)
            self.steps.append(step)
            assert step.output is not None
            self.set(node, whole(step.output, a.shape))
            return True
        return False

    def linear(
        self, node: ir.Node, x: Value, weight: Array, bias: Array | None, shape: tuple[int, ...], name: str = ""
    ) -> None:
        """A ``Linear`` step on a matrix; ``shape`` is the ONNX shape of its output."""
        (outs, ins) = weight.shape
        batch = prod(x.shape) // ins
        x = x.seen((batch, ins))
        bias = np.zeros(outs, np.float32) if bias is None else bias
        constants = {"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}
        self.emit(node, Linear(batch, ins, outs), [x], (batch, outs), shape, constants, name)

    def linear_of(self, node: ir.Node, weight: Array, bias: Array | None, name: str) -> None:
        """A linear layer on the last axis of input 0: a 1x1 convolution where tokens are the lanes, or ``linear``."""
        outs, ins = weight.shape
        x = self.raw(node, 0)
        x = self.narrowed(x) if isinstance(x, Value) else x
        if x.shape[-1] != ins:
            raise Unsupported(f"shapes {list(x.shape)} and {[ins, outs]} do not fit together")
        if isinstance(x, Tokens):
            tokens = x if self._gain(x.shape, weight) > -self._reorder_ns(prod(x.shape)) else None
        else:
            tokens = self._worth_planes(x, weight)
        if tokens is None or not tokens.covers_lanes or not self._features_last(tokens):
            self.linear(node, self.dense(self.value(node, 0), name), weight, bias, (*x.shape[:-1], outs), name)
            return
        tokens = tokens.ordered()
        n, _, h, w = tokens.planes.placed_shape
        constants = {
            "weight": np.ascontiguousarray(weight).reshape(outs, ins, 1, 1),
            "bias": np.zeros(outs, np.float32) if bias is None else np.ascontiguousarray(bias),
        }
        conv = Conv2d(n, ins, outs, h, w, (1, 1))
        done = self.emit(node, conv, [tokens.planes], (n, outs, h, w), constants=constants, name=name)
        axes = (*tokens.axes[:-1], joined_runs([Run(outs, 1, False)]))
        self.set(node, Tokens(done, axes))

    def _features_last(self, x: Tokens) -> bool:
        """Are features the last axis, and tokens all the others?"""
        last = len(x.axes) - 1
        return x.has_planes(last) and not any(not run.lanes for axis in x.axes[:-1] for run in axis)

    def _gain(self, shape: tuple[int, ...], weight: Array) -> float:
        """Nanoseconds that tokens in the lanes save a linear layer on an array of ``shape``; less than none for few."""
        tokens = prod(shape[:-1])
        lanes = -(-tokens // LANES) * LANES / tokens
        kept = np.count_nonzero(weight)
        rows = self.costs.linear if kept > SPARSE * weight.size else self.costs.sparse
        return float(kept * tokens * (rows - self.costs.mac * lanes))

    def _reorder_ns(self, elements: int) -> float:
        """What it costs to change that many elements between rows and planes."""
        return 4.0 * elements * self.costs.reorder

    def _worth_planes(self, x: Value, weight: Array) -> Tokens | None:
        """A matrix of rows as planes with the tokens in the lanes, if that saves more than both changes of layout."""
        outs, ins = weight.shape
        tokens = prod(x.shape) // ins
        if not x.is_rows or len(x.shape) < 2:
            return None
        if self._gain(x.shape, weight) <= self._reorder_ns(tokens * (ins + outs)):
            return None
        n = x.shape[0] if len(x.shape) > 2 and x.shape[0] < tokens else 1  # images
        w = tokens // n
        like = Value((n, ins, 1, w), (), np.zeros((ins, 2), np.int64))
        axes = [joined_runs([Run(d, s, True)]) for d, s in zip(x.shape[:-1], row_major(x.shape[:-1]), strict=True)]
        seen = Tokens(like, (*axes, joined_runs([Run(ins, 1, False)])))
        planes = self.in_tokens(x, seen)
        return seen.on(planes) if planes is not None else None
