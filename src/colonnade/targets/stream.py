"""One command over ssh: feeding it, reading it, and knowing whether all of its answer has come.

The far side marks its own lines on standard error with a secret word (``TOKEN word rest``); the last one is
``TOKEN end``. On standard output, the program's text begins behind the line ``TOKEN begin`` (a login shell may greet
before that) and the line ``TOKEN files`` parts it from raw bytes.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from colonnade.targets.pipes import drain


@dataclass(frozen=True)
class Reply:
    """``text``: standard output of the program, if one began; ``payload``: the bytes behind ``TOKEN files``;
    ``errors``: standard error without the marked lines; ``marks``: these, as (word, rest)."""

    text: str
    payload: bytes
    errors: str
    marks: tuple[tuple[str, str], ...]
    timed_out: bool

    @property
    def lost(self) -> bool:
        """Did it break off before its end?"""
        return not self.said("end")

    def said(self, word: str) -> bool:
        """Is there a mark ``word``?"""
        return any(w == word for w, _ in self.marks)

    def rests(self, word: str) -> list[str]:
        """What stands behind every mark ``word``."""
        return [rest for w, rest in self.marks if w == word]

    def last_error(self) -> str:
        """Last line of the errors."""
        return (self.errors.strip().splitlines() or [""])[-1].strip()


def exchange(
    process: subprocess.Popen[bytes],
    token: str,
    timeout: float,
    feed: Callable[[IO[bytes]], None] | None = None,
    on_line: Callable[[str], None] | None = None,
    hold: bool = False,
) -> Reply:
    """Read ``process`` to its end, at most ``timeout`` seconds; it is gone afterwards.

    ``feed`` writes its standard input, which is closed then; without it the input stays open until the end, and what
    runs there can tell by it that we live. ``on_line`` gets every whole line of the program's output as it comes.
    ``hold``: return at the mark ``end`` and leave the process as it is.
    """
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    feeder = threading.Thread(target=_fed, args=(process.stdin, feed), daemon=True) if feed is not None else None
    if feeder is not None:
        feeder.start()
    out = _Output(token, on_line)
    err = bytearray()
    deadline = time.monotonic() + timeout
    timed_out = held = False
    end = f"{token} end\n".encode()
    try:
        pipes = {process.stdout: out.add, process.stderr: err.extend}
        timed_out = not drain(pipes, deadline, lambda: hold and end in err)
        held = hold and end in err
        if not timed_out and not held:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
    finally:
        if not held:
            if feeder is None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process.poll() is None:
                process.kill()
                process.wait()
            if feeder is not None:  # its pipe has no reader any more
                feeder.join()
            process.stdout.close()
            process.stderr.close()
    marks, plain = [], []
    for line in err.decode(errors="replace").splitlines():
        if line.startswith(token + " "):
            word, _, rest = line[len(token) + 1 :].partition(" ")
            marks.append((word, rest))
        elif line.strip():
            plain.append(line)
    text, payload = out.finish()
    return Reply(text, payload, "\n".join(plain), tuple(marks), timed_out)


def _fed(pipe: IO[bytes], feed: Callable[[IO[bytes]], None]) -> None:
    # a reader that went away shows in what it says, or does not say
    with contextlib.suppress(OSError):
        feed(pipe)
    with contextlib.suppress(OSError):
        pipe.close()


class _Output:
    """Standard output, cut at both markers."""

    def __init__(self, token: str, on_line: Callable[[str], None] | None) -> None:
        self._begin, self._files, self._on_line = f"{token} begin".encode(), f"{token} files".encode(), on_line
        self._begun = False
        self._text = bytearray()
        self._payload = bytearray()
        self._line = 0  # where the first line that was not looked at begins
        self._parted = False
        self._empty = 0  # empty lines held back: the one before the marker is not the program's

    def add(self, chunk: bytes) -> None:
        if self._parted:
            self._payload += chunk
            return
        self._text += chunk
        while (end := self._text.find(b"\n", self._line)) >= 0:
            line = bytes(self._text[self._line : end])
            if line == self._begin and not self._begun:
                del self._text[: end + 1]
                self._begun, self._line, self._empty = True, 0, 0
                continue
            if line == self._files:
                self._payload += self._text[end + 1 :]
                del self._text[max(self._line - 1, 0) :]
                self._parted = True
                return
            self._line = end + 1
            if not line:
                self._empty += 1
            elif self._on_line is not None and self._begun:
                for _ in range(self._empty):
                    self._on_line("")
                self._empty = 0
                self._on_line(line.decode(errors="replace"))

    def finish(self) -> tuple[str, bytes]:
        return self._text.decode(errors="replace") if self._begun else "", bytes(self._payload)
