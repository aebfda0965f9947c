"""Write docs/operators.md from the frontend's registry: `python scripts/operators.py`."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "docs" / "operators.md"
HEAD = """# Operators

Written by `scripts/operators.py` from the registry of the frontend (`src/colonnade/frontend/registry.py`).

ONNX operators of opsets 9 to 23 that can be imported, with what becomes of them. Floats of at most 32 bits are
computed in float32; float16, bfloat16 and the floats of 8 and 4 bits are converted at the model's edges and where it
casts. Whole numbers and float64 are computed as what they are where the last column says so (plain C, for the few
numbers that models keep beside their pixels; whole ones wrap around); elsewhere whole numbers become float32 (exact
up to 2^24) and float64 is refused. What only moves elements moves those of any type. Strings, sequences and optional
values are refused.

`Planes` are what convolutions read (see `layout.md`), `dense arrays` are row-major. Sizes are fixed when a model is
imported; axes, shapes, pads and the weights of convolutions must be constants. Nodes whose inputs are all constant, and
`Constant`, `ConstantOfShape`, `Range`, `Shape` and the like that follow from sizes, are computed at import. Functions
that exporters write as several nodes (SiLU, hard-swish, Mish, GELU, LayerNorm) are found again; functions and limits
end the step before them where they can.

Operators that are not here but that ONNX itself defines by others (RotaryEmbedding, SwiGLU, losses and more) are
replaced by these where all of them are. The last column says what of an operator is refused, as the importer says it
(besides models that contradict themselves); what the onnx package's own tests try that is refused stands in
`tests/onnx_refused.txt`, a reason each. How whole networks fare: [models.md](models.md).

| operator | how | whole numbers, float64 | refused |
|---|---|---|---|
"""
# that a model contradicts itself is no limit of ours
WRONG = re.compile("not fit|is not known|are not the|beyond the|cannot see|is missing|neither|holds NaN|repair")


def limits(handler: Callable[..., object]) -> list[str]:
    """What a handler, and the functions of the frontend that it calls by name, refuse."""
    from colonnade.frontend.context import Unsupported

    seen: dict[object, None] = {}
    found: dict[str, None] = {}

    def walk(function: Any) -> None:
        if function in seen or not function.__module__.startswith("colonnade.frontend"):
            return
        seen[function] = None
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            called = function.__globals__.get(node.func.id)
            if called is Unsupported and not WRONG.search(_said(node.args[0])):
                found[_said(node.args[0]).split(";")[0]] = None
            elif inspect.isfunction(called):
                walk(called)

    walk(handler)
    return list(found)


def _said(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return str(message.value)
    assert isinstance(message, ast.JoinedStr)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in message.values)


def text() -> str:
    """The whole page."""
    from colonnade.frontend.context import MOVES
    from colonnade.frontend.expand import OURS
    from colonnade.frontend.registry import HANDLERS, TYPED

    rows = []
    for name in sorted({*HANDLERS, *OURS}):
        handler: Any = HANDLERS.get(name) or OURS[name]
        plain = handler.func if isinstance(handler, functools.partial) else handler
        words = " ".join((inspect.getdoc(plain) or "").split("\n\n")[0].split())
        other = "moved" if name in MOVES else "computed" if name in TYPED or name in ("Cast", "CastLike") else ""
        rows.append(f"| {name} | {words} | {other} | {'; '.join(limits(plain))} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"{TARGET.name}: {len(text().splitlines())} lines", file=sys.stderr)
