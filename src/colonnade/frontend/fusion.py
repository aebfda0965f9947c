"""What goes into a step that is there already: activations, scales and shifts, sums."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from colonnade.frontend.context import Context
from colonnade.frontend.draft import Value, activate, can_activate, whole
from colonnade.workload import (
    NONE,
    Activation,
    Affine,
    Array,
    Conv2d,
    ConvTranspose2d,
    Epilogue,
    Linear,
    Unary,
    activation_of,
)


class Fusing(Context):
    """A context in which operators become part of the steps before them, where that may be."""

    def activation(self, node: ir.Node, activation: Activation) -> None:
        """``clip`` or a function, in the step that computes its input where that may be."""
        value = self.value(node, 0)
        step = self.writer(value)
        if step is not None and can_activate(step):
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
        placed = value.placed_shape
        if value.is_rows:
            if count == 1:
                count = value.shape[-1] if value.shape else 1
                scale, shift = np.broadcast_to(scale, count), np.broadcast_to(shift, count)
            placed = (prod(value.shape) // count, count)
        self._affine(node, value, placed, scale, shift, NONE)

    def _affine(
        self, node: ir.Node, value: Value, placed: tuple[int, ...], scale: Array, shift: Array, activation: Activation
    ) -> None:
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
