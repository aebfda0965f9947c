"""What the method is worth on this x86-64 host: networks dense and pruned, beside what a user would pick instead.

    python bench/host.py [--data ../shared/data] [--models resnet50,…] [--stage prepare|measure|scaling]
        [--out FOLDER] [--quick]

Real weights (DenseNet-121: random ones) are exported to ONNX, pruned column-wise with T = 8 and grouped rows (every
convolution but stem and depthwise), tuned, built, and timed at 224x224 in alternating blocks of one run with the
peers, each of these in a process of its own on the *dense* file. bench/README.md has the protocol and what counts as
evidence. Exported and pruned files, tuning records and bundles are kept in a cache folder: ``--stage prepare`` makes
them, ``--stage measure`` takes them as they are, so that minutes of a quiet machine are enough, and ``--stage scaling``
those of ResNet-50 for batch 8 and two threads alone (seconds), with scaling.json. Writes host.json and host.md, other
networks' results in them stay; ``--quick`` is a rehearsal of the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import platformdirs
from host_tables import GOALS, MAIN, TILE, markdown, ms

from colonnade.arranging import arranged
from colonnade.bench.ours import Ours, difference
from colonnade.bench.peers import Peer
from colonnade.bench.protocol import Contender, Load, Result, alternate
from colonnade.bench.record import beside_dense, layers
from colonnade.bench.run import profiles, random_inputs
from colonnade.build.toolchain import Toolchain
from colonnade.bundle import Bundle, write_bundle
from colonnade.errors import ColonnadeError, run_script
from colonnade.frontend import imported
from colonnade.pattern import ColumnPattern
from colonnade.report.bundle import enrich
from colonnade.sparsify.onnx_file import prune_file
from colonnade.targets import Local
from colonnade.targets.peak import Peak, look, measure_peak
from colonnade.tune import tune

SCALED = "resnet50"  # the network that threads and batch are shown with
PEERS = ("onnxruntime", "openvino", "ncnn", "torch")
LOAD_TIMES = 9
MEMORY_SLACK = 20 * 10**6


@dataclass(frozen=True)
class Setting:
    """What one bundle is built for."""

    sparsity: float
    batch: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        """As contenders are called."""
        extra = (f", batch {self.batch}" if self.batch > 1 else "") + (
            f", {self.threads} threads" if self.threads > 1 else ""
        )
        return f"colonnade {self.sparsity:g} %{extra}"


class Networks:
    """ONNX files by network and sparsity, made when they are not in ``folder``."""

    def __init__(self, data: Path, folder: Path, group_rows: bool) -> None:
        self.data, self.folder, self.group_rows = data, folder, group_rows
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, network: str, sparsity: float) -> Path:
        """``sparsity`` in per cent, 0 for the dense network."""
        ending = f"-{sparsity:g}{'' if self.group_rows else '-consecutive'}" if sparsity else ""
        path = self.folder / f"{network}{ending}.onnx"
        if path.is_file():
            return path
        if sparsity:
            say(f"pruning {network} to {sparsity:g} %")
            pattern = ColumnPattern(sparsity / 100, tile=TILE)
            prune_file(self.file(network, 0), path, pattern, group_rows=self.group_rows)
        else:
            self._export(network, path)
        return path

    def _export(self, network: str, path: Path) -> None:
        import torch

        say(f"exporting {network}")
        module = self._module(network)
        example = (torch.zeros(1, 3, 224, 224),)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # beside the file: what `bench --vs torch` runs
            torch.export.save(torch.export.export(module, example), path.with_suffix(".pt2"))
            aside = path.with_name(f"new-{path.name}")
            program = torch.onnx.export(module, example, dynamo=True, verbose=False)
            assert program is not None
            program.save(str(aside), external_data=False)
        aside.replace(path)

    def _module(self, network: str) -> Any:
        import torch

        sys.path.insert(0, str(self.data / "loaders"))
        import weights

        if network == "densenet121":  # no real weights at hand: it stands for speed alone
            import torchvision

            torch.manual_seed(0)
            return torchvision.models.densenet121(weights=None).eval()
        loaders = {
            "resnet50": lambda: weights.resnet("pqf_resnet50_large"),
            "resnet18": lambda: weights.resnet("pqf_resnet18"),
            "mobilenet_v2": weights.mobilenet_v2,
        }
        return loaders[network]()


class Builder:
    """Tuned bundles for this machine, all records in one database. ``ready``: they are there, take them."""

    def __init__(self, networks: Networks, work: Path, budget_s: float, ready: bool = False, core: int = 0) -> None:
        self.core, self.cores = core, os.sched_getaffinity(0)
        self.networks, self.work, self.budget_s, self.ready = networks, work, budget_s, ready
        self.target, self.toolchain = Local(), Toolchain()
        self.machine = self.target.probe()
        self.isa = self.machine.pick_isa()
        self.notes: list[str] = []

    def bundle(self, network: str, setting: Setting) -> Bundle:
        """Tune what the records lack, and build."""
        folder = self.work / f"{network}-{setting.sparsity:g}-b{setting.batch}-t{setting.threads}"
        if self.ready:
            if not folder.is_dir():
                raise SystemExit(f"error: {folder}: no such bundle; make it by --stage prepare")
            return Bundle.load(folder)
        self.settle(setting.threads)
        database = self.networks.folder / "tuning.db"
        model = imported(self.networks.file(network, setting.sparsity), batch=setting.batch)
        plan = arranged(model, self.machine, self.isa, database).plan()
        say(f"tuning {network}: {setting.name}")
        found = tune(plan, self.target, self.isa, setting.threads, self.budget_s, database, None, self.toolchain)
        assert found.choices is not None
        if found.left:
            self.notes.append(f"{network}, {setting.name}: {found.left} layers not searched to the end")
        if found.unsettled:
            self.notes.append(f"{network}, {setting.name}: {found.unsettled} layers not settled inside the network")
        extra = {"tuning": found.choices.manifest(), "tune_s": found.seconds}
        return write_bundle(
            plan, found.choices.candidates, self.isa, folder,
            threads=setting.threads, toolchain=self.toolchain, force=True, manifest_extra=extra,
        )  # fmt: skip

    def settle(self, threads: int) -> None:
        """From now on, whatever is started runs on one and the same core, or on all where it has several threads: so
        the probes see what the contenders see."""
        os.sched_setaffinity(0, {self.core} if threads == 1 else self.cores)

    def prepare(self, network: str, sparsities: Sequence[float]) -> None:
        """All bundles that measuring ``network`` takes."""
        shown = MAIN if MAIN in sparsities else sparsities[-1]
        for setting in [*(Setting(s) for s in sparsities), *(self.others(shown) if network == SCALED else [])]:
            self.bundle(network, setting)

    def others(self, sparsity: float) -> list[Setting]:
        """What is measured beside batch 1 and one thread."""
        pair = [Setting(sparsity, threads=2)] if self.machine.cores >= 2 else []
        return [Setting(sparsity, batch=8), *pair]


def network_record(
    builder: Builder, network: str, sparsities: Sequence[float], vs: Sequence[str], blocks: int, block_s: float
) -> dict[str, Any]:
    """Everything about one network: single-threaded beside the peers, then batch and threads beside each other."""
    builder.settle(1)
    settings = [Setting(s) for s in sparsities]
    bundles = {s: builder.bundle(network, s) for s in settings}
    peak = peaks(builder, 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="colonnade-")))
        inputs = random_inputs(dict(bundles[settings[0]].manifest))
        ours = {s: Ours(b, builder.target, inputs, 1) for s, b in bundles.items()}
        np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
        contenders = [Contender(s.name, o) for s, o in ours.items()]
        dense_file = builder.networks.file(network, 0)
        refused: dict[str, str] = {}
        differences: dict[str, float] = {}
        for kind in vs:
            say(f"loading {network} into {kind}")
            try:
                peer = Peer(kind, dense_file, folder / "inputs.npz", 1)
            except ColonnadeError as error:
                refused[kind] = str(error)
                continue
            stack.callback(peer.close)
            contenders.append(Contender(kind, peer, peer.version, peer.options, peer.pid))
            if Setting(0.0) in ours:
                differences[kind] = difference(ours[Setting(0.0)].outputs(), peer.outputs())
        say(f"measuring {network}")
        results = alternate(contenders, peak, blocks, block_s)
        found = {r.contender.name: contender_record(r) for r in results}
        best_peak = best(results)
        rows = step_rows(ours, best_peak)
    # the session is loaded where nothing else is
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "contenders": found,
        "peers": [kind for kind in vs if kind in found],
        "refused": refused,
        "differences": differences,
        "peak_gflops": best_peak,
        "layers": {s.name: r for s, r in rows.items()},
        "kept_work_share": {
            s.name: kept_gflop(b) / (found[s.name]["ms"]["median"] / 1e3) / best_peak for s, b in bundles.items()
        },
        "load_ms": {s.name: median(load_times(b)) for s, b in bundles.items()},
        "memory": {s.name: memory(b) for s, b in bundles.items()},
    }
    dense = Setting(0.0)
    record["slower_than_dense"] = {
        s.name: beside_dense(*same_steps(rows[s], rows[dense])) for s in settings if s.sparsity and dense in rows
    }
    shown = Setting(MAIN) if Setting(MAIN) in bundles else settings[-1]
    if network == SCALED:
        record["scaling"] = scaling(builder, network, shown, bundles[shown], blocks, block_s)
    return record


def scaling(
    builder: Builder, network: str, base: Setting, bundle: Bundle, blocks: int, block_s: float
) -> dict[str, Any]:
    """Batch 8 and two threads beside batch 1 and one thread, in turns; images a second."""
    builder.settle(2)
    others = builder.others(base.sparsity)
    bundles = {base: bundle} | {s: builder.bundle(network, s) for s in others}
    contenders = [
        Contender(s.name, Ours(b, builder.target, random_inputs(dict(b.manifest)), s.threads))
        for s, b in bundles.items()
    ]
    # every core must be undisturbed, and turns are few: a contender with several threads sees the slowest of them
    results = alternate(contenders, peaks(builder, max(s.threads for s in bundles)), blocks, block_s)
    found = {}
    for setting, result in zip(bundles, results, strict=True):
        made = contender_record(result)
        made["images_per_s"] = setting.batch / made["ms"]["median"] * 1e3
        found[setting.name] = made
    rates = [found[s.name]["images_per_s"] / found[base.name]["images_per_s"] for s in others]
    return {"contenders": found, **dict(zip(("batch8", "threads2"), rates, strict=False))}


def step_rows(ours: Mapping[Setting, Ours], peak_gflops: float) -> dict[Setting, list[dict[str, Any]]]:
    """Rows of every build's steps, profiled in turns."""
    first = next(iter(ours.values())).bundle.manifest["isa"]
    limits = measure_peak(Local(), Local().probe().pick_isa(first), 1)
    peak = {"gflops": peak_gflops, "gbps": limits.gbps}
    taken = profiles({s.name: o for s, o in ours.items()})
    return {s: enrich(layers(o.bundle.manifest, taken[s.name], peak_gflops), peak) for s, o in ours.items()}


