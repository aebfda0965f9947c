"""A whole network on a modelled core, step by step: what layers take where their neighbours left the caches.

    python bench/riscv_whole.py MODEL.onnx [--model x60] [--threads 1] [--dtype f32] [--layers 20] [--db FILE]

Builds the model for `model:x60` (untuned where the database knows nothing) and runs one inference under the instrument,
the second of two. Prints modelled Mcycles of all steps together and of the slowest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import colonnade as cn
from colonnade import targets
from colonnade.bench.ours import Ours
from colonnade.bench.run import random_inputs
from colonnade.errors import run_script
from colonnade.machine import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--model", default="x60")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=20, help="slowest steps to print")
    parser.add_argument("--db", type=Path)
    parser.add_argument("--dtype", default="f32", help="f16: convolutions in float16 (COLONNADE_QEMU must know Zvfh)")
    options = parser.parse_args()
    place = f"model:{options.model}"
    mcycles = read(options.model).ghz / 1e6  # of a nanosecond
    with tempfile.TemporaryDirectory(prefix="colonnade-") as room:
        out, threads = Path(room) / "bundle", options.threads
        bundle = cn.build(options.network, place, threads=threads, db=options.db, dtype=options.dtype, out=out)
        runner = Ours(bundle, targets.parse(place), random_inputs(dict(bundle.manifest)), options.threads)
        steps = [step["name"] for step in bundle.manifest["steps"]]
        taken = [ns[-1] * mcycles for ns in runner.profile(1, 1)]
    print(f"{options.network}, modelled on {place}, {options.threads} core(s): {sum(taken):.1f} Mcycles")
    for value, name in sorted(zip(taken, steps, strict=True), reverse=True)[: options.layers]:
        print(f"{value:8.2f}  {name}")


if __name__ == "__main__":
    run_script(main)
