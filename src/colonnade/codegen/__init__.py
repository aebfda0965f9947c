"""From a Plan and its choices to the C files and weights of one model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from colonnade.codegen import model as text
from colonnade.codegen.weights import Constants
from colonnade.kernels import registry, render
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.plan import Plan

WEIGHTS = "weights.bin"
RUNTIME = ("model.h", "runtime.h", "runtime.c", "machine.c", "pool.h", "pool.c", "main.c")
PROGRAM_ONLY = ("main.c",)  # belongs to the program, not to the shared library

__all__ = ["PROGRAM_ONLY", "RUNTIME", "WEIGHTS", "generate", "generate_model"]


def generate(plan: Plan, choices: Sequence[Candidate], isa: Isa, threads: int) -> dict[str, str | bytes]:
    """All source files of the model by name, and weights.bin.

    ``choices``: one candidate a step. ``threads`` is what a session takes when it is not told; the code serves any
    number. Only the kernels used are rendered.
    """
    return generate_model(text.bind(plan, choices, isa, threads))


def generate_model(model: text.Model) -> dict[str, str | bytes]:
    """``generate`` for a plan that is already bound."""
    constants = Constants()
    body = text.source(model, constants)
    weights, checksum = constants.file()
    variants = registry.variants(model.isa)
    runtime = resources.files("colonnade.runtime")
    return {
        **{name: (runtime / name).read_text() for name in RUNTIME},
        **render.library(model.isa, [variants[symbol] for symbol in model.kernels]),
        "model.c": body + "\n" + text.tail(model, len(weights), checksum),
        WEIGHTS: weights,
    }
