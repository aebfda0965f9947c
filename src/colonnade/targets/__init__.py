"""Machines one can build for and run on: ``parse`` turns the command line's text into one."""

from dataclasses import replace

from colonnade.errors import UserError
from colonnade.targets import probe
from colonnade.targets.base import DTYPES, Cache, Machine, Outcome, Target, check_dtype
from colonnade.targets.local import Local, on_cores
from colonnade.targets.qemu import Qemu
from colonnade.targets.ssh import Ssh

__all__ = [
    "DTYPES", "Cache", "Local", "Machine", "Outcome", "Qemu", "Ssh", "Target", "check_dtype", "on_cores",
    "parse", "settle",
]  # fmt: skip

FORMS = "local, qemu[:vlen=256], model:x60, ssh://user@host[:port]"


def parse(text: str) -> Target:
    """The target that ``text`` names. Raises ``UserError`` when there is none."""
    if text == "local":
        return Local()
    if text == "qemu" or text.startswith("qemu:"):
        return Qemu.parse(text)
    if text.startswith("model:"):
        from colonnade.targets.model import Modelled  # it stands on the instrument, which stands on this package

        return Modelled.parse(text)
    if text.startswith("ssh://"):
        return Ssh.parse(text)
    raise UserError(f"unknown target {text!r}; expected one of: {FORMS}")


def settle(target: Target, threads: int | None = None, cpus: str | None = None) -> tuple[Target, int]:
    """How many threads, and on which cores: ``target`` kept on them, and the number.

    ``cpus`` as ``0-3,6``. On a board the default is one cluster, whose cores share a cache (more clusters for more
    threads than it has); elsewhere one thread on any core. Raises ``UserError`` for cores that are not there.
    """
    if cpus is None and not isinstance(target, Ssh):
        return target, threads or 1
    if not isinstance(target, (Local, Ssh)):
        raise UserError(f"--cpus {cpus}: {target.name} has no cores of its own to choose from")
    machine = target.probe()
    cores = sorted({core for cluster in machine.clusters for core in cluster})
    if cpus is not None:
        try:
            wanted = tuple(sorted(set(probe.cpu_list(cpus))))
        except ValueError:
            wanted = ()
        if not wanted or not set(wanted) <= set(cores):
            raise UserError(f"--cpus {cpus}: expected some of the cores {','.join(map(str, cores))}, such as 0-3")
        if threads is not None and threads > len(wanted):
            raise UserError(f"--threads {threads}: more than the {len(wanted)} cores of --cpus {cpus}")
        threads = threads or len(wanted)
    else:
        threads = threads or len(machine.clusters[0])
        wanted = ()
        for cluster in machine.clusters:
            if len(wanted) < threads:
                wanted += cluster
    if isinstance(target, Local):
        return replace(target, cpus=wanted), threads
    target.cpus, target.chosen = wanted, cpus is not None
    return target, threads
