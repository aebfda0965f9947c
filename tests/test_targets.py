"""Targets: what a probe reads, how programs end, what they bring back."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from colonnade import targets
from colonnade.errors import TargetError, UserError
from colonnade.kernels.isa import isa
from colonnade.targets import probe
from colonnade.targets.peak import measure_peak

K1 = """processor\t: 0
hart\t\t: 0
model name\t: Spacemit(R) X60
isa\t\t: rv64imafdcv_zicbom_zicboz_zfh_zvfh_zvkt
mmu\t\t: sv39
uarch\t\t: spacemit,x60
"""


@pytest.fixture
def script(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(body: str) -> Path:
        path = tmp_path / "program"
        path.write_text(f"#!{sys.executable}\n{body}")
        path.chmod(0o755)
        return path

    return make


def test_parse_names_the_forms() -> None:
    assert targets.parse("local").name == "local"
    with pytest.raises(UserError, match=r"unknown target 'cray'.*local"):
        targets.parse("cray")


def test_probe_of_this_machine() -> None:
    machine = targets.parse("local").probe()
    assert machine.cores == len(os.sched_getaffinity(0))
    own = [isa.name for isa in machine.isas if not isa.emulates]
    assert own[-1] == "portable" and machine.memory > machine.memory_free > 0
    assert sorted(c for cluster in machine.clusters for c in cluster) == sorted(os.sched_getaffinity(0))
    assert machine.pick_isa("portable").name == "portable"
    with pytest.raises(UserError, match="cannot run ISA 'rvv9'"):
        machine.pick_isa("rvv9")


def test_probe_of_a_board_with_two_clusters() -> None:
    files = {"/proc/cpuinfo": K1, "/proc/meminfo": "MemTotal:  4000 kB\nMemAvailable: 3000 kB\n"}
    for cpu in range(8):
        cluster = "0-3" if cpu < 4 else "4-7"
        rows = [
            ("1", "Data", "32K", str(cpu)),
            ("1", "Instruction", "32K", str(cpu)),
            ("2", "Unified", "512K", cluster),
        ]
        for index, (level, kind, size, shared) in enumerate(rows):
            base = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {f"{base}/level": level, f"{base}/type": kind, f"{base}/size": size}
            files |= {f"{base}/coherency_line_size": "64", f"{base}/shared_cpu_list": shared}
    machine = probe.parse(files, "riscv64", tuple(range(8)), vlenb=32)
    assert machine.clusters == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert {"v", "zvfh", "zicbom"} <= machine.flags and "spacemit,x60" in machine.cpu
    assert (machine.cache(1), machine.cache(2), machine.cache(3)) == (32768, 524288, 0)
    assert machine.memory_free == 3000 * 1024


def test_key_ignores_what_changes() -> None:
    files = {"/proc/cpuinfo": K1, "/proc/meminfo": "MemTotal:  4000 kB\nMemAvailable: 3000 kB\n"}
    busy = files | {"/proc/meminfo": "MemTotal:  4000 kB\nMemAvailable: 10 kB\n"}
    one, two = (probe.parse(f, "riscv64", (0, 1), 32) for f in (files, busy))
    assert one.key() == two.key() != probe.parse(files, "riscv64", (0, 1), 16).key()


def test_files_lines_and_output_come_back(script) -> None:  # type: ignore[no-untyped-def]
    program = script(
        "import sys; open('y', 'wb').write(open('x', 'rb').read() * 2); print('one'); print('two', sys.argv[1])"
    )
    lines: list[str] = []
    outcome = targets.Local().run(program, ["arg"], {"x": b"ab"}, ["y", "missing"], on_line=lines.append)
    assert outcome.ok and outcome.files == {"y": b"abab"} and lines == ["one", "two arg"]


def test_a_limit_of_months_is_one_as_well(script) -> None:  # type: ignore[no-untyped-def]
    """A wait of the system takes milliseconds as an int; an emulated job may be given more."""
    assert targets.Local().run(script("import sys"), timeout=1e8).ok


def test_failures_are_data(script) -> None:  # type: ignore[no-untyped-def]
    local = targets.Local()
    failed = local.run(script("import sys; sys.exit('no such layer')"))
    assert (failed.code, failed.ok, failed.describe()) == (1, False, "exit code 1: no such layer")
    killed = local.run(script("import os; os.kill(os.getpid(), 11)"))
    assert killed.signal == 11 and "signal 11" in killed.describe()


def test_a_hang_ends_with_all_its_children(script) -> None:  # type: ignore[no-untyped-def]
    program = script("import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\nwhile True: pass")
    started = time.monotonic()
    outcome = targets.Local().run(program, timeout=1.0)
    assert outcome.timed_out and not outcome.ok and time.monotonic() - started < 10
    deadline = time.monotonic() + 5
    child = Path(f"/proc/{outcome.stdout.strip()}/stat")
    while time.monotonic() < deadline and child.exists() and child.read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot start"):
        targets.Local().run(tmp_path / "nothing")


def test_peak_is_plausible() -> None:
    local = targets.Local()
    name = local.probe().isas[0].name
    best = measure_peak(local, isa(name), milliseconds=30)
    plain = measure_peak(local, isa("portable"), milliseconds=30, memory=False)
    assert 0.1 < plain.gflops <= best.gflops * 1.1 and best.gbps > 0.1 and plain.gbps == 0
    assert best.pace > 0.1 and plain.pace > 0.1 and best.handover == 0
    assert measure_peak(local, isa(name), 3, milliseconds=5, memory=False).handover > 0.01
