"""What `colonnade finetune` is given: a model by the name of its factory, its weights, labelled photos or arrays.

No file is opened in a way that could run code: weights are safetensors, or what torch.load(weights_only=True) takes.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from colonnade import stored
from colonnade.errors import UserError
from colonnade.photo import SUFFIXES, center_view, normalized, open_photo

AUGMENT = ("none", "shift", "crop")
LEAST_AREA = 0.25  # of a photo that a random crop shows
Sample = tuple[Tensor, int]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def make_model(factory: str, arguments: str | None = None) -> nn.Module:
    """The model that ``factory`` (``package.module:function``, also of the current folder) returns.

    arguments: its keyword arguments as a JSON object. Raises UserError when anything of this fails.
    """
    module_name, colon, function = factory.partition(":")
    if not colon or not module_name or not function:
        raise UserError(f"model is {factory!r}: expected module:function, such as torchvision.models:resnet18")
    try:
        keywords = json.loads(arguments) if arguments else {}
    except ValueError as error:
        raise UserError(f"--model-args is {arguments!r}: not JSON ({_line(error)})") from error
    if not isinstance(keywords, dict):
        raise UserError(f"--model-args is {arguments!r}: expected a JSON object, such as '{{\"num_classes\": 10}}'")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        made: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{module_name}: cannot be imported ({type(error).__name__}: {_line(error)})") from error
    for name in function.split("."):
        if not hasattr(made, name):
            raise UserError(f"{module_name} has no {function!r}: expected a function or class that returns the model")
        made = getattr(made, name)
    try:
        made = made(**keywords)
    except Exception as error:
        raise UserError(f"{factory} failed ({type(error).__name__}: {_line(error)}); see --model-args") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{factory} returned {type(made).__name__}: expected a torch.nn.Module")
    return made


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, names as the plain model has them.

    A wrapping ``{"state_dict": …}``, the prefix of DataParallel and colonnade's own masks are taken off.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise UserError(
            f"{path}: not a file of tensors alone (pickled objects are refused): expected safetensors, or "
            "torch.save(model.state_dict(), …)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected names and tensors, a state_dict")
    state: dict[str, Tensor] = {str(key): value for key, value in content.items()}
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    ending = ".parametrizations.weight.original"
    for key in [key for key in state if key.endswith(ending)]:
        layer = key.removesuffix(ending)
        weight, mask = state.pop(key), state.pop(f"{layer}.parametrizations.weight.0.mask", None)
        state[f"{layer}.weight"] = weight if mask is None else weight * mask
    return state


def put_state(model: nn.Module, path: Path) -> None:
    """Load the weights at ``path`` into ``model``. Raises UserError that names what does not fit."""
    state, own = read_state(path), model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unknown:
        parts = [
            f"{len(keys)} {what} ({keys[0]}, …)" for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys
        ]
        raise UserError(f"{path}: weights of another model: {' and '.join(parts)}")
    if wrong:
        key = wrong[0]
        theirs, ours = tuple(state[key].shape), tuple(own[key].shape)
        raise UserError(f"{path}: {key} has shape {theirs}, the model's has {ours}: see --model-args")
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class Data:
    """Labelled samples: float32 [C, H, W] and a class from 0. ``labels``: one more than the largest."""

    train: Dataset[Sample]
    validation: Dataset[Sample] | None
    shape: tuple[int, int, int]
    labels: int


class Photos(Dataset[Sample]):
    """Photos in one folder per class, seen as ``preprocess`` says; in training, a random part of each instead.

    ``classes``: names in the order of their numbers. Raises UserError for folders without photos or unknown classes.
    """

    def __init__(
        self, root: Path, preprocess: Mapping[str, Any], *, crop: bool, mirror: bool, classes: list[str] | None = None
    ) -> None:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.classes = classes if classes is not None else found
        if strange := sorted(set(found) - set(self.classes)):
            raise UserError(f"{root / strange[0]}: there is no class of this name to train on")
        self.samples = [
            (path, self.classes.index(name))
            for name in found
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not self.samples:
            raise UserError(f"{root}: expected one folder per class with photos in it ({', '.join(SUFFIXES[:3])}, …)")
        self.preprocess, self.crop, self.mirror = preprocess, crop, mirror

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        photo = open_photo(path, grey=len(self.preprocess["mean"]) == 1)
        photo = self._part(photo) if self.crop else center_view(photo, self.preprocess, path)
        pixels = torch.from_numpy(normalized(photo, self.preprocess)[0])
        return (pixels.flip(2) if self.mirror and torch.rand(()) < 0.5 else pixels), label

    def _part(self, photo: Any) -> Any:
        """A random part of a photo, of 3:4 to 4:3, scaled to the size of the input."""
        from PIL import Image

        height, width = self.preprocess["crop"]
        area = photo.width * photo.height * float(torch.empty(()).uniform_(LEAST_AREA, 1))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3)))) * width / height
        w = min(photo.width, max(1, round(math.sqrt(area * ratio))))
        h = min(photo.height, max(1, round(math.sqrt(area / ratio))))
        left, top = (int(torch.randint(0, room + 1, ())) for room in (photo.width - w, photo.height - h))
        return photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


class Arrays(Dataset[Sample]):
    """Images in memory, [N, C, H, W]; bytes become numbers of 0 to 1, minus ``mean``, over ``std``, when asked for.

    shift: move each at random by up to an eighth of its sides, edges filled with what 0 becomes.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, preprocess: Mapping[str, Any] | None, *, shift: bool, mirror: bool
    ) -> None:
        self.images, self.labels, self.shift, self.mirror = images, labels, shift, mirror
        self.scale: tuple[Tensor, Tensor] | None = None
        if images.dtype == torch.uint8:
            mean, std = ((preprocess or {}).get(key, default) for key, default in (("mean", [0.0]), ("std", [1.0])))
            self.scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.margin = images.shape[2] // 8, images.shape[3] // 8

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        if self.shift:
            down, right = self.margin
            padded = functional.pad(image, (right, right, down, down))
            y, x = int(torch.randint(0, 2 * down + 1, ())), int(torch.randint(0, 2 * right + 1, ()))
            image = padded[:, y : y + image.shape[1], x : x + image.shape[2]]
        if self.scale is not None:
            image = (image.float() / 255 - self.scale[0]) / self.scale[1]
        return (image.flip(2) if self.mirror and torch.rand(()) < 0.5 else image), int(self.labels[index])


