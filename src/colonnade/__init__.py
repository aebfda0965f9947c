"""Colonnade: column-wise N:M pruning, measured kernels, native bundles.

The public names load on first use: a board needs numpy only, pruning files needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colonnade.accuracy import compare as compare
    from colonnade.accuracy import evaluate as evaluate
    from colonnade.api import build as build
    from colonnade.fitting.road import fit as fit
    from colonnade.pattern import ColumnPattern as ColumnPattern
    from colonnade.runtime.session import Session as Session
    from colonnade.sparsify.balance import balance as balance
    from colonnade.sparsify.finetune import finetune as finetune
    from colonnade.sparsify.masks import remove_masks as remove_masks
    from colonnade.sparsify.masks import sparsify_ as sparsify_
    from colonnade.sparsify.rechoose import Rechoose as Rechoose
    from colonnade.sparsify.reconstruct import reconstruct_ as reconstruct_
    from colonnade.sparsify.torch_model import export as export
    from colonnade.sparsify.winograd_torch import winograd_ as winograd_

_PLACES = {
    "ColumnPattern": "colonnade.pattern",
    "Rechoose": "colonnade.sparsify.rechoose",
    "Session": "colonnade.runtime.session",
    "balance": "colonnade.sparsify.balance",
    "compare": "colonnade.accuracy",
    "evaluate": "colonnade.accuracy",
    "export": "colonnade.sparsify.torch_model",
    "finetune": "colonnade.sparsify.finetune",
    "fit": "colonnade.fitting.road",
    "reconstruct_": "colonnade.sparsify.reconstruct",
    "remove_masks": "colonnade.sparsify.masks",
    "sparsify_": "colonnade.sparsify.masks",
    "winograd_": "colonnade.sparsify.winograd_torch",
}

__all__ = [
    "ColumnPattern", "Rechoose", "Session", "balance", "build", "compare", "evaluate", "export", "finetune", "fit",
    "reconstruct_", "remove_masks", "sparsify_", "winograd_",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'colonnade' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`colonnade.build` is the function people call, and also the name of a sub-package.

    The import system would put the sub-package in the function's place as soon as anything imports it. So the name is
    a property that only ever answers with the function; `from colonnade.build import ...` finds the sub-package all
    the same.
    """

    def _get_build(self) -> Any:
        return import_module("colonnade.api").build

    def _set_build(self, package: ModuleType) -> None:
        pass

    build = property(_get_build, _set_build)


sys.modules[__name__].__class__ = _Package
