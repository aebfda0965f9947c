"""What a layer's regression knows of its samples, and how little of it is to be believed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from colonnade.sparsify.arrays import Array, Arrays


@dataclass(frozen=True)
class Damping:
    """What is added to the covariance A of a layer's inputs, in shares of A's mean diagonal.

    plain: of the identity. alike: of what A would be if the channels varied together in the same way at all kernel
    positions: the Kronecker product of A's mean over positions and A's mean over channels. Both have far fewer numbers
    than A, so they are known well where A is not, and inputs unlike those of the calibration obey them too.
    """

    plain: float = 0.01
    alike: float = 0.0


@dataclass
class Moments:
    """Sums over samples of inputs x̃ [K] and wanted outputs y [OC] of one layer (of one convolution group).

    gram: Σ x̃ x̃ᵀ [K, K]; cross: Σ y x̃ᵀ [OC, K]; inputs: Σ x̃ [K]; outputs, squares: Σ y and Σ y² [OC].
    """

    gram: Array
    cross: Array
    inputs: Array
    outputs: Array
    squares: Array
    count: int = 0

    @classmethod
    def empty(cls, arrays: Arrays, rows: int, columns: int) -> Moments:
        return cls(
            arrays.zeros(columns, columns), arrays.zeros(rows, columns), arrays.zeros(columns), arrays.zeros(rows),
            arrays.zeros(rows),
        )  # fmt: skip

    def add(self, inputs: Array, outputs: Array, arrays: Arrays) -> None:
        """Samples x̃ [n, K] with their y [n, OC]."""
        self.gram += arrays.gram(inputs)
        self.cross += outputs.T @ inputs
        self.inputs += inputs.sum(0)
        self.outputs += outputs.sum(0)
        self.squares += (outputs * outputs).sum(0)
        self.count += len(inputs)

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of samples."""
        return Moments(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def of_rows(self, rows: Array) -> Moments:
        """Those of some outputs."""
        return replace(self, cross=self.cross[rows], outputs=self.outputs[rows], squares=self.squares[rows])
