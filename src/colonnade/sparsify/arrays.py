"""The few array operations of which numpy and torch have different spellings, so that one solver runs on both.

The second-order solver is written against an `Arrays`: numpy for ONNX files (no torch needed), torch for modules,
there on the device of the weights. Whatever both spell alike (`@`, slices, `sum`) is used directly.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = Any  # numpy.ndarray or torch.Tensor
# With so many right sides for each of its rows, a triangle is inverted and multiplied: twice the work, but a product.
MANY = 4


class Arrays(Protocol):
    """What the solver asks of a library of arrays. Floats are single precision unless `double` is called."""

    def load(self, values: npt.NDArray[Any]) -> Array: ...
    def host(self, values: Array) -> npt.NDArray[Any]: ...
    def index(self, values: npt.NDArray[np.int64]) -> Array: ...
    def compact(self, values: Array, least: int, largest: float) -> Array: ...
    def zeros(self, *shape: int) -> Array: ...
    def eye(self, size: int) -> Array: ...
    def single(self, values: Array) -> Array: ...
    def double(self, values: Array) -> Array: ...
    def gram(self, values: Array) -> Array: ...
    def inner(self, left: Array, right: Array) -> Array: ...
    def join(self, parts: list[Array], axis: int) -> Array: ...
    def pad(self, maps: Array, top: int, left: int, bottom: int, right: int) -> Array: ...
    def factor(self, matrix: Array) -> Array: ...
    def forward(self, lower: Array, right: Array) -> Array: ...
    def backward(self, lower: Array, right: Array) -> Array: ...
    def inverse(self, lower: Array) -> Array: ...


class NotPositive(ArithmeticError):
    """A matrix without a Cholesky factor."""


class NumpyArrays:
    """numpy, with SciPy's LAPACK."""

    def load(self, values: npt.NDArray[Any]) -> Array:
        return np.asarray(values)

    def host(self, values: Array) -> npt.NDArray[Any]:
        return np.asarray(values)

    def index(self, values: npt.NDArray[np.int64]) -> Array:
        return values

    def compact(self, values: Array, least: int, largest: float) -> Array:
        """Half precision for floats of at least `least` bytes, none of them above `largest`."""
        if values.dtype != np.float32 or values.nbytes < least or not np.abs(values).max(initial=0) < largest:
            return values
        return values.astype(np.float16)

    def zeros(self, *shape: int) -> Array:
        return np.zeros(shape, np.float32)

    def eye(self, size: int) -> Array:
        return np.eye(size, dtype=np.float32)

    def single(self, values: Array) -> Array:
        return np.asarray(values, np.float32)

    def double(self, values: Array) -> Array:
        return np.asarray(values, np.float64)

    def gram(self, values: Array) -> Array:
        """values.T @ values."""
        return values.T @ values  # BLAS computes half of it

    def inner(self, left: Array, right: Array) -> Array:
        """left.T @ right."""
        return left.T @ right

    def join(self, parts: list[Array], axis: int) -> Array:
        return np.concatenate(parts, axis=axis)

    def pad(self, maps: Array, top: int, left: int, bottom: int, right: int) -> Array:
        return np.pad(maps, ((0, 0), (0, 0), (top, bottom), (left, right)))

    def factor(self, matrix: Array) -> Array:
        """Lower Cholesky factor."""
        import scipy.linalg

        try:
            return scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
        except scipy.linalg.LinAlgError as error:
            raise NotPositive(str(error)) from None

    def forward(self, lower: Array, right: Array) -> Array:
        """X of lower @ X = right."""
        import scipy.linalg

        return scipy.linalg.solve_triangular(lower, right, lower=True, check_finite=False)

    def backward(self, lower: Array, right: Array) -> Array:
        """X of lower.T @ X = right."""
        import scipy.linalg

        return scipy.linalg.solve_triangular(lower, right, lower=True, trans=1, check_finite=False)

    def inverse(self, lower: Array) -> Array:
        """Of the matrix whose factor this is."""
        half = self.forward(lower, np.eye(len(lower), dtype=lower.dtype))
        return half.T @ half


