"""The instrument: it counts exactly, its pipes keep the published cycles, its caches miss what they must miss."""

from __future__ import annotations

import shutil
import time
from importlib import resources
from pathlib import Path

import onnx
import pytest

from colonnade.bench.run import bench
from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError, UserError
from colonnade.machine import Instrument, Report, names, read
from colonnade.machine.instrument import interface
from colonnade.machine.model import class_names
from colonnade.targets import parse, qemu
from tests.models import Builder

INSTALLED = shutil.which("qemu-riscv64") is not None
needs_qemu = pytest.mark.skipif(not INSTALLED, reason="qemu-riscv64 is not installed (apt-get install qemu-user)")
HEAD = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
static float memory[1024] __attribute__((aligned(4096), unused));
#define MARK(n) __asm__ volatile("slti x0, x0, " #n ::: "memory")
"""


def program(body: str, head: str = "") -> Path:
    """A static riscv64 program; ``body`` is its main."""
    source = f"{HEAD}{head}int main(void) {{ {body} return 0; }}"
    return Toolchain().compile({"kernels_rvv.c": source}, "program", "riscv64")


def loop(setup: str, lines: list[str], rounds: int = 100, copies: int = 8, operands: str = "") -> str:
    """C that runs ``copies`` times ``lines`` in each of ``rounds`` rounds, twice, marked (the second is warm)."""
    block = "\\n".join(lines)
    text = f"li t0,{rounds}\\n{setup}\\n1:.rept {copies}\\n{block}\\n.endr\\naddi t0,t0,-1\\nbnez t0,1b"
    asm = f'__asm__ volatile("{text}" :: {operands} : "t0", "t1", "memory");'
    return f"for (int r = 0; r < 2; r++) {{ MARK(1); {asm} MARK(2); }}"


def run(model: str, body: str, head: str = "") -> Report:
    report = Instrument(read(model)).run(program(body, head))
    assert report.outcome.ok, report.outcome.describe()
    return report


def per_instruction(model: str, setup: str, lines: list[str], operands: str = "") -> float:
    return run(model, loop(setup, lines, operands=operands)).regions[1] / (100 * 8 * len(lines))


def vset(size: int, lmul: int) -> str:
    return f"vsetvli t1,x0,e{size},m{lmul},ta,ma"


@pytest.mark.parametrize("name", names())
def test_models_are_whole(name: str) -> None:
    model = read(name)
    assert set(model.classes) == set(class_names())
    assert model.vlen in (128, 256, 512, 1024)
    assert all(n.assumed or n.source in model.sources for n in model.numbers.values())
    for number, (low, high) in model.assumed():
        assert low < high
        assert model.vary(number, low).text() != model.vary(number, high).text()


def test_broken_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no machine model 'x61'"):
        read("x61")
    text = (resources.files("colonnade.machine") / "models" / "x60.toml").read_text()
    for change, message in (
        (text.replace('width = { value = 2, from = "llvm" }\n', ""), "width"),
        (text.replace('width = { value = 2, from = "llvm" }', 'width = { value = 2, from = "hearsay" }'), "hearsay"),
        (text.replace(", range = [14, 40]", ""), "range"),
        (text.replace('unit = "vmem"', 'unit = "warp"', 1), "unit"),
    ):
        file = tmp_path / "core.toml"
        file.write_text(change)
        with pytest.raises(UserError, match=message):
            read(str(file))
    with pytest.raises(UserError, match="no number"):
        read("x60").vary("core.warp", 1)


@pytest.mark.parametrize(
    ("said", "version"),
    [("7.2.22 (Debian 1:7.2)", 1), ("8.2.1", 1), ("9.0.4", 2), ("9.1.0", 3), ("10.0.13", 3), ("10.0.13 plain", None)],
)
def test_each_emulator_gets_its_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, version: int | None
) -> None:
    path = tmp_path / "emulator"
    plugins = "" if version is None else "-plugin              QEMU_PLUGIN"
    path.write_text(f"#!/bin/sh\n[ $1 != --version ] || echo qemu-riscv64 version '{said}'\necho '{plugins}'\n")
    path.chmod(0o755)
    if version is not None:
        assert interface(str(path)) == version
        return
    monkeypatch.setenv(qemu.VARIABLE, str(path))
    with pytest.raises(TargetError, match=f"{path} takes no plugins") as caught:
        Instrument(read("x60")).run(path)
    assert "\n" not in str(caught.value)


@needs_qemu
@pytest.mark.allow_skip("Debian has no emulator with Zvfh that takes plugins")
def test_half_precision_is_counted() -> None:
    if not qemu.half(qemu.program("this test")):
        pytest.skip("the emulator does not know Zvfh")
    lines = ["flh ft0,0(%0)", "vle16.v v8,(%0)", "vfmacc.vf v16,ft0,v8", "fmadd.h ft1,ft0,ft0,ft1", "fsh ft1,0(%0)"]
    lines += ["vsetvli t1,x0,e16,m2,ta,ma", "vfwcvt.f.f.v v4,v2", "vfncvt.f.f.w v2,v4", "fcvt.s.h ft2,ft1"]
    setup = ".option arch,+zvfh,+zfh\\n" + vset(16, 4)
    report = run("x60", loop(setup, [*lines, vset(16, 4)], 10, 3, '"r"(memory)'))
    times = 2 * 10 * 3
    for name in ("fload", "fstore", "ffma", "fmove"):
        assert report.executed(name) == {"all": times}, name
    for name, shape in (("vload", "e16m4"), ("vfma", "e16m4"), ("vwiden", "e16m2"), ("vnarrow", "e16m2")):
        assert report.executed(name) == {shape: times}, name


@needs_qemu
@pytest.mark.parametrize("lmul", [1, 2, 4, 8])
def test_pipes_keep_the_published_cycles(lmul: int) -> None:
    # rvv-bench, SpacemiT X60, e32: the class's own instructions back to back, results apart
    model = read("x60")
    registers = [8, 16, 24] if lmul == 8 else [8, 12, 16, 20]
    index = (1, 2, 4, 8).index(lmul)
    for text, kind in (("vfmul.vv v{r},v{r},v{r}", "vfmul"), ("vsll.vi v{r},v{r},1", "vshift")):
        if lmul < 4:
            continue  # shorter groups wait for their own results
        found = per_instruction("x60", vset(32, lmul), [text.format(r=r) for r in registers])
        assert found == pytest.approx(model.classes[kind].cycles[index], rel=0.05)
    loads = [f"vle32.v v{r},(%0)" for r in registers]
    found = per_instruction("x60", vset(32, lmul), loads, operands='"r"(memory)')
    assert found == pytest.approx(model.classes["vload"].cycles[index], rel=0.06)


@needs_qemu
def test_a_chain_costs_its_latency_and_halves_share_the_work() -> None:
    model = read("x60")
    chain = per_instruction("x60", vset(32, 1), ["vfadd.vv v8,v8,v8"])
    assert chain == pytest.approx(model.classes["vfadd"].latency.value, rel=0.05)
    # published for this design: vsll alone 2 cycles, beside vadd (which may use the other half) 1
    assert per_instruction("x60", vset(32, 1), ["vsll.vi v8,v16,1", "vsll.vi v9,v17,1"]) == pytest.approx(2, rel=0.05)
    mixed = ["vsll.vi v8,v16,1", "vadd.vv v9,v17,v18", "vsll.vi v10,v16,1", "vadd.vv v11,v17,v18"]
    assert per_instruction("x60", vset(32, 1), mixed) == pytest.approx(1, rel=0.05)
    # a group of 8 is as long as its unit needs it: its first register is ready before its last is begun
    assert per_instruction("x60", vset(32, 8), ["vfadd.vv v8,v8,v8"]) == pytest.approx(8, rel=0.05)


@needs_qemu
def test_counts_are_exact() -> None:
    lines = ["vfmacc.vf v8,ft0,v16", "vfmacc.vf v12,ft0,v16", "vle32.v v20,(%0)", "flw ft0,0(%0)", "vse32.v v8,(%0)"]
    body = "float *a = aligned_alloc(4096, 4096); memset(a, 0, 4096);" + loop(vset(32, 4), lines, 10, 3, '"r"(a)')
    report = run("x60", body)
    assert report.executed("vfma") == {"e32m4": 2 * 10 * 3 * 2}
    assert report.executed("vload") == report.executed("vstore") == {"e32m4": 2 * 10 * 3}
    assert report.executed("fload") == {"all": 2 * 10 * 3}
    assert report.executed("branch") == {"all": 2 * 10}
    assert report.bound(read("x60")) == 2 * 10 * 3 * 2 * 4


@needs_qemu
@pytest.mark.parametrize(("kilobytes", "again"), [(16, 0), (64, 1024)])
def test_l1_misses_what_does_not_fit(kilobytes: int, again: int) -> None:
    lines = kilobytes * 1024 // 64
    body = f"""volatile char *a = aligned_alloc(4096, {kilobytes} << 10); memset((char *)a, 1, {kilobytes} << 10);
    for (int r = 0; r < 2; r++) {{ MARK(3); for (int k = 0; k < 2; k++) {{ MARK(1);
        for (int i = 0; i < {lines}; i++) (void)a[(i * 37 % {lines}) * 64]; MARK(2); }} }}"""
    own = read("x60").vary("misses.prefetch_streams", 0)
    report = Instrument(own).run(program(body))
    misses = report.memory()["l1_misses"]
    assert misses == pytest.approx(2 * (lines + again), abs=24)  # the stack is in there too
    cold, warm = report.regions[:2]
    assert warm < cold / 2  # from L1 or L2, no longer from memory


@needs_qemu
def test_the_programs_clock_tells_modelled_time() -> None:
    body = """struct timespec a, b; clock_gettime(CLOCK_MONOTONIC, &a); MARK(1);
    for (volatile int i = 0; i < 20000; i++) ; MARK(2); clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%lld\\n", (b.tv_sec - a.tv_sec) * 1000000000ll + b.tv_nsec - a.tv_nsec);"""
    report = Instrument(read("x60")).run(program(body), skip=False)
    told = int(report.outcome.stdout)
    assert told == pytest.approx(report.cycles / 1.6, rel=0.02)
    target = parse("model:x60")
    outcome = target.run(program(body))
    assert int(outcome.stdout) == pytest.approx(told, rel=0.01)
    assert target.probe().vlenb == 32


