"""The ssh target on this machine behind a stand-in for the client: files, programs, and everything that breaks."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from colonnade import targets
from colonnade.build.toolchain import Toolchain
from colonnade.errors import TargetError, UserError
from colonnade.targets import Ssh, probe
from colonnade.targets.base import Machine

SOURCE = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words)
{
    if (count > 1 && !strcmp(words[1], "crash")) abort();
    if (count > 1 && !strcmp(words[1], "hang"))
        for (printf("%d\n", (int)getpid()), fflush(stdout);;) sleep(1);
    if (count > 1 && !strcmp(words[1], "cores")) {
        cpu_set_t set;
        sched_getaffinity(0, sizeof set, &set);
        return printf("%d %d\n", CPU_COUNT(&set), CPU_ISSET(0, &set)) < 0;
    }
    for (int i = 1; i < count; i++) printf("[%s]\n", words[i]);
    FILE *in = fopen("in put", "rb"), *out = fopen("out put", "wb");
    for (int c; in && (c = fgetc(in)) != EOF;) fputc(c + 1, out);
    fclose(out);
    printf("\nno newline at the end");
    fprintf(stderr, "a warning\n");
    return count > 1 ? atoi(words[1]) : 0;
}
"""


@pytest.fixture(scope="module")
def program() -> Path:
    return Toolchain().compile({"program.c": SOURCE}, "program", "x86_64")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("home", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FAKE_BOARD", str(tmp_path))
    fake = Path(__file__).with_name("fake_ssh.py")
    monkeypatch.setenv("COLONNADE_SSH", f"{shlex.quote(sys.executable)} {shlex.quote(str(fake))}")
    monkeypatch.delenv("COLONNADE_BOARD_DIR", raising=False)
    return tmp_path


@pytest.fixture
def ssh(board: Path):  # type: ignore[no-untyped-def]
    made = Ssh.parse("ssh://me@board:2200")
    yield made
    made.close()


def folder(board: Path) -> Path:
    return board / "home" / ".cache" / "colonnade" / "board"


def tool(board: Path, name: str, body: str) -> None:
    path = board / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ssh://board", ("board", "", 0)),
        ("ssh://user@10.0.0.7:2222", ("10.0.0.7", "user", 2222)),
        ("ssh://root@[fe80::1%eth0]:22", ("fe80::1%eth0", "root", 22)),
        ("ssh://my-board.local/", ("my-board.local", "", 0)),
    ],
)
def test_forms(text: str, parts: tuple[str, str, int]) -> None:
    found = targets.parse(text)
    assert isinstance(found, Ssh) and (found.host, found.user, found.port) == parts
    assert Ssh.parse(found.name).name == found.name


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://a b",
        "ssh://a@-b",
        "ssh://h:0",
        "ssh://h:99999",
        "ssh://h;id",
        "ssh://$x",
    ],
)
def test_no_other_forms(text: str) -> None:
    with pytest.raises(UserError, match="expected ssh://"):
        targets.parse(text)


def test_options_leave_nothing_to_chance(ssh: Ssh, board: Path) -> None:
    ssh.probe()
    for line in (board / "log").read_text().splitlines():
        options = line.partition(" | ")[0]
        assert "BatchMode=yes" in options and "StrictHostKeyChecking=yes" in options and "-p 2200 -l me" in options
        assert "StrictHostKeyChecking=no" not in options and "accept-new" not in options
        assert "ForwardAgent=no" in options and "ServerAliveInterval" in options


@pytest.mark.parametrize("greeting", ["Welcome", "Welcome\n\nto the board\n"])
def test_what_a_login_shell_says_is_not_the_programs(ssh: Ssh, board: Path, program: Path, greeting: str) -> None:
    """sshd's shell reads ~/.bashrc for commands too."""
    alone = ssh.run(program, ["cores"])
    (board / "greet").write_text(greeting)
    lines: list[str] = []
    greeted = ssh.run(program, ["cores"], on_line=lines.append)
    assert greeted.ok and greeted.stdout == alone.stdout and lines == alone.stdout.splitlines()


