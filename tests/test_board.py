"""The emulated board (`make board-emulator`): Debian riscv64 under QEMU, behind a real ssh server."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from models import onnxruntime_outputs
from test_build_model import small_model

import colonnade as cn
from colonnade import targets
from colonnade.build.toolchain import Toolchain
from colonnade.cli import run_verb
from colonnade.errors import TargetError

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "board_emulator.sh"
FOLDER = Path(os.environ.get("COLONNADE_BOARD", Path.home() / ".cache" / "colonnade-board"))
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
NO_VECTORS = "rv64,v=false"


def started(name: str, *cpu: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([str(SCRIPT), "start", name, str(port), *cpu], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return f"ssh://{name}"


@pytest.fixture(scope="module")
def boards() -> Iterator[Callable[..., str]]:
    """Starts boards by name; they are stopped in the end."""
    if os.getuid() != 0 or not (FOLDER / "complete").exists():
        pytest.skip("the emulated board is not here: make board-emulator (as root)")
    names: list[str] = []

    def start(kind: str, *cpu: str) -> str:
        names.append(f"{kind}-{WORKER}-{os.getpid()}")
        return started(names[-1], *cpu)

    before = os.environ.get("COLONNADE_SSH")
    os.environ["COLONNADE_SSH"] = f"ssh -F {shlex.quote(str(FOLDER / 'ssh_config'))}"
    yield start
    for name in names:
        subprocess.run([str(SCRIPT), "stop", name], check=True)
    if before is None:
        del os.environ["COLONNADE_SSH"]
    else:
        os.environ["COLONNADE_SSH"] = before


@pytest.fixture(scope="module")
def board(boards: Callable[..., str]) -> str:
    return boards("v256")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(small_model(), path)
    return path


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten different convolutions: a long tuning, so that whatever happens in mid-tuning happens there."""
    rng = np.random.default_rng(3)
    widths = [3, *range(8, 68, 6)]
    constants, nodes = [], []
    for index, (reads, writes) in enumerate(itertools.pairwise(widths)):
        weights = rng.standard_normal((writes, reads, 3, 3)).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(weights, f"w{index}"))
        names = [f"x{index}", f"w{index}"], [f"x{index + 1}"]
        nodes.append(onnx.helper.make_node("Conv", *names, pads=[1, 1, 1, 1]))
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width, 14, 14])
        for name, width in (("x0", widths[0]), (f"x{len(nodes)}", widths[-1]))
    ]
    graph = onnx.helper.make_graph(nodes, "many_layers", ports[:1], ports[1:], constants)
    path = tmp_path_factory.mktemp("model") / "many_layers.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def photo() -> npt.NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal((1, 3, 17, 23), dtype=np.float32)


def shell(board: str, command: str, data: bytes = b"") -> bytes:
    """What a user does by hand: ssh BOARD COMMAND."""
    words = [*shlex.split(os.environ["COLONNADE_SSH"]), board.removeprefix("ssh://"), command]
    return subprocess.run(words, input=data, capture_output=True, check=True).stdout


def test_probe(board: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["probe", board]) == 0
    said = capsys.readouterr().out
    assert "riscv64" in said and "rvv, portable; vlenb 32 (256 bits)" in said and "emulated" in said


@pytest.mark.parametrize(("bits", "vlenb"), [(128, 16), (1024, 128)])
def test_other_vector_lengths(boards: Callable[..., str], bits: int, vlenb: int) -> None:
    name = boards(f"v{bits}", f"rv64,v=true,vlen={bits},vext_spec=v1.0")
    assert targets.parse(name).probe().vlenb == vlenb


def test_a_board_without_vectors_is_refused_before_anything_is_run(
    boards: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = boards("scalar", NO_VECTORS)
    for words in (["probe", name], ["tune", str(model), "--target", name, "--db", str(tmp_path / "db")]):
        assert run_verb(words) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in said if line.startswith("error: ")]) == 1 and "no vector unit" in said[-1]
    assert not (tmp_path / "db").exists()


