"""Modelled speed of riscv64 programs on cores nobody has at hand: an instrumented QEMU, and one data file a core."""

from colonnade.machine.instrument import Instrument, Report
from colonnade.machine.model import Model, Number, names, read

__all__ = ["Instrument", "Model", "Number", "Report", "names", "read"]
