"""Timing a model against its dense self and other runtimes, in alternating blocks of one run."""
