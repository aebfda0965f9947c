"""What the compiler makes of the RVV kernels, read in assembly: inner loops neither spill vectors nor reset vtype."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from colonnade.build.toolchain import FLAGS, Toolchain
from colonnade.kernels import registry, render
from colonnade.kernels.isa import Isa
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import conv, registers
from colonnade.kernels.registry import Variant

RVV = isa_named("rvv")
FUNCTION = re.compile(r"^(f32_\w+):[^\n]*\n(.*?)^\.Lfunc_end", re.MULTILINE | re.DOTALL)
LABEL = re.compile(r"(\.LBB\w+):(?: (\d+))?")  # and how deep in loops
DEPTH = re.compile(r"^(\.LBB\w+:)((?:[^\n]*\n(?=\s*#))*[^\n]*)", re.MULTILINE)
BRANCH = re.compile(r"(?:b\w+|j)\s.*?(\.LBB\w+)$")
# vset*: new vtype or length; whole-register moves to and from memory: how vectors are spilled; sp and s0: the stack
FORBIDDEN = re.compile(r"vset|v[ls][1248]r|.*\b(?:sp|s0)\)|call|csrr")


def assembly(variants: Iterable[Variant], folder: Path, isa: Isa = RVV) -> str:
    """What the default compiler writes for ``variants`` with the flags of a bundle."""
    unit = f"kernels_{isa.name}.c"
    files = render.library(isa, variants)
    for name, content in files.items():
        (folder / name).write_text(content)
    tool = Toolchain()
    flags = [*tool.target("program", "riscv64"), *FLAGS, *tool.features(unit, "riscv64")]
    command = [*tool.command, *flags, "-S", unit, "-o", "kernels.s"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "kernels.s").read_text()


def functions(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions and labels with the depth of their loop) of every function."""
    for match in FUNCTION.finditer(text):
        body = DEPTH.sub(lambda m: f"{m[1]} {max(map(int, re.findall('Depth=([0-9]+)', m[2])), default=0)}", match[2])
        lines = [line.partition("#")[0].strip() for line in body.splitlines()]
        yield match[1], [line for line in lines if line and (not line.startswith(".") or LABEL.match(line))]


def inner_loops(lines: list[str]) -> list[list[str]]:
    """Stretches from a label to a branch back to it, in the same loop, that hold no such stretch themselves."""
    at = {match[1]: index for index, line in enumerate(lines) if (match := LABEL.match(line))}
    spans, depth = [], 0
    for index, line in enumerate(lines):
        if match := LABEL.match(line):
            depth = int(match[2] or 0)
        elif (match := BRANCH.match(line)) and (first := at.get(match[1], index + 1)) <= index:
            head = LABEL.match(lines[first])
            if head is not None and int(head[2] or 0) == depth:
                spans.append((first, index))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return [lines[a : b + 1] for a, b in inner]


def faults(text: str) -> dict[str, list[str]]:
    """Forbidden instructions in the innermost loops of convolution and classifier, by function."""
    found: dict[str, list[str]] = {}
    for name, lines in functions(text):
        if not name.startswith(("f32_spconv", "f32_splinear")):
            continue
        loops = [loop for loop in inner_loops(lines) if any("vfmacc" in line for line in loop)]
        if loops:
            found[name] = [line for loop in loops for line in loop if FORBIDDEN.match(line)]
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return assembly(registry.variants(RVV).values(), tmp_path_factory.mktemp("rvv"))


def test_every_lmul_is_there():
    lmuls = {int(v.params["NV"]) for v in conv.variants(RVV)}
    assert lmuls == {1, 2, 4, 8}
    for variant in conv.variants(RVV):
        rows = variant.params.get("MR") or variant.params.get("R")
        assert rows is None or (rows + 1) * variant.params["NV"] <= 32


def test_inner_loops_neither_spill_nor_set_vtype(library):
    found = faults(library)
    for variant in conv.variants(RVV):
        for rows in variant.params["row_counts"] if variant.body == "spconv.c.in" else ():
            assert found[f"{variant.symbol}_{rows}"] == []
    assert {name: bad for name, bad in found.items() if bad} == {}
    assert sum("splinear" in name for name in found) > 10


def test_convolutions_move_no_group_of_registers(library):
    """A compiler that moves one between our instructions sets another vector type for it, which ours then meet."""
    group = re.compile(r"v[ls][1248]r|vmv[248]r|vset.*e8, m1")
    for name, lines in functions(library):
        if re.fullmatch(r"f32_spconv_\d+x(1|2)v__rvv_(\d+(_alone)?|lanes.*)", name):
            assert [line for line in lines if group.match(line)] == [], name


def test_depthwise_kernels_do_not_spill(library):
    """Their loop over lines branches by length, so all of a function is looked at."""
    bodies = {name: lines for name, lines in functions(library) if re.match(r"f32_dwconv_.*x1$", name)}
    assert len(bodies) > 10
    assert {name for name, lines in bodies.items() if any(re.match("v[ls][1248]r", line) for line in lines)} == set()


def test_inner_loops_of_convolutions_do_nothing_but_the_work(library):
    """One load and MR multiply-adds a kept column; a weight a row, an offset, five scalars of bookkeeping at most;
    and a turn of the ring asks for a line of each of four things (of six columns, twice for one of them), and of the
    weights for all it reads."""
    bodies = dict(functions(library))
    for variant in (v for v in conv.variants(RVV) if v.body == "spconv.c.in"):
        for rows in variant.params["row_counts"]:
            (loop,) = [b for b in inner_loops(bodies[f"{variant.symbol}_{rows}"]) if any("vfmacc.vf" in x for x in b)]
            count = {word: sum(line.startswith(word) for line in loop) for word in ("vle32.v", "vfmacc.vf", "flw", "v")}
            columns = count["vle32.v"]
            assert count["vfmacc.vf"] == count["flw"] == rows * columns
            assert count["v"] == columns * (rows + 1)
            asking = 38 + 9 * (columns > 4) + 2 * len(variant.params["asks"][rows])
            assert len(loop) - 1 <= columns * (2 * rows + 2 + 6) + asking


def test_a_block_that_does_not_fit_is_seen_to_spill(tmp_path):
    """The check can fail: 16 rows of LMUL 2 and their column need 34 registers."""
    assert not registers.legal(16, 2, RVV)
    assert any(faults(assembly([conv.variant(16, 2, RVV)], tmp_path)).values())
