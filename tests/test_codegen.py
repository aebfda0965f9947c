"""From plan to C: what model.c says, weights.bin holds, and the static program does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from plans import affine_only, first_choices, network, reference

from colonnade import codegen
from colonnade.build import Toolchain, host
from colonnade.build.cache import root
from colonnade.build.toolchain import FLAGS, cc_features
from colonnade.bundle import Bundle, check_place, write_bundle
from colonnade.codegen.weights import HEADER, checksum
from colonnade.errors import UserError
from colonnade.kernels import registry, render
from colonnade.kernels.isa import ISAS, isa
from colonnade.plan import Plan, Port

PORTABLE = isa("portable")


def write(plan: Plan, folder: Path, **options: object) -> Bundle:
    return write_bundle(plan, first_choices(plan, PORTABLE), PORTABLE, folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(network(), tmp_path_factory.mktemp("codegen") / "tiny")


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / "run", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 9, 11)).astype(np.float32)


def test_model_c_is_straight_and_named() -> None:
    plan = network()
    files = codegen.generate(plan, first_choices(plan, PORTABLE), PORTABLE, 2)
    text = files["model.c"]
    assert isinstance(text, str)
    for i, step in enumerate(plan.steps):
        assert f"/* {i} {step.name.replace('*/', '* /')}:" in text
    assert "for (" not in text and "while" not in text
    assert max(map(len, text.split("static const char json[]")[0].splitlines())) <= 120
    kernels = files["kernels_portable.c"]
    assert isinstance(kernels, str)
    called = set(re.findall(r"k->(\w+)\(", text))
    assert called == {c.kernel for c in first_choices(plan, PORTABLE)}
    assert set(re.findall(r'^    \{"(\w+)"', kernels, re.M)) == called  # no kernel that is not used


def test_generation_is_deterministic() -> None:
    plan = network()
    once, again = (codegen.generate(plan, first_choices(plan, PORTABLE), PORTABLE, 1) for _ in range(2))
    assert once == again


def test_equal_constants_are_stored_once() -> None:
    plan = affine_only()
    files = codegen.generate(plan, first_choices(plan, PORTABLE), PORTABLE, 1)
    weights = files["weights.bin"]
    assert isinstance(weights, bytes)
    assert weights.startswith(b"COLONNAD") and len(weights) % 64 == 0
    constants = np.arange(1, 5, dtype=np.float32).tobytes()
    assert weights.count(constants) == 1 and weights.index(constants) % 64 == 0
    blocks = [weights[i : i + 64] for i in range(HEADER, len(weights), 64)]
    offsets = [int(n) for n in re.findall(r"cn_at\(weights, (\d+)\)", str(files["model.c"]))]
    assert len(offsets) > len(set(offsets)) and all(o % 64 == 0 for o in offsets)
    assert len(blocks) >= len(set(offsets))


def test_checksum_is_fletchers() -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 50).astype("<u8")
    total = running = 0
    for word in words:
        total = (total + int(word)) % 2**64
        running = (running + total) % 2**64
    assert checksum(words.tobytes()) == (total, running)


def test_wrong_number_of_choices() -> None:
    plan = affine_only()
    with pytest.raises(ValueError, match="2 choices for 3 steps"):
        codegen.generate(plan, first_choices(plan, PORTABLE)[:2], PORTABLE, 1)


def test_names_cannot_break_the_code(tmp_path: Path) -> None:
    plan = affine_only()
    odd = 'é "quoted" \\ */ ??/ \n#error'
    steps = tuple(dataclasses.replace(s, name=f"{odd}" if i else "int") for i, s in enumerate(plan.steps))
    steps = tuple(dataclasses.replace(s, external=odd) if s.external == "x" else s for s in steps)
    plan = dataclasses.replace(plan, name=odd, inputs=(Port(odd, plan.inputs[0].shape),), steps=steps)
    made = write(plan, tmp_path / "odd")
    told = json.loads(run(made.path, "--describe").stdout)
    assert told["name"] == odd and told["inputs"][0]["name"] == odd
    assert [s["name"] for s in told["steps"]] == ["int", odd, odd]


# ---- the static program ----


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_program_computes_the_plan(bundle: Bundle, tmp_path: Path, threads: int) -> None:
    x, plan = image(), network()
    np.save(tmp_path / "x.npy", x)
    done = run(
        bundle.path, "--threads", str(threads), "-i", tmp_path / "x.npy", "-o", tmp_path / "m.npy", tmp_path / "s.bin"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = reference(plan, {"image": x})
    np.testing.assert_allclose(np.load(tmp_path / "m.npy", allow_pickle=False), wanted["maps"], atol=1e-5)
    scores = np.fromfile(tmp_path / "s.bin", "<f4").reshape(wanted["scores"].shape)
    np.testing.assert_allclose(scores, wanted["scores"], atol=1e-5)


def test_files_may_be_named_and_raw(bundle: Bundle, tmp_path: Path) -> None:
    image().tofile(tmp_path / "x.bin")
    np.save(tmp_path / "x.npy", image())
    for file, out in (("x.bin", "a.npy"), ("x.npy", "b.npy")):
        done = run(bundle.path, "-i", f"image={tmp_path / file}", "-o", f"scores={tmp_path / out}")
        assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_times_are_told(bundle: Bundle) -> None:
    done = run(bundle.path, "--json", "--profile", "--repeat", "3", "--warmup", "1")
    told = json.loads(done.stdout)
    assert len(told["run_ns"]) == 3 and all(t > 0 for t in told["run_ns"])
    assert [len(step) for step in told["step_ns"]] == [3] * len(network().steps)
    assert sum(step[0] for step in told["step_ns"]) <= told["run_ns"][0]
    text = run(bundle.path, "--profile", "--repeat", "3").stdout
    assert text.startswith("3 runs: median") and "us  /stem/affine" in text


def test_user_mistakes_are_one_line(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((2, 3, 9, 12), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((2, 3, 9, 11)))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(image()))
    np.save(tmp_path / "good.npy", image())
    (tmp_path / "short.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-1])
    (tmp_path / "head.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:40])
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "long.bin").write_bytes(image().tobytes() + b"x")
    for arguments, words in [
        (["-i", tmp_path / "wide.npy"], "shape (2, 3, 9, 12), but input image is (2, 3, 9, 11)"),
        (["-i", tmp_path / "double.npy"], "type <f8, but input image is float32"),
        (["-i", tmp_path / "fortran.npy"], "Fortran order"),
        (["-i", tmp_path / "short.npy"], "2375 bytes of data"),
        (["-i", tmp_path / "head.npy"], "truncated"),
        (["-i", tmp_path / "text.npy"], "not a .npy file"),
        (["-i", tmp_path / "long.bin"], "more data than the 2376 bytes"),
        (["-i", tmp_path / "nowhere.npy"], "No such file"),
        (["-i", tmp_path / "good.npy", tmp_path / "good.npy"], "one input too many"),
        (["-i", f"picture={tmp_path / 'good.npy'}"], "the model has no input of that name; --describe tells"),
        (["-i", f"image={tmp_path / 'good.npy'}", f"image={tmp_path / 'good.npy'}"], "image has a file already"),
        (["-i", "-o", "y.npy"], "-i: expected a file"),
        (["-i"], "-i: expected a file"),
        (["--weights"], "--weights: expected a file"),
        (["--repeat"], "--repeat: expected a number from 1 on"),
        (["--fast"], "--fast: unknown option; --help tells what there is"),
        (["-i", tmp_path / "good.npy", "-o", "/dev/full"], "No space left on device"),
        (["--threads", "0"], "--threads: expected a number from 1 on"),
        (["--threads", "two"], "--threads: expected a number from 1 on"),
        (["--threads", "5000"], "5000 threads: expected 1 to 1024"),
        (["--weights", tmp_path / "good.npy"], "not a weights file"),
    ]:
        done = run(bundle.path, *arguments)
        assert done.returncode == 2 and words in done.stderr, (arguments, done)
        assert done.stderr.startswith("run: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--json", "--repeat", "2"], ["--profile"]])
def test_times_that_cannot_be_told_are_a_failure(bundle: Bundle, words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([bundle.path / "run", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "run: standard output cannot be written\n"


def test_full_disk_leaves_no_output(bundle: Bundle, tmp_path: Path) -> None:
    code = (
        "import resource, signal, subprocess, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(subprocess.run(sys.argv[1:], restore_signals=False).returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bundle.path / "run", "-o", tmp_path / "m.npy"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert not (tmp_path / "m.npy").exists()


def test_ctrl_c_ends_it(bundle: Bundle) -> None:
    # a shell starts what it puts in the background deaf to Ctrl-C, and children inherit that
    listens = "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    words = [bundle.path / "run", "--threads", "2", "--repeat", "100000000"]
    with subprocess.Popen([sys.executable, "-c", listens, *words]) as process:
        while Path(f"/proc/{process.pid}/exe").resolve().name != "run":
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()


# ---- the bundle ----


def test_manifest(bundle: Bundle) -> None:
    plan = network()
    manifest = Bundle.load(bundle.path).manifest
    assert manifest == bundle.manifest
    assert manifest["inputs"] == [{"name": "image", "shape": [2, 3, 9, 11], "dtype": "float32"}]
    assert [s["name"] for s in manifest["steps"]] == [s.name for s in plan.steps]
    assert [s["key"] for s in manifest["steps"]] == [s.key() for s in plan.steps]
    assert manifest["isa"] == "portable" and manifest["arch"] == host()


def test_build_script_rebuilds_by_hand(copied: Path) -> None:
    (copied / "libmodel.so").unlink()
    (copied / "run").unlink()
    compiler = shutil.which("gcc") or shutil.which("clang")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(root() / "zig")}
    if compiler is not None:
        environment["CC"] = compiler
    else:  # the compiler it was built with, by the name that build.sh gives it
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    copied = copied.rename(copied.with_name("a copy ü"))
    script = subprocess.run([copied / "build.sh"], env=environment, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    Bundle.load(copied)  # which looks at the files' sizes
    assert not re.search(r"^(model|runtime|machine|pool|main)\.[ch]:.*warning", script.stderr, re.M), script.stderr
    assert run(copied, "--repeat", "2").returncode == 0


@pytest.mark.slow
@pytest.mark.allow_skip("gcc is one of the compilers that --cc and build.sh take, not one that is needed")
@pytest.mark.parametrize("name", [row.name for row in ISAS if row.arch in ("any", "x86_64")])
def test_gcc_accepts_every_kernel(name: str, tmp_path: Path) -> None:
    """What the compiler that everything else is built with accepts, it need not."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    files = render.library(isa(name), registry.variants(isa(name)).values())
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    unit = f"kernels_{name}.c"
    flags = [*FLAGS, *cc_features(isa(name).features, "x86_64"), "-w"]
    done = subprocess.run([compiler, *flags, "-fsyntax-only", unit], cwd=tmp_path, capture_output=True, text=True)
    assert unit in files and done.returncode == 0, done.stderr[:2000]


