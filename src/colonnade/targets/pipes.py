"""Reading what a child process says while it runs."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping
from typing import IO

LONGEST = 3600.0  # seconds of one wait; a system call takes so many milliseconds as an int holds


def drain(
    pipes: Mapping[IO[bytes], Callable[[bytes], None]], deadline: float, enough: Callable[[], bool] | None = None
) -> bool:
    """Hand out what comes through every pipe, in the order of its coming, until all have ended or ``enough()``.

    ``deadline``: on the clock of ``time.monotonic``, in seconds. False when it passed first.
    """
    with selectors.DefaultSelector() as selector:
        for pipe, take in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, take)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for ready, _ in selector.select(min(left, LONGEST)):
                if chunk := os.read(ready.fd, 1 << 17):
                    ready.data(chunk)
                else:
                    selector.unregister(ready.fileobj)
            if enough is not None and enough():
                break
    return True
