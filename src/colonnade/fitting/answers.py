"""Who answers for a network of the frontier: what a user will run on the target, computed on this machine.

A bundle for this machine answers itself. In float32 any other one is answered for by onnxruntime, from which it differs
by the order of sums. Float16 changes answers, so there a second bundle is made, which no folder keeps: the same steps
in the same precisions, by kernels that emulate the vectors of a board.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from colonnade import accuracy
from colonnade.build.toolchain import Toolchain
from colonnade.bundle import Bundle
from colonnade.errors import UserError
from colonnade.fitting.times import Place

EMULATED = "rvv_emulated"  # the ISA by which this machine computes what RISC-V's vectors of float16 do


def emulated(where: Place) -> bool:
    """Do answers take the emulation of float16?"""
    return where.dtype == "f16" and where.target.name != "local"


def check(where: Place) -> None:
    """Raises UserError where nothing on this machine can answer for the bundles of a place."""
    from colonnade.targets import Local

    if emulated(where):
        try:
            Local().probe().pick_isa(EMULATED, where.dtype)
            _ = Toolchain().version  # of what compiles for this machine, whatever compiles for the target
        except UserError as error:
            raise UserError(f"answers in float16 are emulated on this machine: {error}") from error


def answer(
    bundle: Bundle,
    onnx_file: Path,
    where: Place,
    images: accuracy.Samples,
    progress: Callable[[int, int], None] | None = None,
) -> accuracy.Accuracy:
    """The answers that ``bundle``, made from ``onnx_file`` for ``where``, gives to ``images``. ``progress`` hears how
    many of how many images are answered.

    Raises UserError for images that do not fit the model, and answers that are not finite.
    """
    if where.target.name == "local":
        return accuracy.evaluate(bundle.path, images, threads=where.threads, progress=progress)
    if not emulated(where):
        return accuracy.evaluate(onnx_file, images, threads=where.threads, progress=progress)
    from colonnade.api import build

    # the cores are this machine's: those of the target have nothing to do with how long this takes
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="colonnade-") as room:
        twin = build(
            onnx_file, "local", threads=threads, isa=EMULATED, dtype=where.dtype, batch=where.batch,
            out=Path(room) / "answers", db=where.db,
        )  # fmt: skip
        return accuracy.evaluate(twin.path, images, threads=threads, progress=progress)
