"""The compiler as a cached function."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colonnade.build import Cache, CompileError, Toolchain, host
from colonnade.build.cache import FRESH, root
from colonnade.errors import ColonnadeError, UserError

PROGRAM = '#include <stdio.h>\n#include "answer.h"\nint main(void) { printf("%d\\n", answer()); return 0; }\n'
SOURCES = {"main.c": PROGRAM, "answer.c": '#include "answer.h"\nint answer(void) { return 42; }\n'}
HEADER = {"answer.h": "int answer(void);\n"}


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    """An empty cache of our own; the C libraries that zig built once are shared."""
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(root() / "zig")))
    return Toolchain(cache=Cache(tmp_path / "cache"))


def test_program_is_static_and_cached(toolchain: Toolchain) -> None:
    made = toolchain.compile({**SOURCES, **HEADER}, "program", host())
    assert subprocess.run([made], capture_output=True, text=True, check=True).stdout == "42\n"
    assert b"ld-linux" not in made.read_bytes() and b"ld-musl" not in made.read_bytes()
    before = made.stat().st_ino
    assert toolchain.compile({**SOURCES, **HEADER}, "program", host()) == made
    assert made.stat().st_ino == before


def test_key_covers_sources_headers_and_flags(toolchain: Toolchain) -> None:
    made = {
        toolchain.compile({**SOURCES, **HEADER}, "program", host()),
        toolchain.compile({**SOURCES, "answer.h": "int answer(void); /* other */\n"}, "program", host()),
        toolchain.compile({**SOURCES, **HEADER}, "program", host(), flags=["-DX"]),
    }
    assert len(made) == 3


def test_only_kernel_files_get_their_isa(toolchain: Toolchain) -> None:
    probe = "int {}(void) {{\n#ifdef __AVX512F__\nreturn 1;\n#else\nreturn 0;\n#endif\n}}\n"
    sources = {
        "kernels_avx512.c": probe.format("inside"),
        "other.c": probe.format("outside"),
        "main.c": "int inside(void), outside(void); int main(void) { return inside() * 10 + outside(); }\n",
    }
    assert subprocess.run([toolchain.compile(sources, "program", "x86_64")], check=False).returncode == 10


def test_cross_compiles_for_riscv(toolchain: Toolchain) -> None:
    made = toolchain.compile({"one.c": "int one(void) { return 1; }\n"}, "shared", "riscv64")
    assert made.read_bytes()[:5] == b"\x7fELF\x02" and made.read_bytes()[18:20] == b"\xf3\x00"  # EM_RISCV


def test_first_error_line_is_told(toolchain: Toolchain) -> None:
    with pytest.raises(CompileError) as caught:
        toolchain.compile({"bad.c": "int f( {\n"}, "program", host())
    assert "bad.c:1" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1 and "error" in caught.value.log


def test_undefined_symbols_fail_at_build_time(toolchain: Toolchain) -> None:
    with pytest.raises(CompileError, match="nowhere"):
        toolchain.compile({"a.c": "int nowhere(void); int f(void) { return nowhere(); }\n"}, "shared", host())


@pytest.mark.parametrize("cc", ["no-such-compiler", "/nowhere/gcc"])
def test_missing_compiler(cc: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--cc {cc}"):
        Toolchain(cc, Cache(tmp_path)).compile(SOURCES, "program", host())


def test_a_program_that_is_no_compiler(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a C compiler"):
        Toolchain("/bin/false", Cache(tmp_path)).compile(SOURCES, "program", host())


def test_unknown_architecture(toolchain: Toolchain) -> None:
    with pytest.raises(UserError, match="z80"):
        toolchain.compile(SOURCES, "program", "z80")


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("a file where the folder should be")
    with pytest.raises(ColonnadeError) as caught:
        Toolchain(cache=Cache(tmp_path)).compile({"a.c": "int a;\n"}, "shared", host())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the write fails half-way all the same."""
    made = tmp_path / "made"
    made.write_bytes(b"x" * 100_000)
    cache = Cache(tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match="larger than this file system"):
            cache.put("ab" + "0" * 62, ".bin", made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.entries() == [] and not [f for f in cache.folder.rglob("*") if f.is_file()]


def test_eviction_takes_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=2500)
    made = tmp_path / "made"
    made.write_bytes(b"x" * 1000)
    digests = [f"{i:02d}" + "0" * 62 for i in range(3)]
    old = time.time() - 10 * FRESH
    for i, digest in enumerate(digests[:2]):
        os.utime(cache.put(digest, ".o", made), (old + i, old + i))
    assert cache.get(digests[0], ".o") is not None  # used again: now the second is the oldest
    cache.put(digests[2], ".o", made)
    assert [cache.get(d, ".o") is not None for d in digests] == [True, False, True]


def test_fresh_entries_survive_a_small_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=10)
    made = tmp_path / "made"
    made.write_bytes(b"x" * 1000)
    assert cache.put("aa" + "0" * 62, ".o", made).exists()


def test_clear_empties_and_counts(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made = tmp_path / "made"
    made.write_bytes(b"x" * 1000)
    cache.put("aa" + "0" * 62, ".o", made)
    assert cache.clear() == 1000 and cache.entries() == []
    assert cache.clear() == 0


def test_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path))
    assert root() == tmp_path and Cache().folder == tmp_path / "objects"


def test_two_processes_fill_one_cache(tmp_path: Path, toolchain: Toolchain) -> None:
    code = (
        "import sys, pathlib\nfrom colonnade.build import Cache, Toolchain, host\n"
        "t = Toolchain(cache=Cache(pathlib.Path(sys.argv[1])))\n"
        "print(t.compile({'a.c': 'int a(void) { return 1; }\\n'}, 'shared', host()))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "both")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1