@needs_qemu
def test_a_bench_on_a_modelled_core_takes_each_time_once(tmp_path: Path) -> None:
    """It repeats itself, and a second of it takes minutes."""
    b = Builder()
    onnx.save(b.build(b.op("Relu", b.conv(b.input("x", (1, 8, 12, 12)), 8, 16, 3))), tmp_path / "m.onnx")
    began = time.monotonic()
    found = bench(tmp_path / "m.onnx", parse("model:x60"))
    (ours,) = found["contenders"]
    assert ours["blocks"] == 1 and found["peak"]["gflops"] == pytest.approx(25.6, rel=0.05)
    assert time.monotonic() - began < 200


@needs_qemu
def test_a_profile_says_where_the_cycles_went() -> None:
    made = program(loop(vset(32, 2), ["vfmacc.vf v0,fa0,v8", "vfdiv.vv v16,v24,v24"], rounds=50, copies=1))
    instrument = Instrument(read("x60"))
    found = instrument.profile(made)
    assert sum(cycles for _, cycles in found.values()) == pytest.approx(instrument.run(made).cycles, rel=0.05)
    hot = {cycles / times for times, cycles in found.values() if times >= 50}
    assert max(hot) > 50  # the division's unit is what the next round waits for
    assert min(hot) < 3


