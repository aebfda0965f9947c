"""The emulated RISC-V machine as a target: what it says of itself, how programs end, that nothing is timed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from convolutions import operands
from emulated import INSTALLED, MISSING, RVV

from colonnade import targets
from colonnade.build.toolchain import Toolchain
from colonnade.errors import UserError
from colonnade.kernels import registry
from colonnade.kernels.isa import isa
from colonnade.machine import Instrument, read
from colonnade.pattern import ColumnPattern
from colonnade.plan import Plan
from colonnade.targets import Qemu, parse
from colonnade.tune import tune
from colonnade.tune.job import Run, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.workload import RELU, Conv2d, Epilogue

needs_qemu = pytest.mark.skipif(not INSTALLED, reason=MISSING)


@pytest.mark.parametrize(
    ("text", "vlen", "poison"),
    [
        ("qemu", 256, False),
        ("qemu:vlen=128", 128, False),
        ("qemu:vlen=1024,poison", 1024, True),
        ("qemu:poison", 256, True),
    ],
)
def test_names_of_the_target(text, vlen, poison):
    target = parse(text)
    assert target == Qemu(vlen, poison)
    assert parse(target.name) == target


@pytest.mark.parametrize(
    "text",
    ["qemu:", "qemu:vlen", "qemu:vlen=0", "qemu:vlen=100", "qemu:vlen=2048", "qemu:vlen=256,", "qemux", "qemu:v=1"],
)
def test_names_that_are_none(text):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_without_qemu_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv(targets.qemu.VARIABLE, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install qemu-user"):
        Qemu().probe()


@pytest.mark.parametrize("name", ["/nowhere/qemu", "qemu-of-nobody"])
def test_an_emulator_that_is_none_is_named(monkeypatch, name):
    monkeypatch.setenv(targets.qemu.VARIABLE, name)
    for ask in (Qemu().probe, Qemu().command, Instrument(read("x60")).run):
        with pytest.raises(UserError, match=f"COLONNADE_QEMU={name} is no program") as caught:
            ask(*([Path("program")] if ask.__name__ == "run" else []))
        assert "\n" not in str(caught.value)


def emulator(folder: Path, script: str) -> str:
    """The path of a shell script that stands for an emulator."""
    path = folder / "emulator"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "half"),
    [
        ('case "$2" in *zfh=true,zvfh=true) exit 57;; esac', True),
        ('echo "can\'t apply global rv64-riscv-cpu.zfh=true: Property not found" >&2; exit 1', False),
        ("exit 0", False),
        ("kill -ILL $$", False),
    ],
)
def test_half_precision_is_asked_for_where_the_emulator_knows_it(monkeypatch, tmp_path, script, half):
    path = emulator(tmp_path, f"echo >>{tmp_path}/asked; {script}")
    monkeypatch.setenv(targets.qemu.VARIABLE, path)
    for target in (Qemu(), Qemu(512, poison=True)):
        program, option, cpu, word = target.command("word")
        assert (program, option, word) == (path, "-cpu", "word")
        assert ("zfh=true,zvfh=true" in cpu.split("vext_spec=v1.0,")[-1]) == half
        assert cpu.startswith(f"rv64,v=true,vlen={target.vlen},") and ("rvv_ta_all_1s" in cpu) == target.poison
        assert target.probe().flags == frozenset("imafdcv") | ({"zfh", "zvfh"} if half else set())
    assert (tmp_path / "asked").read_text() == "\n"  # once


@pytest.mark.parametrize("half", [False, True])
def test_who_lacks_half_precision_is_told(monkeypatch, tmp_path, half):
    """A core without it lacks it under any emulator; of others an emulator without it does."""
    monkeypatch.setenv(targets.qemu.VARIABLE, emulator(tmp_path, "exit 57" if half else "exit 1"))
    newer = " (no emulator here knows it: COLONNADE_QEMU may name a newer one)"
    for target, more in (("model:c908", ""), ("model:x60", newer), ("qemu", newer)):
        machine = parse(target).probe()
        if half and more:
            assert machine.pick_isa(dtype="f16").half
            continue
        with pytest.raises(UserError) as caught:
            machine.pick_isa(dtype="f16")
        wanted = f"{machine.cpu} does not compute with f16, which takes RISC-V's Zvfh{more}; leave out --dtype f16"
        assert str(caught.value) == wanted
        with pytest.raises(UserError) as caught:
            machine.pick_isa("rvv_zvfh")
        assert str(caught.value).endswith(f"it has: rvv, portable; f16 takes RISC-V's Zvfh{more}")


def test_an_emulator_may_be_named_by_a_relative_path(monkeypatch, tmp_path):
    path = emulator(tmp_path, "exit 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(targets.qemu.VARIABLE, "./emulator")
    assert Path(Qemu().command()[0]).samefile(path) and Path(Qemu().command()[0]).is_absolute()


@pytest.mark.parametrize("vlen", targets.qemu.VLENS)
def test_half_precision_in_emulation(half_qemu, vlen):
    """Sums of halves, and what a tail holds: ones with `poison`. Nothing else is said."""
    source = r"""
    #include <stdio.h>
    int main(void)
    {
        _Float16 x[4] = {1, 2, 3, 0.1f16}, y[4];
        unsigned short after;
        __asm__ volatile("vsetivli x0,8,e16,m1,ta,ma\n vmv.v.i v8,0\n vsetivli x0,4,e16,m1,ta,ma\n"
                         "vle16.v v8,(%1)\n flh ft0,2(%1)\n vfmacc.vf v8,ft0,v8\n vse16.v v8,(%2)\n"
                         "vsetivli x0,8,e16,m1,ta,ma\n vslidedown.vi v8,v8,5\n vmv.x.s %0,v8"
                         : "=r"(after) : "r"(x), "r"(y) : "memory", "v8", "ft0");
        printf("%g %g %g %.4f %x\n", (double)y[0], (double)y[1], (double)y[2], (double)y[3], after);
    }
    """
    program = Toolchain().compile({"kernels_rvv_zvfh.c": source}, "program", "riscv64")
    assert {"zfh", "zvfh"} <= Qemu(vlen).probe().flags
    for poison in (False, True):
        target = Qemu(vlen, poison)
        assert target.command()[0] == half_qemu
        outcome = target.run(program)
        assert outcome.ok and not outcome.stderr
        assert outcome.stdout == f"3 6 9 0.2998 {'ffff' if poison else '0'}\n"
    plain = [half_qemu, "-cpu", "rv64,v=true", str(program)]
    assert subprocess.run(plain, capture_output=True).returncode != 0, "this needs Zvfh"


@needs_qemu
@pytest.mark.parametrize("vlen", targets.qemu.VLENS)
def test_the_machine_is_what_the_probe_says(vlen):
    source = r"""
    #include <stdio.h>
    #include <sys/auxv.h>
    int main(void)
    {
        unsigned long vlenb;
        __asm__ volatile("csrr %0, vlenb" : "=r"(vlenb));
        printf("%lu %d\n", vlenb, (int)(getauxval(AT_HWCAP) >> ('v' - 'a') & 1));
    }
    """
    program = Toolchain().compile({"kernels_rvv.c": source}, "program", "riscv64")
    machine = Qemu(vlen).probe()
    outcome = Qemu(vlen).run(program)
    assert outcome.ok and outcome.stdout == f"{vlen // 8} 1\n"
    assert machine.vlenb == vlen // 8
    half = targets.qemu.half(targets.qemu.program("this test"))
    assert [row.name for row in machine.isas] == ["rvv", *(["rvv_zvfh"] if half else []), "portable"]
    assert machine.key() != Qemu(512 if vlen == 256 else 256).probe().key()


@needs_qemu
def test_how_programs_end():
    source = r"""
    #include <stdio.h>
    #include <stdlib.h>
    #include <unistd.h>
    int main(int argc, char **argv)
    {
        FILE *in = fopen("in", "r"), *out = fopen("out", "w");
        if (argc > 1 && argv[1][0] == 'c') *(volatile int *)8 = 1;
        while (argc > 1 && argv[1][0] == 'h') pause();
        fputc(fgetc(in) + 1, out);
        return argc > 1 ? atoi(argv[1]) : 0;
    }
    """
    program = Toolchain().compile({"main.c": source}, "program", "riscv64")
    run = Qemu().run
    assert run(program, inputs={"in": b"a"}, outputs=["out", "none"]).files == {"out": b"b"}
    assert run(program, ["7"], {"in": b"a"}).code == 7
    assert run(program, ["crash"], {"in": b"a"}).signal == 11
    assert run(program, ["hang"], {"in": b"a"}, timeout=0.5).timed_out


@needs_qemu
@pytest.mark.parametrize("row", RVV, ids=lambda row: row.label)
def test_every_kernel_through_the_measuring_program(row):
    """The tuner's program on the emulated machine: results are checked, nothing is timed; two threads."""
    conv = Conv2d(1, 11, 53, 13, 17, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, RELU))
    case, _ = operands(conv, ColumnPattern(0.75, tile=26), seed=3)
    object.__setattr__(case, "key", lambda: "convolution")
    chosen = {c.kernel: c for c in reversed(registry.candidates(case, isa("rvv"), 2))}
    found: dict[str, Measurement] = {}
    names = list(chosen)
    Harness(Qemu(row.vlen, poison=True), isa("rvv"), 2).run(
        problem(case),
        list(chosen.values()),
        [Run(index, check=True, least=0, most=0, budget_ns=0, limit_s=20) for index in range(len(names))],
        lambda index, measurement: found.__setitem__(names[index], measurement),
        registry.bind,
    )
    assert {name: (m.outcome, m.detail) for name, m in found.items()} == {name: ("ok", "") for name in names}
    assert len(names) > 8