def test_c_program_through_model_h(bundle: Bundle, tmp_path: Path) -> None:
    """What a C user writes: two models at once, errors as codes with a message, and nothing else exported."""
    source = """
        #include "model.h"
        #include <stdio.h>
        int main(int argc, char **argv) {
            char error[200];
            colonnade_model *a, *b, *none;
            size_t inputs, outputs;
            const colonnade_port *in = colonnade_inputs(&inputs);
            colonnade_outputs(&outputs);
            if (argc < 2 || inputs != 1 || outputs != 2 || in[0].rank != 4 || in[0].bytes != 2376) return 1;
            if (colonnade_create(argv[1], 1, &a, error, sizeof error)) return 2;
            if (colonnade_create(argv[1], 2, &b, 0, 0)) return 3;
            static float x[594], maps[2][594], scores[2][10];
            for (int i = 0; i < 594; i++) x[i] = (float)(i % 7) - 3;
            const void *from[] = {x};
            void *to_a[] = {maps[0], scores[0]}, *to_b[] = {maps[1], scores[1]};
            if (colonnade_run(a, from, to_a) || colonnade_run(b, from, to_b)) return 4;
            for (int i = 0; i < 594; i++) if (maps[0][i] != maps[1][i]) return 5;
            if (colonnade_run(a, 0, to_a) != COLONNADE_BAD_ARGUMENT) return 6;
            if (colonnade_create("/nowhere", 1, &none, error, 12) != COLONNADE_BAD_WEIGHTS || none) return 7;
            if (colonnade_create(argv[1], -1, &none, error, sizeof error) != COLONNADE_BAD_ARGUMENT) return 8;
            puts(error);
            colonnade_destroy(a); colonnade_destroy(b); colonnade_destroy(0);
            return 0;
        }
    """
    files = {p.name: p.read_text() for p in (bundle.path / "source").iterdir() if p.name != "main.c"}
    files |= {"model.h": (bundle.path / "model.h").read_text(), "user.c": source}
    program = Toolchain().compile(files, "program", host())
    done = subprocess.run([program, bundle.weights], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "-1 threads: expected 1 to 1024, or 0 for the default\n")


