"""Colonnade as an ONNX backend (``onnx.backend.base.Backend``): what the onnx package's own tests run.

Devices are ``CPU`` and, to force an ISA, ``CPU:portable`` and the like. Models run in this process, in kernels that are
compiled once a machine; for speed build a bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.backend.base import Backend, BackendRep

from colonnade.codegen.in_process import Program
from colonnade.errors import UserError
from colonnade.frontend import load
from colonnade.frontend.context import TYPES
from colonnade.kernels.isa import PORTABLE, isa
from colonnade.onnx_io import graph_inputs


class Prepared(BackendRep):
    """A model ready to run, or one that is made ready by its first inputs.

    Some operators need operands that are known at build time (axes, shapes, weights). Where a model takes them as
    inputs, it is built for the values it is called with, and once more when these change.
    """

    def __init__(self, model: onnx.ModelProto, name: str, options: dict[str, Any]) -> None:
        self._model, self._isa, self._options = model, isa(name), options
        self._names = [value.name for value in graph_inputs(model.graph)]
        self._programs: dict[object, Program] = {}
        self._through = _through(model)
        if len(self._through) == len(model.graph.output):
            return
        try:
            self._programs[()] = self._program({})
        except UserError as error:
            if not _wants_constants(str(error)):
                raise
            self._problem = error

    def _program(self, values: dict[str, npt.NDArray[Any]]) -> Program:
        return Program(load(_specialised(self._model, values), **self._options), self._isa)

    def run(self, inputs: Any, **_: Any) -> tuple[npt.NDArray[Any], ...]:
        """All outputs in order, for ``inputs`` in order (a list, an array, or arrays by name).

        Raises:
            UserError: an input has another shape than the model, or no values make the model one that is supported.
        """
        if not isinstance(inputs, dict):
            given = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            inputs = dict(zip(self._names, given, strict=True))
        try:
            if len(self._through) == len(self._model.graph.output):
                return tuple(inputs[self._through[value.name]] for value in self._model.graph.output)
            feeds = {name: np.asarray(inputs[name]) for name in self._names}
        except (ValueError, NotImplementedError) as error:
            raise UserError("inputs: only arrays of numbers or truths are supported, no sequences") from error
        strange = [name for name, array in feeds.items() if str(array.dtype) not in TYPES.values()]
        if strange:
            raise UserError(f"input {strange[0]}: only arrays of numbers or truths are supported")
        program = self._programs.get(()) or self._special(feeds)
        for port in program.plan.inputs:
            shape = feeds[port.name].shape
            if shape != port.shape:
                raise UserError(f"input {port.name}: shape {list(shape)}, expected {list(port.shape)}")
        outputs = program.run(feeds)
        return tuple(outputs[port.name] for port in program.plan.outputs)

    def _special(self, feeds: dict[str, npt.NDArray[Any]]) -> Program:
        """The program for these values: of the whole numbers among the inputs, or of all inputs but the first.

        Of all inputs only where one has no element.
        """
        numbers = [name for name, array in feeds.items() if array.dtype.kind in "iub" and array.ndim < 2]
        rest = self._names[1:]
        empty = [name for name, array in feeds.items() if not array.size]
        problem = self._problem
        for names in (empty, numbers, list(dict.fromkeys(empty + numbers)), rest):
            if len(names) == len(self._names) and not empty:
                continue  # nothing would be left to compute at run time: the answer would be the importer's
            values = {name: feeds[name] for name in names}
            key = tuple((name, array.shape, array.tobytes()) for name, array in values.items())
            if key in self._programs:
                return self._programs[key]
            try:
                self._programs[key] = self._program(values)
            except UserError as error:
                problem = error
                continue
            return self._programs[key]
        raise problem


def _through(model: onnx.ModelProto) -> dict[str, str]:
    """Input by output, for outputs that are an input: these may be anything (a sequence, nothing), not only arrays."""
    source = {value.name: value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
    return {value.name: source[value.name] for value in model.graph.output if value.name in source}


def _wants_constants(problem: str) -> bool:
    return "must be constant" in problem or "is empty" in problem or "free sizes" in problem


def _specialised(model: onnx.ModelProto, values: dict[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """The model with some of its inputs as constants."""
    if not values:
        return model
    special = onnx.ModelProto()
    special.CopyFrom(model)
    kept = [value for value in special.graph.input if value.name not in values]
    del special.graph.input[:]
    special.graph.input.extend(kept)
    special.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    return special


class ColonnadeBackend(Backend):
    """ONNX models through Colonnade's frontend and kernels."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **_: Any) -> bool:
        """Are all of the model's operators supported?"""
        try:
            load(model)
        except UserError:
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **options: Any) -> Prepared:
        """Import the model; ``options`` as ``colonnade.frontend.load`` (batch, input_shapes, outputs).

        Raises:
            UserError: something in the model is not supported.
        """
        name = device.partition(":")[2]
        return Prepared(model, name or PORTABLE, options)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **options: Any) -> Any:
        """Prepare and run."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Run a single node."""
        super().run_node(node, inputs, device, outputs_info, **options)
        arrays = [np.asarray(x) for x in inputs]
        names = [name for name in node.input if name]
        ins = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in zip(names, arrays, strict=True)
        ]
        outs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
        model = onnx.helper.make_model(onnx.helper.make_graph([node], node.op_type, ins, outs), **options)
        return cls.run_model(model, arrays, device)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """``CPU``, alone or with the name of an ISA."""
        return device.partition(":")[0] == "CPU"


prepare = ColonnadeBackend.prepare
run_model = ColonnadeBackend.run_model
run_node = ColonnadeBackend.run_node
supports_device = ColonnadeBackend.supports_device
is_compatible = ColonnadeBackend.is_compatible
