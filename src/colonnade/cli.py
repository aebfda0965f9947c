"""The verbs of the command line.

Only the verb that was asked for is imported, so `colonnade --help` answers at once. Errors end here: what the user
can mend is one line and exit code 2, what is our fault one line and 1 (`--verbose` adds the traceback), Ctrl-C 130.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from colonnade.errors import ColonnadeError, UserError, say


class Verb(NamedTuple):
    """Where a verb lives, and its line in `colonnade --help`. ``attribute``: a function or a ``typer.Typer``."""

    module: str
    attribute: str
    help: str


VERBS = {
    "demo": Verb("colonnade.cli_demo", "demo", "The whole road on bundled real data, in a few minutes."),
    "inspect": Verb("colonnade.cli_inspect", "inspect", "List layers, and what can be pruned."),
    "prune": Verb("colonnade.cli_prune", "prune", "Prune an ONNX model column-wise; the result is plain ONNX."),
    "plan": Verb("colonnade.cli_fit", "plan", "Choose what every layer loses, for a latency; `prune --plan` takes it."),
    "fit": Verb(
        "colonnade.cli_fit", "fit", "All in one: a frontier of ready bundles, the one that meets a budget marked."
    ),
    "finetune": Verb("colonnade.cli_finetune", "finetune", "Train a pruned torch model further, its zeros frozen."),
    "tune": Verb("colonnade.cli_tune", "tune", "Measure the candidates for every layer on the target."),
    "build": Verb("colonnade.cli_build", "build", "Turn an ONNX model into a native bundle."),
    "run": Verb("colonnade.cli_build", "run", "Run a bundle on arrays or a photo."),
    "bench": Verb("colonnade.cli_bench", "bench", "Time a model or bundle, and other runtimes beside it."),
    "report": Verb("colonnade.cli_report", "report", "Tell what ran in a bundle, how fast, how far from the limit."),
    "cache": Verb("colonnade.cli_tune", "cache", "List or clear what was compiled and measured."),
    "probe": Verb("colonnade.cli_tune", "probe", "Tell what a target has: ISA, caches, cores."),
    "doctor": Verb("colonnade.cli_doctor", "doctor", "Tell what is missing on this machine, and how to get it."),
}

# What a missing module is called on the shelf: the extra that brings it.
EXTRAS = {
    "torch": "train",
    "accelerate": "train",
    "safetensors": "train",
    "PIL": "photo",
    "sklearn": "demo",
    "onnxruntime": "calibrate",
    "openvino": "bench",
    "ncnn": "bench",
    "pnnx": "bench",
    "plotly": "report",
}

# The operating system's refusals that the user can mend.
_USERS_ERRNO = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC,
    errno.EDQUOT, errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip


def _stub() -> None:
    raise AssertionError("a verb that was not loaded cannot run")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"colonnade {version('colonnade')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks; may stand after the verb too.")] = False,
) -> None:
    """Prune trained CNNs column-wise, N of every M inside tiles of rows, and build the fastest native program."""


def application(verb: str | None) -> typer.Typer:
    """The command line with ``verb`` loaded and the others as their help lines only."""
    # Plain help: importing rich for its boxes would cost more than all the rest of `--help`.
    app = typer.Typer(name="colonnade", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_options)
    for name, entry in VERBS.items():
        if name != verb:
            app.command(name, help=entry.help)(_stub)
            continue
        loaded: typer.Typer | Callable[..., Any] = getattr(importlib.import_module(entry.module), entry.attribute)
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=name, help=entry.help)
        else:
            app.command(name)(loaded)
    return app


def _explain(error: BaseException) -> tuple[str, int]:
    """The line for the user, and the exit code."""
    if isinstance(error, ColonnadeError):
        return str(error), error.exit_code
    if type(error).__module__.endswith("session"):  # SessionError: its file stands by itself and knows no base of ours
        return str(error), getattr(error, "exit_code", UserError.exit_code)
    if callable(formatted := getattr(error, "format_message", None)):  # the option parser's own errors
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return f"{formatted()}{where}", 2
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return f"this needs the package {package!r}: pip install 'colonnade[{EXTRAS[package]}]'", 2
    if isinstance(error, OSError) and error.errno in _USERS_ERRNO:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}", 2
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or use a smaller batch", 1
    return f"{type(error).__name__}: {error} (this is a bug in colonnade; run with --verbose for the details)", 1


def run_verb(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    verbose = "--verbose" in argv
    words = [word for word in argv if word != "--verbose"] or ["--help"]
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS)
        say(f"no such verb: {verb!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"))
        return UserError.exit_code
    if verb is not None and not verbose:
        import logging

        logging.lastResort = logging.NullHandler()  # what libraries log is for who asks for details
    try:
        # The option parser itself turns Ctrl-C into a number; what else a verb returns means nothing.
        answer = application(verb)(words, standalone_mode=False, prog_name="colonnade")
        code = answer if isinstance(answer, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # The reader (`| head`) went away: nothing to tell it; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if verbose:
            traceback.print_exc()
        text, code = _explain(error)
        say(text)
    if code == 130:
        print("stopped", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the `colonnade` program."""
    sys.exit(run_verb(sys.argv[1:]))


if __name__ == "__main__":
    main()