def test_verbs_on_a_board_that_greets(board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx
    from models import Builder

    from colonnade.cli import run_verb

    (board / "greet").write_text("Welcome\n\nto the board\n")
    made = Builder()
    onnx.save(made.build(made.conv(made.input("x", (1, 3, 8, 8)), 3, 8, 3)), tmp_path / "m.onnx")
    common = ["--target", "ssh://board", "--threads", "1", "--db", str(tmp_path / "db")]
    assert run_verb(["tune", str(tmp_path / "m.onnx"), *common, "--budget", "1s"]) == 0, capsys.readouterr().err
    assert run_verb(["bench", str(tmp_path / "m.onnx"), *common, "--blocks", "1"]) == 0, capsys.readouterr().err


def test_probe_of_a_machine_without_riscv(ssh: Ssh) -> None:
    local = targets.Local().probe()
    found = ssh.probe()
    assert (found.arch, found.cores, found.clusters, found.caches) == (
        local.arch, local.cores, local.clusters, local.caches,
    )  # fmt: skip
    assert found.isas == local.isas and found.memory == local.memory


def test_files_words_lines_and_results(ssh: Ssh, board: Path, program: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))
    words = ["3", "it's", '$HOME `id` "x" \\', "", "*", "new\nline", "-n", "ä"]
    lines: list[str] = []
    outcome = ssh.run(program, words, {"in put": b"abc", "big": big}, ["out put", "nothing"], on_line=lines.append)
    wanted = "".join(f"[{word}]\n" for word in words) + "\nno newline at the end"
    assert (outcome.code, outcome.signal, outcome.stdout) == (3, 0, wanted)
    assert lines[:3] == ["[3]", "[it's]", '[$HOME `id` "x" \\]'] and outcome.stderr == "a warning"
    assert outcome.files == {"out put": b"bcd"} and list((folder(board) / "runs").iterdir()) == []


def test_files_go_once(ssh: Ssh, board: Path, program: Path) -> None:
    def pushes() -> int:
        return (board / "log").read_text().count("tar -xf -")

    ssh.run(program, [], {"in put": b"abc"})
    before = pushes()
    ssh.run(program, [], {"in put": b"abc"})
    other = Ssh.parse(ssh.name)
    other.run(program, [], {"in put": b"abc", "again": b"abc"})
    assert pushes() == before
    other.run(program, [], {"in put": b"abcd"})
    assert pushes() == before + 1
    other.close()


def test_a_cleared_cache_is_filled_again(ssh: Ssh, board: Path, program: Path) -> None:
    ssh.run(program, [], {"in put": b"abc"})
    for file in (folder(board) / "objects").iterdir():
        file.unlink()
    assert ssh.run(program, [], {"in put": b"abc"}, ["out put"]).files == {"out put": b"bcd"}


def test_crash_and_hang_are_data(ssh: Ssh, program: Path) -> None:
    crashed = ssh.run(program, ["crash"])
    assert (crashed.signal, crashed.ok) == (6, False)
    started = time.monotonic()
    hung = ssh.run(program, ["hang"], timeout=1.0)
    assert hung.timed_out and time.monotonic() - started < 10 and gone(int(hung.stdout))


def test_a_lost_connection_ends_the_program_and_can_be_taken_up(ssh: Ssh, board: Path, program: Path) -> None:
    ssh.run(program)
    (board / "cut").write_text("2")
    lines: list[str] = []
    with pytest.raises(TargetError, match=r"the connection was lost.*Broken pipe.*run it again"):
        ssh.run(program, ["hang"], on_line=lines.append)
    assert gone(int(lines[0]))
    (board / "cut").unlink()
    assert ssh.run(program, [], {"in put": b"abc"}, ["out put"]).files == {"out put": b"bcd"}
    assert list((folder(board) / "runs").iterdir()) == []


def test_our_own_end_ends_the_program(ssh: Ssh, program: Path) -> None:
    seen: list[int] = []

    def stop(line: str) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ssh.run(program, ["hang"], on_line=stop)
    assert gone(seen[0])


