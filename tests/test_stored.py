"""Files of arrays as users have them: whole, cut off, damaged, or something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from colonnade.accuracy import calibration_inputs, samples
from colonnade.errors import UserError
from colonnade.stored import arrays


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "two.npz", x=x, labels=np.arange(3))
    np.save(tmp_path / "one.npy", x)
    found = arrays(tmp_path / "two.npz")
    assert isinstance(found, dict) and sorted(found) == ["labels", "x"] and (found["x"] == x).all()
    alone = arrays(tmp_path / "one.npy")
    assert isinstance(alone, np.ndarray) and (alone == x).all()


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.npz"
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    np.savez_compressed(path, x=values)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:3000] + bytes(500) + whole[3500:])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "objects":
        np.savez(path, x=np.array([{}, 1], dtype=object))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", "damaged or cut off"),
        ("damaged", "damaged or cut off"),
        ("text", "neither an array"),
        ("empty", "damaged or cut off"),
        ("objects", "holds Python objects"),
        ("missing", "there is no such file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, kind: str, said: str) -> None:
    """Whoever reads it: pruning's calibration, images with labels, and the reader itself."""
    path = broken(tmp_path, kind)
    for read in (arrays, calibration_inputs, samples):
        with pytest.raises(UserError, match=said) as error:
            read(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_folder_is_no_file_of_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        arrays(broken(tmp_path, "folder"))
