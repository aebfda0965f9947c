"""A plan run in this process: kernel calls through ctypes, without a bundle.

The kernels of every operator are a shared library of their own in the build cache, so a model that brings no new
operator compiles nothing. For tests and for tools that run many small models; speed is the bundle's business.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.build.toolchain import Toolchain, host
from colonnade.kernels import registry, render
from colonnade.kernels.call import Arena, Call, Const, External
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.registry import Candidate, Variant
from colonnade.layout import LINE, round_up
from colonnade.plan import Plan, Step

Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class Program:
    """A plan bound to memory of its own; ``choices`` has a candidate a step (default: the static ranking's best).

    ``lean``: compile the kernels that it takes, not all those of its operators: sooner ready, of no use to others.
    """

    def __init__(self, plan: Plan, isa: Isa, choices: Sequence[Candidate] | None = None, lean: bool = False) -> None:
        self.plan = plan
        if choices is None:
            choices = [registry.candidates(step, isa, 1)[0] for step in plan.steps]
        self._arena = _aligned(plan.arena)
        self._arena.view(np.float32)[:] = np.nan  # nothing may rely on what lay there before
        self._kept: list[npt.NDArray[Any]] = []
        self._calls = []
        bound = [(step, registry.bind(step, choice)) for step, choice in zip(plan.steps, choices, strict=True)]
        scratch = max((call.scratch for _, calls in bound for call in calls), default=0)
        shared = max((sum(c.shared for c in calls) for _, calls in bound), default=0)
        self._scratch, self._shared = _aligned(scratch), _aligned(shared)
        symbols = sorted({call.kernel for _, calls in bound for call in calls})
        if lean:
            taken = compiled([v for s, v in registry.variants(isa).items() if s in symbols], isa)
        else:
            one = replace(isa, adders=False)  # which changes no kernel, only which are offered
            taken = {s: kernels(_row_of(s, isa.name), one)[s] for s in symbols}
        for step, calls in bound:
            for index, call in enumerate(calls):
                kernel = taken[call.kernel]
                image, outside = self._arguments(call)
                self._calls.append((kernel, image, outside, step, index == 0))
        self._once = sum(len(calls) for _, calls in bound[: plan.once])  # calls from here on are for all images

    def run(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        before: Callable[[Step, npt.NDArray[np.uint8]], None] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name; inputs are converted to the types of their ports. ``before`` sees the arena in front of
        every step."""
        inputs = {p.name: np.ascontiguousarray(feeds[p.name], p.dtype).reshape(p.shape) for p in self.plan.inputs}
        outputs = {p.name: np.empty(p.shape, p.dtype) for p in self.plan.outputs}
        images, seam = self.plan.images, self.plan.seam
        between = {} if seam is None else {seam.name: np.empty(seam.shape, seam.dtype)}
        sources, sinks = inputs | between, outputs | between
        turns = [(index, self._calls[: self._once]) for index in range(images)]
        for index, calls in (*turns, (0, self._calls[self._once :])):
            for kernel, image, outside, step, first in calls:
                if first and before is not None:
                    before(step, self._arena)
                for at, name in outside:
                    array = (sinks if step.inputs else sources)[name]
                    _point(image, at, array.ctypes.data + index * (array.nbytes // images))
                kernel(image.ctypes.data, 0, 1)
        return outputs

    def _arguments(self, call: Call) -> tuple[npt.NDArray[np.uint8], list[tuple[int, str]]]:
        """The call's struct, and where the user's arrays go into it."""
        struct = registry.structs()[call.struct]
        numbers = {k: v for k, v in call.fields.items() if isinstance(v, int | float)}
        image = _aligned(struct.size)
        image[:] = np.frombuffer(struct.pack(numbers), np.uint8)
        outside = []
        offsets = struct.offsets()
        for member in struct.members:
            if not member.is_pointer:
                continue
            value, at = call.fields[member.name], offsets[member.name]
            match value:
                case Arena(offset):
                    _point(image, at, self._arena.ctypes.data + offset)
                case Const(data):
                    _point(image, at, self._keep(data))
                case External(name):
                    outside.append((at, name))
                case None:
                    pass
                case _:
                    shared = getattr(value, "offset", None)
                    base = self._scratch if shared is None else self._shared
                    _point(image, at, base.ctypes.data + (shared or 0))
        self._kept.append(image)
        return image, outside

    def _keep(self, data: npt.NDArray[Any]) -> int:
        array = _aligned(data.nbytes)
        array[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._kept.append(array)
        return int(array.ctypes.data)


def _point(image: npt.NDArray[np.uint8], at: int, address: int) -> None:
    image[at : at + 8] = np.frombuffer(address.to_bytes(8, "little"), np.uint8)


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    """uint8 [size] on a cache line, with one to spare behind it."""
    room = np.zeros(round_up(max(size, 1), LINE) + 2 * LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + round_up(size, 4)][:size] if size else room[start : start + LINE]


@functools.cache
def _owners(name: str) -> dict[str, str]:
    """Operator by kernel symbol."""
    return {v.symbol: op for op, row in reversed(registry.rows().items()) for v in row.variants(isa_named(name))}


def _row_of(symbol: str, name: str) -> str:
    return _owners(name)[symbol]


@functools.cache
def kernels(op: str, isa: Isa) -> dict[str, Any]:
    """Symbol → function, of all kernels of operator ``op``."""
    return compiled(registry.operator(op).variants(isa), isa)


def compiled(variants: Iterable[Variant], target: Isa) -> dict[str, Any]:
    """Symbol → function."""
    files = render.library(target, variants)
    files["exports.c"] = (
        f"extern const char cn_kernels_{target.name}[];\n"
        f'__attribute__((visibility("default"))) const void *cn_table(void) {{ return cn_kernels_{target.name}; }}\n'
    )
    library = ctypes.CDLL(str(Toolchain().compile(files, "shared", host())))
    library.cn_table.restype = ctypes.c_void_p
    table = library.cn_table()
    found: dict[str, Any] = {}
    while symbol := ctypes.c_char_p.from_address(table).value:
        function = Kernel(ctypes.c_void_p.from_address(table + 8).value or 0)
        function.library = library  # type: ignore[attr-defined]
        found[symbol.decode()] = function
        table += 16
    return found