def test_a_killed_client_leaves_nothing_running(board: Path, program: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from colonnade import targets\n"
        "targets.parse('ssh://board').run(Path(sys.argv[1]), ['hang'], on_line=lambda l: print(l, flush=True))"
    )
    client = subprocess.Popen([sys.executable, "-c", script, str(program)], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.kill()
    client.wait()
    client.stdout.close()
    assert gone(pid)


def test_what_a_reboot_left_is_cleared_and_orphans_are_ended(ssh: Ssh, board: Path, program: Path) -> None:
    ssh.run(program)
    ssh.close()
    runs = folder(board) / "runs"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    client = ssh._client
    owners = {
        f"{client}-{dead.stdout.strip()}-aa": f"{sleepers[0].pid} {boot}",  # its client is no more
        f"0123456789-{dead.stdout.strip()}-bb": f"{sleepers[1].pid} {boot}",  # another machine's: not ours to judge
        f"{client}-1-cc": f"{os.getpid()} another-boot",
        f"{client}-1-dd": "",
        f"{client}-1-ee": f"{os.getpid()} another-boot another-board",  # which shares the folder
        f"{client}-1-ff": f"{os.getpid()} another-boot another-board",
    }
    for name, owner in owners.items():
        (runs / name).mkdir()
        (runs / name / ".shell").write_text(owner + "\n")
    days_ago = time.time() - 5 * 86400
    os.utime(runs / f"{client}-1-ff", (days_ago, days_ago))
    again = Ssh.parse("ssh://board")
    assert again.run(program).code == 0
    again.close()
    assert sorted(path.name[-2:] for path in runs.iterdir()) == ["bb", "ee"]
    assert sleepers[0].wait(5) != 0 and sleepers[1].poll() is None
    sleepers[1].kill()
    sleepers[1].wait()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("df", "echo Filesystem; echo /dev/x 1000 990 10 99% /"),
        ("tar", 'case $1 in -xf) cat >/dev/null; echo "tar: x: No space left on device" >&2; exit 2 ;; esac'),
    ],
)
def test_a_full_disk(ssh: Ssh, board: Path, program: Path, name: str, body: str) -> None:
    tool(board, name, body)
    with pytest.raises(TargetError, match=r"the disk there is full.*COLONNADE_BOARD_DIR"):
        ssh.run(program)
    assert list((folder(board) / "runs").iterdir()) == [] and list((folder(board) / "objects").iterdir()) == []
    (board / "bin" / name).unlink()
    assert ssh.run(program).code == 0


def test_a_transfer_cut_short_leaves_nothing(ssh: Ssh, board: Path, program: Path) -> None:
    ssh.probe()
    tool(board, "tar", 'head -c 100000 | exec /usr/bin/env -i PATH="/usr/bin:/bin" tar "$@"')
    with pytest.raises(TargetError, match="files could not be written"):
        ssh.run(program, [], {"big": bytes(1 << 20)})
    (board / "bin" / "tar").unlink()
    assert list((folder(board) / "runs").iterdir()) == []
    assert ssh.run(program, [], {"big": bytes(1 << 20)}).code == 0


def test_a_board_that_never_answers(ssh: Ssh, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.ssh, "ANSWER_S", 1.0)
    tool(board, "uname", "exec sleep 30")
    with pytest.raises(TargetError, match="cannot connect: no answer in time"):
        ssh.probe()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("Host key verification failed.", "host key is not known yet.*ssh -p 2200 me@board"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            r"ssh-keygen -R '\[board\]:2200'",
        ),
        ("me@board: Permission denied (publickey).", "no key of yours is accepted.*ssh-copy-id"),
        ("ssh: connect to host board port 2200: Connection refused", "cannot connect .*Connection refused"),
    ],
)
def test_refusals_in_one_line(ssh: Ssh, board: Path, said: str, match: str) -> None:
    (board / "say").write_text(said)
    with pytest.raises(TargetError, match=match) as caught:
        ssh.probe()
    assert "\n" not in str(caught.value)


def test_places(ssh: Ssh, board: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLONNADE_BOARD_DIR", "/proc/nowhere")
    with pytest.raises(TargetError, match=r"no folder can be written to.*COLONNADE_BOARD_DIR"):
        ssh.probe()
    monkeypatch.setenv("COLONNADE_BOARD_DIR", str(tmp_path / "a 'folder' $x"))
    assert ssh.run(program, [], {"in put": b"a"}, ["out put"]).files == {"out put": b"b"}
    assert (tmp_path / "a 'folder' $x" / "objects").is_dir() and not folder(board).exists()


def test_no_tar_and_strange_machines(ssh: Ssh, board: Path) -> None:
    tool(board, "uname", "echo sparc64")
    with pytest.raises(TargetError, match=r"is sparc64; Colonnade builds for x86_64, riscv64"):
        ssh.probe()


def test_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLONNADE_SSH", "there-is-no-such-client")
    with pytest.raises(TargetError, match="apt-get install openssh-client"):
        Ssh.parse("ssh://board").probe()


# ---- what the agent tells about vectors ----

CPUINFO = b"processor : 0\nisa : rv64imafdcv\nmmu : sv39\nmvendorid : 0x710\nmarchid : 0x8000000058000001\n"


def told(vlenb: str, vsetvli: str, hwprobe: str = "", cpuinfo: bytes = CPUINFO) -> bytes:
    head = f"hwcap 20112d\nvlenb {vlenb}\nvsetvli {vsetvli}\n{hwprobe}file {len(cpuinfo)} /proc/cpuinfo\n"
    return head.encode() + cpuinfo + b"cpus 0 1 2 3\n"


def test_vectors_of_version_one() -> None:
    found = probe.facts(told("32", "8 d0", "hwprobe0 710\nhwprobe4 7\n"))
    assert probe.vector_refusal(found) == probe.vector_refusal(probe.facts(told("128", "32 d0"))) == ""
    machine = probe.machine(found, "riscv64")
    assert (machine.vlenb, machine.cores, machine.isas[0].name) == (32, 4, "rvv") and machine.isa_text == "rv64imafdcv"


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (told("none", "none", cpuinfo=CPUINFO.replace(b"dcv", b"dc")).replace(b"20112d", b"112d"), "no vector unit"),
        (told("none", "none"), "the kernel does not let programs use them"),
        # C906 and C910 say v, have a vlenb, and answer vill
        (told("16", "0 8000000000000000", "hwprobe0 5b7\n"), r"0\.7\.1, XTheadVector\) \(a T-Head core\)"),
        (told("16", "4 d0", "hwprobe0 5b7\nhwprobe4 3\n"), "the kernel says that the vectors"),
        (told("16", "8 d0"), r"0\.7\.1"),
        (told("256", "64 d0"), "vectors of 2048 bits: memory is laid out for up to 1024"),
    ],
)
def test_other_vectors_are_refused(output: bytes, match: str) -> None:
    import re

    assert re.search(match, probe.vector_refusal(probe.facts(output)))


