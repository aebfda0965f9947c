"""Accuracy, always with the number of images and a 95 % interval: bundles, ONNX files and torch modules alike.

A difference between two models is measured on the same images and has its own, narrower interval: only the images
on which the two disagree count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade import stored
from colonnade.errors import UserError

Array = npt.NDArray[Any]
NORMAL_95 = 1.959964  # two-sided 95 % of the normal distribution
PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
ARRAYS = (".npz", ".npy")


@dataclass(frozen=True, eq=False)
class Samples:
    """inputs: float32 [N, ...], as the model takes them; labels: int64 [N], None where there are none; classes: names
    of the labels, from the folders."""

    inputs: Array
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class Accuracy:
    """answers: int64 [N], the class with the largest output; labels: int64 [N], None without; top5: bool [N], whether
    the label is among the five largest outputs (None without labels)."""

    answers: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None = None
    top5: npt.NDArray[np.bool_] | None = None

    @property
    def images(self) -> int:
        return len(self.answers)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        if self.labels is None:
            raise UserError(
                "these images have no labels: accuracy needs a folder for each class, or an array of labels"
            )
        return np.asarray(self.answers == self.labels)

    @property
    def top1(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of top1."""
        return wilson(int(self.correct.sum()), self.images)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.top1:.1f} % ({100 * low:.1f} to {100 * high:.1f} with 95 %, {self.images} images)"


