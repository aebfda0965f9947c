"""Bundle: the folder that is shipped. A library, a static program, mapped weights, and the sources of both.

manifest.json   what it is: format, arch, ISA, inputs, outputs, every step with its workload and kernels
model.h         the C interface          libmodel.so    the model for Python and C
weights.bin     the constants            run            the model as a program that needs nothing
session.py      numpy + ctypes           build.sh       rebuilds both binaries from source/
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from colonnade import codegen
from colonnade.build.cache import write_error, writing
from colonnade.build.toolchain import FLAGS, LINK, SHAPES, Toolchain, cc_features, host
from colonnade.codegen import model as lowered
from colonnade.errors import UserError
from colonnade.kernels.call import Call, Const
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.layout import Panels, Placed, Rows
from colonnade.plan import Plan

FORMAT = 1
MANIFEST = "manifest.json"
FILES = (MANIFEST, "model.h", "libmodel.so", "run", codegen.WEIGHTS, "session.py", "build.sh")
KEYS = ("name", "arch", "isa", "threads", "inputs", "outputs", "steps", "bytes")
TOP = ("model.h", codegen.WEIGHTS)  # generated files that stand beside the binaries, not under source/


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; ``manifest`` as in manifest.json."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def library(self) -> Path:
        """The shared library (ABI: model.h)."""
        return self.path / "libmodel.so"

    @property
    def program(self) -> Path:
        """The static program."""
        return self.path / "run"

    @property
    def weights(self) -> Path:
        """The constants."""
        return self.path / codegen.WEIGHTS

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Open what ``write_bundle`` wrote. Raises ``UserError`` with one line for anything that is not whole."""
        folder = Path(path)
        if not folder.exists():
            raise UserError(f"{folder}: no such bundle")
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: not a bundle: {MANIFEST} is missing")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            found = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST}: damaged; build the bundle again") from error
        except OSError as error:
            raise UserError(f"{folder / MANIFEST}: {error.strerror}") from error
        if found != FORMAT:
            raise UserError(f"{folder}: bundle of format {found}, expected {FORMAT}; build it again with this version")
        lacking = [key for key in KEYS if key not in manifest]
        if lacking:
            raise UserError(f"{folder / MANIFEST}: damaged, {lacking[0]!r} is missing; build the bundle again")
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: incomplete bundle, {', '.join(missing)} missing; build or copy it again")
        wrong = [name for name, size in manifest["bytes"].items() if (folder / name).stat().st_size != size]
        if wrong:
            raise UserError(f"{folder / wrong[0]}: truncated or changed; build or copy the bundle again")
        return cls(folder, manifest)


