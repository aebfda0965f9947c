"""Stands in for the ssh client: runs the command on this machine, in the folder of an imagined board.

The board is ``$FAKE_BOARD``: its ``home``, a ``bin`` in front of PATH, a ``log`` of what was asked, and files that
spoil things: ``say`` (its text is the client's error, nothing runs), ``cut`` (seconds until the connection breaks),
``greet`` (what its login shell prints before any command).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> int:
    board = Path(os.environ["FAKE_BOARD"])
    words = sys.argv[1:]
    at = words.index("--")
    host, command = words[at + 1], words[at + 2]
    with (board / "log").open("a") as log:
        log.write(f"{' '.join(words[:at])} | {host} | {command!r}\n")
    if (board / "say").exists():
        print((board / "say").read_text(), file=sys.stderr)
        return 255
    if (board / "greet").exists():
        print((board / "greet").read_text(), end="", flush=True)
    environment = {"HOME": str(board / "home"), "PATH": f"{board / 'bin'}:{os.environ['PATH']}"}
    child = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, cwd=board / "home", env=environment)
    assert child.stdin is not None
    pipe = child.stdin

    def relay() -> None:
        while chunk := os.read(0, 1 << 16):
            try:
                pipe.write(chunk)
                pipe.flush()
            except OSError:
                return
        pipe.close()

    threading.Thread(target=relay, daemon=True).start()
    if (board / "cut").exists() and "ControlMaster=no" in words:
        time.sleep(float((board / "cut").read_text()))
        print("client_loop: send disconnect: Broken pipe", file=sys.stderr, flush=True)
        os._exit(255)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
