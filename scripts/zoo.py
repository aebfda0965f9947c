"""Networks end to end in kernels against onnxruntime, dense and pruned: `python scripts/zoo.py [NAME...]` prints rows.

The networks, their inputs and the comparison are those of `tests/test_models_zoo.py`; all of them if no name is given.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main(names: list[str]) -> None:
    """A row a network: side of its input, largest difference over largest magnitude for every sparsity."""
    from colonnade.pattern import ColumnPattern
    from colonnade.sparsify.onnx_file import prune_file
    from tests.models import torchvision_zoo
    from tests.test_models_zoo import LARGE, SMALL, SPARSITIES, check, network

    models = torchvision_zoo()
    print("| network | input | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |", flush=True)
    print("|---|---|" + "---|" * len(SPARSITIES), flush=True)
    for name in names or sorted(SMALL | LARGE):
        dense = network(models, name)
        errors = []
        for sparsity in SPARSITIES:
            model = dense
            if sparsity:
                with tempfile.TemporaryDirectory() as folder:
                    files = [Path(folder) / kind for kind in ("dense.onnx", "pruned.onnx")]
                    onnx.save(dense, files[0])
                    prune_file(files[0], files[1], ColumnPattern(sparsity))
                    model = onnx.load(files[1])
            errors.append(check(model))
        side = (SMALL | LARGE)[name]
        print(f"| {name} | {side} x {side} | " + " | ".join(f"{e:.1e}" for e in errors) + " |", flush=True)
        network.cache_clear()


if __name__ == "__main__":
    main(sys.argv[1:])
