#!/usr/bin/env bash
# The RISC-V tests run in QEMU's user mode: installed by apt where we are root, otherwise said. Then the compiler's C
# libraries for riscv64 are built (once, a minute or two), so that no single test waits for them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

if ! command -v qemu-riscv64 >/dev/null; then
    said="the RISC-V tests need QEMU's user mode: apt-get install qemu-user"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        mkdir -p build-out
        echo "Installing qemu-user" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y --no-install-recommends qemu-user >build-out/qemu.log 2>&1 ||
            { apt-get update && apt-get install -y --no-install-recommends qemu-user; } >>build-out/qemu.log 2>&1 || true
    fi
    if ! command -v qemu-riscv64 >/dev/null; then
        [ "${CI:-}" != true ] || { echo "error: $said (the log: build-out/qemu.log)" >&2; exit 1; }
        echo "note: $said; they are skipped" >&2
        exit 0
    fi
fi
"$python" scripts/warm_compiler.py riscv64
