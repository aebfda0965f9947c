"""The machine this program runs on."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from colonnade.errors import TargetError
from colonnade.targets import probe
from colonnade.targets.base import Machine, Outcome
from colonnade.targets.pipes import drain

ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Local:
    """Programs run as children of this process, each in a session of its own: Ctrl-C reaches us, not them."""

    name: str = "local"
    untimed: str = ""
    cpus: tuple[int, ...] = ()  # cores that programs are kept on; empty for all
    modelled: str = ""

    def probe(self) -> Machine:
        """See ``Target.probe``. Static facts are read once a process."""
        return replace(_probe(), cpus=self.cpus)

    def run(
        self,
        program: Path,
        args: Sequence[str] = (),
        inputs: Mapping[str, Path | bytes] | None = None,
        outputs: Sequence[str] = (),
        timeout: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """See ``Target.run``."""
        with on_cores(self.cpus):
            return execute_staged([str(program.resolve()), *args], inputs, outputs, timeout, on_line)


@contextlib.contextmanager
def on_cores(cpus: tuple[int, ...]) -> Iterator[None]:
    """Keep this thread, and the programs and threads that it starts meanwhile, on ``cpus``; empty changes nothing."""
    before = os.sched_getaffinity(0)
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
        yield
    except OSError as error:
        if not cpus or error.errno != errno.EINVAL:
            raise
        raise TargetError(f"cores {','.join(map(str, cpus))} may not be used here") from error
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


def execute_staged(
    command: Sequence[str],
    inputs: Mapping[str, Path | bytes] | None = None,
    outputs: Sequence[str] = (),
    timeout: float = 60.0,
    on_line: Callable[[str], None] | None = None,
) -> Outcome:
    """``execute`` in a fresh folder that holds ``inputs`` by name; ``outputs`` come back in the outcome."""
    with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
        for name, content in (inputs or {}).items():
            if isinstance(content, bytes):
                (Path(folder) / name).write_bytes(content)
            else:
                (Path(folder) / name).symlink_to(content.resolve())
        outcome = execute(command, Path(folder), timeout, on_line)
        files = {n: (Path(folder) / n).read_bytes() for n in outputs if (Path(folder) / n).is_file()}
        return replace(outcome, files=files)


def execute(
    command: Sequence[str], folder: Path, timeout: float, on_line: Callable[[str], None] | None = None
) -> Outcome:
    """Run ``command`` in ``folder``, its lines handed out as they come; killed with all its children at the timeout."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise TargetError(f"cannot start {command[0]}: {error.strerror}") from error
    assert process.stdout is not None and process.stderr is not None
    out, err = bytearray(), bytearray()
    handed = 0

    def add(chunk: bytes) -> None:
        nonlocal handed
        out.extend(chunk)
        end = out.rfind(b"\n") + 1
        if on_line is not None and end > handed:
            for line in out[handed:end].decode(errors="replace").splitlines():
                on_line(line)
            handed = end

    deadline = time.monotonic() + timeout
    try:
        timed_out = not drain({process.stdout: add, process.stderr: err.extend}, deadline)
        if not timed_out:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                timed_out = True
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()
    code = process.returncode
    return Outcome(
        code=code if code >= 0 else 128 - code,
        signal=-code if code < 0 and not timed_out else 0,
        timed_out=timed_out,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
    )


@cache
def _probe() -> Machine:
    arch = platform.machine().lower()
    usable = tuple(sorted(os.sched_getaffinity(0)))
    wanted = [*probe.COMMON, *(path for cpu in usable for path in probe.paths(cpu))]
    files = {}
    for path in wanted:
        with contextlib.suppress(OSError):
            files[path] = Path(path).read_text(errors="replace")
    return probe.parse(files, ARCHITECTURES.get(arch, arch), usable)
