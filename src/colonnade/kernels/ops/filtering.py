"""Minimal filtering F(m, r): m outputs of an FIR filter of r taps in n = m + r - 1 products, by evaluation at points.

Winograd, "Arithmetic Complexity of Computations" (1980); as used here: y = A [(G w) * (B d)] for inputs d [n] and
weights w [r]. With the points p_0 .. p_(n-2) and infinity, a row of B holds the coefficients of the product of all
(x - p_k) but its own (of all of them, for infinity), a row of G the powers of its point over what that product is at
the point, a column of A the powers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

import numpy as np
import numpy.typing as npt

Program = tuple[tuple[str, str, float, str], ...]  # sums that share what they can: name = first + factor * second

# By (m, r): small, in pairs of both signs behind 0, at most one alone behind these. Of the points tried they leave the
# smallest error; over sums of 42 products of normal numbers, F(4, 4) leaves 8e-7 of their spread and F(6, 4) 3e-6 where
# sums in order leave 2.4e-7.
_PLAIN, _HALF, _LAST = tuple(Fraction(p) for p in (0, 1, -1, 2, -2)), Fraction(1, 2), Fraction(3, 4)
POINTS: dict[tuple[int, int], tuple[Fraction, ...]] = {
    (2, 3): _PLAIN[:3],
    (4, 3): _PLAIN,
    (4, 4): (*_PLAIN, _HALF),
    (6, 3): (*_PLAIN, _HALF, -_HALF),
    (6, 4): (*_PLAIN, _HALF, -_HALF, _LAST),
}
ONE = 1  # the place of the point 1, whose column of A holds ones alone: what is added there comes out in every output


def size(m: int, r: int) -> int:
    """n: products, and inputs of the window."""
    return m + r - 1


def _product(points: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of all (x - p), the constant one first."""
    found = [Fraction(1)]
    for p in points:
        found = [a - p * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def inputs(m: int, r: int) -> npt.NDArray[np.float64]:
    """B [n, n]"""
    points = POINTS[m, r]
    rows = [_product([*points[:i], *points[i + 1 :]]) for i in range(len(points))] + [_product(points)]
    return np.array([[float(v) for v in (*row, 0)][: len(points) + 1] for row in rows])


def weights(m: int, r: int) -> npt.NDArray[np.float64]:
    """G [n, r]"""
    points, rows = POINTS[m, r], []
    for i, p in enumerate(points):
        others = prod(p - q for k, q in enumerate(points) if k != i)
        rows.append([float(p**t / others) for t in range(r)])
    return np.array([*rows, [0.0] * (r - 1) + [1.0]])


def outputs(m: int, r: int) -> npt.NDArray[np.float64]:
    """A [m, n]"""
    columns = [[float(p**t) for t in range(m)] for p in POINTS[m, r]] + [[0.0] * (m - 1) + [1.0]]
    return np.array(columns).T


def into(m: int, r: int) -> Program:
    """B as sums, a row each: its last coefficient is 1, so no product stands alone."""
    steps: list[tuple[str, str, float, str]] = []
    for i, row in enumerate(inputs(m, r)):
        *others, last = np.flatnonzero(row)
        assert row[last] == 1 and others
        terms = [(float(row[k]), f"x{k}") for k in others]
        steps += _sum(f"y{i}", f"x{last}", terms)
    return tuple(steps)


def back(m: int, r: int) -> Program:
    """A as sums: those and the differences of a pair first, which rows of even and odd powers are made of."""
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