def same_steps(
    pruned: list[dict[str, Any]], dense: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both that belong together by name: builds may differ in their conversions."""
    known = {row["name"]: row for row in dense}
    pairs = [(row, known[row["name"]]) for row in pruned if row["name"] in known]
    return [a for a, _ in pairs], [b for _, b in pairs]


def contender_record(result: Result) -> dict[str, Any]:
    """One contender's figures and all that they stand on."""
    return {
        "version": result.contender.version,
        "options": dict(result.contender.options),
        "ms": result.summary(),
        "blocks": len(result.counted),
        "thrown_away": len(result.blocks) - len(result.counted),
        "disturbed": result.disturbed,
        "measured": [
            {
                "ns": list(b.ns),
                "peak": [b.before.gflops, b.after.gflops],
                "pace": [b.before.pace, b.after.pace],
                "handover": [b.before.handover, b.after.handover],
                "disturbance": b.disturbance,
            }
            for b in result.blocks
        ],
    }


def peaks(builder: Builder, threads: int) -> Callable[[], Peak]:
    """The probe around each block."""
    return lambda: look(builder.target, builder.isa, threads, builder.toolchain)


def best(results: Sequence[Result]) -> float:
    """The best peak seen around any block, GFLOP/s."""
    return max(max(b.before.gflops, b.after.gflops) for r in results for b in r.blocks)


def kept_gflop(bundle: Bundle) -> float:
    """10^9 operations on kept weights of one inference."""
    return float(2 * sum(step["kept_macs"] for step in bundle.manifest["steps"]) / 1e9)


LOADER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import session
start = time.perf_counter_ns()
opened = session.Session(sys.argv[1], threads=1)
print((time.perf_counter_ns() - start) / 1e6)
"""


def load_times(bundle: Bundle) -> list[float]:
    """ms from the call to a session that is ready, each in a fresh process that has imported numpy."""
    command = [sys.executable, "-c", LOADER, str(bundle.path.resolve())]
    return [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(LOAD_TIMES)]


# A program's largest size includes that of the process that started it, so a small one has to.
MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.argv[1], "--repeat", "3"], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def memory(bundle: Bundle) -> dict[str, float]:
    """Bytes: the largest resident size of the static program over a few inferences, and what is allowed."""
    command = [sys.executable, "-I", "-S", "-c", MEASURED, str(bundle.program.resolve())]
    peak = float(subprocess.run(command, capture_output=True, check=True).stdout)
    allowed = bundle.manifest["bytes"]["weights.bin"] + 1.3 * bundle.manifest["arena_bytes"] + MEMORY_SLACK
    return {"peak": peak, "allowed": float(allowed)}


def say(text: str) -> None:
    """Progress."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of weights and loaders")
    parser.add_argument("--models", default=",".join(GOALS))
    parser.add_argument("--vs", default=",".join(PEERS))
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("colonnade") / "bench-host")
    parser.add_argument("--out", type=Path, default=Path("build-out/host"), help="folder of host.json and host.md")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds a tuning may take")
    parser.add_argument("--blocks", type=int, default=6)
    stages = ("prepare", "measure", "scaling", "all")
    parser.add_argument("--stage", choices=stages, default="all", help="do only a part of it")
    parser.add_argument("--core", type=int, default=0, help="that everything on one thread runs on")
    parser.add_argument("--quick", action="store_true", help="rehearse: few sparsities, one short block, rough tuning")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - set(GOALS):
        parser.error(f"unknown model {min(unknown)}; known: {', '.join(GOALS)}")
    networks = Networks(options.data, options.cache, group_rows=not options.quick)
    load_before = Load()
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "quick": options.quick}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "host.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if before.get("quick") != options.quick:
        before = {}
    bundles = options.cache / ("bundles-quick" if options.quick else "bundles")
    bundles.mkdir(parents=True, exist_ok=True)
    ready, budget_s = options.stage in ("measure", "scaling"), 15.0 if options.quick else options.budget
    builder = Builder(networks, bundles, budget_s, ready, options.core)
    found |= {
        "machine": {k: getattr(builder.machine, k) for k in ("cpu", "arch", "kernel", "cores")},
        "isa": builder.isa.name, "compiler": builder.toolchain.version, "networks": before.get("networks", {}),
        "notes": builder.notes,
    }  # fmt: skip
    blocks, block_s = (1, 0.15) if options.quick else (options.blocks, 0.6)
    if options.stage == "scaling":
        base = Setting(MAIN)
        result = scaling(builder, SCALED, base, builder.bundle(SCALED, base), blocks, block_s)
        (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name, row in result["contenders"].items():
            say(f"{name}: {ms(row)} ms, {row['blocks']} of {row['blocks'] + row['thrown_away']} blocks")
        say(", ".join(f"{name} {result[name]:.3f}" for name in ("batch8", "threads2") if name in result))
        return
    for model in models:
        sparsities = [0.0, MAIN] if options.quick else [0.0, *(s for s in GOALS[model] if s)]
        if options.stage == "prepare":
            builder.prepare(model, sparsities)
            continue
        found["networks"][model] = network_record(builder, model, sparsities, options.vs.split(","), blocks, block_s)
        # what is known is kept, should a later network fail
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (options.out / "host.md").write_text(markdown(found), encoding="utf-8")
    foreign, _ = load_before.shares()
    own = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    say(f"other programs took {foreign:.0%} of a core over the whole run; ours {own:.0f} s; see {options.out}/host.md")


if __name__ == "__main__":
    run_script(main)
