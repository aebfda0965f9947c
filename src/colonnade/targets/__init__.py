"""Machines one can build for and run on: ``parse`` turns the command line's text into one."""

from colonnade.errors import UserError
from colonnade.targets.base import Cache, Machine, Outcome, Target
from colonnade.targets.local import Local
from colonnade.targets.qemu import Qemu

__all__ = ["Cache", "Local", "Machine", "Outcome", "Qemu", "Target", "parse"]

FORMS = "local, qemu[:vlen=256], ssh://user@host[:port]"


def parse(text: str) -> Target:
    """The target that ``text`` names. Raises ``UserError`` when there is none."""
    if text == "local":
        return Local()
    if text == "qemu" or text.startswith("qemu:"):
        return Qemu.parse(text)
    if text.startswith("ssh://"):
        raise UserError(f"target {text!r} is not available in this version; use local or qemu")
    raise UserError(f"unknown target {text!r}; expected one of: {FORMS}")
