"""Machines one can build for and run on: ``parse`` turns the command line's text into one."""

from colonnade.errors import UserError
from colonnade.targets.base import Cache, Machine, Outcome, Target
from colonnade.targets.local import Local
from colonnade.targets.qemu import Qemu
from colonnade.targets.ssh import Ssh

__all__ = ["Cache", "Local", "Machine", "Outcome", "Qemu", "Ssh", "Target", "parse"]

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
