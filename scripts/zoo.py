"""Networks end to end in kernels against onnxruntime, dense and pruned, as rows of a table.

    python scripts/zoo.py [NAME...]              on this machine, in this process; all networks if no name is given
    python scripts/zoo.py --emulated [NAME...]   as a bundle for riscv64 under QEMU, at two vector lengths
    python scripts/zoo.py --timm ...             those of the package timm, which the tests do not need

The networks, their inputs and the comparison are those of `tests/zoo.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
VLENS = (128, 256)


def host(name: str) -> list[str]:
    """Cells: MACs of the dense network, largest difference over largest magnitude by sparsity."""
    from colonnade import frontend
    from tests.zoo import SPARSITIES, ZOO, ZOO_OF_TIMM, model_of, on_host, pruned

    network = (ZOO | ZOO_OF_TIMM)[name]
    dense, cells = model_of(name, network.side), []
    for sparsity in SPARSITIES:
        with tempfile.TemporaryDirectory() as folder:
            model = pruned(dense, sparsity, Path(folder), network.quick)
        plan = frontend.load(model)
        if not sparsity:
            cells = [network.input, f"{sum(step.workload.macs for step in plan.steps) / 1e6:,.0f}"]
        cells.append(f"{on_host(model, plan, network.feeds(plan, network.side)):.1e}")
    return cells


def under_qemu(name: str) -> list[str]:
    """Cells: by vector length, the same for dense / 50 % / 75 %."""
    from tests.zoo import SPARSITIES, ZOO, ZOO_OF_TIMM, emulated, model_of, pruned

    network = (ZOO | ZOO_OF_TIMM)[name]
    dense, errors = model_of(name, network.emulated), []
    for sparsity in SPARSITIES:
        with tempfile.TemporaryDirectory() as folder:
            model = pruned(dense, sparsity, Path(folder), network.quick)
            errors.append(emulated(name, model, Path(folder), VLENS))
    columns = [" / ".join(f"{error:.1e}" for error in column) for column in zip(*errors, strict=True)]
    return [network.smallest, *columns]


def main() -> None:
    """A row a network; one that fails says why and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--timm", action="store_true")
    given = parser.parse_args()
    from tests.zoo import SPARSITIES, ZOO, ZOO_OF_TIMM

    zoo = ZOO_OF_TIMM if given.timm else ZOO
    by_sparsity = [f"{s:.0%}" for s in SPARSITIES]
    heads = ["input", *(f"VLEN {v}" for v in VLENS)] if given.emulated else ["input", "MMAC", *by_sparsity]
    names = [f"timm {name}" if given.timm and name not in zoo else name for name in given.names] or list(zoo)
    if unknown := [name for name in names if name not in zoo]:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(zoo)}")
    print("| network | from | " + " | ".join(heads) + " |", flush=True)
    print("|---|---|" + "---|" * len(heads), flush=True)
    failed = False
    for name in names:
        try:
            cells = under_qemu(name) if given.emulated else host(name)
        except Exception as error:  # whatever a network makes fail
            cells, failed = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"], True
        print(f"| {name} | {zoo[name].source} | " + " | ".join(cells) + " |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
