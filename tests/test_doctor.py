"""`colonnade doctor`: complete here, and one line with a remedy for each thing that is taken away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from colonnade import cli_doctor
from colonnade.cli import run_verb


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {" ".join(line[9:23].split()): line for line in capsys.readouterr().out.splitlines()[:-1]}


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["doctor"]) == 0
    lines = said(capsys)
    for name in ("Python", "machine", "compiler", "cache folder", "tuning records", "temporary"):
        assert lines[name].startswith("ok"), lines[name]


def test_tools_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("qemu-riscv64", "ssh") else which(name))
    assert run_verb(["doctor"]) == 0  # boards and emulation are not for everybody
    lines = said(capsys)
    assert "install qemu-user" in lines["qemu"] and "--target qemu" in lines["qemu"]
    assert "install openssh-client" in lines["ssh"]


@pytest.mark.parametrize(("version", "state"), [("7.1.0", "without"), ("7.2.17", "ok"), ("10.0.2", "ok")])
def test_an_old_emulator(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(cli_doctor, "_answer", lambda *_: f"qemu-riscv64 version {version} (Debian)")
    assert [check.state for check in cli_doctor.qemu()] == [state]


def test_a_broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from colonnade.build.toolchain import Toolchain

    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path))
    monkeypatch.setattr(Toolchain, "command", property(lambda _: ("false",)))
    assert run_verb(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "not ready: compiler" and any(line.startswith("missing  compiler") for line in lines)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 << 20))
    assert run_verb(["doctor"]) == 1
    assert "5 MB free" in (line := said(capsys)["cache folder"]) and "COLONNADE_CACHE" in line


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli_doctor.EXTRAS, "bench", ("other runtimes", ("there_is_no_such_module",)))
    lines = {check.name: check.line() for check in cli_doctor.extras()}
    assert lines["bench"].startswith("without") and "pip install 'colonnade[bench]'" in lines["bench"]


@pytest.mark.parametrize(
    ("script", "mode", "found"),
    [
        (None, 0, "{} is no program that can be executed"),
        ("exit 0", 0o644, "{} is no program that can be executed"),
        ("exit 1", 0o755, "{} does not answer as QEMU does"),
        ("cat; echo hello 9.1", 0o755, "{} does not answer as QEMU does"),
        ("echo qemu-riscv64 version 7.1.0", 0o755, "qemu-riscv64 version 7.1.0"),
    ],
)
def test_the_emulator_that_is_named(monkeypatch, tmp_path, script, mode, found):
    """COLONNADE_QEMU decides which one is looked at, and what to do."""
    path = tmp_path / "emulator"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
    monkeypatch.setenv("COLONNADE_QEMU", str(path))
    (check,) = cli_doctor.qemu()
    assert (check.state, check.found) == ("without", found.format(f"COLONNADE_QEMU={path}"))
    assert check.remedy.endswith("unset COLONNADE_QEMU, or name an emulator by it") and "\n" not in check.line()


def test_no_emulator_is_named(monkeypatch):
    """An empty name is none."""
    monkeypatch.setenv("COLONNADE_QEMU", "")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (check,) = cli_doctor.qemu()
    assert check.found == "no qemu-riscv64" and "install qemu-user" in check.remedy
