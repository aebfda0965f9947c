"""Other runtimes, one row each, run in a process of their own.

``python -m colonnade.bench.peers KIND MODEL INPUTS THREADS`` is started by ``Peer``.

The process answers one JSON line when it is ready (version, options, outputs written beside the inputs), then one for
every line ``WARMUP REPEAT`` on its standard input: all repetitions in ns. Between its blocks it is stopped, so that
spinning pools cannot disturb the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.errors import ColonnadeError, UserError

Arrays = dict[str, npt.NDArray[Any]]
Loaded = tuple[Callable[[], Any], Callable[[Any], list[npt.NDArray[Any]]], str, dict[str, Any]]
CONVERSION_S = 600  # pnnx folds constants and writes the model three times


def _onnxruntime(model: Path, inputs: Arrays, threads: int, folder: Path) -> Loaded:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    said = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "graph": "all", "spinning": True}
    return lambda: session.run(None, inputs), list, ort.__version__, said


def _openvino(model: Path, inputs: Arrays, threads: int, folder: Path) -> Loaded:
    import openvino as ov

    options = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        # its default on machines that have bf16 is not f32
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    core = ov.Core()
    network = core.read_model(str(model))
    network.reshape({port: list(inputs[port.get_any_name()].shape) for port in network.inputs})
    compiled = core.compile_model(network, "CPU", options)
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        request.set_tensor(port, ov.Tensor(inputs[port.get_any_name()]))

    def answers(_: Any) -> list[npt.NDArray[Any]]:
        return [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    return request.infer, answers, ov.__version__.split("-")[0], options


def _ncnn(model: Path, inputs: Arrays, threads: int, folder: Path) -> Loaded:
    import ncnn

    if any(a.shape[0] != 1 for a in inputs.values()):
        raise UserError("ncnn takes one image at a time: bench it with batch 1")
    param = model.with_suffix(".ncnn.param")
    converted = ""
    if not param.is_file():
        param, converted = _pnnx(model, inputs, folder)
    binary = param.with_suffix(".bin")
    net = ncnn.Net()
    net.opt.num_threads = threads
    # f32 all through, as the others
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
    if net.load_param(str(param)) or net.load_model(str(binary)):
        raise UserError(f"ncnn cannot load {param}")
    mats = [ncnn.Mat(a[0]).clone() for a in inputs.values()]

    def run() -> list[Any]:
        with net.create_extractor() as extractor:
            for index, mat in enumerate(mats):
                extractor.input(net.input_names()[index], mat)
            return [extractor.extract(name)[1] for name in net.output_names()]

    said = {"num_threads": threads, "fp16": False, "bf16": False, "vulkan": False, "converter": converted or param.name}
    return run, lambda out: [np.array(o)[None] for o in out], ncnn.__version__, said


def _pnnx(model: Path, inputs: Arrays, folder: Path) -> tuple[Path, str]:
    """``model`` as ncnn's pair of files in ``folder``, and the converter's name. It writes a lot beside its input."""
    import importlib.metadata
    import importlib.util

    # found, not imported: its module would load torch, its program needs nothing
    found = importlib.util.find_spec("pnnx")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'pnnx', which converts ONNX files for ncnn", name="pnnx")
    work = folder / "pnnx"
    work.mkdir()
    (work / "model.onnx").symlink_to(model.resolve())
    shapes = ",".join(f"[{','.join(map(str, a.shape))}]" for a in inputs.values())
    command = [str(Path(found.origin).with_name("pnnx")), "model.onnx", f"inputshape={shapes}", "fp16=0"]
    ended = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=CONVERSION_S)
    param = work / "model.ncnn.param"
    if ended.returncode or not param.is_file():
        last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
        raise UserError(f"pnnx cannot convert {model} for ncnn: {' '.join(last) or f'status {ended.returncode}'}")
    return param, f"pnnx {importlib.metadata.version('pnnx')}, fp16=0"


def _torch(model: Path, inputs: Arrays, threads: int, folder: Path) -> Loaded:
    import torch

    program = model.with_suffix(".pt2")
    if not program.is_file():
        raise UserError(
            f"torch cannot run ONNX: torch.export.save(torch.export.export(model, inputs), {str(program)!r})"
        )
    torch.set_num_threads(threads)
    module = torch.export.load(program).module()
    tensors = [torch.from_numpy(a) for a in inputs.values()]

    def run() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    def answers(out: Any) -> list[npt.NDArray[Any]]:
        return [o.numpy() for o in (out if isinstance(out, (tuple, list)) else [out])]

    return run, answers, torch.__version__, {"num_threads": threads, "mode": "exported program, eager"}


ROWS: Mapping[str, Callable[[Path, Arrays, int, Path], Loaded]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "torch": _torch,
}


def check_known(kind: str) -> None:
    """Raises ``UserError`` when there is no such row."""
    if kind not in ROWS:
        raise UserError(f"--vs {kind}: unknown runtime; known: {', '.join(ROWS)}")


class Peer:
    """A runtime that has loaded its model. Raises ``UserError`` when it cannot."""

    def __init__(self, kind: str, model: Path, inputs: Path, threads: int) -> None:
        check_known(kind)
        self.name = kind
        self._answers = inputs.with_name(f"{kind}.npz")
        # pools of libraries that nobody asked for would only be in the way
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "colonnade.bench.peers", kind, str(model), str(inputs), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        ready = self._read()
        if "error" in ready:
            self.close()
            raise UserError(f"--vs {kind}: {ready['error']}")
        self.version, self.options = str(ready["version"]), dict(ready["options"])
        self._pause()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def block(self, warmup: int, repeat: int) -> list[int]:
        """ns of ``repeat`` inferences after ``warmup`` that do not count."""
        os.killpg(self.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{warmup} {repeat}\n")
            self._process.stdin.flush()
            return list(self._read()["ns"])
        except BrokenPipeError as error:
            raise ColonnadeError(f"{self.name} ended with status {self._process.wait()} while measuring") from error
        finally:
            self._pause()

    def outputs(self) -> list[npt.NDArray[Any]]:
        """What it computed from the inputs, in its order."""
        with np.load(self._answers) as arrays:
            return [arrays[name] for name in arrays.files]

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _pause(self) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # libraries like to greet
                return dict(json.loads(line))
        code = self._process.wait()
        raise ColonnadeError(f"{self.name} died ({'signal ' + str(-code) if code < 0 else f'status {code}'})")


def serve(kind: str, model: Path, inputs: Path, threads: int) -> None:
    """The peer's process."""
    try:
        with np.load(inputs) as arrays:
            run, answers, version, options = ROWS[kind](
                model, {n: arrays[n] for n in arrays.files}, threads, inputs.parent
            )
        found = answers(run())
        np.savez(inputs.with_name(f"{kind}.npz"), *found)
    except ImportError as error:
        print(json.dumps({"error": f"not installed ({error}): pip install 'colonnade[bench]'"}), flush=True)
        return
    except Exception as error:
        print(json.dumps({"error": " ".join(str(error).split())[:300] or type(error).__name__}), flush=True)
        return
    print(json.dumps({"version": version, "options": options}), flush=True)
    for line in sys.stdin:
        warmup, repeat = map(int, line.split())
        for _ in range(warmup):
            run()
        ns = []
        for _ in range(repeat):
            start = time.perf_counter_ns()
            run()
            ns.append(time.perf_counter_ns() - start)
        print(json.dumps({"ns": ns}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
