"""Other runtimes on a board: those that its own Python has, started there by a script that needs nothing of ours.

The loaders are those of ``peers``, sent as source, so a runtime gets the same options on a board as on this machine.
A block is a process of its own: the model is loaded again, outside the times.
"""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.bench import peers
from colonnade.errors import ColonnadeError, UserError
from colonnade.targets.base import Target

# what boards may have: neither OpenVINO nor torch is built for RISC-V
KINDS: dict[str, Callable[..., peers.Loaded]] = {"onnxruntime": peers._onnxruntime, "ncnn": peers._ncnn}
TIMEOUT_S = 600.0

SCRIPT = """#!/usr/bin/env python3
from __future__ import annotations

import json
import sys
import time
from pathlib import Path


class UserError(Exception):
    pass


{loader}

threads, warmup, repeat = map(int, sys.argv[1:])
try:
    import numpy as np

    with np.load("inputs.npz") as arrays:
        feeds = {{n: arrays[n] for n in arrays.files}}
    run, answers, version, options = {name}(Path("model.onnx"), feeds, threads, Path())
    if not repeat:
        np.savez("outputs.npz", *answers(run()))
    for _ in range(warmup):
        run()
    ns = []
    for _ in range(repeat):
        start = time.perf_counter_ns()
        run()
        ns.append(time.perf_counter_ns() - start)
    print(json.dumps({{"version": version, "options": options, "ns": ns}}))
except ImportError as error:
    print(json.dumps({{"error": f"not installed on the board ({{error}})"}}))
except Exception as error:
    print(json.dumps({{"error": " ".join(str(error).split())[:300] or type(error).__name__}}))
"""


def check_known(kind: str) -> None:
    """Raises ``UserError`` for a runtime that no board has."""
    peers.check_known(kind)
    if kind not in KINDS:
        raise UserError(f"--vs {kind}: not to be had on a board; there are {', '.join(KINDS)}")


class BoardPeer:
    """A runtime of the board's own Python with its model. Raises ``UserError`` when the board does not have it."""

    def __init__(self, kind: str, model: Path, inputs: Path, threads: int, target: Target, folder: Path) -> None:
        check_known(kind)
        self.name, self._target, self._threads = kind, target, threads
        loader = KINDS[kind]
        self._program = folder / f"board_{kind}.py"
        self._program.write_text(SCRIPT.format(loader=inspect.getsource(loader), name=loader.__name__))
        self._program.chmod(0o755)
        self._files: dict[str, Path | bytes] = {"model.onnx": model, "inputs.npz": inputs}
        if kind == "ncnn":
            param = model.with_suffix(".ncnn.param")
            if not param.is_file():  # the converter runs here, not on the board
                with np.load(inputs) as arrays:
                    param, _ = peers._pnnx(model, {name: arrays[name] for name in arrays.files}, folder)
            self._files |= {"model.ncnn.param": param, "model.ncnn.bin": param.with_suffix(".bin")}
        ready, self._answers = self._run(0, 0)
        self.version, self.options = str(ready["version"]), dict(ready["options"])

    def block(self, warmup: int, repeat: int) -> list[int]:
        """ns of ``repeat`` inferences after ``warmup`` that do not count."""
        return list(self._run(warmup, repeat)[0]["ns"])

    def outputs(self) -> list[npt.NDArray[Any]]:
        """What it computed from the inputs, in its order."""
        with np.load(io.BytesIO(self._answers)) as arrays:
            return [arrays[name] for name in arrays.files]

    def _run(self, warmup: int, repeat: int) -> tuple[dict[str, Any], bytes]:
        words = [str(n) for n in (self._threads, warmup, repeat)]
        outcome = self._target.run(self._program, words, self._files, ["outputs.npz"], TIMEOUT_S)
        line = next((line for line in outcome.stdout.splitlines() if line.startswith("{")), "")
        if not line:
            if outcome.code in (126, 127):
                raise UserError(f"--vs {self.name}: {self._target.name} has no python3")
            raise ColonnadeError(f"{self.name} on {self._target.name}: {outcome.describe()}")
        told = dict(json.loads(line))
        if "error" in told:
            raise UserError(f"--vs {self.name} on {self._target.name}: {told['error']}")
        return told, outcome.files.get("outputs.npz", b"")
