"""What a fit keeps in its folder: JSON files, each whole or not there, and digests of what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.onnx_io import writing_aside


def digest(arrays: Mapping[str, npt.NDArray[Any]], **values: Any) -> str:
    """Equal for equal arrays and values."""
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or it is broken."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """The file, whole or not at all."""
    with writing_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
