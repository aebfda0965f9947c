"""The test cases of the onnx package, and the list of those that are refused.

``python tests/onnx_cases.py`` writes the list anew; look at the difference before it is committed.
"""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

REFUSED = Path(__file__).parent / "onnx_refused.txt"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")


# where a scale leaves a fraction of a pixel, PyTorch and onnxruntime align corners by whole ones, and so do we
OTHERWISE = {
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}


@functools.cache
def cases() -> dict[str, Any]:
    """All cases by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts that overflow, on purpose
        return {case.name: case for kind in KINDS for case in load_model_tests(kind=kind)}


@functools.cache
def refused() -> dict[str, str]:
    """Reasons by name of case."""
    lines = REFUSED.read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines if line and not line.startswith("#"))


def data(case: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    """(model, sets of inputs and outputs)."""
    if case.model is not None:
        return case.model, [tuple([_array(x) for x in part] for part in pair) for pair in case.data_sets]
    if case.url:  # a network that people deploy, its weights replaced by constants so that it comes with the package
        from onnx.backend.test.runner import Runner

        file = Path(onnx.__file__).parents[1] / case.url
        model = onnx.load(file)
        known = {tensor.name for tensor in model.graph.initializer}
        inputs = [Runner.generate_dummy_data(x, name=case.name) for x in model.graph.input if x.name not in known]
        counts = range(len(model.graph.output))
        return model, [(inputs, [_array(onnx.load_tensor(f"{file.with_suffix('')}_output_{i}.pb")) for i in counts])]
    folder = Path(case.model_dir)
    sets = []
    for place in sorted(folder.glob("test_data_set_*")):
        parts = []
        for kind in ("input", "output"):
            count = len(list(place.glob(f"{kind}_*.pb")))
            parts.append([_array(onnx.load_tensor(str(place / f"{kind}_{i}.pb"))) for i in range(count)])
        sets.append((parts[0], parts[1]))
    return onnx.load(folder / "model.onnx"), sets


def _array(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def run(name: str, device: str = "CPU:portable") -> None:
    """Run a case through the backend.

    Raises:
        UserError: the model, or a value it is called with, is refused.
        AssertionError: a wrong result.
    """
    from colonnade.onnx_backend import prepare

    case = cases()[name]
    model, sets = data(case)
    prepared = prepare(model, device)
    for inputs, outputs in sets:
        found = prepared.run(inputs)
        assert len(found) == len(outputs)
        for ours, theirs in zip(found, outputs, strict=True):
            if isinstance(theirs, list):  # a sequence, handed through
                assert len(ours) == len(theirs)
                for one, other in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(one, other)
                continue
            theirs, rtol = np.asarray(theirs), case.rtol
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            if ours.dtype.name == "bfloat16":  # as the onnx package's own runner: two units in the last place
                ours, theirs, rtol = ours.astype(np.float32), theirs.astype(np.float32), max(rtol, 2**-6)
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=case.atol)


def reason(error: Exception) -> str:
    """What the list says of a refusal: without what to do, and without the node's name."""
    said = str(error).splitlines()[-1].split("; ")[0]
    return re.sub(r" (.[^ ]*.):", ":", said, count=1) if "'" in said else said


def _write() -> None:
    from colonnade.errors import UserError

    lines = ["# Cases of the onnx package's tests that are refused, never computed wrongly: name, tab, reason."]
    for name in sorted(cases()):
        try:
            run(name)
        except UserError as error:
            lines.append(f"{name}\t{reason(error)}")
    REFUSED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _write()
