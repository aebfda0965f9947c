"""Bench: the protocol on contenders of known speed, a peer in its own process, and the record of a small model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from colonnade.bench import protocol
from colonnade.bench.ours import difference
from colonnade.bench.peers import Peer
from colonnade.bench.protocol import Block, Contender, Load, alternate
from colonnade.bench.record import beside_dense, layers
from colonnade.errors import UserError
from colonnade.report.bench import short, table
from colonnade.targets.peak import Peak


class Fixed:
    """A contender that says how long it took."""

    def __init__(self, ns: int, log: list[int]) -> None:
        self.ns, self.log = ns, log

    def block(self, warmup: int, repeat: int) -> list[int]:
        self.log.append(self.ns)
        return [self.ns + i for i in range(repeat)]


def test_contenders_take_turns_and_all_repetitions_are_kept() -> None:
    log: list[int] = []
    found = alternate(
        [Contender("a", Fixed(10**6, log)), Contender("b", Fixed(2 * 10**6, log))], lambda: Peak(100.0), 3, 0.01, False
    )
    assert log[2:] == [10**6, 2 * 10**6] * 3
    assert [len(r.clean) for r in found] == [3, 3]
    assert found[0].summary()["min"] == 1.0 and found[1].summary()["median"] >= 2.0


def test_blocks_under_a_fallen_peak_are_thrown_away_and_taken_again() -> None:
    peaks = iter([100.0, 100, 100, 100, 60, 100, 100, 100, 100, 100, 100, 100])
    (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda: Peak(next(peaks)), 3, 0.01, False)
    assert [bool(b.disturbance) for b in found.blocks] == [False, True, False, False]
    assert "60 of 100 GFLOP/s" in found.blocks[1].disturbance and not found.disturbed


def test_early_blocks_are_judged_by_the_best_peak_of_the_whole_run() -> None:
    peaks = iter([50.0, 50, 50, *[100.0] * 20])
    (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda: Peak(next(peaks)), 2, 0.01, False)
    assert [bool(b.disturbance) for b in found.blocks] == [True, False, False]


def test_a_run_that_never_calms_says_so() -> None:
    peaks = iter([100.0] + [50.0] * 100)
    (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda: Peak(next(peaks)), 2, 0.01, False)
    assert found.disturbed and len(found.blocks) == 2 * (1 + protocol.RETRIES) and found.summary()["min"] == 1.0


def test_a_neighbour_on_the_same_core_shows_in_the_pace() -> None:
    """Multiply-adds in registers are as fast as ever, taking data from the second cache is not."""
    paces = iter([90.0, 90, 90, 90, 60, *[90.0] * 20])
    (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda: Peak(100.0, pace=next(paces)), 3, 0.01, False)
    assert [bool(b.disturbance) for b in found.blocks] == [False, True, False, False]
    assert "60 of 90 GB/s" in found.blocks[1].disturbance


def test_threads_that_lost_their_common_cache_show_in_the_handover() -> None:
    """Each of them is as fast as ever; what they hand to each other is not."""
    rates = iter([9.0, 9, 9, 8, 2.4, *[9.0] * 20])
    (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda: Peak(100.0, handover=next(rates)), 3, 0.01, False)
    assert [bool(b.disturbance) for b in found.blocks] == [False, True, False, False]
    assert "2.4 of 9.0 GB/s from thread to thread" in found.blocks[1].disturbance
    # the halves of one core share all their caches, and their multiply-adds, or only what these take from a cache
    for half in (Peak(50.0, 0, 90.0, 40.0), Peak(100.0, 0, 50.0, 40.0)):
        halves = iter([half] * 3 + [Peak(100.0, 0, 90.0, 9.0)] * 20)
        (found,) = alternate([Contender("a", Fixed(10**6, []))], lambda looks=halves: next(looks), 2, 0.01, False)
        assert [bool(b.disturbance) for b in found.blocks] == [True, False, False]


def test_own_work_is_not_foreign() -> None:
    load, started, own = Load(), time.monotonic(), time.process_time()
    while time.monotonic() < started + 0.4:
        pass
    mine = (time.process_time() - own) / (time.monotonic() - started)
    foreign, _ = load.shares()
    # whatever else runs here, it cannot have had the time that we had
    assert foreign <= (os.cpu_count() or 1) - mine + 0.2


def test_foreign_load_disturbs() -> None:
    block = protocol._judged(Block((1,), Peak(100), Peak(100), foreign=0.9, steal=0.0), Peak(100))
    assert "90%" in block.disturbance
    assert not protocol._judged(Block((1,), Peak(100), Peak(100), foreign=0.01, steal=0.0), Peak(100)).disturbance


def test_layer_rates_count_kept_work() -> None:
    step = {"name": "c", "workload": "w", "kernel": "k", "params": {}, "macs": 4000, "kept_macs": 1000}
    (row,) = layers({"steps": [step]}, [[1000, 3000, 2000]], 10.0)
    assert row["ms"] == 0.002 and row["gflops"] == 1.0 and row["peak_share"] == 0.1 and row["kept"] == 0.25
    (row,) = layers({"steps": [step]}, [[2000]], 10.0, dense=True)
    assert row["gflops"] == 4.0
    (row,) = layers({"steps": [step | {"macs": 0, "kept_macs": 0}]}, [[2000]], 10.0)
    assert row["gflops"] is None and row["kept"] is None


def test_layers_slower_than_their_dense_selves_are_named() -> None:
    def rows(**ms: float) -> list[dict[str, object]]:
        return [{"name": n, "kept": 0.25, "ms": v, "spread_ms": 0.05, "kernel": "k"} for n, v in ms.items()]

    pruned = [*rows(faster=0.5, within=1.12, slower=1.2), {"name": "stem", "kept": 1.0, "ms": 9.0, "spread_ms": 0.0}]
    dense = [*rows(faster=1.0, within=1.0, slower=1.0), {"name": "stem", "kept": 1.0, "ms": 1.0, "spread_ms": 0.0}]
    assert beside_dense(pruned, dense) == ["slower"]
    assert [r.get("dense_ms") for r in pruned] == [1.0, 1.0, 1.0, None]


def test_short_workloads() -> None:
    key = "conv2d(batch=1,in_channels=3,out_channels=64,height=224,width=200,kernel=7x7,stride=2x2,epilogue=clip(0,6))"
    assert short(key, 0.25) == "conv2d 7x7/2 3→64 224x200, 25% kept"
    assert short("binary(kind=add,shape=1x8x4x4)", None) == "binary add 1x8x4x4"


def test_difference() -> None:
    a = np.array([1.0, -4.0])
    assert difference([a], [a]) == 0 and difference([a + 0.4], [a]) == pytest.approx(0.1)
    assert np.isnan(difference([a], [a[:1]]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution with half of its columns pruned in tiles of 4, ReLU, and a mean over pixels."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    weight[:4, ::2] = 0
    weight[4:, 1::2] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4, kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["y"], "pool"),
        ],
        "small",
        [helper.make_tensor_value_info("x", 1, [1, 4, 12, 12])],
        [helper.make_tensor_value_info("y", 1, [1, 8, 1, 1])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.ones((1, 4, 12, 12), np.float32))
    return path


def test_a_peer_answers_from_its_own_process(model: Path, inputs: Path) -> None:
    pytest.importorskip("onnxruntime")
    peer = Peer("onnxruntime", model, inputs, 1)
    try:
        ns = peer.block(1, 5)
        assert len(ns) == 5 and min(ns) > 0 and peer.outputs()[0].shape == (1, 8, 1, 1)
        assert peer.options["intra_op_num_threads"] == 1 and peer.version
        deadline = time.monotonic() + 5
        while (state := _state(peer.pid)) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state == "T", "not stopped between blocks"
    finally:
        peer.close()
    assert not Path(f"/proc/{peer.pid}").exists()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_peers_that_cannot_run_say_why(model: Path, inputs: Path) -> None:
    with pytest.raises(UserError, match="unknown runtime; known: onnxruntime"):
        Peer("warp", model, inputs, 1)
    with pytest.raises(UserError, match=r"--vs torch: .*torch\.export\.save"):
        Peer("torch", model, inputs, 1)
    many = inputs.with_name("many.npz")
    np.savez(many, x=np.ones((2, 4, 12, 12), np.float32))
    with pytest.raises(UserError, match=r"--vs ncnn: .*(batch 1|not installed)"):
        Peer("ncnn", model, many, 1)
    model.write_bytes(b"junk")
    for kind in ("onnxruntime", "openvino", "ncnn"):
        with pytest.raises(UserError, match=f"--vs {kind}"):
            Peer(kind, model, inputs, 1)


@pytest.mark.parametrize("kind", ["openvino", "ncnn", "torch"])
def test_every_other_peer_gives_the_same_answer_in_f32(kind: str, model: Path, inputs: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    for package in {"ncnn": ("ncnn", "pnnx")}.get(kind, (kind,)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if kind == "torch":
        _as_program(model)
    with np.load(inputs) as arrays:
        (wanted,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, dict(arrays))
    peer = Peer(kind, model, inputs, 1)
    try:
        (found,) = peer.outputs()
        # bf16 or fp16 would be off by a few thousandths
        assert difference([found.reshape(wanted.shape)], [wanted]) < 1e-5
        assert len(peer.block(1, 3)) == 3 and peer.version
        said = {"openvino": ("INFERENCE_PRECISION_HINT", "f32"), "ncnn": ("fp16", False), "torch": ("num_threads", 1)}
        name, value = said[kind]
        assert peer.options[name] == value
    finally:
        peer.close()
    assert {p.name for p in model.parent.glob("small.*")} <= {"small.onnx", "small.pt2"}, "nothing is left beside it"


def _as_program(model: Path) -> None:
    """The same convolution, ReLU and mean as torch saves them."""
    import onnx
    import torch

    weight = torch.from_numpy(onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[0]).copy())
    conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
    conv.weight.data = weight
    module = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)).eval()
    torch.export.save(torch.export.export(module, (torch.ones(1, 4, 12, 12),)), model.with_suffix(".pt2"))


def test_the_whole_bench_of_a_pruned_model(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from colonnade.bench.run import bench
    from colonnade.targets import Local

    found = bench(model, Local(), 1, ["onnxruntime"], "portable", db=tmp_path / "t.db", blocks=1)
    rows = {row["name"]: row for row in found["contenders"]}
    assert list(rows) == ["colonnade pruned", "colonnade dense", "onnxruntime"]
    assert rows["onnxruntime"]["difference"] < 1e-4
    assert all(row["ms"]["min"] > 0 for row in rows.values())
    conv = next(r for r in found["layers"]["colonnade pruned"] if r["workload"].startswith("conv2d"))
    assert conv["kept"] == 0.5 and conv["kernel"].endswith("__portable") and 0 < conv["peak_share"] < 2
    assert conv["dense_ms"] > 0 and conv["dense_kernel"].endswith("__portable")
    assert any("slower than" in note and "dense sel" in note for note in found["notes"])
    assert any("untuned" in note for note in found["notes"])
    assert json.loads(json.dumps(found)) == found
    assert len(table(found)) > 4


@pytest.mark.parametrize(
    ("script", "options", "line"),
    [
        ("riscv_whole.py", ["nowhere.onnx"], "error: nowhere.onnx: no such file: expected an ONNX model"),
        (
            "riscv.py",
            ["--model", "z80"],
            "error: no machine model 'z80'; known: c908, x100, x280, x60, or the path of a .toml file",
        ),
    ],
)
def test_a_script_that_was_asked_for_what_is_not_there_says_so_in_a_line(
    script: str, options: list[str], line: str
) -> None:
    at = Path(__file__).resolve().parent.parent / "bench" / script
    done = subprocess.run([sys.executable, at, *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
