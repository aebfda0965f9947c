"""`colonnade tune`, `colonnade probe`, `colonnade cache`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from colonnade.errors import UserError

cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

TARGETS = "local | qemu[:vlen=N] | ssh://user@host[:port] | model:CORE (a modelled core, such as x60)"
Target = Annotated[str, typer.Option("--target", metavar="T", help=TARGETS)]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, help="Threads; one by default, on a board a cluster's cores."),
]
Cpus = Annotated[str | None, typer.Option("--cpus", metavar="0-3,6", help="Cores to use, as the target numbers them.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="f32|f16", help="What convolutions compute with.")]
IsaName = Annotated[str | None, typer.Option("--isa", help="Instruction set; the machine's best one by default.")]
Db = Annotated[Path | None, typer.Option("--db", help="Tuning database; in the user's data folder by default.")]
Compiler = Annotated[str, typer.Option("--cc", help="C compiler: zig, gcc, clang or a path.")]


def seconds(text: str) -> float:
    """``120s``, ``2m``, ``90`` → seconds. Raises ``UserError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if match is None:
        raise UserError(f"--budget {text}: expected a time such as 120s or 2m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]]


def tune(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    target: Target = "local",
    threads: Threads = None,
    cpus: Cpus = None,
    isa: IsaName = None,
    dtype: Dtype = "f32",
    budget: Annotated[str, typer.Option("--budget", help="Time to measure for, such as 120s.")] = "120s",
    db: Db = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Batch size where the model leaves it open.")
    ] = None,
    cc: Compiler = "zig",
) -> None:
    """Measure the candidates for every layer on the target, and record them for `build`."""
    limit = seconds(budget)
    from rich.console import Console

    from colonnade import targets
    from colonnade.arranging import arranged
    from colonnade.build.toolchain import Toolchain
    from colonnade.frontend import imported
    from colonnade.tune import tune as measure

    console = Console(stderr=True, markup=False)
    targets.check_dtype(dtype)
    machine_of = targets.parse(target)
    steps = imported(model, batch=batch)
    machine_of, count = targets.settle(machine_of, threads, cpus)
    machine = machine_of.probe()
    chosen_isa = machine.pick_isa(isa, dtype, timed=True)
    toolchain = Toolchain(cc, notice=console.print)
    made = arranged(steps, machine, chosen_isa, db)
    with bar(console, "tuning") as progress:
        summary = measure(made, machine_of, chosen_isa, count, limit, db, progress, toolchain)
    choices = summary.choices
    assert choices is not None
    for line in summary.failures:
        console.print(f"never chosen: {line}", highlight=False)
    if summary.measured:
        typer.echo(
            f"{summary.measured} measurements of {summary.workloads - summary.known} workloads in "
            f"{summary.seconds:.0f} s; "
            f"{summary.known} of {summary.workloads} were known; {choices}"
        )
    else:
        typer.echo(f"{summary.known} of {summary.workloads} workloads were known, nothing was measured; {choices}")
    if modelled := machine_of.modelled:
        typer.echo(f"all times are {modelled}, none is measured")
    if summary.walks:
        typer.echo(f"the leaders of every layer met in {summary.walks} runs of the whole network")
    if choices.dense_instead:
        typer.echo(f"{choices.dense_instead} pruned layers run dense: measured in turns, that is faster here")
    if summary.left or summary.unsettled:
        what = f"{summary.left} workloads are not searched to the end" if summary.left else ""
        what += " and " * bool(summary.left and summary.unsettled)
        what += f"{summary.unsettled} not settled inside the network" if summary.unsettled else ""
        typer.echo(f"{what}: run again, or give a larger --budget")


class bar:
    """A progress bar as context: yields the callable that ``tune.tune`` reports to."""

    def __init__(self, console: object, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        assert isinstance(console, Console)
        name, at = (TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[at]"))
        columns = (name, BarColumn(), TimeElapsedColumn(), at)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(title, total=1.0, at="")

    def __enter__(self) -> bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: float, text: str) -> None:
        """Show that ``done`` (0 .. 1) of the work is over and ``text`` is at hand."""
        self._progress.update(self._task, completed=done, at=text[:48])


def probe(
    target: Annotated[str, typer.Argument(metavar="T", help=TARGETS)] = "local",
    peak: Annotated[bool, typer.Option("--peak", help="Measure multiply-adds and memory bandwidth too.")] = False,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Measure what moving data costs, and build by that from now on.")
    ] = False,
    db: Db = None,
) -> None:
    """Tell what a target has: ISA, caches, cores, memory."""
    from colonnade import targets

    place = targets.parse(target)
    machine = place.probe()
    clusters = "; ".join(",".join(map(str, cluster)) for cluster in machine.clusters)
    caches = ", ".join(f"L{c.level} {c.kind} {size_text(c.size)} (line {c.line})" for c in machine.caches)
    vectors = f"; vlenb {machine.vlenb} ({machine.vlenb * 8} bits)" if machine.vlenb else ""
    lines = {
        "target": place.name,
        **({"board": machine.model} if machine.model else {}),
        "machine": f"{machine.cpu} ({machine.arch}), Linux {machine.kernel}",
        "ISAs": ", ".join(isa.name for isa in machine.isas) + vectors,
        **({"ISA string": machine.isa_text} if machine.isa_text else {}),
        "cores": f"{machine.cores} in clusters {clusters}",
        "caches": caches or "unknown",
        "memory": f"{size_text(machine.memory_free)} free of {size_text(machine.memory)}",
        "governor": machine.governor or "none",
        **({"temperature": f"{machine.temperature:.0f} °C"} if machine.temperature else {}),
    }
    if peak:
        from colonnade.targets.peak import measure_peak

        for threads in sorted({1, machine.cores}):
            found = measure_peak(place, machine.isas[0], threads)
            lines[f"peak, {threads} thr."] = f"{found.gflops:.0f} GFLOP/s f32, {found.gbps:.1f} GB/s read"
    if layouts:
        from dataclasses import asdict

        from colonnade.bench.layouts import measure

        costs = asdict(measure(place, machine.pick_isa(), db))
        label = place.modelled
        lines["layout costs"] = ", ".join(f"{name} {ns:.4f}" for name, ns in costs.items()) + f" ns {label}".rstrip()
    for name, value in lines.items():
        typer.echo(f"{name:<13} {value}")


@cache.command("list")
def cache_list(db: Db = None) -> None:
    """What is kept, and where."""
    from colonnade.build.cache import Cache
    from colonnade.tune.database import Database, default_path

    store = Cache()
    entries = store.entries()
    typer.echo(f"compiled  {len(entries)} files, {size_text(sum(e.size for e in entries))}, {store.folder}")
    path = db or default_path()
    if not path.is_file():
        typer.echo(f"tuned     nothing, {path}")
        return
    database = Database(path)
    typer.echo(f"tuned     {database.count()} measurements, {size_text(path.stat().st_size)}, {path}")
    database.close()


@cache.command("clear")
def cache_clear(
    records: Annotated[bool, typer.Option("--records", help="Forget all measurements too.")] = False,
    db: Db = None,
) -> None:
    """Remove what was compiled; measurements stay unless --records is given."""
    from colonnade.build.cache import Cache, writing
    from colonnade.tune.database import default_path

    typer.echo(f"freed {size_text(Cache().clear())}")
    path = db or default_path()
    if records and path.is_file():
        with writing(path):
            for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
                file.unlink(missing_ok=True)
        typer.echo(f"forgot {path}")


def size_text(size: float) -> str:
    """Bytes for people: ``1.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
