"""`colonnade build` and `colonnade run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colonnade.cli_shapes import InputShapes, Outputs, parse_shapes
from colonnade.cli_tune import Compiler, Cpus, Db, Dtype, IsaName, Target, Threads, bar, seconds, size_text
from colonnade.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    from colonnade.bundle import Bundle
    from colonnade.targets import Target as Place

TOP = 5


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The folder to make.")],
    target: Target = "local",
    threads: Threads = None,
    cpus: Cpus = None,
    isa: IsaName = None,
    dtype: Dtype = "f32",
    tune: Annotated[bool, typer.Option("--tune", help="Measure first what the records lack.")] = False,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time that --tune may take, such as 120s (as without it).")
    ] = None,
    db: Db = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch size; the model's own by default.")] = None,
    input_shape: InputShapes = None,
    outputs: Outputs = None,
    preprocess: Annotated[
        str | None, typer.Option("--preprocess", metavar="imagenet|FILE.json", help="How photos become inputs.")
    ] = None,
    cc: Compiler = "zig",
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
) -> None:
    """Turn an ONNX model into a native bundle: library, program, weights, and a session for Python."""
    if budget is not None and not tune:
        raise UserError("--budget is the time that --tune may take: give that too")
    limit = seconds("120s" if budget is None else budget)
    from rich.console import Console

    from colonnade.api import build as make
    from colonnade.kernels.isa import isa as known_isa

    console = Console(stderr=True, markup=False)
    options: dict[str, Any] = {
        "threads": threads, "cpus": cpus, "isa": isa, "dtype": dtype, "batch": batch, "out": output, "db": db, "cc": cc,
        "input_shapes": parse_shapes(input_shape), "outputs": outputs, "preprocess": preprocess, "force": force,
        "notice": lambda line: console.print(line, highlight=False),
    }  # fmt: skip
    if tune:
        with bar(console, "tuning") as progress:
            bundle = make(model, target, tune=True, budget=limit, progress=progress, **options)
    else:
        with console.status("building"):
            bundle = make(model, target, **options)
    manifest = bundle.manifest
    half = ["f16"] if manifest["dtype"] == "f16" else []
    kept, macs = (sum(int(step[key]) for step in manifest["steps"]) for key in ("kept_macs", "macs"))
    typer.echo(
        f"{bundle.path}: {', '.join([manifest['isa'], *half])}, {len(manifest['steps'])} steps, "
        f"{kept / 1e6:.1f} of {macs / 1e6:.1f} million multiply-adds kept, "
        f"weights {size_text(manifest['bytes']['weights.bin'])}, arena {size_text(manifest['arena_bytes'])}"
    )
    if manifest.get("left_to_the_host"):
        typer.echo(f"cut at {', '.join(outputs or [])}; left to the host: {manifest['left_to_the_host']}")
    tuning = manifest["tuning"]
    if known_isa(manifest["isa"]).emulates:
        typer.echo(f"{manifest['isa']} emulates another machine: its answers are that one's, its times are not")
    elif tuning["untuned"]:
        typer.echo(f"{tuning['untuned']} of {tuning['tunable']} layers untuned (`colonnade tune`, or build --tune)")


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="[NAME=]x.npy|photo.jpg", help="One for each input of the model.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="y.npy", help="Where the outputs go (.npz for several).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Threads; the bundle's own number by default.")
    ] = None,
    cpus: Cpus = None,
    target: Target = "local",
) -> None:
    """Run a bundle on arrays or a photo; prints the five largest answers of a classifier when there is no -o."""
    import numpy as np

    from colonnade import targets
    from colonnade.bundle import Bundle
    from colonnade.runtime.session import Session

    place = targets.parse(target)
    opened = Bundle.load(bundle)
    ports = opened.manifest["inputs"]
    feeds = {
        name: _load(path, port, opened.manifest.get("preprocess"))
        for name, path, port in _named(inputs, {port["name"]: port for port in ports})
    }
    if output is not None and not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}")
    if output is not None and output.suffix not in (".npy", ".npz"):
        raise UserError(f"{output}: expected a name that ends in .npy, or .npz for several outputs")
    if output is not None and output.suffix == ".npy" and len(opened.manifest["outputs"]) > 1:
        raise UserError(
            f"{output}: the model has {len(opened.manifest['outputs'])} outputs; give a name that ends in .npz"
        )
    place, count = targets.settle(place, threads or int(opened.manifest["threads"]), cpus)
    if isinstance(place, targets.Local):
        with targets.on_cores(place.cpus), Session(bundle, threads=count) as session:
            answers = session.run(feeds)
    else:
        answers = _elsewhere(opened, place, feeds, count)
    if output is not None:
        _save(output, answers)
        typer.echo(f"{output}: " + ", ".join(f"{name} {value.shape}" for name, value in answers.items()))
        return
    for name, value in answers.items():
        if value.ndim == 2 and value.shape[1] > 1:
            for row, scores in enumerate(value):
                best = np.argsort(-scores.astype(np.float64), kind="stable")[:TOP]
                said = ", ".join(f"{index} ({scores[index]:.4g})" for index in best)
                typer.echo(f"{name}[{row}]: {said}")
        elif not value.size:
            typer.echo(f"{name}: {value.dtype} {value.shape}, no element")
        else:
            typer.echo(
                f"{name}: {value.dtype} {value.shape}, from {value.min():.4g} to {value.max():.4g}, "
                f"mean {value.mean():.4g} (-o y.npy keeps it)"
            )


def _elsewhere(bundle: Bundle, place: Place, feeds: dict[str, Any], threads: int) -> dict[str, npt.NDArray[Any]]:
    """The outputs of the bundle's static program on a target that is not this process."""
    import numpy as np

    from colonnade.bench.ours import Ours

    manifest, machine = bundle.manifest, place.probe()
    if manifest["arch"] != machine.arch:
        raise UserError(
            f"{bundle.path}: this bundle needs {manifest['arch']} ({manifest['isa']}); {place.name} is {machine.arch}"
        )
    machine.pick_isa(manifest["isa"])
    for port in manifest["inputs"]:
        array = feeds[port["name"]]
        if array.dtype != np.dtype(port["dtype"]):
            raise UserError(f"input {port['name']!r}: type {array.dtype}, expected {port['dtype']}")
        if array.shape != tuple(port["shape"]):
            raise UserError(f"input {port['name']!r}: shape {array.shape}, expected {tuple(port['shape'])}")
    answers = Ours(bundle, place, feeds, threads).outputs()
    return {port["name"]: answer for port, answer in zip(manifest["outputs"], answers, strict=True)}