def write_bundle(
    plan: Plan,
    choices: Sequence[Candidate],
    isa: Isa,
    directory: str | Path,
    *,
    threads: int = 1,
    arch: str | None = None,
    toolchain: Toolchain | None = None,
    force: bool = False,
    manifest_extra: Mapping[str, Any] | None = None,
) -> Bundle:
    """Compile ``plan`` with ``choices`` (one candidate a step) and write the bundle.

    ``threads``: default of a session. ``arch``: that of ``isa``, or this machine's for a portable one. An existing
    ``directory`` needs ``force`` unless it is empty, and is replaced only if it is a bundle. ``manifest_extra`` is
    added to the manifest (``preprocess``, ``source``, …). Nothing appears at ``directory`` before all of it is there.
    Raises ``UserError`` for a place that cannot be written, ``CompileError`` when the compiler fails.
    """
    folder, toolchain = Path(directory), toolchain or Toolchain()
    arch = arch or (isa.arch if isa.arch != "any" else host())
    check_place(folder, force)
    with _aside(folder) as work:  # first of all: a place that cannot be written should not cost a compilation
        model = lowered.bind(plan, choices, isa, threads)
        files = codegen.generate_model(model)
        code = {name: content for name, content in files.items() if name != codegen.WEIGHTS}
        library = {name: content for name, content in code.items() if name not in codegen.PROGRAM_ONLY}
        binaries = {
            "libmodel.so": toolchain.compile(library, "shared", arch),
            "run": toolchain.compile(code, "program", arch),
        }
        with writing(folder):
            (work / "source").mkdir()
            for name, content in files.items():
                place = work / name if name in TOP else work / "source" / name
                place.write_bytes(content.encode() if isinstance(content, str) else content)
            for name, made in binaries.items():
                shutil.copyfile(made, work / name)
                (work / name).chmod(0o755)
            (work / "session.py").write_text((resources.files("colonnade.runtime") / "session.py").read_text())
            (work / "build.sh").write_text(_build_script(toolchain, arch, isa))
            (work / "build.sh").chmod(0o755)
            manifest = _manifest(model, arch, toolchain)
            manifest["bytes"] = {name: (work / name).stat().st_size for name in ("libmodel.so", "run", codegen.WEIGHTS)}
            manifest |= dict(manifest_extra or {})
            (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Bundle(folder, manifest)


def check_place(folder: Path, force: bool) -> None:
    """Raise ``UserError`` if a bundle may not stand at ``folder``: something else does, or ``force`` is missing."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: exists and is not a folder; choose another -o")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: exists and is not a bundle, so it is not replaced; choose another -o")
    if not force:
        raise UserError(f"{folder}: exists; pass --force to replace it")


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end, or disappears."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
        work.mkdir()
    try:
        yield work
        with writing(folder):
            old = work.with_name(f"{work.name}-old")
            if folder.exists():  # rename cannot replace a folder that holds files
                folder.rename(old)
            try:
                work.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


CONVERSIONS = ("convert", "interleave", "precision", "reorder")  # steps that only move what others computed


def _manifest(model: lowered.Model, arch: str, toolchain: Toolchain) -> dict[str, Any]:
    described = lowered.description(model)
    steps, once = [], model.plan.once
    for index, bound in enumerate(model.steps):
        step = bound.step
        images = model.plan.images if index < once else 1
        steps.append(
            {
                "name": step.name,
                "workload": step.workload.key(),
                "key": step.key(),
                "kernel": bound.candidate.kernel,
                "params": dict(bound.candidate.params),
                "calls": [call.kernel for call in bound.calls],
                # of all images, as are the times of a profile
                "macs": images * int(step.workload.macs),
                "kept_macs": images * step.workload.kept_macs,
                "constant_bytes": images * _constants(bound.calls),
                "activation_bytes": images
                * sum(_bytes(p) for p in (*step.inputs, *([step.output] if step.output else []))),
            }
        )
    return {
        "format": FORMAT,
        "name": model.plan.name,
        "arch": arch,
        "isa": model.isa.name,
        "dtype": model.isa.prefix,
        "threads": model.threads,
        "compiler": toolchain.version,
        "inputs": described["inputs"],
        "outputs": described["outputs"],
        "images_in_turn": model.plan.images,
        "arena_bytes": model.plan.arena,
        "conversions": [
            {"name": step["name"], "bytes": step["activation_bytes"]}
            for step, bound in zip(steps, model.steps, strict=True)
            if bound.step.workload.op in CONVERSIONS
        ],
        "steps": steps,
    }


def _constants(calls: Sequence[Call]) -> int:
    """Bytes of weights and tables that these calls read: kept weights only."""
    held = {id(f.data): int(f.data.nbytes) for call in calls for f in call.fields.values() if isinstance(f, Const)}
    return sum(held.values())


def _bytes(tensor: Placed) -> int:
    """Bytes of a tensor's planes, panels or rows: what a step that reads or writes all of it moves."""
    layout = tensor.layout
    if isinstance(layout, Rows):
        return layout.batch * layout.width * layout.itemsize
    if isinstance(layout, Panels):
        return tensor.shape[1] * layout.planes.lanes * layout.itemsize
    return len(tensor.offsets) * layout.plane * layout.itemsize


def _build_script(toolchain: Toolchain, arch: str, isa: Isa) -> str:
    return f"""#!/bin/sh
# Rebuilds libmodel.so and run from source/. CC may name any C compiler for {arch}:
#   CC=gcc ./build.sh
# Built with: {toolchain.version}
set -eu
cd "$(dirname "$0")"
out=$PWD
if [ -n "${{CC:-}}" ]; then
    shared=$CC program=$CC kernels="{" ".join(cc_features(isa.features, arch))}"
else
    shared="{toolchain.shell("shared", arch)}"
    program="{toolchain.shell("program", arch)}"
    kernels="{" ".join(toolchain.features(f"kernels_{isa.name}.c", arch))}"
fi
flags="{" ".join(FLAGS)} -I.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd source
for kind in shared program; do
    eval "cc=\\$$kind"
    for unit in *.c; do
        extra= # only the kernels may use more than the oldest machine of the architecture has
        case $unit in kernels_*) extra=$kernels ;; esac
        $cc $flags $extra -c "$unit" -o "$work/${{unit%.c}}.$kind.o"
    done
done
rm "$work/main.shared.o"
$shared {" ".join(SHAPES["shared"])} -s "$work"/*.shared.o {" ".join(LINK)} -o "$work/libmodel.so"
$program {" ".join(SHAPES["program"])} -s "$work"/*.program.o {" ".join(LINK)} -o "$work/run"
mv "$work/libmodel.so" "$work/run" "$out/"
cd "$out" # which sizes a whole bundle's files have stands in its manifest
for file in libmodel.so run; do
    sed "s/\\"$file\\": [0-9][0-9]*/\\"$file\\": $(wc -c <$file | tr -d ' ')/" manifest.json >"$work/manifest.json"
    mv "$work/manifest.json" manifest.json
done
"""
