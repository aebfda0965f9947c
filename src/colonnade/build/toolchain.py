"""A C compiler as a function: sources in, one shared library or static program out, nothing compiled twice.

The compiler is the ``ziglang`` wheel unless told otherwise: one package that compiles for this host and for boards.
Shared libraries ask for glibc 2.28 at least; programs are static (musl with zig), so a bare board runs them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Literal

from colonnade.build.cache import Cache, write_error, writing
from colonnade.errors import ColonnadeError, UserError
from colonnade.kernels.isa import isa

Kind = Literal["shared", "program"]
Sources = Mapping[str, str | bytes]

GLIBC = "2.28"  # Debian 10, RHEL 8, Ubuntu 20.04 and whatever boards ship today are newer
ARCHITECTURES = ("x86_64", "riscv64")
JOBS = 2  # a compiler process of a large kernel library takes some hundred MB

# Same source, same bits: no fused multiply-add but where a kernel asks for one, no fast-math. What is left out is
# errno of the math library and traps on floating-point exceptions, which nobody reads.
FLAGS = (
    "-std=gnu11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra",
)  # fmt: skip
LINK = ("-lm", "-lpthread")
SHAPES: dict[str, tuple[str, ...]] = {
    "shared": ("-shared", "-Wl,-z,defs", "-Wl,-soname,libmodel.so"),
    "program": ("-static",),
}

_BASELINE = {"x86_64": "x86_64", "riscv64": "baseline_rv64"}  # zig's names of the oldest machine of an architecture
_FULL_DISK = "No space left on device"


class CompileError(ColonnadeError):
    """The compiler refused a source; ``log`` is all it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def host() -> str:
    """This machine's architecture, in Colonnade's words (``x86_64``, ``riscv64``)."""
    return {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())


def cc_features(features: Sequence[str], arch: str) -> tuple[str, ...]:
    """Flags of gcc and clang that add ``features`` to the baseline of ``arch``."""
    if arch == "riscv64":
        return ("-march=" + "_".join(["rv64gc", *features]),)
    return tuple(f"-m{feature}" for feature in features)


