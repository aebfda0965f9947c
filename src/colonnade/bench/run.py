"""The whole of ``colonnade bench``: build what is not built, load the peers, measure in turns, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colonnade.bench import boards
from colonnade.bench.ours import Ours, difference
from colonnade.bench.peers import Peer, check_known
from colonnade.bench.protocol import BLOCK_S, BLOCKS, Contender, alternate
from colonnade.bench.record import beside_dense, layers, record
from colonnade.build.toolchain import Toolchain
from colonnade.bundle import Bundle, write_bundle
from colonnade.errors import UserError
from colonnade.kernels import registry
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.plan import Plan, Variants
from colonnade.targets.base import DTYPES, Machine, Target, check_dtype
from colonnade.targets.peak import Peak, look, measure_peak
from colonnade.tune.database import Database
from colonnade.tune.tuner import Chooser, place
from colonnade.tune.variants import settle

Progress = Callable[[float, str], None]
PROFILES = 5  # of each of our builds, in turns


def dense_self(operands: registry.Operands, isa: Isa, threads: int) -> list[Candidate]:
    """The step's candidates that ignore the pattern; all of them where there is none to ignore."""
    found = registry.candidates(operands, isa, threads)
    return [c for c in found if c.params.get("dense")] or found


def pruned(plan: Plan) -> bool:
    """Is there a layer whose weights have a pattern?"""
    return any(getattr(s.workload, "kept_macs", s.workload.macs) < s.workload.macs for s in plan.steps)


def build_both(
    model: Variants, machine: Machine, isa: Isa, threads: int, folder: Path, db: Path | None, toolchain: Toolchain
) -> tuple[dict[str, Bundle], list[str]]:
    """The model as it is and, if it is pruned, its dense self: bundles by name, and remarks on missing tuning."""
    database = Database(db)
    bundles, notes = {}, []
    try:
        spot = place(machine, isa, threads, toolchain)
        plan = settle(model, Chooser(database, spot, isa))
        builds = {"colonnade": registry.candidates}
        if pruned(plan):
            builds = {"colonnade pruned": registry.candidates, "colonnade dense": dense_self}
        for name, candidates in builds.items():
            choices = Chooser(database, spot, isa, candidates).choose(plan)
            if choices.untuned:
                notes.append(f"{name}: {choices}; `colonnade tune` first gives the best times")
            to = folder / name.replace(" ", "-")
            bundles[name] = write_bundle(
                plan, choices.candidates, isa, to, threads=threads, arch=machine.arch, toolchain=toolchain
            )
    finally:
        database.close()
    return bundles, notes