# ---- threads and cores ----


@pytest.fixture
def k1(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Ssh]:
    machine = Machine("riscv64", "x60", frozenset("v"), 8, clusters=((0, 1, 2, 3), (4, 5, 6, 7)), vlenb=32)

    def make() -> Ssh:
        board = Ssh.parse("ssh://k1")
        board._machine = machine
        return board

    return make


def test_a_board_takes_one_cluster(k1: Callable[[], Ssh]) -> None:
    board, threads = targets.settle(k1())
    assert threads == 4 and isinstance(board, Ssh) and board.cpus == (0, 1, 2, 3) and board.probe().cpus == ()
    board, threads = targets.settle(k1(), 6)
    assert threads == 6 and isinstance(board, Ssh) and board.cpus == tuple(range(8))
    board, threads = targets.settle(k1(), None, "4-6")
    assert threads == 3 and board.probe().cpus == (4, 5, 6) and "cpus=4,5,6" in board.probe().key()


@pytest.mark.parametrize("cpus", ["8", "x", "", "3-1", "-1"])
def test_cores_that_are_not_there(k1: Callable[[], Ssh], cpus: str) -> None:
    with pytest.raises(UserError, match=r"expected some of the cores 0,1,2"):
        targets.settle(k1(), None, cpus)


def test_more_threads_than_cores(k1: Callable[[], Ssh]) -> None:
    with pytest.raises(UserError, match="more than the 2 cores"):
        targets.settle(k1(), 3, "0-1")


def test_programs_stay_on_their_cores(ssh: Ssh, program: Path) -> None:
    first = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    for target in (targets.Local(), ssh):
        pinned, threads = targets.settle(target, None, str(first))
        outcome = pinned.run(program, ["cores"])
        assert threads == 1 and outcome.stdout.split()[0] == "1", outcome
    assert os.sched_getaffinity(0) == before


def test_elsewhere_one_thread() -> None:
    assert targets.settle(targets.Local()) == (targets.Local(), 1)
    with pytest.raises(UserError, match="no cores of its own"):
        targets.settle(targets.parse("qemu"), None, "0")


# ---- the board's own runtimes beside ours ----


def test_bench_beside_the_boards_own_runtime(
    board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import onnx
    from test_build_model import small_model

    from colonnade.cli import run_verb

    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "small.onnx")
    tool(board, "python3", f'exec {shlex.quote(sys.executable)} "$@"')
    words = ["bench", str(tmp_path / "small.onnx"), "--target", "ssh://board", "--threads", "1", "--blocks", "1"]
    words += ["--db", str(tmp_path / "db"), "--json", str(tmp_path / "out.json"), "--vs", "onnxruntime"]
    assert run_verb(words) == 0, capsys.readouterr().err
    record = json.dumps(json.loads((tmp_path / "out.json").read_text()))
    assert "onnxruntime" in record and "onnxruntime" in capsys.readouterr().out
    tool(board, "python3", f'exec {shlex.quote(sys.executable)} -S "$@"')  # without packages, as a bare board
    assert run_verb(words) == 2
    assert "not installed on the board" in capsys.readouterr().err
    (board / "bin" / "python3").unlink()
    assert run_verb([*words[:-1], "openvino"]) == 2
    assert "not to be had on a board" in capsys.readouterr().err
