"""Options by which verbs fix what a model leaves free, or cut it."""

from __future__ import annotations

import re
from typing import Annotated

import typer

InputShapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="NAME=1x3x224x224", help="An input's whole shape; may be repeated."),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--outputs", metavar="NAME", help="End the model at these values instead; may be repeated."),
]


def parse_shapes(given: list[str] | None) -> dict[str, list[int]] | None:
    """``["x=1x3x224x224"]`` → ``{"x": [1, 3, 224, 224]}``; None for none.

    Raises:
        UserError: not of that form.
    """
    from colonnade.errors import UserError

    shapes = {}
    for text in given or []:
        name, _, sizes = text.rpartition("=")
        if not name or not re.fullmatch(r"\d+([x,]\d+)*", sizes):
            raise UserError(f"--input-shape {text!r}: expected NAME=SIZES, such as input=1x3x224x224")
        shapes[name] = [int(size) for size in re.split("[x,]", sizes)]
    return shapes or None