def random_inputs(manifest: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The same arrays at every call: normal for floats, 0 … 255 for bytes, 0 and 1 for wider integers (ids, masks)."""
    rng = np.random.default_rng(0)
    arrays = {}
    for port in manifest["inputs"]:
        kind = np.dtype(port.get("type") or port.get("dtype") or "float32")
        shape = port["shape"]
        limit = 256 if kind.itemsize == 1 else 2  # tables of ids have at least two rows, whatever they are
        values = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, limit, shape)
        arrays[port["name"]] = values.astype(kind)
    return arrays


def bench(
    model: Path,
    target: Target,
    threads: int = 1,
    vs: Sequence[str] = (),
    isa: str | None = None,
    dtype: str = "f32",
    batch: int | None = None,
    db: Path | None = None,
    blocks: int = BLOCKS,
    toolchain: Toolchain | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time ``model`` (ONNX file or bundle) on ``target`` beside the runtimes ``vs``; the record of ``report.record``.

    A pruned ONNX model is built twice, as it is and ignoring its pattern. Raises ``UserError`` for a model, runtime
    or option that does not fit, ``TargetError`` when the target fails.
    """
    if target.untimed:
        raise UserError(f"{target.name}: {target.untimed}; bench a machine of its own (local or ssh://...)")
    check_dtype(dtype)
    local = target.name == "local"
    for kind in vs:
        check_known(kind) if local else boards.check_known(kind)
    toolchain = toolchain or Toolchain()
    machine = target.probe()
    notes: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="colonnade-")))
        if progress is not None:
            progress(0.0, "building")
        if model.is_dir():
            if dtype != DTYPES[0]:
                raise UserError(f"{model}: a bundle has its own dtype; --dtype needs the ONNX file")
            if vs:
                raise UserError(f"{model}: --vs needs the ONNX file, other runtimes cannot run a bundle")
            bundle = Bundle.load(model)
            chosen = machine.pick_isa(bundle.manifest["isa"], timed=True)
            bundles = {"colonnade": bundle}
        else:
            from colonnade.arranging import arranged
            from colonnade.frontend import imported

            chosen = machine.pick_isa(isa, dtype, timed=True)
            made = arranged(imported(model, batch=batch), machine, chosen, db)
            bundles, notes = build_both(made, machine, chosen, threads, folder, db, toolchain)
        inputs = random_inputs(dict(next(iter(bundles.values())).manifest))
        ours = {name: Ours(bundle, target, inputs, threads) for name, bundle in bundles.items()}
        contenders = [
            Contender(name, o, _version(), {"isa": chosen.name, "threads": threads}) for name, o in ours.items()
        ]
        np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
        answers = {name: o.outputs() for name, o in ours.items()}
        differences: dict[str, float] = {}
        for kind in vs:
            if progress is not None:
                progress(0.0, f"loading {kind}")
            if not local:
                there = boards.BoardPeer(kind, model.resolve(), folder / "inputs.npz", threads, target, folder)
                contenders.append(Contender(kind, there, there.version, there.options))
                differences[kind] = difference(next(iter(answers.values())), there.outputs())
                continue
            peer = Peer(kind, model.resolve(), folder / "inputs.npz", threads)
            stack.callback(peer.close)
            contenders.append(Contender(kind, peer, peer.version, peer.options, peer.pid))
            differences[kind] = difference(next(iter(answers.values())), peer.outputs())

        # a modelled core is never disturbed, and repeats itself; a second of it takes minutes
        modelled = bool(target.modelled)
        if modelled and progress is not None:
            progress(0.0, "modelling the limits")
        limits: Peak = measure_peak(target, chosen, threads, toolchain)

        def peak() -> Peak:
            return limits if modelled else look(target, chosen, threads, toolchain)

        rounds, block_s = (1, 0.0) if modelled else (blocks, BLOCK_S)
        results = alternate(contenders, peak, rounds, block_s, local=local, progress=progress)
        best = max(limits.gflops, *(max(b.before.gflops, b.after.gflops) for r in results for b in r.blocks))
        rows = {
            name: layers(ours[name].bundle.manifest, ns, best, name.endswith("dense"))
            for name, ns in profiles(ours, modelled).items()
        }
        if len(rows) == 2:
            slower = beside_dense(rows["colonnade pruned"], rows["colonnade dense"])
            verdict = f"slower than their dense selves: {', '.join(slower)}" if slower else "slower than its dense self"
            notes.append(f"{len(slower) or 'no'} pruned layer{'s' * (len(slower) > 1)} {verdict}")
        for result in results:
            if away := [b.disturbance for b in result.blocks if b.disturbance]:
                what = "all blocks were disturbed, its figures are unreliable" if result.disturbed else "thrown away"
                notes.append(f"{result.contender.name}: {len(away)} disturbed blocks ({away[0]}, …): {what}")
    return record(
        model.name,
        machine,
        chosen.name if dtype == DTYPES[0] else f"{chosen.name} {dtype}",
        threads,
        (best, limits.gbps),
        results,
        rows,
        differences,
        notes,
    )


def profiles(ours: Mapping[str, Ours], modelled: bool = False) -> dict[str, list[list[int]]]:
    """ns of every step and repetition of each build, in turns, so that their layers can be compared; of a modelled
    core, which repeats itself, one repetition."""
    rounds, warmup, repeat = (1, 1, 1) if modelled else (PROFILES, 2, 6)
    taken: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, build in ours.items():
            ns = build.profile(warmup, repeat)
            known = taken.setdefault(name, [[] for _ in ns])
            for step, more in zip(known, ns, strict=True):
                step += more
    return taken


def _version() -> str:
    from importlib.metadata import version

    return version("colonnade")
