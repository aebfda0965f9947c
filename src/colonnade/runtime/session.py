"""Run a Colonnade bundle from Python with numpy alone. This file is copied into every bundle, and stands by itself.

from session import Session

with Session("path/to/bundle", threads=2) as session:
    outputs = session.run({"input": x})  # numpy arrays by name
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

FORMAT = 1
_ERROR_BYTES = 512
_FORKED = 5  # COLONNADE_FORKED of model.h


class SessionError(ValueError):
    """A bundle that cannot be used here, or inputs that do not fit it; always one line."""

    exit_code = 2


@dataclass(frozen=True)
class Port:
    """An input or output: ``name``, ``shape``, ``type`` (a numpy name)."""

    name: str
    shape: tuple[int, ...]
    type: str


class Session:
    """A loaded model with its memory and threads.

    ``path`` is the bundle's folder (default: the one this file stands in), ``threads`` how many threads run uses, the
    caller's included (default: what the bundle was built for). One call runs at a time; a call from another thread
    waits for its turn. Close it, or use it in a ``with`` statement. A session does not survive ``os.fork``.
    """

    def __init__(self, path: str | Path | None = None, threads: int | None = None) -> None:
        self._model: int | None = None
        self._lock = threading.Lock()
        self.path = Path(path) if path is not None else Path(__file__).resolve().parent
        self.manifest = _manifest(self.path)
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise SessionError(f"threads: {threads!r}, expected a whole number of at least 1")
        self.threads = threads if threads is not None else int(self.manifest["threads"])
        self._inputs = _ports(self.manifest["inputs"])
        self._outputs = _ports(self.manifest["outputs"])
        library = self.path / "libmodel.so"
        size = self.manifest["bytes"][library.name]
        if library.is_file() and library.stat().st_size != size:  # the loader maps what is not there, and reads it
            raise SessionError(f"{library}: truncated or changed; build or copy the bundle again")
        self._library = _library(library)
        described = self.describe()
        if any(described[ports] != self.manifest[ports] for ports in ("inputs", "outputs")):
            raise SessionError(f"{library}: of another bundle than manifest.json; build or copy the bundle again")
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        model = ctypes.c_void_p()
        weights = os.fsencode(self.path / "weights.bin")
        if self._library.colonnade_create(weights, self.threads, ctypes.byref(model), error, _ERROR_BYTES) != 0:
            raise SessionError(error.value.decode(errors="replace"))
        self._model = model.value

    def get_inputs(self) -> list[Port]:
        """The model's inputs, in order."""
        return list(self._inputs)

    def get_outputs(self) -> list[Port]:
        """The model's outputs, in order."""
        return list(self._outputs)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What runs, in order: ``name``, ``workload``, ``kernel`` and more of every step, as in manifest.json."""
        return list(self.manifest["steps"])

    def describe(self) -> dict[str, Any]:
        """What the library says about itself: name, isa, threads, inputs, outputs, steps."""
        described: dict[str, Any] = json.loads(self._library.colonnade_describe().decode())
        return described

    def run(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name for ``feeds``, one array an input by name. The outputs are new arrays.

        Raises ``SessionError`` for a missing or unknown name, a wrong shape or type; nothing is converted silently.
        """
        arrays = self._feeds(feeds)
        outputs = self._empty()
        self._call(self._library.colonnade_run, arrays, outputs)
        return {port.name: outputs[at] for at, port in enumerate(self._outputs)}  # zip's strict is of Python 3.10

    def profile(self, feeds: Mapping[str, npt.ArrayLike], repeat: int = 10) -> npt.NDArray[np.uint64]:
        """Time of every step in ns, uint64 [repeat, steps]; ``steps`` tells which is which. Runs once more before."""
        if not isinstance(repeat, Integral) or repeat < 1:
            raise SessionError(f"repeat: {repeat!r}, expected a whole number from 1")
        arrays, outputs = self._feeds(feeds), self._empty()
        times = np.zeros((repeat, len(self.steps)), np.uint64)
        self._call(self._library.colonnade_run, arrays, outputs)
        for row in times:
            self._call(self._library.colonnade_profile, arrays, outputs, row.ctypes.data)
        return times

    def close(self) -> None:
        """Stop the threads and free the memory. Closing twice is allowed."""
        with self._lock:
            model, self._model = self._model, None
            if model is not None:
                self._library.colonnade_destroy(model)

    def __reduce__(self) -> str:  # copies too
        raise SessionError(
            "a session has memory and threads of its own, and cannot be copied or pickled; open another one"
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()

    def _feeds(self, feeds: Mapping[str, npt.ArrayLike]) -> list[npt.NDArray[Any]]:
        names = [port.name for port in self._inputs]
        if not isinstance(feeds, Mapping):
            raise SessionError(f"inputs are {type(feeds).__name__}: expected arrays by name, of {', '.join(names)}")
        unknown = [str(name) for name in feeds if name not in names]
        missing = [name for name in names if name not in feeds]
        if unknown or missing:
            what = f"unknown input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise SessionError(f"{what}; the model's inputs: {', '.join(names)}")
        arrays = []
        for port in self._inputs:
            try:
                array = np.asarray(feeds[port.name])
            except ValueError as error:  # lists of several lengths
                raise SessionError(f"input {port.name!r}: no array ({error})") from error
            if array.dtype != _dtype(port.type):
                raise SessionError(
                    f"input {port.name!r}: type {array.dtype}, expected {port.type}; use .astype({port.type!r})"
                )
            if array.shape != port.shape:
                raise SessionError(f"input {port.name!r}: shape {array.shape}, expected {port.shape}")
            arrays.append(np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"]))
        return arrays

    def _empty(self) -> list[npt.NDArray[Any]]:
        return [np.empty(port.shape, _dtype(port.type)) for port in self._outputs]

    def _call(self, function: Any, inputs: list[npt.NDArray[Any]], outputs: list[npt.NDArray[Any]], *more: int) -> None:
        with self._lock:
            if self._model is None:
                raise SessionError(f"{self.path}: the session is closed")
            code = function(self._model, _pointers(inputs), _pointers(outputs), *more)
        if code == _FORKED:
            raise SessionError(f"{self.path}: the session belongs to the parent process; open one after the fork")
        if code != 0:
            raise SessionError(f"{self.path}: the model failed with code {code}")


def _dtype(name: str) -> np.dtype[Any]:
    """numpy's own types; bfloat16 and the smaller ones come with ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        try:
            small: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        except ImportError:
            raise SessionError(f"arrays of {name} need the package ml_dtypes; pip install ml_dtypes") from None
        return small


def _pointers(arrays: list[npt.NDArray[Any]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(len(arrays), 1))(*(array.ctypes.data for array in arrays))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, arch, _ = manifest["format"], manifest["arch"], manifest["bytes"]["libmodel.so"]
    except OSError as error:
        raise SessionError(f"{folder}: not a bundle: {path.name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SessionError(f"{path}: damaged; build or copy the bundle again") from error
    if found != FORMAT:
        raise SessionError(f"{folder}: bundle of format {found}, expected {FORMAT}; build it again with this version")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if arch != machine:
        raise SessionError(f"{folder}: this bundle needs {arch} ({manifest.get('isa')}); this machine is {machine}")
    return manifest


def _ports(rows: list[dict[str, Any]]) -> list[Port]:
    return [Port(row["name"], tuple(row["shape"]), row["dtype"]) for row in rows]


_LOADED: dict[Path, tuple[int, int]] = {}  # by name that the process has loaded: which file that was


def _load(path: Path) -> ctypes.CDLL:
    """The library at a path, also where another one that stood there before is loaded: the loader goes by names."""
    found = path.stat()
    which = (found.st_ino, found.st_mtime_ns)
    if _LOADED.setdefault(path, which) == which:
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(shutil.copy(path, folder))


def _library(path: Path) -> ctypes.CDLL:
    try:
        library = _load(path.resolve())
        void, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        for name, result, arguments in (
            ("create", ctypes.c_int, [text, ctypes.c_int, void, text, size]),
            ("run", ctypes.c_int, [void, void, void]),
            ("profile", ctypes.c_int, [void, void, void, void]),
            ("destroy", None, [void]),
            ("describe", text, []),
        ):
            function = getattr(library, f"colonnade_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise SessionError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return library
