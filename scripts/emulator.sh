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

# Debian 13's, into $work/tree; what is said goes into the log.
fetch_newer() {
    scripts/trixie.sh "$work" "$(dpkg --print-architecture)" qemu-user && mkdir "$work/tree" &&
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
        work=$(mktemp -d build-out/qemu10.XXXXXX)
        trap 'rm -rf "$work"' EXIT
        if fetch_newer >>build-out/qemu.log 2>&1; then
            [ -x "$newer" ] || rm -rf build-out/qemu10
            mv -T "$work/tree" build-out/qemu10 || true # another `make` was quicker
        fi
        rm -rf "$work"
    fi
    [ -x "$newer" ] || without "tests of RISC-V's half precision need a QEMU that knows Zvfh, such as Debian 13's"
fi
"$python" scripts/warm_compiler.py riscv64
