"""Candidates → measured on the target → recorded → chosen."""

from colonnade.tune.database import Database, default_path
from colonnade.tune.tuner import Choices, Summary, choose, tune

__all__ = ["Choices", "Database", "Summary", "choose", "default_path", "tune"]