@needs_qemu
def test_what_the_last_region_did_stands_apart() -> None:
    report = run("x60", "MARK(1); for (volatile int i = 0; i < 100; i++) ; MARK(2); MARK(1); MARK(2);")
    (thread,) = report.threads
    assert thread["instructions"] > 100 > thread["last"]["instructions"]


@needs_qemu
def test_a_core_does_not_wait_for_the_clock_of_another() -> None:
    """What one core asked for late by its own clock, another one behind it finds in the shared cache at once."""
    head = """
#include <pthread.h>
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static float shared[16384] __attribute__((aligned(4096)));
static void touch(void) { for (int i = 0; i < 16384; i += 16) *(volatile float *)(shared + i); }
static void *behind(void *x) { pthread_mutex_lock(&turn); MARK(1); touch(); MARK(2); return x; }
"""
    body = """
        pthread_t other;
        pthread_mutex_lock(&turn);
        pthread_create(&other, 0, behind, 0);
        MARK(1);
        for (volatile int i = 0; i < 1000000; i++) ;
        touch();
        MARK(2);
        pthread_mutex_unlock(&turn);
        pthread_join(other, 0);
    """
    report = Instrument(read("x60"), cores=2).run(program(body, head))
    assert report.outcome.ok, report.outcome.describe()
    late, early = sorted((t["regions"][0] for t in report.threads), reverse=True)
    assert late > 2_000_000 and early < 250_000, (late, early)  # 1024 lines


