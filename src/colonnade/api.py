"""The functions behind the verbs: what `import colonnade` offers beyond single pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.build.toolchain import Toolchain
from colonnade.bundle import Bundle, check_place, write_bundle
from colonnade.errors import UserError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Progress = Callable[[float, str], None]  # share done (0 .. 1), what is being measured
MAX_THREADS = 1024


def build(
    model: str | Path | ir.Model | onnx.ModelProto,
    target: str = "local",
    *,
    threads: int | None = None,
    cpus: str | None = None,
    isa: str | None = None,
    dtype: str = "f32",
    batch: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    outputs: Sequence[str] | None = None,
    out: str | Path | None = None,
    tune: bool = False,
    budget: float = 120.0,
    db: str | Path | None = None,
    cc: str = "zig",
    preprocess: str | Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Bundle:
    """Turn an ONNX model into a bundle for ``target``.

    Args:
        model: a file, or a model in memory.
        target: ``local``, ``qemu[:vlen=N]`` or ``ssh://user@host[:port]``.
        threads: what sessions use when they are not told, and what candidates are chosen for; by default one, on a
            board the cores of one cluster.
        cpus: cores of the target to tune on, as ``0-3,6``.
        isa: instruction set; the target's best one by default.
        dtype: ``f16``: convolutions and what stands between them in float16, on RISC-V with Zvfh; the model's inputs
            and outputs stay as they are.
        batch, input_shapes, outputs: as ``frontend.load``.
        out: the bundle's folder; ``NAME.bundle`` in the current one by default, NAME that of the model.
        tune: measure what the records lack first, for at most ``budget`` seconds.
        db: the tuning database, the user's own by default. Layers without records take the static ranking; the
            manifest's ``tuning`` says how many.
        cc: ``zig``, ``gcc``, ``clang`` or a path.
        preprocess: how photos become inputs (see ``colonnade.photo``): ``imagenet``, a JSON file, or its content.
        force: replace a bundle that is there.
        progress: hears how far tuning is.
        notice: hears a line before rare work that takes long.

    Raises:
        UserError: the model, an option or the place is at fault, or the target lacks ``isa``.
        TargetError: the target cannot be reached.
    """
    from colonnade import targets
    from colonnade import tune as tuning
    from colonnade.arranging import arranged
    from colonnade.frontend import imported
    from colonnade.photo import checked, preprocessing

    known = threads is None or (isinstance(threads, int) and not isinstance(threads, bool))
    if not known or (threads is not None and not 1 <= threads <= MAX_THREADS):
        raise UserError(f"threads {threads!r}: expected a whole number from 1 to {MAX_THREADS}")
    targets.check_dtype(dtype)
    machine_of = targets.parse(target)
    extra: dict[str, Any] = {}
    if isinstance(preprocess, str):
        extra["preprocess"] = preprocessing(preprocess)
    elif preprocess is not None:
        extra["preprocess"] = checked(preprocess, "preprocess")
    # what is quick to refuse is refused before anything long begins
    if out is not None:
        check_place(Path(out), force)
    steps = imported(model, batch=batch, input_shapes=input_shapes, outputs=outputs)
    if steps.cut:
        extra["left_to_the_host"] = steps.cut
    folder = Path(out) if out is not None else Path(re.sub(r"[^\w.-]+", "_", steps.name) + ".bundle")
    check_place(folder, force)

    machine_of, count = targets.settle(machine_of, threads, cpus)
    machine = machine_of.probe()
    chosen = machine.pick_isa(isa, dtype)
    toolchain = Toolchain(cc, notice=notice)
    records = Path(db) if db is not None else None
    made = arranged(steps, machine, chosen, records)
    if tune:
        tuning.tune(made, machine_of, chosen, count, budget, records, progress, toolchain)
    plan, choices = tuning.choose(made, chosen, machine, count, records, toolchain)
    extra["target"] = machine_of.name
    extra["tuning"] = choices.manifest()
    return write_bundle(
        plan,
        choices.candidates,
        chosen,
        folder,
        threads=count,
        arch=machine.arch,
        toolchain=toolchain,
        force=force,
        manifest_extra=extra,
    )
