"""The transforms of minimal filtering (``workload.filtering``) as sums, and these as C."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from colonnade.workload.filtering import POINTS, inputs

Program = tuple[tuple[str, str, float, str], ...]  # sums that share what they can: name = first + factor * second

# Three taps in fewer sums than are found below, and in an order in which few wait for the one before
INTO: dict[tuple[int, int], Program] = {
    (2, 3): (("y0", "x2", -1, "x0"), ("y1", "x1", 1, "x2"), ("y2", "x2", -1, "x1"), ("y3", "x3", -1, "x1")),
    (4, 3): (
        ("a", "x4", -4, "x2"), ("b", "x3", -4, "x1"), ("c", "x4", -1, "x2"), ("d", "x3", -1, "x1"),
        ("e", "x4", -5, "x2"), ("f", "x5", -5, "x3"), ("y1", "a", 1, "b"), ("y2", "a", -1, "b"),
        ("y3", "c", 2, "d"), ("y4", "c", -2, "d"), ("y0", "e", 4, "x0"), ("y5", "f", 4, "x1"),
    ),
}  # fmt: skip
BACK: dict[tuple[int, int], Program] = {
    (2, 3): (("a", "x0", 1, "x1"), ("b", "x1", -1, "x2"), ("y0", "a", 1, "x2"), ("y1", "b", 1, "x3")),
    (4, 3): (
        ("a", "x1", 1, "x2"), ("b", "x1", -1, "x2"), ("c", "x3", 1, "x4"), ("d", "x3", -1, "x4"), ("e", "x0", 1, "a"),
        ("f", "b", 8, "d"), ("y1", "b", 2, "d"), ("y2", "a", 4, "c"), ("y0", "e", 1, "c"), ("y3", "f", 1, "x5"),
    ),
}  # fmt: skip


def into(m: int, r: int) -> Program:
    """B as sums, a row each: its last coefficient is 1, so no product stands alone."""
    if (m, r) in INTO:
        return INTO[m, r]
    steps: list[tuple[str, str, float, str]] = []
    for i, row in enumerate(inputs(m, r)):
        *others, last = np.flatnonzero(row)
        assert row[last] == 1 and others
        terms = [(float(row[k]), f"x{k}") for k in others]
        steps += _sum(f"y{i}", f"x{last}", terms)
    return tuple(steps)


def back(m: int, r: int) -> Program:
    """A as sums: those and the differences of a pair first, which rows of even and odd powers are made of."""
    if (m, r) in BACK:
        return BACK[m, r]
    points = POINTS[m, r]
    pairs = [(i, float(points[i])) for i in range(1, len(points) - 1, 2)]
    alone = [(len(points) - 1, float(points[-1]))] if len(points) % 2 == 0 else []
    steps = [(name, f"x{i}", sign, f"x{i + 1}") for i, _ in pairs for name, sign in ((f"s{i}", 1.0), (f"d{i}", -1.0))]
    for t in range(m):
        first, *rest = [(p**t, f"{'d' if t % 2 else 's'}{i}") for i, p in pairs]
        assert first[0] == 1
        terms = rest + [(p**t, f"x{i}") for i, p in alone]
        terms += [(1.0, "x0")] * (t == 0) + [(1.0, f"x{len(points)}")] * (t == m - 1)
        steps += _sum(f"y{t}", first[1], terms)
    return tuple(steps)


def _sum(name: str, first: str, terms: Sequence[tuple[float, str]]) -> list[tuple[str, str, float, str]]:
    """``name`` = first + the sum of factor * second of all ``terms``."""
    names = [first, *(f"t{name[1:]}_{count}_" for count in range(len(terms) - 1)), name]
    return [(names[k + 1], names[k], factor, second) for k, (factor, second) in enumerate(terms)]


def lines(program: Program, lmul: int, source: str, target: str, suffix: str = "") -> list[str]:
    """C of a transform in vector primitives: from variables ``<source>i<suffix>`` to ``<target>i<suffix>``."""

    def variable(name: str) -> str:
        return {"x": source, "y": target}.get(name[0], f"{target}{name[0]}") + name[1:] + suffix

    found = []
    for name, first, factor, second in program:
        a, b = variable(first), variable(second)
        value = f"{a}, {b}" if abs(factor) == 1 else f"{a}, {float(factor)!r}f, {b}"
        action = "add" if factor == 1 else "sub" if factor == -1 else "fma"
        found.append(f"const vec{lmul}_t {variable(name)} = vec{lmul}_{action}({value}, vl);")
    return found
