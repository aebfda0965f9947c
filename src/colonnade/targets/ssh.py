"""A board reached through the system's OpenSSH client: its configuration, keys, agent and jump hosts are the user's.

The board needs a POSIX shell and ``tar``. Everything goes through ``ssh HOST SCRIPT``: files travel as tar streams,
once, and lie there by the digest of their content; programs run under ``agent.c``, which pins them to cores, ends them
when this side is gone or the time is up, and tells how they ended. Every script ends with a line that carries a
secret word, so that an answer cut short is never taken for one.

    BASE/objects/DIGEST-BYTES     files, shared by all runs, the least recently used go when there are too many
    BASE/runs/CLIENT-PID-RANDOM   a run's own folder; what a reboot left is removed at the next visit
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import IO

from colonnade.build.toolchain import ARCHITECTURES, Toolchain
from colonnade.errors import TargetError, UserError
from colonnade.targets import probe, scripts
from colonnade.targets.base import Machine, Outcome
from colonnade.targets.stream import Reply, exchange

FORM = "ssh://[user@]host[:port]"
CONNECT_S = 20
ANSWER_S = 90.0  # a script that moves no data answers within this; slow boards under load included
GRACE_S = 30.0  # beyond a program's own limit, before the board counts as gone
SLOWEST = 100_000  # bytes a second that a transfer may crawl at
BOOKED = 1 << 30  # bytes of files kept on the board
OPTIONS = {
    "BatchMode": "yes",  # no passwords, no questions
    "StrictHostKeyChecking": "yes",  # also where the user's configuration would accept new keys
    "UpdateHostKeys": "no",
    "ConnectTimeout": str(CONNECT_S),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "4",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "LogLevel": "ERROR",
}


@dataclass(eq=False)
class Ssh:
    """``user`` and ``port`` may be left to the user's configuration.

    ``cpus``: cores that programs are kept on, empty for all; ``chosen``: by the user, so that measurements on other
    cores do not count. ``COLONNADE_SSH`` names another client or adds options (``ssh -F file``);
    ``COLONNADE_BOARD_DIR`` a folder of the board to keep files in.
    """

    host: str
    user: str = ""
    port: int = 0
    cpus: tuple[int, ...] = ()
    chosen: bool = False
    toolchain: Toolchain = field(default_factory=Toolchain, repr=False)
    untimed: str = ""
    modelled: str = ""

    def __post_init__(self) -> None:
        self._client = _client_id()
        self._token = f"cn{secrets.token_hex(12)}"
        self._folder = ""  # BASE there, once known
        self._arch = ""
        self._there: set[str] = set()
        self._machine: Machine | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._socket = ""

    @property
    def name(self) -> str:
        """As on the command line."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    @classmethod
    def parse(cls, text: str) -> Ssh:
        """``ssh://user@board:2222``, ``ssh://NAME`` of the configuration, ``ssh://[fe80::1]``. Raises ``UserError``."""
        user, host, address = r"([A-Za-z0-9_][\w.+-]*)@", r"([A-Za-z0-9_][\w.-]*)", r"\[([0-9A-Fa-f:.]+(?:%\w+)?)\]"
        found = re.fullmatch(rf"ssh://(?:{user})?(?:{host}|{address})(?::(\d{{1,5}}))?/?", text)
        port = int(found[4] or 0) if found else 0
        if found is None or port > 65535 or (found[4] and port == 0):
            raise UserError(f"target {text!r}: expected {FORM}, or ssh://NAME with NAME from ~/.ssh/config")
        return cls(found[2] or found[3], found[1] or "", port)

    # ---- what a target does ----

    def probe(self) -> Machine:
        """See ``Target.probe``; a RISC-V board without vectors of version 1.0 is refused here. Asked once."""
        if self._machine is None:
            agent = self._ready()
            reply = self._exchange(scripts.capture(self._token, self._folder, agent, ["probe"]), ANSWER_S)
            facts = probe.facts(reply.payload)
            if not facts.files:
                raise TargetError(
                    f"{self.name}: the probe told nothing: {self._why(reply.last_error()) or 'no output'}"
                )
            if self._arch == "riscv64" and (refusal := probe.vector_refusal(facts)):
                raise TargetError(f"{self.name}: {refusal}")
            self._machine = probe.machine(facts, self._arch)
        return replace(self._machine, cpus=self.cpus) if self.chosen else self._machine

    def run(
        self,
        program: Path,
        args: Sequence[str] = (),
        inputs: Mapping[str, Path | bytes] | None = None,
        outputs: Sequence[str] = (),
        timeout: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """See ``Target.run``. Raises ``TargetError`` also when the connection is lost or the board's disk is full."""
        files: dict[str, Path | bytes] = {"": program, **(inputs or {})}
        for attempt in (1, 2):
            self.probe()
            agent = self._ready()
            objects = self._bring(files, [agent])
            cpus = ",".join(map(str, self.cpus)) or "-"
            links = {name: place for name, place in objects.items() if name}
            script = scripts.run(
                self._token, self._folder, self._run_name(), agent, objects[""], args, links, outputs, timeout, cpus
            )
            reply = self._exchange(script, timeout + GRACE_S, on_line=on_line)
            if reply.said("missing") and attempt == 1:  # someone cleared the board's cache: bring all of it again
                self._there.clear()
                continue
            return self._outcome(reply)
        raise AssertionError

    def close(self) -> None:
        """End the shared connection; the next call opens another."""
        master, self._master = self._master, None
        if master is not None:
            assert master.stdin is not None
            with contextlib.suppress(OSError):
                master.stdin.close()
            try:
                master.wait(2)
            except subprocess.TimeoutExpired:
                master.kill()
                master.wait()
            if master.stdout is not None:
                master.stdout.close()
            if master.stderr is not None:
                master.stderr.close()
        if self._socket:
            shutil.rmtree(Path(self._socket).parent, ignore_errors=True)
            self._socket = ""

    # ---- connection ----

    def _start(self, script: str, master: bool = False) -> subprocess.Popen[bytes]:
        words = shlex.split(os.environ.get("COLONNADE_SSH", "ssh")) or ["ssh"]
        for name, value in OPTIONS.items():
            words += ["-o", f"{name}={value}"]
        # one connection for all visits, in a private folder and never one of the user's own
        words += ["-o", f"ControlPath={self._socket}", "-o", f"ControlMaster={'yes' if master else 'no'}"]
        words += ["-o", "ControlPersist=no", "-T"]
        words += [*(["-p", str(self.port)] if self.port else []), *(["-l", self.user] if self.user else [])]
        # the login shell there may be any: it only has to understand one quoted word
        command = [*words, "--", self.host, f"exec sh -c {shlex.quote(script)}"]
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise TargetError(
                f"{self.name}: cannot start {command[0]} ({error.strerror}): apt-get install openssh-client"
            ) from error

    def _ready(self) -> str:
        """Connect if need be and bring the agent. Returns its object."""
        if self._folder and self._master is not None and self._master.poll() is not None:
            self.close()  # the shared connection died; say hello again, the board may have rebooted
            self._folder = ""
        if not self._folder:
            self._hello()
        source = (resources.files("colonnade.targets") / "agent.c").read_text()
        program = self.toolchain.compile({"agent.c": source}, "program", self._arch)
        return self._bring({"": program})[""]

    def _hello(self) -> None:
        """Open the shared connection: its first command tells what is there, and holds it open until we are gone."""
        self._there.clear()
        self.close()
        _sweep()
        self._socket = str(Path(tempfile.mkdtemp(prefix=f"cn-{os.getpid()}-", dir=_sockets())) / "s")
        self._master = self._start(
            scripts.hello(self._token, os.environ.get("COLONNADE_BOARD_DIR", ""), BOOKED), master=True
        )
        atexit.register(self.close)
        reply = exchange(self._master, self._token, ANSWER_S, hold=True)
        if reply.lost or reply.timed_out:
            self.close()
            raise self._lost(reply, "cannot connect")
        if trouble := reply.rests("trouble"):
            self.close()
            raise TargetError(f"{self.name}: {trouble[0]}")
        arch = {"amd64": "x86_64"}.get(reply.rests("arch")[0], reply.rests("arch")[0])
        if arch not in ARCHITECTURES:
            self.close()
            raise TargetError(f"{self.name}: is {arch}; Colonnade builds for {', '.join(ARCHITECTURES)}")
        self._arch, self._folder = arch, reply.rests("folder")[0]
        mine = [run for run in reply.rests("alive") if self._orphaned(run)]
        if mine:  # programs of ours that outlived a lost connection would disturb what is measured now
            self._exchange(scripts.end(self._token, self._folder, mine), ANSWER_S)

    def _orphaned(self, run: str) -> bool:
        """Does a run belong to a process of this machine and user that is no more?"""
        client, _, rest = run.partition("-")
        return client == self._client and not _alive(rest.partition("-")[0])

    def _run_name(self) -> str:
        return f"{self._client}-{os.getpid()}-{secrets.token_hex(6)}"

    # ---- talking ----

    def _exchange(
        self,
        script: str,
        timeout: float,
        feed: Callable[[IO[bytes]], None] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Reply:
        """Run ``script`` there. Raises ``TargetError`` when no whole answer came."""
        reply = exchange(self._start(script), self._token, timeout, feed=feed, on_line=on_line)
        if reply.lost or reply.timed_out:
            self.close()
            self._folder = ""
            raise self._lost(reply, "the connection was lost")
        return reply

    def _lost(self, reply: Reply, what: str) -> TargetError:
        said = reply.last_error()
        if "Host key verification failed" in said or "REMOTE HOST IDENTIFICATION" in reply.errors:
            login = f"{self.user}@{self.host}" if self.user else self.host
            port = f"-p {self.port} " if self.port else ""
            if "REMOTE HOST IDENTIFICATION" in reply.errors:
                place = f"'[{self.host}]:{self.port}'" if self.port else self.host
                return TargetError(
                    f"{self.name}: the board's host key has changed; make sure that it is your board, then "
                    f"ssh-keygen -R {place}"
                )
            return TargetError(
                f"{self.name}: its host key is not known yet; connect once by hand and compare it: ssh {port}{login}"
            )
        if "Permission denied" in said:
            return TargetError(f"{self.name}: no key of yours is accepted there ({said}); ssh-copy-id brings one")
        if reply.timed_out:
            return TargetError(f"{self.name}: {what}: no answer in time; what was finished is kept, run it again")
        again = "; what was finished is kept, run it again" if what != "cannot connect" else ""
        return TargetError(f"{self.name}: {what}" + (f" ({said})" if said else "") + again)

    def _why(self, trouble: str) -> str:
        """What the board said of a program that did not start, with what to do."""
        if "Permission denied" in trouble:
            trouble += f"; is {self._folder} mounted noexec? COLONNADE_BOARD_DIR may name another folder there"
        return trouble

    def _outcome(self, reply: Reply) -> Outcome:
        verdict = [(word, rest) for word, rest in reply.marks if word in ("exit", "signal", "timeout")]
        if not verdict and reply.said("gone"):
            raise self._lost(reply, "the connection was lost, or the board is shutting down")
        if not verdict:
            trouble = next((rest for w, rest in reply.marks if w in ("trouble", "cannot")), "") or reply.last_error()
            trouble = self._why(trouble) or "it was ended there"
            raise TargetError(f"{self.name}: the board could not run a program: {trouble}")
        word, rest = verdict[0]
        files: dict[str, bytes] = {}
        if reply.payload:
            try:
                with tarfile.open(fileobj=io.BytesIO(reply.payload)) as archive:
                    for member in archive:
                        if member.isfile() and (content := archive.extractfile(member)) is not None:
                            files[member.name.removeprefix("./")] = content.read()
            except (tarfile.TarError, EOFError) as error:
                raise TargetError(
                    f"{self.name}: what the program wrote arrived damaged ({error}); run it again"
                ) from error
        number = int(rest) if rest.isdigit() else 0
        return Outcome(
            code=number if word == "exit" else 128 + (number or 9),
            signal=number if word == "signal" else 0,
            timed_out=word == "timeout",
            stdout=reply.text,
            stderr=reply.errors,
            files=files,
        )

    # ---- files ----

    def _bring(self, files: Mapping[str, Path | bytes], keep: Sequence[str] = ()) -> dict[str, str]:
        """Make ``files`` be there; their objects by name."""
        objects = {name: _object(content) for name, content in files.items()}
        unknown = {objects[name]: content for name, content in files.items() if objects[name] not in self._there}
        if unknown:
            reply = self._exchange(scripts.missing(self._token, self._folder, list(unknown)), ANSWER_S)
            missing = {place: unknown[place] for place in reply.rests("missing")}
            if missing:
                self._push(missing, [*objects.values(), *keep])
            self._there.update(unknown)
        return objects

    def _push(self, contents: Mapping[str, Path | bytes], keep: Sequence[str]) -> None:
        size = sum(int(place.partition("-")[2]) for place in contents)

        def feed(pipe: IO[bytes]) -> None:
            with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
                for place, content in contents.items():
                    entry = tarfile.TarInfo(place)
                    entry.size, entry.mode, entry.mtime = int(place.partition("-")[2]), 0o700, int(time.time())
                    if isinstance(content, bytes):
                        archive.addfile(entry, io.BytesIO(content))
                    else:
                        with content.open("rb") as file:
                            archive.addfile(entry, file)

        script = scripts.push(self._token, self._folder, self._run_name(), list(contents), keep, size, BOOKED)
        reply = self._exchange(script, ANSWER_S + size / SLOWEST, feed=feed)
        if full := reply.rests("full"):
            raise TargetError(
                f"{self.name}: the disk there is full: {size >> 10} KB are needed in {self._folder} and {full[0]} KB "
                "are free; make room, or name another folder of the board in COLONNADE_BOARD_DIR"
            )
        if not reply.said("pushed"):
            trouble = (reply.rests("trouble") or [reply.last_error()])[0]
            raise TargetError(f"{self.name}: files could not be written to {self._folder}: {trouble}")


def _object(content: Path | bytes) -> str:
    """Name of a file there: digest and size."""
    if isinstance(content, bytes):
        return f"{hashlib.sha256(content).hexdigest()[:40]}-{len(content)}"
    status = content.stat()
    return _digest(str(content.resolve()), status.st_mtime_ns, status.st_size)


_digests: dict[tuple[str, int, int], str] = {}
_lock = threading.Lock()


def _digest(path: str, changed: int, size: int) -> str:
    key = (path, changed, size)
    with _lock:
        if key not in _digests:
            with Path(path).open("rb") as file:
                _digests[key] = f"{hashlib.file_digest(file, 'sha256').hexdigest()[:40]}-{size}"
        return _digests[key]


def _alive(pid: str) -> bool:
    """Is there a process of this number? What is no number is nobody's to judge, and counts as alive."""
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sockets() -> str:
    """Where sockets go: a name that ssh takes as it is, and of which the kernel takes 108 bytes with what ssh adds."""
    folder = tempfile.gettempdir()
    return folder if re.fullmatch(r"[\w./-]{1,50}", folder, re.ASCII) else "/tmp"


def _sweep() -> None:
    """Remove the folders of sockets whose process was killed."""
    for folder in Path(_sockets()).glob("cn-*-*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not _alive(folder.name.split("-")[1]):
                shutil.rmtree(folder, ignore_errors=True)


def _client_id() -> str:
    """This machine and user, as the board's folders name them."""
    return hashlib.sha256(f"{socket.gethostname()}:{os.getuid()}".encode()).hexdigest()[:10]