class HostArrays(NumpyArrays):
    """numpy's arrays with torch's products and factors, where torch is there and values are on the CPU.

    On one core of an AVX-512 machine torch's Cholesky factor is 2 to 10 times as fast as SciPy's, its products do not
    fall to a third at some shapes, and it converts to and from half precision 4 times as fast; numpy's symmetric
    product is faster. Triangles are torch's too: by turns with SciPy's, whose library has threads of its own, each
    waits for the other's, and a layer took 17 times as long on two cores.
    """

    def compact(self, values: Array, least: int, largest: float) -> Array:
        """Half precision for floats of at least `least` bytes, none of them above `largest`."""
        import torch

        if values.dtype != np.float32 or values.nbytes < least:
            return values
        whole = torch.from_numpy(values)
        if whole.ndim == 4 and not whole.is_contiguous():
            whole = whole.movedim(1, -1)  # channels last: the ends are found 5 times as fast in the order of memory
        low, high = (float(end) for end in torch.aminmax(whole))
        return torch.from_numpy(values).half().numpy() if -largest < low and high < largest else values

    def single(self, values: Array) -> Array:
        import torch

        return torch.from_numpy(values).float().numpy() if values.dtype == np.float16 else super().single(values)

    def inner(self, left: Array, right: Array) -> Array:
        """left.T @ right."""
        import torch

        return (torch.from_numpy(left).T @ torch.from_numpy(right)).numpy()

    def factor(self, matrix: Array) -> Array:
        """Lower Cholesky factor."""
        import torch

        lower, info = torch.linalg.cholesky_ex(torch.from_numpy(np.ascontiguousarray(matrix)))
        if int(info):
            raise NotPositive(f"order {int(info)}")
        return lower.contiguous().numpy()

    def forward(self, lower: Array, right: Array) -> Array:
        """X of lower @ X = right."""
        if MANY * len(lower) > right.shape[1]:
            return self._solved(lower, right, upper=False)
        inverse = self._solved(lower, np.eye(len(lower), dtype=lower.dtype), upper=False)
        return self.inner(np.ascontiguousarray(inverse.T), right)

    def backward(self, lower: Array, right: Array) -> Array:
        """X of lower.T @ X = right."""
        return self._solved(lower.T, right, upper=True)

    def inverse(self, lower: Array) -> Array:
        """Of the matrix whose factor this is: no other matrix of its size is made."""
        import torch

        return torch.cholesky_inverse(torch.from_numpy(lower)).numpy().T  # the same, row by row

    def _solved(self, triangle: Array, right: Array, upper: bool) -> Array:
        import torch

        given = torch.from_numpy(triangle), torch.from_numpy(right)
        return torch.linalg.solve_triangular(*given, upper=upper).numpy()


def host_arrays() -> NumpyArrays:
    """The quickest ones for numpy's arrays: with torch's products where torch is installed."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):  # OSError: a library of its own is missing
        return NumpyArrays()
    return HostArrays()


class TorchArrays:
    """torch, on one device."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def load(self, values: npt.NDArray[Any]) -> Array:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def host(self, values: Array) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = values.detach().cpu().numpy()
        return array

    def index(self, values: npt.NDArray[np.int64]) -> Array:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self.device)

    def compact(self, values: Array, least: int, largest: float) -> Array:
        """Half precision for floats of at least `least` bytes, none of them above `largest`."""
        import torch

        small = values.numel() * values.element_size() < least
        if values.dtype != torch.float32 or small or not float(values.abs().max()) < largest:
            return values
        return values.half()

    def zeros(self, *shape: int) -> Array:
        import torch

        return torch.zeros(shape, device=self.device)

    def eye(self, size: int) -> Array:
        import torch

        return torch.eye(size, device=self.device)

    def single(self, values: Array) -> Array:
        return values.float()

    def double(self, values: Array) -> Array:
        return values.double()

    def gram(self, values: Array) -> Array:
        """values.T @ values."""
        if values.device.type == "cpu":
            return self.load(NumpyArrays().gram(values.numpy()))
        return values.T @ values

    def inner(self, left: Array, right: Array) -> Array:
        """left.T @ right."""
        return left.T @ right

    def join(self, parts: list[Array], axis: int) -> Array:
        import torch

        return torch.cat(parts, dim=axis)

    def pad(self, maps: Array, top: int, left: int, bottom: int, right: int) -> Array:
        import torch.nn.functional as functional

        return functional.pad(maps, (left, right, top, bottom))

    def factor(self, matrix: Array) -> Array:
        """Lower Cholesky factor."""
        import torch

        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise NotPositive(f"order {int(info)}")
        return lower

    def forward(self, lower: Array, right: Array) -> Array:
        """X of lower @ X = right."""
        import torch

        return torch.linalg.solve_triangular(lower, right, upper=False)

    def backward(self, lower: Array, right: Array) -> Array:
        """X of lower.T @ X = right."""
        import torch

        return torch.linalg.solve_triangular(lower.mT, right, upper=True)

    def inverse(self, lower: Array) -> Array:
        """Of the matrix whose factor this is: no other matrix of its size is made."""
        import torch

        return torch.cholesky_inverse(lower).mT  # the same, row by row