@needs_qemu
@pytest.mark.parametrize(("apart", "read_mb"), [(False, 2), (True, 4)])
def test_cores_keep_pace_in_the_cache_and_share_what_the_memory_gives(apart: bool, read_mb: int) -> None:
    """Two cores that read the same 2 MB, four times what the second cache holds, read it once; the memory gives them
    together a line in 14 cycles."""
    head = f"""
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
static atomic_int here;
static char shared[2][1 << 21] __attribute__((aligned(4096)));
static void *reader(void *x) {{
    const char *at = shared[{int(apart)} * (x != 0)];
    MARK(4); atomic_fetch_add(&here, 1); while (here < 2) sched_yield(); MARK(5);
    MARK(1); for (int i = 0; i < 1 << 21; i += 64) *(volatile const char *)(at + i); MARK(2); return x;
}}
"""
    body = """
        pthread_t other;
        memset(shared, 1, sizeof shared);
        pthread_create(&other, 0, reader, shared);
        reader(0);
        pthread_join(other, 0);
    """
    report = Instrument(read("x60"), cores=2).run(program(body, head))
    assert report.outcome.ok, report.outcome.describe()
    assert report.memory()["read_bytes"] == pytest.approx(read_mb << 20, rel=0.05)
    assert 0.98 < report.regions[0] / (14 * (read_mb << 20) / 64) < 1.25


@needs_qemu
@pytest.mark.parametrize(
    ("lines", "published"),
    [
        # bytes a cycle of 12 KB in L1, rvv-bench memset and memcpy on a BPI-F3
        (["vse8.v v0,(%0)"], {1: 5.25, 8: 13.0}),
        (["vle8.v v0,(%1)", "vse8.v v0,(%0)"], {1: 3.95, 4: 5.09, 8: 5.16}),
    ],
)
def test_copy_and_fill_come_near_to_what_was_measured(lines: list[str], published: dict[int, float]) -> None:
    for lmul, expected in published.items():
        block = "\\n".join(lines)
        body = f"""char *d = aligned_alloc(4096, 16384), *s = aligned_alloc(4096, 16384);
        memset(d, 1, 16384), memset(s, 1, 16384);
        for (int r = 0; r < 2; r++) {{ char *x = d, *y = s; long n = 12288; MARK(1);
        __asm__ volatile("1: vsetvli t1,%2,e8,m{lmul},ta,ma\\n{block}\\n"
            "add %1,%1,t1\\nsub %2,%2,t1\\nadd %0,%0,t1\\nbnez %2,1b"
            : "+r"(x), "+r"(y), "+r"(n) :: "t1", "memory"); MARK(2); }}"""
        assert 12288 / run("x60", body).regions[1] == pytest.approx(expected, rel=0.2)


@needs_qemu
def test_a_programs_alarm_waits_for_the_emulation() -> None:
    body = """alarm(1); struct timespec t = {0, 1500000000 % 1000000000}; nanosleep(&t, 0); t.tv_sec = 1, t.tv_nsec = 0;
    nanosleep(&t, 0); puts("alive");"""
    assert run("x60", body, "#include <unistd.h>\n").outcome.stdout == "alive\n"
