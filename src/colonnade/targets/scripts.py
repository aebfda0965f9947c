"""What the board's shell is asked to do: POSIX sh, one script a visit, every word from here quoted.

Each script ends with the mark ``end`` (see ``stream``); ``trouble`` says in words what went wrong.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

quote = shlex.quote


def _start(token: str, folder: str = "") -> str:
    # a connection that breaks must not keep a script from clearing up
    lines = f"""umask 077
trap "" PIPE HUP
say() {{ printf "\\n%s %s\\n" {token} "$*" >&2; }}
finish() {{ say end; exit 0; }}
fail() {{ say trouble "$*"; finish; }}
"""
    return lines + (f'cd {quote(folder)} || fail "the folder is gone"\n' if folder else "")


def _enter(run: str) -> str:
    """Into a folder of this run, whose owner can be told dead from alive at the next visit."""
    new, old = quote(f"runs/.{run}"), quote(f"runs/{run}")
    return f"""boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
me="$$ $boot $(uname -n)"
why=$({{ mkdir {new} && echo "$me" >{new}/.shell && mv {new} {old}; }} 2>&1) || {{ rm -rf {new}; fail "$why"; }}
cd {old}
"""


def _trim(limit: int, keep: Sequence[str] = ()) -> str:
    """The least recently used objects but ``keep`` go while there are more than ``limit`` bytes."""
    kilo = limit >> 10
    return f"""used=$(du -sk objects 2>/dev/null | cut -f 1)
if [ "${{used:-0}}" -gt {kilo} ]; then
ls -tr objects | while read -r o && [ "$(du -sk objects | cut -f 1)" -gt {kilo} ]; do
case " {" ".join(keep)} " in *" $o "*) ;; *) rm -f "objects/$o" ;; esac
done
fi
"""


# in the order in which they are tried
PLACES = '"${XDG_CACHE_HOME:-${HOME:-/nowhere}/.cache}/colonnade/board" "${TMPDIR:-/tmp}/colonnade-$(id -u)"'


def hello(token: str, folder: str, limit: int) -> str:
    """Find or make the folder, clear what dead runs left, tell who is alive; then stay until standard input ends."""
    return f"""{_start(token)}say arch "$(uname -m)"
command -v tar >/dev/null || fail "there is no tar on the board; install it"
tried=
found=
for base in {quote(folder) if folder else PLACES}; do
tried="$tried $base"
mkdir -p "$base/objects" "$base/runs" 2>/dev/null && [ -O "$base" ] && cd "$base" || continue
mkdir "runs/.try$$" 2>/dev/null || continue
rmdir "runs/.try$$"
found=yes
break
done
[ -n "$found" ] || fail "no folder can be written to on the board (tried$tried); name one in COLONNADE_BOARD_DIR"
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
here=$(uname -n)
for run in runs/*-*-*; do
[ -d "$run" ] || continue
pid= was= host=
read -r pid was host <"$run/.shell" 2>/dev/null
# another board may share this folder, and its runs are not ours to judge, unless they are days old
if [ "${{host:-$here}}" != "$here" ] && [ -z "$(find "$run" -prune -mtime +2 2>/dev/null)" ]; then continue
elif [ -n "$pid" ] && [ "$was" = "$boot" ] && kill -0 "$pid" 2>/dev/null; then say alive "${{run#runs/}}"
else rm -rf "$run"; fi
done
{_trim(limit)}say folder "$(pwd -P)"
say end
read -r ended
"""


def end(token: str, folder: str, runs: Sequence[str]) -> str:
    """End programs whose owners are gone, and clear up behind them."""
    names = " ".join(quote(run) for run in runs)
    return f"""{_start(token, folder)}for run in {names}; do
for who in .agent .shell; do
pid=
read -r pid rest <"runs/$run/$who" 2>/dev/null && [ -n "$pid" ] && kill "$pid" 2>/dev/null
done
rm -rf "runs/$run"
done
finish
"""


def missing(token: str, folder: str, objects: Sequence[str]) -> str:
    """Which of ``objects`` are not there?"""
    return f"""{_start(token, folder)}for o in {" ".join(objects)}; do
if [ -f "objects/$o" ]; then touch -c "objects/$o"; else say missing "$o"; fi
done
finish
"""


def push(token: str, folder: str, run: str, objects: Sequence[str], keep: Sequence[str], size: int, limit: int) -> str:
    """Take ``objects`` (``size`` bytes) as a tar stream; each appears whole and on the disk, or not at all."""
    needed = (size >> 10) + 256
    return f"""{_start(token, folder)}room() {{ set -- $(df -Pk . 2>/dev/null | tail -n 1); free=${{4:-999999999}}; }}
room
if [ "$free" -lt {needed} ]; then
for o in objects/*; do
case " {" ".join([*objects, *keep])} " in *" ${{o#objects/}} "*) ;; *) rm -f "$o" ;; esac
done
room
fi
[ "$free" -ge {needed} ] || {{ say full "$free"; finish; }}
{_enter(run)}why=$(tar -xf - 2>&1) || {{
cd ../..
rm -rf runs/{quote(run)}
case $why in *"o space left"*|*"uota exceeded"*) room; say full "$free"; finish ;; *) fail $why ;; esac
}}
for o in {" ".join(objects)}; do
[ "$(wc -c <"$o")" -eq "${{o##*-}}" ] || {{ cd ../..; rm -rf runs/{quote(run)}; fail "$o arrived cut short"; }}
done
sync 2>/dev/null
mv -f {" ".join(objects)} ../../objects/ || fail "objects cannot be written"
cd ../..
rm -rf runs/{quote(run)}
{_trim(limit, [*objects, *keep])}say pushed
finish
"""


def capture(token: str, folder: str, program: str, args: Sequence[str]) -> str:
    """Run an object of ours and bring its whole output."""
    words = " ".join(quote(word) for word in args)
    return f"""{_start(token, folder)}[ -f objects/{program} ] || fail "the agent is gone"
printf "\\n%s files\\n" {token}
objects/{program} {words} || fail "the agent ended with status $?"
finish
"""


def run(
    token: str,
    folder: str,
    run: str,
    agent: str,
    program: str,
    args: Sequence[str],
    links: Mapping[str, str],
    outputs: Sequence[str],
    seconds: float,
    cpus: str,
) -> str:
    """Run the object ``program`` in a new folder with ``links`` (name → object); ``outputs`` come as a tar stream."""
    needed = " ".join(dict.fromkeys([agent, program, *links.values()]))
    linked = "".join(f"ln -s ../../objects/{place} {quote(name)} &&\n" for name, place in links.items())
    words = " ".join(quote(word) for word in args)
    return f"""{_start(token, folder)}for o in {needed}; do
[ -f "objects/$o" ] || {{ say missing "$o"; finish; }}
touch -c "objects/$o"
done
{_enter(run)}{linked}printf "\\n%s begin\\n" {token}
sh -c "echo \\$\\$ >.agent; exec \\"\\$0\\" \\"\\$@\\"" \
../../objects/{agent} run {token} {seconds:.1f} {cpus} ../../objects/{program} {words}
set --
for f in {" ".join(quote(name) for name in outputs)}; do [ -f "$f" ] && set -- "$@" "./$f"; done
if [ $# -gt 0 ]; then printf "\\n%s files\\n" {token}; tar -cf - "$@" || say trouble "the results could not be read"; fi
cd ../..
rm -rf runs/{quote(run)}
finish
"""
