#!/usr/bin/env bash
# The RISC-V tests run in QEMU's user mode: installed by apt where we are root, otherwise said. Where it is too old for
# half precision (Debian 12's), Debian 13's is fetched beside it, into build-out/qemu10: nothing of the system changes.
# Then the compiler's C libraries for riscv64 are built (once, a minute or two), so that no single test waits for them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
newer=build-out/qemu10/usr/bin/qemu-riscv64

# In CI nothing is skipped.
without() {
    [ "${CI:-}" != true ] || { echo "error: $1 (the log: build-out/qemu.log)" >&2; exit 1; }
    echo "note: $1; they are skipped" >&2
}

knows_half() {
    "$python" -c 'import sys; from colonnade.targets import qemu; sys.exit(not qemu.half(sys.argv[1]))' "$1"
}

# Debian's mirrors as the system's sources name them, and the one that has everything.
mirrors() {
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
        sed -nE 's#^(URIs:|deb)[[:space:]]+(\[[^]]*\][[:space:]]+)?(https?://[^[:space:]]+/debian)/?([[:space:]].*)?$#\3#p'
    echo http://deb.debian.org/debian
}

# Fetches Debian 13's qemu-user by an apt configuration of its own; what it says goes into the log.
fetch_newer() {
    local work=$PWD/$1 mirror=$2
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg
    local apt=(apt-get -q -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o "Dir::State=$work" -o "Dir::State::Lists=$work/lists" -o "Dir::State::status=$work/status"
        -o "Dir::Cache=$work/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root
        -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o Acquire::Retries=1)
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/tree" &&
        : >"$work/status" &&
        echo "deb [signed-by=$keys] $mirror trixie main" >"$work/sources.list" &&
        "${apt[@]}" update &&
        (cd "$work" && "${apt[@]}" download qemu-user) &&
        dpkg-deb --fsys-tarfile "$work"/qemu-user_*.deb | tar -x -C "$work/tree" ./usr/bin/qemu-riscv64 &&
        knows_half "$work/tree/usr/bin/qemu-riscv64"
}

if ! command -v qemu-riscv64 >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        mkdir -p build-out
        echo "Installing qemu-user" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y --no-install-recommends qemu-user >build-out/qemu.log 2>&1 ||
            { apt-get update && apt-get install -y --no-install-recommends qemu-user; } >>build-out/qemu.log 2>&1 || true
    fi
    if ! command -v qemu-riscv64 >/dev/null; then
        without "the RISC-V tests need QEMU's user mode: apt-get install qemu-user"
        exit 0
    fi
fi
if [ ! -x "$newer" ] && ! knows_half "$(command -v qemu-riscv64)"; then
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
        mkdir -p build-out
        echo "Fetching a qemu-user that knows half precision into build-out/qemu10" >&2
        trap 'rm -rf "${work:-}"' EXIT
        while read -r mirror; do
            work=$(mktemp -d build-out/qemu10.XXXXXX)
            if fetch_newer "$work" "$mirror" >>build-out/qemu.log 2>&1; then
                [ -x "$newer" ] || rm -rf build-out/qemu10
                mv -T "$work/tree" build-out/qemu10 || true # another `make` was quicker
            fi
            rm -rf "$work"
            [ ! -x "$newer" ] || break
        done < <(mirrors | awk '!seen[$0]++')
    fi
    [ -x "$newer" ] || without "tests of RISC-V's half precision need a QEMU that knows Zvfh, such as Debian 13's"
fi
"$python" scripts/warm_compiler.py riscv64
