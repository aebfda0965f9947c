"""Arrays that a user stored in a file, .npz or .npy: nothing in it is run; what is wrong with it is said in a line."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError

BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def arrays(path: Path, others: str = "") -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    """The array of an .npy, or those of an .npz by name. others: what else the file might have been, for the error.

    Raises ``UserError`` where there is no such file, or it is damaged, none of these, or holds Python objects, which
    could run anything.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except BROKEN as error:
        raise UserError(f"{path}: {_reason(path, error, others)}") from None


def _reason(path: Path, error: Exception, others: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, ValueError) and "pickle" in str(error):
        with path.open("rb") as file:
            known = file.read(6) == b"\x93NUMPY" or zipfile.is_zipfile(path)
        if known:
            return "holds Python objects, which are not read; save arrays of numbers"
        return f"neither an array (.npy) nor arrays (.npz){others and f' nor {others}'}, or cut off"
    return "damaged or cut off; save or copy it again"
