"""From a torch model to an ONNX file, masks folded into plain zeros."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colonnade.errors import UserError
from colonnade.onnx_winograd import define
from colonnade.sparsify.masks import remove_masks
from colonnade.sparsify.winograd_torch import WinogradConv2d

OPSET = 18  # the first that torch's exporter writes without converting down


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    input_names: tuple[str, ...] = ("input",),
    output_names: tuple[str, ...] = ("output",),
    dynamic_batch: bool = False,
    opset: int = OPSET,
) -> Path:
    """Write ``model`` in evaluation mode as one ONNX file; ``model`` itself stays as it is.

    example_inputs: a tensor, or a tuple of the model's inputs; their shapes become the file's.
    dynamic_batch:  leave the first axis of every input open.

    Returns the path. Raises UserError when torch cannot export the model or the file cannot be written; nothing is
    left behind then. Weights above 2 GB stand in a second file, ``<path>.data``.
    """
    target = Path(path)
    given = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    # strides such as those of pixels with their channels inside would tie an open batch to the example's
    inputs = tuple(value.contiguous() if isinstance(value, Tensor) else value for value in given)
    plain = remove_masks(copy.deepcopy(model)).eval()
    transformed = [module for module in plain.modules() if isinstance(module, WinogradConv2d)]
    for module in transformed:
        module.exported = True
    names = [*input_names[: len(inputs)], *(f"input{index}" for index in range(len(input_names), len(inputs)))]
    # One pair of axes per input; the name makes them equal.
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            written = Path(aside) / target.name
            try:
                with warnings.catch_warnings(), _quiet():
                    warnings.simplefilter("ignore")
                    torch.onnx.export(
                        plain, inputs, str(written), input_names=names, output_names=list(output_names),
                        opset_version=opset, dynamo=True, optimize=True, external_data=_too_large(plain),
                        dynamic_shapes=shapes, verbose=False,
                    )  # fmt: skip
            except OSError:
                raise
            except Exception as error:
                raise UserError(f"torch cannot export {type(model).__name__}: {_reason(error)}") from error
            _define(written, sorted({module.size for module in transformed}))
            # Weights first: whoever sees the model finds them beside it.
            for part in sorted(Path(aside).iterdir(), key=lambda part: part == written):
                part.replace(target.parent / part.name)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def _reason(error: BaseException) -> str:
    """The first line of what was raised first: the exporter says what it was about, not what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _define(path: Path, sizes: list[str]) -> None:
    """Say in a file what its convolutions with transformed weights compute."""
    import onnx

    if sizes:
        file = onnx.load(str(path), load_external_data=False)
        for size in sizes:
            define(file, size)
        onnx.save(file, str(path))


def _too_large(model: nn.Module) -> bool:
    """Whether the weights pass what one protobuf file can hold (2 GB), with room for the graph."""
    return bool(sum(t.numel() * t.element_size() for t in model.state_dict().values()) > 2_000_000_000)


class _quiet:
    """Keeps the exporter's own log lines off the terminal; its errors come as exceptions."""

    def __enter__(self) -> None:
        self.loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