@dataclass(frozen=True)
class Toolchain:
    """``cc``: ``zig`` (default), ``gcc``, ``clang``, or a path to one of these or a cross-compiling cousin.

    ``notice`` gets a line before the rare work that takes long (zig builds a C library the first time a target is
    used: up to a minute).
    """

    cc: str = "zig"
    cache: Cache | None = None
    notice: Callable[[str], None] | None = None

    @property
    def is_zig(self) -> bool:
        """Is it ``zig cc``?"""
        return self.cc == "zig" or Path(self.cc).name == "zig"

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the compiler. Raises ``UserError`` when it is not there."""
        if self.cc == "zig":
            if importlib.util.find_spec("ziglang") is None:
                raise UserError(
                    "the C compiler (package ziglang) is missing: pip install ziglang, or choose one by --cc"
                )
            return (sys.executable, "-m", "ziglang", "cc")
        found = shutil.which(self.cc)
        if found is None:
            raise UserError(f"--cc {self.cc}: no such compiler on this machine")
        return (found, "cc") if self.is_zig else (found,)

    @property
    def version(self) -> str:
        """Name and version, as it stands in digests and tuning records: ``zig 0.14.1``, ``gcc (Debian …) 12.2.0``."""
        if self.cc == "zig" and self.command:
            return f"zig {importlib.metadata.version('ziglang')}"
        return _version(self.command)

    def shell(self, kind: Kind, arch: str) -> str:
        """The compiler with its target as one shell command: what build.sh starts from (``python3`` for ours)."""
        first = ("python3", "-m", "ziglang", "cc") if self.cc == "zig" else self.command
        return " ".join([*first, *self.target(kind, arch)])

    def target(self, kind: Kind, arch: str) -> tuple[str, ...]:
        """Flags that choose the machine and C library. Raises ``UserError`` when the compiler cannot serve ``arch``."""
        if arch not in ARCHITECTURES:
            raise UserError(f"cannot build for {arch!r}; known architectures: {', '.join(ARCHITECTURES)}")
        if self.is_zig:
            return ("-target", f"{arch}-linux-gnu.{GLIBC}" if kind == "shared" else f"{arch}-linux-musl")
        made_for = _machine(self.command)
        if made_for != arch:
            raise UserError(f"--cc {self.cc} compiles for {made_for}, not {arch}; leave --cc out to use zig")
        return ()

    def features(self, name: str, arch: str) -> tuple[str, ...]:
        """Flags of source file ``name``: ``kernels_<isa>.c`` may use its ISA, everything else is baseline."""
        match = re.fullmatch(r"kernels_(\w+)\.c", name)
        extra = isa(match[1]).features if match else ()
        if self.is_zig:
            return (f"-mcpu={'+'.join([_BASELINE[arch], *extra])}",)
        return cc_features(extra, arch)

    def compile(self, sources: Sources, kind: Kind, arch: str, flags: Sequence[str] = ()) -> Path:
        """Compile and link the ``.c`` files of ``sources`` (name → content; the other files are there to include).

        Returns a file in the cache: copy it, do not change it. The same call later answers at once. Raises
        ``CompileError`` with the compiler's first error, ``UserError`` for a missing compiler or a full disk.
        """
        cache = self.cache or Cache()
        units = sorted(name for name in sources if name.endswith(".c"))
        headers = {name: content for name, content in sources.items() if name not in units}
        target = self.target(kind, arch)
        base = [self.version, arch, *target, *FLAGS, *flags]
        digests = {
            name: _digest([*base, *self.features(name, arch)], {name: sources[name], **headers}) for name in units
        }
        suffix = ".so" if kind == "shared" else ".bin"
        whole = _digest([*base, kind, *LINK, *SHAPES[kind]], digests)
        if (made := cache.get(whole, suffix)) is not None:
            return made
        self._announce(target, cache)
        with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="colonnade-") as name:
            work = Path(name)
            for file, content in sources.items():
                (work / file).write_bytes(content.encode() if isinstance(content, str) else content)

            def one(unit: str) -> Path:
                if (known := cache.get(digests[unit], ".o")) is not None:
                    return known
                output = work / f"{unit}.o"
                self._call([*target, *FLAGS, *flags, *self.features(unit, arch), "-c", unit, "-o", str(output)], work)
                return cache.put(digests[unit], ".o", output)

            with ThreadPoolExecutor(JOBS) as jobs:
                objects = list(jobs.map(one, units))
            made = work / "out"
            self._call(
                [*target, *self.features("", arch), *SHAPES[kind], "-s", *map(str, objects), *LINK, "-o", str(made)],
                work,
            )
            self._used(target, cache)
            return cache.put(whole, suffix, made)

    def _call(self, arguments: Sequence[str], work: Path) -> None:
        environment = dict(os.environ)
        if self.is_zig:
            # objects are ours to keep; only the C libraries stay in zig's own cache
            environment["ZIG_LOCAL_CACHE_DIR"] = str(work / "zig")
            environment["ZIG_GLOBAL_CACHE_DIR"] = str(_zig_cache(self.cache or Cache()))
        done = subprocess.run(
            [*self.command, *arguments], cwd=work, env=environment, capture_output=True, text=True, errors="replace"
        )
        if done.returncode == 0:
            return
        log = done.stderr + done.stdout
        if _FULL_DISK in log:
            raise write_error(work, OSError(28, _FULL_DISK))
        lines = [line for line in log.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)] or log.splitlines()
        reason = lines[0].strip() if lines else f"it ended with status {done.returncode} and no message"
        raise CompileError(f"{self.cc} could not compile: {reason}", log)

    def _announce(self, target: Sequence[str], cache: Cache) -> None:
        if self.is_zig and self.notice is not None and not _marker(self.version, target, cache).exists():
            self.notice(f"preparing the C library for {target[-1]} (once, up to a minute)")

    def _used(self, target: Sequence[str], cache: Cache) -> None:
        if self.is_zig:
            marker = _marker(self.version, target, cache)
            with writing(marker):
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()


def _zig_cache(cache: Cache) -> Path:
    override = os.environ.get("ZIG_GLOBAL_CACHE_DIR")
    return Path(override) if override else cache.folder.parent / "zig"


def _marker(version: str, target: Sequence[str], cache: Cache) -> Path:
    return _zig_cache(cache) / f"used-{version.replace(' ', '-')}-{target[-1]}"


def _digest(words: Sequence[str], files: Mapping[str, str | bytes]) -> str:
    """Hex digest over words and named contents, unambiguous."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    for name in sorted(files):
        content = files[name]
        data = content.encode() if isinstance(content, str) else content
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _ask(command: Sequence[str], question: str) -> str:
    done = subprocess.run([*command, question], capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not done.stdout.strip():
        raise UserError(f"--cc {command[0]}: not a C compiler that answers {question}")
    return done.stdout.splitlines()[0].strip()


@memoize
def _version(command: tuple[str, ...]) -> str:
    return _ask(command, "--version")


@memoize
def _machine(command: tuple[str, ...]) -> str:
    return _ask(command, "-dumpmachine").split("-")[0]
