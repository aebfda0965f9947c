"""`colonnade doctor`: what is missing on this machine, what for, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from colonnade.errors import ColonnadeError, UserError

ENOUGH_MB = 1500  # the compiler's C libraries, compiled kernels, some bundles
QEMU_SINCE = (7, 2)  # the first that runs vectors of version 1.0 well
# what the extras are for; the packages whose presence tells
EXTRAS = {
    "photo": ("photos as input of `run`", ("PIL",)),
    "calibrate": ("`fit`, `plan`, `prune --method obs` and `--balance`", ("onnxruntime", "PIL")),
    "train": ("pruning and fine-tuning torch models", ("torch", "accelerate", "safetensors")),
    "bench": ("other runtimes beside ours in `bench --vs`", ("onnxruntime", "openvino", "ncnn")),
    "demo": ("`colonnade demo`", ("sklearn", "torch")),
    "report": ("`report -o report.html`", ("plotly",)),
}
APT = {"qemu-riscv64": "qemu-user", "ssh": "openssh-client", "tar": "tar"}


@dataclass(frozen=True)
class Check:
    """One line: ``state`` is ok, missing (nothing works without it) or without (only ``purpose`` does not work)."""

    name: str
    state: str
    found: str = ""
    purpose: str = ""
    remedy: str = ""

    def line(self) -> str:
        """For the terminal."""
        if self.state == "ok":
            return f"ok       {self.name:<14} {self.found}"
        what = f"{self.found}; " if self.found else ""
        for_ = f"for {self.purpose}: " if self.purpose else ""
        return f"{self.state:<8} {self.name:<14} {what}{for_}{self.remedy}"


def doctor() -> int:
    """Tell what is missing on this machine, what it is needed for, and how to get it."""
    checks = [found for check in CHECKS for found in check()]
    for found in checks:
        typer.echo(found.line())
    missing = [c.name for c in checks if c.state == "missing"]
    without = [c.name for c in checks if c.state == "without"]
    if missing:
        typer.echo(f"not ready: {', '.join(missing)}")
        return 1
    typer.echo("ready" + (f"; some things are left out for want of {', '.join(without)}" if without else ""))
    return 0


def python() -> list[Check]:
    """The interpreter, and the packages that everything needs."""
    found = [Check("Python", "ok", f"{platform.python_version()}, {sys.executable}")]
    gone = []
    for line in importlib.metadata.requires("colonnade") or []:
        name = re.match(r"[\w.-]+", line)
        if name is None or "extra ==" in line:
            continue
        try:
            importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            gone.append(name[0])
    if gone:
        found.append(Check("packages", "missing", "", "everything", f"pip install {' '.join(gone)}"))
    return found


def machine() -> list[Check]:
    """What kernels can use here."""
    from colonnade import targets

    try:
        here = targets.Local().probe()
    except ColonnadeError as error:  # pragma: no cover - /proc is not readable
        return [Check("machine", "missing", str(error), "--target local", "build for another target")]
    names = ", ".join(isa.name for isa in here.isas)
    what = f"{here.cpu}, {here.cores} cores, {here.memory_free >> 20} MB free, kernels for {names}"
    return [Check("machine", "ok", what)]


def compiler() -> list[Check]:
    """A C compiler that works, proven by use."""
    from colonnade.build.toolchain import Toolchain, host

    try:
        chain = Toolchain()
        version, here = chain.version, host()
        chain.compile({"main.c": "int main(void) { return 0; }\n"}, "program", here)
    except (ColonnadeError, OSError) as error:
        return [Check("compiler", "missing", " ".join(str(error).split()), "", "pip install --force-reinstall ziglang")]
    others = [name for name in ("gcc", "clang") if shutil.which(name)]
    more = f"; --cc may name {' or '.join(others)}" if others else ""
    return [Check("compiler", "ok", f"{version}, compiles for x86_64 and riscv64{more}")]


def qemu() -> list[Check]:
    """RISC-V without a board."""
    from colonnade.targets.qemu import PROGRAM, VARIABLE, half, program

    purpose = "--target qemu (RISC-V without a board)"
    named = os.environ.get(VARIABLE)
    who = f"{VARIABLE}={named}" if named else PROGRAM
    remedy = f"unset {VARIABLE}, or name an emulator by it" if named else _install(PROGRAM)
    try:
        path = program(purpose)
    except UserError:
        found = f"{who} is no program that can be executed" if named else f"no {who}"
        return [Check("qemu", "without", found, purpose, remedy)]
    said = _answer(path, "--version") or ""
    number = re.search(r"^qemu\S* version (\d+)\.(\d+)", said)
    if number is None:
        return [Check("qemu", "without", f"{who} does not answer as QEMU does", purpose, remedy)]
    if (int(number[1]), int(number[2])) < QEMU_SINCE:
        remedy = remedy if named else "a newer qemu-user package"
        return [Check("qemu", "without", said, purpose, f"version 7.2 or newer is needed: {remedy}")]
    return [Check("qemu", "ok", said + (", half precision" if half(path) else ""))]


def ssh() -> list[Check]:
    """The way to a board."""
    purpose = "--target ssh://… (a board)"
    words = (os.environ.get("COLONNADE_SSH") or "ssh").split()
    said = _answer(words[0], "-V")
    if said is None:
        return [Check("ssh", "without", "no ssh", purpose, _install("ssh"))]
    if "OpenSSH" not in said:
        return [Check("ssh", "without", said or words[0], purpose, "an OpenSSH client is needed: " + _install("ssh"))]
    keys = sorted(path.stem for path in (Path.home() / ".ssh").glob("id_*.pub"))
    agent = "an agent" if os.environ.get("SSH_AUTH_SOCK") else ""
    have = (
        ", ".join(filter(None, [*keys, agent])) or "no key yet (ssh-keygen makes one, ssh-copy-id brings it to a board)"
    )
    return [Check("ssh", "ok", f"{said.split(',')[0]}; {have}")]


def places() -> list[Check]:
    """Folders that must be writable, and room in them."""
    from colonnade.build import cache
    from colonnade.tune.database import default_path

    found = []
    for name, folder, variable in (
        ("cache folder", cache.root(), "COLONNADE_CACHE"),
        ("tuning records", default_path().parent, "COLONNADE_DB"),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free >> 20
        if not os.access(there, os.W_OK):
            found.append(Check(name, "missing", f"{folder} cannot be written", "", f"set {variable} to another place"))
        elif free < ENOUGH_MB:
            remedy = f"make room ({ENOUGH_MB} MB), or set {variable} to another place"
            found.append(Check(name, "missing", f"{folder}: {free} MB free", "", remedy))
        else:
            found.append(Check(name, "ok", f"{folder}, {free >> 10} GB free"))
    return found


def extras() -> list[Check]:
    """Optional packages."""
    from importlib.util import find_spec

    found = []
    for extra, (purpose, modules) in EXTRAS.items():
        gone = [module for module in modules if find_spec(module) is None]
        if gone:
            remedy = f"pip install 'colonnade[{extra}]'"
            found.append(Check(extra, "without", f"no {', '.join(gone)}", purpose, remedy))
        else:
            found.append(Check(extra, "ok", purpose))
    return found


CHECKS: Sequence[Callable[[], list[Check]]] = (python, machine, compiler, qemu, ssh, places, extras)


def _answer(program: str, option: str) -> str | None:
    """First line of what ``program`` says to ``option``; None when it is not there or does not work."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, option], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ((done.stdout + done.stderr).strip().splitlines() or [""])[0]


def _install(program: str) -> str:
    package = APT[program]
    if shutil.which("apt-get"):
        return f"{'' if os.getuid() == 0 else 'sudo '}apt-get install {package}"
    return f"install {package} (its name on Debian)"
