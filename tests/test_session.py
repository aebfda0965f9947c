"""Bundles from Python: results, errors, threads, memory."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from plans import Array, affine_only, first_choices, network, reference

import colonnade as cn
from colonnade.bundle import Bundle, write_bundle
from colonnade.kernels.isa import Isa, isa
from colonnade.runtime.session import Session, SessionError
from colonnade.targets import Local

MACHINE = Local().probe()


def write(folder: Path, row: Isa, **options: int) -> Bundle:
    plan = network(**options)
    return write_bundle(plan, first_choices(plan, row), row, folder)


@pytest.fixture(scope="module", params=[row.name for row in MACHINE.isas])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("session") / "tiny", isa(request.param))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("session") / "portable", isa("portable"))


@pytest.fixture
def copied(portable: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(portable.path, tmp_path / "copy"))


def image(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((2, 3, 9, 11)).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_equals_the_definition_in_poisoned_memory(
    bundle: Bundle, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLONNADE_POISON", "1")
    with cn.Session(bundle.path, threads=threads) as session:
        for seed in range(3):
            got = session.run({"image": image(seed)})
            wanted = reference(network(), {"image": image(seed)})
            assert list(got) == ["maps", "scores"]
            for name, array in wanted.items():
                np.testing.assert_allclose(got[name], array, atol=1e-5)


def test_a_bundle_that_was_built_again_in_the_same_place(copied: Path) -> None:
    """As in a notebook: the loader must not answer with the library of before."""
    with Session(copied) as session:
        session.run({"image": image()})
    shutil.rmtree(copied)
    write(copied, isa("portable"), width=12)
    for _ in range(2):
        with Session(copied) as session:
            wanted = np.zeros((2, 3, 9, 12), np.float32)
            got = session.run({"image": wanted})
            for name, array in reference(network(width=12), {"image": wanted}).items():
                np.testing.assert_allclose(got[name], array, atol=1e-5)


def test_bit_equal_between_runs_sessions_and_thread_counts(bundle: Bundle) -> None:
    feeds = {"image": image()}
    results = []
    for threads in (1, 2, 3, 2):
        with Session(bundle.path, threads) as session:
            results += [session.run(feeds) for _ in range(5)]
    for result in results[1:]:
        for name, array in results[0].items():
            assert array.tobytes() == result[name].tobytes()


def test_the_isa_that_was_asked_for_runs(bundle: Bundle) -> None:
    with Session(bundle.path) as session:
        told = session.describe()
        assert told["isa"] == bundle.manifest["isa"]
        assert all(k.endswith(f"__{told['isa']}") for step in told["steps"] for k in step["kernels"])


def test_ports_and_profile(portable: Bundle) -> None:
    with Session(portable.path, threads=2) as session:
        (port,) = session.get_inputs()
        assert (port.name, port.shape, port.type) == ("image", (2, 3, 9, 11), "float32")
        assert [p.name for p in session.get_outputs()] == ["maps", "scores"]
        times = session.profile({"image": image()}, repeat=4)
        assert times.shape == (4, len(session.steps)) and times.dtype == np.uint64
        assert 0 < times.sum() < 10**10  # ns
        with pytest.raises(SessionError, match="repeat"):
            session.profile({"image": image()}, repeat=0)
        with pytest.raises(SessionError, match=r"repeat: 1\.5, expected a whole number"):
            session.profile({"image": image()}, repeat=1.5)  # type: ignore[arg-type]


def test_inputs_need_not_be_contiguous(portable: Bundle) -> None:
    x = image()
    strided = np.zeros((2, 3, 9, 22), np.float32)[..., ::2]
    strided[...] = x
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    with Session(portable.path) as session:
        wanted = session.run({"image": x})["maps"]
        for other in (strided, np.asfortranarray(x), unaligned):
            np.testing.assert_array_equal(session.run({"image": other})["maps"], wanted)


def test_mistakes_are_one_line(portable: Bundle) -> None:
    with Session(portable.path) as session:
        for feeds, words in [
            ({}, "input 'image' is missing"),
            ({"picture": image()}, "unknown input 'picture'; the model's inputs: image"),
            ({"image": image(), "b": image()}, "unknown input 'b'"),
            ({"image": image()[:1]}, r"shape \(1, 3, 9, 11\), expected \(2, 3, 9, 11\)"),
            ({"image": image().astype(np.float64)}, "type float64, expected float32"),
            ({"image": "x.npy"}, "type"),
            (image(), "inputs are ndarray: expected arrays by name, of image"),
            ([image()], "inputs are list: expected arrays by name"),
            (None, "inputs are NoneType"),
            ({"image": [[1.0, 2.0], [3.0]]}, "input 'image': no array"),
        ]:
            with pytest.raises(SessionError, match=words) as caught:
                session.run(feeds)
            assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)
    for threads in (0, -1, 1.5, True, 2000, "2"):
        with pytest.raises(SessionError, match="threads"):
            Session(portable.path, threads=threads)  # type: ignore[arg-type]


def test_closed_session(portable: Bundle) -> None:
    session = Session(portable.path)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run({"image": image()})


def test_weights_are_checked(copied: Path, tmp_path: Path) -> None:
    path = copied / "weights.bin"
    whole = path.read_bytes()
    other = write_bundle(
        affine_only(), first_choices(affine_only(), isa("portable")), isa("portable"), tmp_path / "other"
    )
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, words in [
        (other.weights.read_bytes(), "does not belong to this model"),
        (bytes(flipped), "is damaged"),
        (whole[:-64], "is truncated"),
        (whole + b"more", "is truncated"),
        (whole[:10], "not a weights file"),
        (b"", "not a weights file"),
        (b"x" * len(whole), "not a weights file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(SessionError, match=words) as caught:
            Session(copied)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(SessionError, match="No such file"):
        Session(copied)
    path.write_bytes(whole)
    Session(copied).close()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_library_that_is_cut_off(copied: Path, share: float) -> None:
    """The loader maps what is not there, and dies where it reads it."""
    library = copied / "libmodel.so"
    os.truncate(library, int(share * library.stat().st_size))
    with pytest.raises(SessionError, match=r"libmodel\.so: truncated or changed"):
        Session(copied)


def test_a_manifest_of_another_bundle(copied: Path) -> None:
    """Buffers are as large as it says, and the library fills what it was built for."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["outputs"][0]["shape"][0] = 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SessionError, match=r"libmodel\.so: of another bundle than manifest\.json"):
        Session(copied)
    del manifest["bytes"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SessionError, match=r"manifest\.json: damaged"):
        Session(copied)