def test_an_unknown_host_key_is_never_accepted(board: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    known = tmp_path / "known_hosts"
    text = (FOLDER / "ssh_config").read_text().replace(str(FOLDER / "known_hosts"), str(known))
    config.write_text(text.replace("  HostName", "  StrictHostKeyChecking accept-new\n  HostName"))
    monkeypatch.setenv("COLONNADE_SSH", f"ssh -F {config}")
    with pytest.raises(TargetError, match="host key is not known yet"):
        targets.parse(board).probe()
    assert not known.exists()
    stranger = " ".join((FOLDER / "key.pub").read_text().split()[:2])
    port = text.partition(f"Host {board.removeprefix('ssh://')}\n")[2].partition("Port ")[2].split()[0]
    known.write_text(f"[127.0.0.1]:{port} {stranger}\n")
    with pytest.raises(TargetError, match="host key has changed"):
        targets.parse(board).probe()


def test_tune_run_and_the_same_bits_three_ways(
    board: str, model: Path, photo: npt.NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned there, then: the static program by `run --target`, by hand, and session.py under the board's own Python."""
    db = tmp_path / "tuning.db"
    assert run_verb(["tune", str(model), "--target", board, "--db", str(db), "--budget", "15s"]) == 0
    with sqlite3.connect(db) as records:
        rows = records.execute("select outcome, isa, threads, machine from measurement").fetchall()
    cores = len(os.sched_getaffinity(0))
    assert rows and {row[:3] for row in rows} == {("ok", "rvv", cores)} and all("emulated" in row[3] for row in rows)
    bundle = cn.build(model, board, out=tmp_path / "bundle", db=db)
    assert bundle.manifest["arch"] == "riscv64" and bundle.manifest["threads"] == cores
    np.save(tmp_path / "x.npy", photo)
    words = ["run", str(bundle.path), "--input", str(tmp_path / "x.npy"), "--target", board]
    assert run_verb([*words, "-o", str(tmp_path / "y.npy")]) == 0
    answer = np.load(tmp_path / "y.npy")
    wanted = next(iter(onnxruntime_outputs(onnx.load(model), {"photo": photo}).values()))
    assert np.abs(answer - wanted).max() <= 1e-4 * np.abs(wanted).max()

    tar = subprocess.run(["tar", "-C", str(bundle.path), "-cf", "-", "."], capture_output=True, check=True).stdout
    shell(board, "rm -rf small && mkdir small && tar -xf - -C small", tar)
    shell(board, "cat >small/x.npy", (tmp_path / "x.npy").read_bytes())
    static = shell(board, "cd small && ./run -i x.npy -o static.npy && cat static.npy")
    python = (
        "import numpy as np; from session import Session; s = Session(); "
        "np.save('python.npy', s.run({'photo': np.load('x.npy')})['scores'])"
    )
    dynamic = shell(board, f"cd small && python3 -c {shlex.quote(python)} && cat python.npy")
    for name, content in {"static": static, "dynamic": dynamic}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        assert np.load(tmp_path / f"{name}.npy").tobytes() == answer.tobytes(), name


def dropbears(name: str) -> list[int]:
    """Process numbers of the servers that hold the connections of board ``name``."""
    top = int((FOLDER / "run" / f"{name}.pid").read_text())
    family, found = [top], []
    while family:
        pid = family.pop()
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            continue
        family += map(int, children)
        found += map(int, children)
    return found


@pytest.mark.parametrize("how", ["killed", "stopped", "board"])
def test_a_connection_lost_in_mid_tuning_and_taken_up_again(
    how: str, boards: Callable[..., str], many_layers: Path, tmp_path: Path
) -> None:
    """The server's process is killed, or falls silent, or the whole board goes down: one line, all records kept."""
    name = boards(f"lost-{how}")
    alias = name.removeprefix("ssh://")
    db = tmp_path / "tuning.db"
    words = ["-m", "colonnade.cli", "tune", str(many_layers), "--target", name, "--threads", "1", "--db", str(db)]
    client = subprocess.Popen(
        [sys.executable, *words, "--budget", "200s"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def count() -> int:
        try:
            with sqlite3.connect(f"file:{db}?mode=ro", uri=True) as records:
                return int(records.execute("select count(*) from measurement").fetchone()[0])
        except sqlite3.Error:
            return 0

    deadline = time.monotonic() + 120
    while count() < 8 and time.monotonic() < deadline and client.poll() is None:
        time.sleep(0.05)
    kept = count()
    assert kept >= 8 and client.poll() is None, client.communicate()
    if how == "board":
        subprocess.run([str(SCRIPT), "stop", alias], check=True)
    else:
        kind = signal.SIGKILL if how == "killed" else signal.SIGSTOP
        top = int((FOLDER / "run" / f"{alias}.pid").read_text())
        first = Path(f"/proc/{top}/task/{top}/children").read_text().split()
        # a moment between two connections has nothing to lose: until the client has noticed, whatever comes is lost too
        while client.poll() is None and time.monotonic() < deadline:
            for pid in dropbears(alias):
                if str(pid) not in first:  # the listening server lives on
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, kind)
            time.sleep(0.2)
    out, err = client.communicate(timeout=120)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert client.returncode == 1 and len(said) == 1 and "run it again" in said[0], (out, err)
    assert count() >= kept
    if how == "board":
        # up again under the same name, but with another port: what is on its disk has stayed
        assert started(alias) == name
    elif how == "stopped":
        for pid in dropbears(alias):
            with contextlib.suppress(ProcessLookupError):  # its connection was given up: it may end meanwhile
                os.kill(pid, signal.SIGCONT)
    kept = count()
    again = subprocess.run([sys.executable, *words, "--budget", "12s"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert count() > kept and "measurements of" in again.stdout
    deadline = time.monotonic() + 30
    while left := shell(name, "ls .cache/colonnade/board/runs").split():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_full_disk_there(board: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Toolchain().compile({"main.c": "int main(void) { return 0; }"}, "program", "riscv64")
    monkeypatch.setenv("COLONNADE_BOARD_DIR", "/mnt/small/files")
    target = targets.parse(board)
    with pytest.raises(TargetError, match=r"the disk there is full.*/mnt/small/files"):
        target.run(program, [], {"big": bytes(8 << 20)})
    assert shell(board, "ls /mnt/small/files/runs") == b""
    assert target.run(program, [], {"small": bytes(1 << 10)}).ok


def test_crash_hang_and_the_right_end(board: str) -> None:
    source = "#include <stdlib.h>\n#include <unistd.h>\nint main(int c, char **v)"
    source += "{ if (c > 2) for (;;) sleep(1); if (c > 1) abort(); return v == 0; }"
    program = Toolchain().compile({"main.c": source}, "program", "riscv64")
    target = targets.parse(board)
    assert target.run(program).ok
    assert target.run(program, ["x"]).signal == 6
    assert target.run(program, ["x", "y"], timeout=1).timed_out
