"""Content-addressed files in the user's cache folder: what was compiled once is not compiled again.

An entry is one file named by a digest of everything that decides its content. It appears by an atomic rename, so two
processes may fill the same entry. The least recently used ones go when the folder passes its size limit.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from colonnade.errors import UserError

LIMIT = 1 << 30  # bytes
FRESH = 3600.0  # seconds during which an entry is safe from eviction: its user may not have copied it yet


def root() -> Path:
    """The cache folder: ``$COLONNADE_CACHE``, else the user's cache folder of the platform."""
    override = os.environ.get("COLONNADE_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("colonnade")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing at ``path`` into one line. Raises ``UserError`` for ``OSError``."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> UserError:
    """The line for an ``OSError`` met while writing at ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free some space or write elsewhere")
    if error.errno == errno.EFBIG:
        return UserError(f"{path}: larger than this file system or process may write")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path}: no permission to write there; choose another place")
    return UserError(f"{path}: cannot be written: {error.strerror or error}")


@dataclass(frozen=True)
class Entry:
    """One file of the cache: its size in bytes and when it was last used, in seconds since the epoch."""

    path: Path
    size: int
    used: float


class Cache:
    """Files by digest under ``folder``; ``limit`` in bytes."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = (folder or root()) / "objects"
        self.limit = limit

    def _place(self, digest: str, suffix: str) -> Path:
        return self.folder / digest[:2] / f"{digest[2:]}{suffix}"

    def get(self, digest: str, suffix: str) -> Path | None:
        """The entry's file, marked as used now, or None."""
        path = self._place(digest, suffix)
        if not path.is_file():
            return None
        with suppress(OSError):  # a cache that may only be read still serves
            os.utime(path)
        return path

    def put(self, digest: str, suffix: str, made: Path) -> Path:
        """Copy the file ``made`` into the cache and return its place. Raises ``UserError`` if it cannot be written."""
        path = self._place(digest, suffix)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            os.close(handle)
            try:
                shutil.copyfile(made, aside)
                shutil.copymode(made, aside)
                Path(aside).replace(path)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise
        self.evict()
        return path

    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""
        found = []
        for path in self.folder.glob("??/*"):
            with suppress(FileNotFoundError):  # another process may clear it meanwhile
                status = path.stat()
                found.append(Entry(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, str(entry.path)))

    def evict(self) -> None:
        """Remove the least recently used entries until the rest fits the limit; those in use now stay."""
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit or entry.used > time.time() - FRESH:
                return
            with suppress(OSError):
                entry.path.unlink()
                total -= entry.size

    def clear(self) -> int:
        """Remove everything, also the C libraries that the compiler built. Returns bytes freed."""
        folders = [self.folder, self.folder.parent / "zig"]
        freed = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
        for folder in folders:
            if folder.exists():
                with writing(folder):
                    shutil.rmtree(folder)
        return freed
