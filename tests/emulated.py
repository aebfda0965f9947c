"""RISC-V kernels under QEMU for the kernel tests: one emulated process a vector length, many calls each."""

from __future__ import annotations

import atexit
import functools
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import half
import numpy as np
import pytest

from colonnade.build.toolchain import Toolchain
from colonnade.kernels import registry, render
from colonnade.kernels.call import Arena, Call, Const, External, Scratch, Shared
from colonnade.kernels.isa import Isa, isa
from colonnade.layout import LINE
from colonnade.targets import Qemu
from colonnade.targets.qemu import PROGRAM, VARIABLE, VLENS

INSTALLED = shutil.which(PROGRAM) is not None
MISSING = f"{PROGRAM} is not installed (apt-get install qemu-user)"


@dataclass(frozen=True)
class Emulated(Isa):
    """A row of the ISA table on an emulated machine whose vector registers have ``vlen`` bits."""

    vlen: int = 256

    @property
    def label(self) -> str:
        """For test ids: ``rvv-256``."""
        return f"{self.name}-{self.vlen}"


def emulated(name: str, vlen: int) -> Emulated:
    """ISA ``name`` of the table on an emulated machine."""
    row = isa(name)
    return Emulated(**{f.name: getattr(row, f.name) for f in fields(row)}, vlen=vlen)


RVV = [emulated("rvv", vlen) for vlen in VLENS]
HALF = [emulated("rvv_zvfh", vlen) for vlen in VLENS]


@functools.cache
def program(name: str) -> Path:
    """The runner with all kernels of ISA ``name``, a static riscv64 program."""
    files = render.library(isa(name), registry.variants(isa(name)).values())
    runner = (Path(__file__).parent / "kernel_runner.c").read_text()
    files["runner.c"] = f"#define CN_KERNELS cn_kernels_{name}\n{runner}"
    return Toolchain().compile(files, "program", "riscv64")


@dataclass
class _Request:
    """Buffers, pointers between them and calls, as kernel_runner.c reads them."""

    buffers: list[tuple[int, int, int, bytes | None]] = field(default_factory=list)
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)
    calls: list[tuple[int, str]] = field(default_factory=list)

    def buffer(self, size: int, align: int, poison: int, content: bytes | None) -> int:
        self.buffers.append((size, align, poison, content))
        return len(self.buffers) - 1

    def encode(self, threads: int, backwards: bool) -> bytes:
        words = [len(self.buffers), len(self.relocations), len(self.calls), threads, int(backwards)]
        for size, align, poison, content in self.buffers:
            words += [size, align, poison, content is not None]
        for relocation in self.relocations:
            words += relocation
        for args, symbol in self.calls:
            words += [args, len(symbol)]
        packed = struct.pack(f"<{len(words)}Q", *(int(w) & 2**64 - 1 for w in words))
        contents = [content for *_, content in self.buffers if content is not None]
        return b"".join([packed, *contents, *(symbol.encode() for _, symbol in self.calls)])


class _Process:
    """A running runner; started again after it died."""

    def __init__(self, name: str, vlen: int) -> None:
        with pytest.MonkeyPatch.context() as patched:
            if isa(name).half:
                patched.setenv(VARIABLE, half.emulator() or "")
            self.command = [*Qemu(vlen, poison=True).command(str(program(name)))]
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def ask(self, request: bytes, sizes: Sequence[int]) -> list[bytes]:
        """The buffers afterwards. Raises ``AssertionError`` for a kernel that died or wrote in front of a buffer."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what ended it is told below
        head = self.process.stdout.read(16)
        if len(head) < 16:
            code = self.process.wait()
            self.stop()
            raise AssertionError(f"the kernel died: {f'signal {-code}' if code < 0 else f'exit code {code}'}")
        status, which = struct.unpack("<2Q", head)
        assert status != 1, f"call {which}: no such kernel"
        assert status != 2, f"something in front of buffer {which} was written"
        return [self.process.stdout.read(size) for size in sizes]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@functools.cache
def _process(name: str, vlen: int) -> _Process:
    return _Process(name, vlen)


def run_calls(
    target: Emulated,
    calls: Sequence[Call],
    threads: int,
    arena: np.ndarray,
    user: np.ndarray,
    poison: float,
    backwards: bool,
) -> None:
    """Run ``calls`` one after the other, all threads of each in turn, on copies of ``arena`` and ``user`` (uint8);
    both then hold what came out. Arguments and constants must come back as they went."""
    bits = int(np.float32(poison).view(np.uint32))
    request = _Request()
    base = request.buffer(arena.size, LINE, bits, arena.tobytes())
    external = request.buffer(user.size, 4, bits, user.tobytes())
    shared = request.buffer(max(call.shared for call in calls), LINE, bits, None)
    unchanged: dict[int, tuple[bytes, str]] = {}
    for call in calls:
        shape = registry.structs()[call.struct]
        assert set(call.fields) == {m.name for m in shape.members}, f"{call.kernel}: fields do not match {call.struct}"
        image = shape.pack({k: v for k, v in call.fields.items() if isinstance(v, int | float)})
        args = request.buffer(shape.size, LINE, bits, image)
        unchanged[args] = (image, "the arguments of " + call.kernel)
        request.calls.append((args, call.kernel))
        for name, at in _pointers(call, shape.offsets()).items():
            value = call.fields[name]
            if isinstance(value, Arena):
                request.relocations.append((args, at, base, value.offset))
            elif isinstance(value, External):
                request.relocations.append((args, at, external, 0))
            elif isinstance(value, Scratch):
                place = request.buffer(call.scratch * threads, LINE, bits, None)
                request.relocations.append((args, at, place, 0))
            elif isinstance(value, Shared):
                request.relocations.append((args, at, shared, value.offset))
            elif isinstance(value, Const):
                data = np.ascontiguousarray(value.data).tobytes()
                place = request.buffer(len(data), LINE, bits, data)
                unchanged[place] = (data, f"constant {name}")
                request.relocations.append((args, at, place, 0))
    sizes = [size for size, *_ in request.buffers]
    after = _process(target.name, target.vlen).ask(request.encode(threads, backwards), sizes)
    for place, (before, what) in unchanged.items():
        assert after[place] == before, f"{what} was written"
    arena[:] = np.frombuffer(after[base], np.uint8)
    user[:] = np.frombuffer(after[external], np.uint8)


def _pointers(call: Call, offsets: Mapping[str, int]) -> dict[str, int]:
    members = registry.structs()[call.struct].members
    return {m.name: offsets[m.name] for m in members if m.is_pointer and call.fields[m.name] is not None}
