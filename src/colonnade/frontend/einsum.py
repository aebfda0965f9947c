"""Einsum as sums, transposes and a product of matrices."""

from __future__ import annotations

from math import prod
from string import ascii_letters

import numpy as np
import onnx_ir as ir

from colonnade.frontend.written import Nodes, known_shape


def written_out(node: ir.Node, graph: ir.Graph) -> bool:
    """Einsum: one operand after the other: what one alone has is summed, then a product of matrices, one for each index
    that both have and somebody needs, and the axes in order.

    False where a shape is not known, and for an axis of 1 that is repeated.
    """
    values = [value for value in node.inputs if value is not None]
    shapes = [known_shape(value) for value in values]
    terms, output = _terms(node.attributes["equation"].as_string(), [len(shape) for shape in shapes])
    if [len(term) for term in terms] != [len(shape) for shape in shapes]:
        return False
    axes = [pair for term, shape in zip(terms, shapes, strict=True) for pair in zip(term, shape, strict=True)]
    sizes = dict(axes)
    if any(sizes[name] != size for name, size in axes):
        return False
    writer = _Writer(Nodes(node, graph), sizes)
    value, term = values[0], terms[0]
    for place in range(1, len(terms)):
        needed = output + "".join(terms[place + 1 :])
        value, term = writer.product(value, term, values[place], terms[place], needed)
    value, term = writer.alone(value, term, output)
    writer.nodes.done(writer.ordered(writer.nodes.op("Identity", value), term, output))
    return True


def _terms(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The names of every operand's axes, and of the output's: an ellipsis becomes names of its own."""
    left, arrow, output = "".join(equation.split()).partition("->")
    terms = left.split(",")
    free = "".join(name for name in ascii_letters if name not in equation)
    hidden = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=False) if "..." in t]
    names = free[: max(hidden, default=0)]
    if not arrow:
        own = left.replace("...", "")
        output = "..." * bool(hidden) + "".join(sorted(n for n in set(own) - {","} if own.count(n) == 1))
    return [
        term.replace("...", names[len(names) - (rank - len(term.replace("...", ""))) :] if "..." in term else "")
        for term, rank in zip(terms, ranks, strict=False)
    ], output.replace("...", names)


class _Writer:
    """Makes nodes of values whose axes have names."""

    def __init__(self, nodes: Nodes, sizes: dict[str, int]) -> None:
        self.nodes, self.sizes = nodes, sizes

    def alone(self, value: ir.Value, term: str, others: str) -> tuple[ir.Value, str]:
        """Of axes with one name the diagonal, and without the axes that nobody else has."""
        while twice := next((name for name in term if term.count(name) > 1), ""):
            first, second = term.index(twice), term.rindex(twice)
            rest = [i for i in range(len(term)) if i not in (first, second)]
            size, sizes = self.sizes[twice], [self.sizes[term[i]] for i in rest]
            square = self.nodes.op("Transpose", value, perm=[first, second, *rest])
            lines = self.nodes.op("Reshape", square, np.array([size * size, *sizes]))
            value = self.nodes.op("Gather", lines, np.arange(size) * (size + 1), axis=0)
            term = twice + "".join(term[i] for i in rest)
        axes = [i for i, name in enumerate(term) if name not in others]
        if not axes:
            return value, term
        return self.nodes.reduced("ReduceSum", value, axes, 0), "".join(name for name in term if name in others)

    def ordered(self, value: ir.Value, term: str, wanted: str) -> ir.Value:
        perm = [term.index(name) for name in wanted]
        return value if perm == list(range(len(term))) else self.nodes.op("Transpose", value, perm=perm)

    def product(self, a: ir.Value, first: str, b: ir.Value, second: str, needed: str) -> tuple[ir.Value, str]:
        """Of two values, without the axes that are not needed."""
        a, first = self.alone(a, first, needed + second)
        b, second = self.alone(b, second, needed + first)
        batch = "".join(name for name in first if name in second and name in needed)
        summed = "".join(name for name in first if name in second and name not in needed)
        rows, columns = "".join(n for n in first if n not in second), "".join(n for n in second if n not in first)
        left, right = self.matrix(a, first, batch, rows, summed), self.matrix(b, second, batch, summed, columns)
        found = batch + rows + columns
        shape = np.array([self.sizes[name] for name in found], np.int64)
        return self.nodes.op("Reshape", self.nodes.op("MatMul", left, right), shape), found

    def matrix(self, value: ir.Value, term: str, batch: str, *groups: str) -> ir.Value:
        """A matrix for each index of the batch; its rows and columns are groups of axes."""
        shape = [self.sizes[name] for name in batch] + [prod(self.sizes[name] for name in group) for group in groups]
        return self.nodes.op("Reshape", self.ordered(value, term, batch + "".join(groups)), np.array(shape))
