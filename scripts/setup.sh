#!/usr/bin/env bash
# Makes the checkout's own Python environment: scripts/setup.sh demo|test [ENVIRONMENT]   (default ./.venv)
#
# Quick when nothing changed (a stamp per set). What fails says so in one line and leaves no half-made environment:
# the stamp goes first and comes back last, and an environment that was begun here is removed again.
set -euo pipefail
cd "$(dirname "$0")/.."
set_=${1:?usage: scripts/setup.sh demo|test}
env=${2:-.venv}
case $set_ in
demo) extra=demo; need_mb=2500 ;;
test) extra=dev; need_mb=4000 ;;
*) echo "error: scripts/setup.sh: unknown set '$set_'; there are demo and test" >&2; exit 2 ;;
esac
out=build-out
log=$out/setup-$set_.log

fail() { echo "error: $*" >&2; exit 1; }

python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    # `sys.executable` and not the name: a shim is slow and follows the folder it is called from.
    if python=$("$candidate" -c 'import sys; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)' 2>/dev/null); then
        break
    fi
    python=""
done
[ -n "$python" ] || fail "no Python 3.11 or newer: install one (apt-get install python3) or name it (make PYTHON=/path/to/python3)"

# What decides whether an environment is up to date; the folder too, because environments cannot be moved.
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh <("$python" -VV) <(pwd) | sha256sum | cut -d' ' -f1)
stamp=$env/.colonnade-$set_
if [ -x "$env/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

mkdir -p "$out" 2>/dev/null || fail "cannot write into $(pwd): give yourself the right to, or clone into a folder of yours"
if command -v flock >/dev/null; then # two `make` at once: the second waits and then finds the work done
    exec 9>"$out/setup.lock"
    flock 9
    if [ -x "$env/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
fi

# An environment counts when its Python and pip start from where it stands now.
sound() {
    [ -e "$env/.colonnade-begun" ] && return 1
    [ "$("$env/bin/python" -c 'import pip, sys; print(sys.prefix) if sys.version_info >= (3, 11) else None' 2>/dev/null)" = "$(realpath "$env")" ]
}
begun=""
drop() { if [ -n "$begun" ]; then rm -rf "$env"; fi; }
trap drop EXIT
trap 'exit 130' INT TERM
if ! sound; then
    if [ -e "$env" ] && [ ! -e "$env/pyvenv.cfg" ] && [ ! -e "$env/.colonnade-begun" ]; then
        fail "$env is in the way and no Python environment: move it, or name another (scripts/setup.sh $set_ DIR)"
    fi
    free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
    [ "$free_mb" -ge "$need_mb" ] || fail "the disk of $(pwd) has $free_mb MB free and $need_mb are needed: make room and run this again"
    rm -rf "$env"
    begun=yes
    mkdir -p "$env" && : >"$env/.colonnade-begun" || fail "cannot write into $(pwd): free space or the right to write is missing"
    echo "Setting up $env with $("$python" -V)" >&2
    if ! "$python" -m venv "$env" >"$log" 2>&1; then
        grep -qi 'no space left' "$log" && fail "the disk is full: make room and run this again"
        fail "Python's venv module is missing or broken: apt-get install python3-venv (or python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv), then run this again"
    fi
fi
rm -f "$stamp"

install() {
    if ! "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt --log "$log" "$@" >>"$out/setup-$set_.out" 2>&1; then
        # Said in the order of certainty; the log has the rest.
        grep -qiE 'no space left|disk quota' "$log" && fail "the disk is full: make room (about $need_mb MB) and run this again"
        grep -qiE 'name resolution|name or service not known|connection (refused|reset|aborted|broken)|network is unreachable|no route to host|timed out|proxyerror|sslerror|newconnectionerror|nodename nor servname' "$log" &&
            fail "the package registry cannot be reached: check the network (or pip's proxy and index settings) and run this again"
        fail "installing packages failed: $(grep -hE '^ERROR|ERROR:' "$out/setup-$set_.out" | tail -n 1 | cut -c1-300) (the log: $log)"
    fi
}
: >"$log"
: >"$out/setup-$set_.out"
echo "Installing packages for '$set_' (some minutes the first time)" >&2
install setuptools
install --no-build-isolation -e .
# The compiler builds its C libraries at first use (most of a minute on two cores): meanwhile the big packages come.
"$env/bin/python" scripts/warm_compiler.py >"$out/warm.log" 2>&1 &
warm=$!
install --no-build-isolation -e ".[$extra]"
# Only tests need torchvision. Its own requirement is not asked: it would exchange a CPU build of torch for another.
if [ "$set_" = test ]; then install --no-deps torchvision; fi
if kill -0 "$warm" 2>/dev/null; then echo "Waiting for the compiler to build its C libraries (once)" >&2; fi
if ! wait "$warm"; then
    grep -qi 'nospaceleft\|no space left' "$out/warm.log" && fail "the disk is full: make room and run this again"
    fail "the compiler does not work here: $(tail -n 1 "$out/warm.log" | cut -c1-300)"
fi
rm -f "$env/.colonnade-begun"
begun=""
echo "$wanted" >"$stamp"