def _named(words: list[str], ports: dict[str, Any]) -> list[tuple[str, Path, Any]]:
    """(input's name, file, port) for every ``[NAME=]FILE``. Raises UserError for names that do not fit the model."""
    known = ", ".join(ports)
    found: dict[str, tuple[str, Path, Any]] = {}
    for word in words:
        name, mark, path = word.partition("=")
        if not mark or (name not in ports and Path(word).exists()):
            if len(ports) > 1:
                raise UserError(f"--input {word}: the model has several inputs; say which: NAME={word} ({known})")
            name, path = next(iter(ports)), word
        if name not in ports:
            raise UserError(f"--input {word}: the model has no input {name!r}; its inputs: {known}")
        if name in found:
            raise UserError(f"--input {word}: input {name!r} was given twice")
        found[name] = (name, Path(path), ports[name])
    missing = [name for name in ports if name not in found]
    if missing:
        raise UserError(f"input {missing[0]!r} is missing: --input {missing[0]}=FILE")
    return list(found.values())


def _load(path: Path, port: Any, preprocess: Any) -> npt.NDArray[Any]:
    """The array for one input, from an array's file or a photo."""
    from colonnade.photo import SUFFIXES, load_photo
    from colonnade.stored import arrays

    if path.suffix.lower() in SUFFIXES:
        if preprocess is None:
            raise UserError(
                f"{path}: the bundle does not say how a photo becomes its input; build it with --preprocess imagenet "
                "or --preprocess FILE.json"
            )

        photo = load_photo(path, preprocess)
        shape = tuple(port["shape"])
        if photo.shape[1:] == shape[1:] and shape[0] != 1:
            raise UserError(f"{path}: the bundle takes {shape[0]} images at once and this is one; build with --batch 1")
        return photo.astype(port["dtype"])
    loaded = arrays(path, f"a photo ({', '.join(SUFFIXES)})")
    if isinstance(loaded, dict):
        raise UserError(f"{path}: several arrays in one file; save each as .npy and give them by name")
    return loaded


def _save(path: Path, answers: dict[str, npt.NDArray[Any]]) -> None:
    """Write the outputs beside ``path`` and rename."""
    import numpy as np

    from colonnade.onnx_io import writing_aside

    with writing_aside(path) as aside, aside.open("wb") as file:
        if path.suffix == ".npz":
            # The keyword of an output could collide with the function's own.
            import zipfile

            with zipfile.ZipFile(file, "w") as archive:
                for name, value in answers.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, value, allow_pickle=False)
        else:
            np.lib.format.write_array(file, next(iter(answers.values())), allow_pickle=False)