def test_nothing_is_tuned_by_emulated_times(tmp_path):
    empty = Plan(name="none", steps=(), buffers=(), arena=0, inputs=(), outputs=())
    with pytest.raises(UserError, match="static ranking chooses") as caught:
        tune(empty, Qemu(), isa("rvv"), db_path=tmp_path / "db")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "db").exists()


def test_the_static_ranking_of_rvv():
    """Tiles of 8 rows take 8 x LMUL 2 on wide maps; no candidate differs from another in what RVV does not have."""
    conv = Conv2d(1, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))
    call, _ = operands(conv, ColumnPattern(0.75, tile=8), seed=0)
    ranked = registry.candidates(call, isa("rvv"), 1)
    assert ranked[0].kernel == "f32_spconv_8x2v__rvv" and not ranked[0].params["dense"]
    assert {c.params.get("prefetch", 0) for c in ranked} == {0}
    dense, _ = operands(conv, None, seed=0)
    first, *others = registry.candidates(dense, isa("rvv"), 1)
    assert first.kernel.startswith("f32_winograd"), "a quarter of the multiplications, and all that it moves, is less"
    best = next(c for c in others if c.kernel.startswith("f32_spconv"))
    rows, lmul = (int(x.rstrip("v")) for x in best.kernel.split("_")[2].split("x"))
    assert rows * lmul >= 16, "sums fill half of the registers at least; more leave too few columns to wait for loads"
    assert np.isfinite([c.rank for c in ranked]).all()