def test_existing_places(tmp_path: Path, bundle: Bundle) -> None:
    plan = affine_only()
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty", force=False)
    with pytest.raises(UserError, match="--force"):
        write(plan, bundle.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a bundle"):
        write(plan, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        write(plan, tmp_path / "file", force=True)


def test_force_replaces_the_whole_bundle(tmp_path: Path) -> None:
    first = write(network(), tmp_path / "b")
    (first.path / "stray").write_text("")
    second = write(affine_only(), tmp_path / "b", force=True)
    assert Bundle.load(second.path).manifest["name"] == "affine"
    assert [p.name for p in tmp_path.iterdir()] == ["b"] and not (second.path / "stray").exists()


def test_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(affine_only(), tmp_path / "b")

    def no_room(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    for name in ("b", "new"):
        with pytest.raises(UserError, match="the disk is full"):
            write(network(), tmp_path / name, force=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert Bundle.load(tmp_path / "b").manifest["name"] == "affine"


def test_unwritable_place() -> None:
    with pytest.raises(UserError) as caught:
        write(affine_only(), Path("/proc/nowhere/bundle"))
    assert "/proc/nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_bundles(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such bundle"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a bundle"):
        Bundle.load(tmp_path)
    weights = (copied / "weights.bin").read_bytes()
    (copied / "weights.bin").write_bytes(weights[:-64])
    with pytest.raises(UserError, match=r"weights\.bin: truncated"):
        Bundle.load(copied)
    (copied / "weights.bin").write_bytes(weights)
    (copied / "run").unlink()
    with pytest.raises(UserError, match="run missing"):
        Bundle.load(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Bundle.load(copied)
    (copied / "run").write_bytes(b"")
    for damaged in ("{", "[]", "null", '{"format": 1}', ""):
        (copied / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            Bundle.load(copied)
