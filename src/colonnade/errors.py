"""The errors a user may see: one line that names what, where, and what to do."""


class ColonnadeError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with 1."""

    exit_code = 1


class UserError(ColonnadeError):
    """The user's input or option is at fault; the command line exits with 2."""

    exit_code = 2


class TargetError(ColonnadeError):
    """A target (machine, emulator, board) failed or went away."""
