"""What every operator call has: a stable key, its numpy definition, its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from colonnade.workload.function import Function

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Activation:
    """``function(clip(x, low, high))``: none, ReLU and ReLU6 are limits alone, one or two instructions a vector.

    A function is computed in place: by the kernel on what it has just stored (``kernels.ops.then``), or right after the
    step's own calls (``kernels.registry.bind``).
    """

    low: float = -np.inf
    high: float = np.inf
    function: Function | None = None

    def __call__(self, x: Array) -> Array:
        x = np.clip(x, np.float32(self.low), np.float32(self.high))
        return x if self.function is None else self.function(x)

    def __str__(self) -> str:
        if self.function is not None:
            limits = Activation(self.low, self.high)
            return str(self.function) if limits == NONE else f"{limits}+{self.function}"
        return {(-np.inf, np.inf): "none", (0.0, np.inf): "relu", (0.0, 6.0): "relu6"}.get(
            (self.low, self.high), f"clip({self.low:g},{self.high:g})"
        )


NONE = Activation()
RELU = Activation(low=0.0)
RELU6 = Activation(low=0.0, high=6.0)


@dataclass(frozen=True)
class Epilogue:
    """What happens between the sum and the only store: ``activation(sum + bias + residual)``."""

    residual: bool = False
    activation: Activation = NONE

    def __str__(self) -> str:
        return ("add+" if self.residual else "") + str(self.activation)


PLAIN = Epilogue()


class Workload(ABC):
    """One operator call: shapes, strides, dtype and epilogue, but no data. Its classes are frozen dataclasses."""

    op: ClassVar[str]  # name of the operator: the kernels that implement it carry it in their registry row

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense operator (0 where the notion makes no sense)."""
        return 0

    @property
    def kept_macs(self) -> int:
        """Multiply-adds on kept weights: all, where an operator knows of no zeros."""
        return self.macs

    def key(self) -> str:
        """``op(field=value,...)``, fields in order of declaration: equal exactly for equal workloads, stable over
        versions, part of every tuning record."""
        values = ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.op}({values})"

    @abstractmethod
    def reference(self, *inputs: Any, **constants: Any) -> Array:
        """The operator's definition in numpy: what every kernel is tested against."""


# constants that ``reference`` takes behind the first input, in this order; all others it takes by name
POSITIONAL = ("weight", "bias", "scale", "shift")


def evaluate(workload: Workload, inputs: Sequence[Array], constants: Mapping[str, Any]) -> Array:
    """``workload.reference`` of a step's inputs (data first) and its constants by role."""
    roles = ("weight", "bias") if "weight" in constants else POSITIONAL
    fixed = [constants.get(role) for role in roles if role in constants or "weight" in constants]
    named = {role: array for role, array in constants.items() if role not in POSITIONAL}
    return workload.reference(*inputs[:1], *fixed, *inputs[1:], **named)


def activation_of(workload: Workload) -> Activation:
    """The activation in which a workload ends; ``NONE`` for one that cannot end in any."""
    holder = getattr(workload, "epilogue", workload)
    found = getattr(holder, "activation", NONE)
    assert isinstance(found, Activation)
    return found


def with_activation(workload: Workload, activation: Activation) -> Workload:
    """The workload with another activation in the place of its own."""
    epilogue = getattr(workload, "epilogue", None)
    if epilogue is not None:
        return replace(workload, epilogue=replace(epilogue, activation=activation))  # type: ignore[type-var]
    return replace(workload, activation=activation)  # type: ignore[type-var]


def without_function(workload: Workload) -> Workload:
    """The workload up to the function in which it ends; its limits stay."""
    return with_activation(workload, replace(activation_of(workload), function=None))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return str(value)
