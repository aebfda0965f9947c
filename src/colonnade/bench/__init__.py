"""Timing a model against its dense self and other runtimes, in alternating blocks of one run."""

from colonnade.bench.protocol import Block, Contender, Result, alternate
from colonnade.bench.report import layers, record, table

__all__ = ["Block", "Contender", "Result", "alternate", "layers", "record", "table"]
