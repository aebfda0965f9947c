"""Tensors that must be alike in something, by union and find."""

from __future__ import annotations

from colonnade.frontend.draft import Tensor


class Ties:
    """Which tensors are tied to each other, over however many others."""

    def __init__(self) -> None:
        self._parent: dict[Tensor, Tensor] = {}

    def find(self, tensor: Tensor) -> Tensor:
        """One of all that are tied, the same for each of them."""
        while (parent := self._parent.setdefault(tensor, tensor)) is not tensor:
            self._parent[tensor] = self._parent[parent]
            tensor = self._parent[parent]
        return tensor

    def tie(self, *tensors: Tensor) -> None:
        """All of these, and what they are tied to."""
        for tensor in tensors[1:]:
            self._parent[self.find(tensor)] = self.find(tensors[0])