def open_data(
    place: Path, preprocess: Mapping[str, Any] | None, *, augment: str | None = None, mirror: bool | None = None
) -> Data:
    """The samples at ``place``: a folder (train/CLASS/photo and val/CLASS/photo, or CLASS/photo) or an .npz file.

    The file holds ``x`` and ``y``, or ``x_train``, ``y_train`` and, if there are any, ``x_val``, ``y_val``. Images:
    bytes [N, H, W] or [N, H, W, C], to be scaled, or floats [N, C, H, W], taken as they are. Labels: whole, from 0.
    augment: "none", "shift" (arrays) or "crop" (photos, the default for them); ``mirror`` goes with crop by default.
    Raises UserError for what is missing or does not fit.
    """
    if augment not in (None, *AUGMENT):
        raise UserError(f"--augment is {augment!r}: expected one of {', '.join(AUGMENT)}")
    if place.is_dir():
        if augment == "shift":
            raise UserError("--augment shift is for arrays: photos take crop, or none")
        from colonnade.photo import IMAGENET

        view = dict(preprocess or IMAGENET)
        if view["crop"] is None:
            raise UserError("--preprocess: photos need a crop, such as [224, 224], to stand in one batch")
        crop = augment in (None, "crop")
        split = (place / "train").is_dir()
        train = Photos(place / "train" if split else place, view, crop=crop, mirror=crop if mirror is None else mirror)
        val = place / "val"
        held_out = (
            Photos(val, view, crop=False, mirror=False, classes=train.classes) if split and val.is_dir() else None
        )
        return Data(train, held_out, (len(view["mean"]), *view["crop"]), len(train.classes))
    if augment == "crop":
        raise UserError("--augment crop is for folders of photos: arrays take shift, or none")
    arrays = _read_arrays(place)
    suffix = "_train" if "x_train" in arrays else ""
    images, labels = _pair(arrays, suffix, place)
    data: Dataset[Sample] = Arrays(images, labels, preprocess, shift=augment == "shift", mirror=bool(mirror))
    held = None
    largest = int(labels.max())
    if "x_val" in arrays:
        other, other_labels = _pair(arrays, "_val", place)
        if other.shape[1:] != images.shape[1:] or other.dtype != images.dtype:
            raise UserError(f"{place}: x_val holds images of another shape or type than x{suffix}")
        held, largest = (
            Arrays(other, other_labels, preprocess, shift=False, mirror=False),
            max(largest, int(other_labels.max())),
        )
    channels = len((preprocess or {}).get("mean", [0.0]))
    if images.dtype == torch.uint8 and channels not in (1, images.shape[1]):
        raise UserError(f"{place}: images have {images.shape[1]} channels, the preprocessing {channels}")
    return Data(data, held, cast("tuple[int, int, int]", tuple(images.shape[1:])), largest + 1)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    found = stored.arrays(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a folder of photos, or an .npz file of arrays x and y")
    return found


def _pair(arrays: Mapping[str, npt.NDArray[Any]], suffix: str, path: Path) -> tuple[Tensor, Tensor]:
    x, y = arrays.get(f"x{suffix}"), arrays.get(f"y{suffix}")
    if x is None or y is None:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; expected x{suffix} and y{suffix}")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    elif x.dtype in (np.float32, np.float64) and x.ndim == 4:
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"{path}: x{suffix} holds NaN or infinity")
    else:
        raise UserError(
            f"{path}: x{suffix} is {x.dtype} {x.shape}: expected uint8 [N, H, W] or [N, H, W, C], or float [N, C, H, W]"
        )
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x) or not len(y) or int(y.min()) < 0:
        raise UserError(f"{path}: y{suffix} is {y.dtype} {y.shape}: expected {len(x)} whole numbers from 0")
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))
