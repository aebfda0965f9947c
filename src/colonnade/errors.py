"""The errors a user may see: one line that names what, where, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class ColonnadeError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with 1."""

    exit_code = 1


class UserError(ColonnadeError):
    """The user's input or option is at fault; the command line exits with 2."""

    exit_code = 2


class TargetError(ColonnadeError):
    """A target (machine, emulator, board) failed or went away."""


def say(text: str) -> None:
    """Tells the user what went wrong, in one line, whatever the text was made of."""
    print("error:", " ".join(text.split()), file=sys.stderr)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script of bench/ and ends the program: an error that was raised on purpose is one line, as of a verb."""
    try:
        code = main()
    except ColonnadeError as error:
        say(str(error))
        code = error.exit_code
    sys.exit(code)
