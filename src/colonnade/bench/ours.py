"""Our side: a bundle's static program as a contender, and its time per layer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.bundle import Bundle
from colonnade.errors import ColonnadeError
from colonnade.targets.base import Target


class Ours:
    """Runs ``bundle`` on ``target``: a process a block, so it needs nothing there."""

    def __init__(self, bundle: Bundle, target: Target, inputs: Mapping[str, npt.NDArray[Any]], threads: int) -> None:
        self.bundle, self._target, self._threads = bundle, target, threads
        self._files: dict[str, Path | bytes] = {"weights.bin": bundle.weights}
        self._arguments = ["--weights", "weights.bin", "--threads", str(threads), "-i"]
        for index, (name, array) in enumerate(inputs.items()):
            content = io.BytesIO()
            np.save(content, array)
            self._files[f"input{index}.npy"] = content.getvalue()
            self._arguments.append(f"{name}=input{index}.npy")

    def block(self, warmup: int, repeat: int) -> list[int]:
        """See ``protocol.Runner``."""
        return list(self._run(["--warmup", str(warmup), "--repeat", str(repeat), "--json"])["run_ns"])

    def profile(self, warmup: int, repeat: int) -> list[list[int]]:
        """ns by step, all repetitions."""
        arguments = ["--warmup", str(warmup), "--repeat", str(repeat), "--json", "--profile"]
        return list(self._run(arguments)["step_ns"])

    def outputs(self, timeout: float = 300) -> list[npt.NDArray[Any]]:
        """What it computes from the inputs, in the order of the model; ``timeout`` in seconds."""
        names = [port["name"] for port in self.bundle.manifest["outputs"]]
        files = [f"output{i}.npy" for i in range(len(names))]
        arguments = ["-o", *(f"{name}={file}" for name, file in zip(names, files, strict=True))]
        outcome = self._target.run(
            self.bundle.program, [*self._arguments, *arguments], self._files, outputs=files, timeout=timeout
        )
        if not outcome.ok:
            raise ColonnadeError(f"{self.bundle.path}: {outcome.describe()}")
        return [np.load(io.BytesIO(outcome.files[file])) for file in files]

    def _run(self, arguments: Sequence[str]) -> dict[str, Any]:
        outcome = self._target.run(self.bundle.program, [*self._arguments, *arguments], self._files, timeout=300)
        if not outcome.ok:
            raise ColonnadeError(f"{self.bundle.path}: {outcome.describe()}")
        return dict(json.loads(outcome.stdout))


def difference(ours: Sequence[npt.NDArray[Any]], theirs: Sequence[npt.NDArray[Any]]) -> float:
    """Largest difference over all outputs, as a share of the largest magnitude of theirs; NaN when shapes differ."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("nan")
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(ours, theirs, strict=True))