def test_sessions_are_not_copied(portable: Bundle) -> None:
    with Session(portable.path) as session:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(SessionError, match="cannot be copied or pickled"):
                make(session)


def test_bundle_of_another_machine(tmp_path: Path, copied: Path) -> None:
    plan = affine_only()
    needy = dataclasses.replace(isa("portable"), flags=("fma", "unobtainium"))
    made = write_bundle(plan, first_choices(plan, needy), needy, tmp_path / "needy")
    with pytest.raises(SessionError, match="this bundle needs portable; this machine lacks unobtainium"):
        Session(made.path)
    done = subprocess.run([made.program], capture_output=True, text=True)
    assert done.returncode == 2 and "lacks unobtainium" in done.stderr
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "arch": "vax"}))
    with pytest.raises(SessionError, match="needs vax"):
        Session(copied)


def test_broken_bundle(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="not a bundle"):
        Session(tmp_path / "nowhere")
    library = copied / "libmodel.so"
    library.write_bytes(b"not a library".ljust(library.stat().st_size))
    with pytest.raises(SessionError, match=r"libmodel\.so: cannot be loaded"):
        Session(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(SessionError, match="format 0"):
        Session(copied)
    for damaged in ("{", "[]", '{"format": 1}'):
        (copied / "manifest.json").write_text(damaged)
        with pytest.raises(SessionError, match="damaged"):
            Session(copied)


def test_session_file_stands_alone(copied: Path, tmp_path: Path) -> None:
    """The copy in the bundle, with numpy and nothing of ours, finds its own folder."""
    np.save(tmp_path / "x.npy", image())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\nfrom session import Session\n"
        "with Session() as s: print(s.run({'image': np.load(sys.argv[2])})['scores'].tobytes().hex())\n"
        "assert not any(m.split('.')[0] == 'colonnade' for m in sys.modules)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, copied, tmp_path / "x.npy"], capture_output=True, text=True, check=True
    ).stdout
    with Session(copied) as session:
        assert bytes.fromhex(told) == session.run({"image": image()})["scores"].tobytes()


