"""Every measurement ever taken, in SQLite: one row a visit to a candidate, failures included.

WAL mode and short transactions: several tuners may share a file, and what one has recorded survives its death.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from colonnade.errors import UserError
from colonnade.kernels.registry import Candidate
from colonnade.tune.measure import Measurement

FORMAT = 1
PATIENCE = 30.0  # seconds that others may keep the file locked
SCHEMA = """
create table if not exists measurement (
    id integer primary key,
    workload text not null, isa text not null, compiler text not null, machine text not null, threads integer not null,
    source text not null, candidate text not null, kernel text not null, params text not null,
    stage integer not null, outcome text not null, detail text not null, reps text not null, at real not null
);
create index if not exists measurement_place on measurement (workload, isa, compiler, machine, threads);
"""


def default_path() -> Path:
    """``$COLONNADE_DB``, else ``tuning.db`` in the user's data folder."""
    override = os.environ.get("COLONNADE_DB")
    return Path(override).expanduser() if override else platformdirs.user_data_path("colonnade") / "tuning.db"


@dataclass(frozen=True)
class Place:
    """Where measurements may be compared: same machine, compiler, ISA and number of threads."""

    machine: str
    compiler: str
    isa: str
    threads: int


@dataclass(frozen=True)
class Record:
    """One row: ``source`` is the digest of what was compiled and bound, ``stage`` that of the search."""

    candidate: str
    source: str
    stage: int
    measurement: Measurement


class Database:
    """The file at ``path``, made when it is not there. Raises ``UserError`` when it cannot be used."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # records that may only be read: SQLite would make files beside them, for others that write
            sealed = self.path.is_file() and not os.access(self.path.parent, os.W_OK)
            name = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1" if sealed else str(self.path)
            self._connection = sqlite3.connect(name, timeout=PATIENCE, isolation_level=None, uri=sealed)
            version = self._connection.execute("pragma user_version").fetchone()[0]
            # in WAL mode this still survives the death of the process; only a power cut may lose the last rows
            self._connection.execute("pragma synchronous = normal")
            if version not in (0, FORMAT):
                raise UserError(
                    f"{self.path}: tuning records of format {version}, expected {FORMAT}; choose another --db"
                )
            if version == 0:
                self._write_ahead()
                self._connection.executescript(f"begin immediate; {SCHEMA} pragma user_version = {FORMAT}; commit;")
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _write_ahead(self) -> None:
        """Change to WAL mode. SQLite waits for no lock here, where two who open a new file at once would wait for each
        other, so that is done here."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def add(
        self, workload: str, place: Place, candidate: Candidate, source: str, stage: int, result: Measurement
    ) -> None:
        """Record one visit; it is on disk (or in the operating system's hands) when this returns."""
        row = (
            workload, place.isa, place.compiler, place.machine, place.threads,
            source, candidate.key(), candidate.kernel, json.dumps(dict(candidate.params)),
            stage, result.outcome, result.detail, json.dumps(result.reps), time.time(),
        )  # fmt: skip
        marks = ",".join("?" * (len(row) + 1))
        try:
            self._connection.execute(f"insert into measurement values ({marks})", (None, *row))
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: cannot record a measurement ({error}); free some space or choose another --db"
            ) from error

    def records(self, workload: str, place: Place) -> list[Record]:
        """All rows of ``workload`` at ``place``, oldest first."""
        rows = self._read(
            "select candidate, source, stage, outcome, detail, reps from measurement"
            " where workload = ? and isa = ? and compiler = ? and machine = ? and threads = ? order by id",
            workload, place.isa, place.compiler, place.machine, place.threads,
        )  # fmt: skip
        try:
            return [Record(c, s, stage, Measurement(o, d, tuple(json.loads(r)))) for c, s, stage, o, d, r in rows]
        except (ValueError, TypeError) as error:  # not what `add` writes
            raise self._unusable(error) from error

    def keep(self, name: str, text: str) -> None:
        """Keep ``text`` under ``name``, in place of what was there."""
        try:
            self._connection.execute("create table if not exists note (name text primary key, text text not null)")
            self._connection.execute("insert or replace into note values (?, ?)", (name, text))
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error}); choose another --db") from error

    def note(self, name: str) -> str | None:
        """What was kept under ``name``."""
        if not self._read("select 1 from sqlite_master where name = 'note'"):
            return None
        rows = self._read("select text from note where name = ?", name)
        return str(rows[0][0]) if rows else None

    def count(self) -> int:
        """Rows in all."""
        return int(self._read("select count(*) from measurement")[0][0])

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows at once: what is damaged shows while they are fetched."""
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: cannot be used as tuning database ({error}); choose another --db")

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()
