"""From a photo to a model's input, as the bundle's manifest says.

The manifest's ``preprocess`` entry (and the file given to ``colonnade build --preprocess``) is a JSON object:

    {"resize": 256,                     pixels of the shorter side, bilinear; null or left out: not resized
     "crop": [224, 224],                height and width cut from the middle; null or left out: not cut
     "mean": [0.485, 0.456, 0.406],     subtracted from each channel, on a scale of 0 to 1; one channel means grey
     "std":  [0.229, 0.224, 0.225]}     and divided by

The result is float32 [1, channels, height, width], channels in the order red, green, blue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET: dict[str, Any] = {
    "resize": 256,
    "crop": [224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
NAMED = {"imagenet": IMAGENET}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")  # of files taken for photos
LARGEST = 16_384  # pixels a side


def preprocessing(name_or_file: str) -> dict[str, Any]:
    """The preprocessing called ``imagenet``, or that of a JSON file. Raises UserError if it is missing or wrong."""
    if name_or_file in NAMED:
        return dict(NAMED[name_or_file])
    path = Path(name_or_file)
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--preprocess {name_or_file}: neither {', '.join(NAMED)} nor a readable file ({error.strerror})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return checked(content, str(path))


def checked(content: Any, where: str) -> dict[str, Any]:
    """``content`` in full, with every key. Raises UserError that names ``where`` and what is wrong."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST

    def numbers(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) in (1, 3)
            and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
        )

    if not isinstance(content, Mapping):
        raise UserError(f"{where}: expected a JSON object with mean and std, and resize and crop where needed")
    unknown = sorted(set(content) - set(IMAGENET))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(IMAGENET)}")
    resize, crop, mean, std = (content.get(key) for key in ("resize", "crop", "mean", "std"))
    if resize is not None and not whole(resize):
        raise UserError(f"{where}: resize is {resize!r}: expected pixels of the shorter side, such as 256")
    if crop is not None and not (isinstance(crop, list) and len(crop) == 2 and all(map(whole, crop))):
        raise UserError(f"{where}: crop is {crop!r}: expected [height, width], such as [224, 224]")
    for key, value in (("mean", mean), ("std", std)):
        if not numbers(value):
            raise UserError(f"{where}: {key} is {value!r}: expected one number a channel (1 or 3 of them)")
    assert isinstance(mean, list) and isinstance(std, list)
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise UserError(f"{where}: std is {std!r}: expected as many numbers as in mean, all above 0")
    return {"resize": resize, "crop": crop, "mean": mean, "std": std}


def open_photo(path: Path, *, grey: bool) -> Image.Image:
    """The photo at ``path``, upright, in one channel or three. Raises UserError for what is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            # Phones store photos lying on their side, with a note how to turn them.
            return _eight_bits(ImageOps.exif_transpose(opened), path).convert("L" if grey else "RGB")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        MemoryError,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(f"{path}: not a photo that can be read ({' '.join(str(error).split())})") from error


def _eight_bits(photo: Image.Image, path: Path) -> Image.Image:
    """A photo of 16 bits a pixel, which Pillow would cut off at 255, in 8 bits; any other as it is. Raises UserError
    for floats, and for whole numbers beyond 16 bits."""
    from PIL import Image

    if photo.mode != "I" and photo.mode != "F" and not photo.mode.startswith("I;16"):
        return photo
    pixels = np.asarray(photo)
    if photo.mode == "F" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
        raise UserError(f"{path}: its pixels are no whole numbers of 8 or 16 bits: save it so")
    return Image.fromarray((pixels.astype(np.float32) / 257).round().astype(np.uint8))


def center_view(photo: Image.Image, spec: Mapping[str, Any], path: Path) -> Image.Image:
    """``photo`` scaled and cut as ``spec`` says. Raises UserError, with ``path``, when it is too small to cut."""
    from PIL import Image

    if spec["resize"] is not None:
        # The longer side is cut to whole pixels and the middle rounded as torchvision does, so accuracies compare.
        width, height = photo.size
        short = spec["resize"]
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        photo = photo.resize(size, Image.Resampling.BILINEAR)
    if spec["crop"] is not None:
        height, width = spec["crop"]
        left, top = round((photo.width - width) / 2), round((photo.height - height) / 2)
        if left < 0 or top < 0:
            raise UserError(
                f"{path}: {photo.width}x{photo.height} pixels after resizing, too small to cut {width}x{height} from"
            )
        photo = photo.crop((left, top, left + width, top + height))
    return photo


def normalized(photo: Image.Image, spec: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The pixels as float32 [1, C, H, W], minus the mean and over the standard deviation of ``spec``."""
    pixels = np.asarray(photo, np.float32) / np.float32(255)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    mean, std = np.asarray(spec["mean"], np.float32), np.asarray(spec["std"], np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])


def load_photo(path: Path, preprocess: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The photo at ``path`` as float32 [1, C, H, W]. Raises UserError for what is no photo or too small to crop."""
    spec = checked(preprocess, "the bundle's preprocessing")
    photo = open_photo(path, grey=len(spec["mean"]) == 1)
    return normalized(center_view(photo, spec, path), spec)