@dataclass(frozen=True)
class Difference:
    """other - base in top-1 on the same images, with its 95 % interval; agreement: share of equal answers."""

    points: float
    low: float
    high: float
    images: int
    agreement: float

    def __str__(self) -> str:
        return (
            f"{100 * self.points:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f} with 95 %, "
            f"{self.images} images), same answer on {100 * self.agreement:.1f} %"
        )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, 95 %. Raises UserError for no trials."""
    if count < 1:
        raise UserError("no images to evaluate on")
    share, z = hits / count, NORMAL_95
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(base: Accuracy, other: Accuracy) -> Difference:
    """The paired difference of two models on the same images; interval of Bonett and Price (2012).

    Raises UserError if the two were not measured on the same images.
    """
    count = base.images
    same = count == other.images and base.labels is not None and other.labels is not None
    if not same or not np.array_equal(np.asarray(base.labels), np.asarray(other.labels)):
        raise UserError("the two models were not measured on the same labelled images")
    lost = int((base.correct & ~other.correct).sum())
    won = int((~base.correct & other.correct).sum())
    p_lost, p_won = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    half = NORMAL_95 * math.sqrt((p_lost + p_won - (p_won - p_lost) ** 2) / (count + 2))
    agreement = float((base.answers == other.answers).mean())
    centre = p_won - p_lost
    return Difference((won - lost) / count, max(-1.0, centre - half), min(1.0, centre + half), count, agreement)


def samples(
    source: str | Path | Sequence[Any] | Array | Samples,
    *,
    preprocess: str | Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Samples:
    """Images as arrays.

    source: a folder of photos, or of one folder of photos for each class (labels are the folders' places in
            alphabetical order, as in torchvision); an .npz with `inputs` (or `x`, or a single array) and `labels` (or
            `y`); an .npy; an array; or (inputs, labels). Arrays are taken as they are, photos go through `preprocess`
            (``imagenet`` by default; see colonnade.photo).
    limit:  that many images at most, chosen at random by `seed`.

    Raises UserError for what cannot be read, and for sources without any image.
    """
    if isinstance(source, Samples):
        found = source
    elif isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return _photos(path, preprocess, limit, seed)
        found = _stored(path)
    elif isinstance(source, np.ndarray):
        found = Samples(source)
    else:
        if len(source) != 2:
            raise UserError(f"images are a sequence of {len(source)}: expected (inputs, labels)")
        found = Samples(np.asarray(source[0]), _whole(source[1]))
    if not found.inputs.ndim or found.inputs.dtype.kind not in "fiub":
        raise UserError(f"images are {found.inputs.dtype} {found.inputs.shape}: expected numbers, image by image")
    if not len(found):
        raise UserError("no images: the array is empty")
    if found.labels is not None and found.labels.shape != (len(found),):
        raise UserError(f"labels are {found.labels.shape}: expected one for each of {len(found)} images")
    index = _subset(len(found), limit, seed)
    return Samples(found.inputs[index], None if found.labels is None else found.labels[index], found.classes)


def calibration_inputs(
    source: str | Path, *, preprocess: str | Mapping[str, Any] | None = None, limit: int = 512, seed: int = 0
) -> dict[str, Array]:
    """Inputs for pruning, by name: as `samples` (labels are dropped), or an .npz with an array for each model input."""
    path = Path(source)
    if path.suffix == ".npz" and not path.is_dir():
        content = stored.arrays(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: one array without a name; expected an .npz")
        arrays = {name: array for name, array in content.items() if name not in ("labels", "y")}
        sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
        if len(sizes) != 1 or not min(sizes):
            raise UserError(f"{path}: expected arrays of inputs, all with the same number of samples")
        index = _subset(sizes.pop(), limit, seed)
        return {name: array[index] for name, array in arrays.items()}
    return {"input": samples(path, preprocess=preprocess, limit=limit, seed=seed).inputs}


def evaluate(
    model: Any,
    data: str | Path | Sequence[Any] | Array | Samples,
    *,
    preprocess: str | Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """The answers of a classifier on images, and how many are right.

    model: a bundle's folder or its `Session`; an ONNX file (run by onnxruntime); a torch module, in evaluation mode for
           the time; or a function from float32 [n, ...] to outputs [n, classes].
    data:  see `samples`, as for preprocess (default: the bundle's own, else ``imagenet``), limit and seed.
    batch: images at once, where the model leaves that free.

    Raises UserError for a model or images that cannot be read or do not fit each other, and for answers that are no
    scores of classes.
    """
    run, fixed, own = _runner(model, threads)
    size = fixed or batch
    images = samples(data, preprocess=preprocess if preprocess is not None else own, limit=limit, seed=seed)
    answers, among = [], []
    for start, part in _batches(images.inputs, size):
        if progress:
            progress(start, len(images))
        count = len(part)
        if fixed and count < fixed:  # the last batch is filled up with its first image
            part = np.concatenate([part, np.repeat(part[:1], fixed - count, axis=0)])
        scores = np.asarray(run(np.ascontiguousarray(part)))[:count]
        if scores.ndim < 2 or scores.shape[1] < 2 or scores.size != count * scores.shape[1]:
            shape = "×".join(map(str, scores.shape[1:])) or "one number"
            raise UserError(f"the model answers {shape} an image: expected a score for each of two classes or more")
        scores = scores.reshape(count, -1)
        if not np.isfinite(scores).all():
            raise UserError(f"the model answers NaN or infinity on images {start} to {start + count - 1}")
        answers.append(scores.argmax(axis=1))
        if images.labels is not None:
            wanted = images.labels[start : start + count]
            if wanted.size and int(wanted.max()) >= scores.shape[1]:
                raise UserError(f"a label is {int(wanted.max())}, but the model has {scores.shape[1]} classes")
            best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
            among.append((best == wanted[:, None]).any(axis=1))
    return Accuracy(np.concatenate(answers).astype(np.int64), images.labels, np.concatenate(among) if among else None)


def _batches(inputs: Array, size: int) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(inputs), size):
        yield start, inputs[start : start + size]


def _subset(count: int, limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    if limit is None or limit >= count:
        return np.arange(count)
    if limit < 1:
        raise UserError(f"limit is {limit}: expected at least one image")
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _photos(folder: Path, preprocess: str | Mapping[str, Any] | None, limit: int | None, seed: int) -> Samples:
    from colonnade.photo import load_photo, preprocessing

    spec = preprocessing(preprocess) if isinstance(preprocess, str) else preprocess or preprocessing("imagenet")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    beside = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix.lower() in PHOTOS]
    if beside and classes:
        if any(file.suffix.lower() in PHOTOS for name in classes for file in (folder / name).iterdir()):
            raise UserError(f"{folder}: photos beside folders of photos: expected either, or a folder for each class")
        classes = []
    found: list[tuple[Path, int]] = []
    for number, name in enumerate(classes or [""]):
        found += [(file, number) for file in sorted((folder / name).iterdir()) if file.suffix.lower() in PHOTOS]
    if not found:
        raise UserError(f"{folder}: no photos in it: expected files such as .jpg or .png, or a folder of them a class")
    chosen = [found[index] for index in _subset(len(found), limit, seed)]
    arrays = [load_photo(file, spec) for file, _ in chosen]
    if len({array.shape for array in arrays}) != 1:
        raise UserError(f"{folder}: photos differ in size: give a preprocessing with a crop")
    labels = np.array([label for _, label in chosen], np.int64) if classes else None
    return Samples(np.concatenate(arrays), labels, tuple(classes))


def _stored(path: Path) -> Samples:
    if path.suffix not in ARRAYS:
        raise UserError(f"{path}: expected a folder of photos, an .npz or an .npy")
    arrays = stored.arrays(path)
    if not isinstance(arrays, dict):
        return Samples(arrays)
    labels = next((arrays.pop(name) for name in ("labels", "y") if name in arrays), None)
    inputs = next((arrays[name] for name in ("inputs", "x") if name in arrays), None)
    if inputs is None and len(arrays) == 1:
        inputs = next(iter(arrays.values()))
    if inputs is None:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}: expected `inputs`, and `labels` where known")
    return Samples(inputs, None if labels is None else _whole(labels).reshape(-1))


def _whole(labels: Any) -> npt.NDArray[np.int64]:
    """Labels as they must be. Raises UserError for what are no classes."""
    found = np.asarray(labels)
    if found.dtype.kind == "f" and (abs(found) < 2**53).all() and (found == np.floor(found)).all():
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu" or (found.size and not 0 <= int(found.min()) <= int(found.max()) < 2**63):
        raise UserError(f"labels are {found.dtype}, not all of them classes: expected whole numbers from 0")
    return found.astype(np.int64)


def _runner(model: Any, threads: int | None) -> tuple[Callable[[Array], Any], int, Mapping[str, Any] | None]:
    """A function from a batch to outputs, the batch that it insists on (0: any), and its own preprocessing."""
    from colonnade.runtime.session import Session

    if isinstance(model, str | Path):
        path = Path(model)
        if path.is_dir():
            model = Session(path, threads=threads)
        elif path.suffix == ".onnx":
            return _onnx(path, threads)
        else:
            raise UserError(f"{path}: expected a bundle's folder or an ONNX file")
    if isinstance(model, Session):
        session, ports = model, model.get_inputs()
        if len(ports) != 1:
            raise UserError(f"{session.path}: takes {len(ports)} inputs: evaluate supports one")
        output = session.get_outputs()[0].name
        own = session.manifest.get("preprocess")
        return lambda batch: session.run({ports[0].name: batch})[output], ports[0].shape[0], own
    if _is_module(model):
        return _module(model), 0, None
    if callable(model):
        return model, 0, None
    raise UserError(f"{type(model).__name__} cannot be evaluated: expected a bundle, an ONNX file or a torch module")


def _onnx(path: Path, threads: int | None) -> tuple[Callable[[Array], Any], int, None]:
    import onnxruntime

    from colonnade.onnx_io import check_samples, graph_inputs, load_onnx

    model = load_onnx(path)  # its errors name what is wrong with the file
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise UserError(f"{path}: takes {len(inputs)} inputs: evaluate supports one")
    first = inputs[0].shape[0] if inputs[0].shape else 0
    value = graph_inputs(model.graph)[0]
    del model
    name, kind = inputs[0].name, inputs[0].type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))

    def run(batch: Array) -> Any:
        check_samples(value, batch)
        return session.run(None, {name: batch.astype(dtype, copy=False)})[0]

    return run, first if isinstance(first, int) else 0, None


def _is_module(model: Any) -> bool:
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _module(model: Any) -> Callable[[Array], Any]:
    import torch

    from colonnade.sparsify.masks import evaluating

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def run(batch: Array) -> Any:
        with evaluating(model), torch.no_grad():
            return model(torch.from_numpy(batch).to(device)).float().cpu().numpy()

    return run