def test_library_and_program_give_the_same_bits(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", image())
    subprocess.run([bundle.program, "-i", tmp_path / "x.npy", "-o", tmp_path / "m.npy", tmp_path / "s.npy"], check=True)
    with Session(bundle.path) as session:
        got = session.run({"image": image()})
    assert np.load(tmp_path / "m.npy").tobytes() == got["maps"].tobytes()
    assert np.load(tmp_path / "s.npy").tobytes() == got["scores"].tobytes()


def test_many_sessions_leak_nothing(portable: Bundle) -> None:
    def status() -> tuple[int, int, int, int]:
        gc.collect()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]), int(lines["Threads"]), len(os.listdir("/proc/self/fd")), maps  # noqa: PTH208

    def use() -> None:
        with Session(portable.path, threads=3) as session:
            session.run({"image": image()})

    for _ in range(10):
        use()
    growth = []
    for _ in range(3):  # a leak grows every time; a large process's own heap does now and then
        rss, threads, files, maps = status()
        for _ in range(100):
            use()
        after = status()
        assert after[1] == threads and after[2] == files and after[3] - maps < 10
        growth.append(after[0] - rss)
    assert min(growth) < 500, growth  # KiB


def test_failing_create_leaks_no_threads(copied: Path) -> None:
    (copied / "weights.bin").write_bytes(b"")
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(10):
        with pytest.raises(SessionError):
            Session(copied, threads=4)
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_concurrent_sessions_and_callers(portable: Bundle) -> None:
    """Two sessions, each called by two Python threads at once: every answer belongs to its question."""
    wanted = {seed: reference(network(), {"image": image(seed)})["scores"] for seed in range(4)}
    wrong: list[int] = []

    def ask(session: Session, seed: int) -> None:
        for _ in range(50):
            got = session.run({"image": image(seed)})["scores"]
            if not np.allclose(got, wanted[seed], atol=1e-5):
                wrong.append(seed)

    with Session(portable.path, threads=2) as one, Session(portable.path, threads=2) as two:
        callers = [threading.Thread(target=ask, args=(s, seed)) for seed, s in enumerate((one, one, two, two))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
    assert wrong == []


def test_fork_is_refused_not_hung(portable: Bundle) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\nfrom session import Session, SessionError\n"
        "s = Session(threads=2); x = np.zeros((2, 3, 9, 11), np.float32); s.run({'image': x})\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: s.run({'image': x})\n"
        "    except SessionError as error: s.close(); os._exit(7 if 'fork' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "s.run({'image': x}); s.close()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, portable.path], check=True, timeout=60)


def test_oversubscription_does_not_collapse(portable: Bundle) -> None:
    """Sixteen threads on whatever is here: barriers sleep, so a run of 8 small steps stays far below a second."""
    with Session(portable.path, threads=16) as session:
        times = session.profile({"image": image()}, repeat=20).sum(axis=1)
    assert np.median(times) < 0.5e9  # ns
