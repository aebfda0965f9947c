#!/usr/bin/env bash
# An emulated RISC-V board: Debian's riscv64 in a folder, QEMU user mode as its processor, dropbear as its ssh server.
#
#   board_emulator.sh build                              make the root (about 3 minutes, 300 MB); nothing if it is there
#   board_emulator.sh start [NAME [PORT [CPU]]]          start it; afterwards `ssh -F FOLDER/ssh_config NAME` answers
#   board_emulator.sh stop [NAME]                        stop it (all of them without NAME)
#   board_emulator.sh clean                              stop and remove everything
#
# Needs root: chroot, a mount namespace, and a binfmt_misc entry, which is there only while a board runs.
# FOLDER is $COLONNADE_BOARD, by default ~/.cache/colonnade-board. Commands run beside each other: a lock serialises them.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${COLONNADE_BOARD:-$HOME/.cache/colonnade-board}
root=$folder/root
entry=colonnade-board
misc=/proc/sys/fs/binfmt_misc
default_cpu=rv64,v=true,vlen=256,vext_spec=v1.0
suite=trixie

say() { echo "board-emulator: $*" >&2; }
die() { say "$*"; exit 2; }

needs_root() {
    [ "$(id -u)" = 0 ] || die "needs root (chroot, mounts, binfmt_misc): sudo make board-emulator"
}

needs() { # PROGRAM PACKAGE ...: install what is missing
    local missing=()
    while [ $# -gt 0 ]; do
        command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "install ${missing[*]} first (on Debian and Ubuntu this script does)"
    say "installing ${missing[*]}"
    apt-get -qq update >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt-get install ${missing[*]} failed"
}

mirror() { # the Debian mirror that apt uses here, or the one that BOARD_MIRROR names
    local found
    found=$(apt-get indextargets --format '$(SITE)' 'Origin: Debian' 2>/dev/null |
        grep -v -- '-security' | grep -E '/debian/?$' | head -n 1) || true
    found=${BOARD_MIRROR:-$found}
    [ -n "$found" ] || die "apt knows no Debian mirror here: name one, BOARD_MIRROR=… make board-emulator"
    echo "$found"
}

interpreter() { # compile board_cpu.c once
    [ -x "$folder/board-cpu" ] && [ "$folder/board-cpu" -nt "$here/board_cpu.c" ] && return 0
    local python=$here/../.venv/bin/python
    if [ -x "$python" ] && "$python" -c 'import ziglang' 2>/dev/null; then
        ZIG_GLOBAL_CACHE_DIR=$folder/zig ZIG_LOCAL_CACHE_DIR=$folder/zig \
            "$python" -m ziglang cc -target "$(uname -m)-linux-musl" -static -O2 -s "$here/board_cpu.c" -o "$folder/board-cpu.new"
    else
        cc -static -O2 -s "$here/board_cpu.c" -o "$folder/board-cpu.new" || die "no C compiler: run make test first"
    fi
    mv "$folder/board-cpu.new" "$folder/board-cpu"
}

register() { # let the kernel start riscv64 programs by our interpreter
    [ -e $misc/register ] || mount -t binfmt_misc binfmt_misc $misc 2>/dev/null || true
    [ -w $misc/register ] || die "this kernel has no binfmt_misc that can be written ($misc)"
    [ -e $misc/$entry ] && return 0
    local magic mask
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xf3\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    echo ":$entry:M::$magic:$mask:$folder/board-cpu:PF" >$misc/register || die "binfmt_misc refused the entry"
}

unregister() {
    [ ! -e $misc/$entry ] || echo -1 >$misc/$entry
}

alive() { # NAME: is the process in its pid file one of ours?
    local pid
    pid=$(cat "$folder/run/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = unshare ]
}

running() { # names of the boards that run
    local file name
    for file in "$folder"/run/*.pid; do
        [ -e "$file" ] || continue
        name=$(basename "$file" .pid)
        if alive "$name"; then echo "$name"; else rm -f "$file"; fi
    done
}

build() {
    needs_root
    needs debootstrap debootstrap qemu-riscv64-static qemu-user-static ssh openssh-client unshare util-linux
    mkdir -p "$folder/run"
    interpreter
    if [ ! -e "$folder/complete" ]; then
        local from
        from=$(mirror)
        say "Debian $suite for riscv64 from $from into $root (about 3 minutes)"
        rm -rf "$root"
        register
        mkdir -p "$root/usr/bin" "$root/etc"
        cp "$(command -v qemu-riscv64-static)" "$root/usr/bin/"
        echo "$default_cpu" >"$root/etc/board-cpu"
        if ! debootstrap --arch=riscv64 --variant=minbase --include=python3-minimal,python3-numpy,dropbear-bin \
            "$suite" "$root" "$from" >"$folder/debootstrap.log" 2>&1; then
            [ -n "$(running)" ] || unregister
            tail -n 3 "$folder/debootstrap.log" >&2
            die "debootstrap failed; all it said is in $folder/debootstrap.log"
        fi
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        mkdir -p "$root/etc/dropbear" "$root/root/.ssh" "$root/mnt/small"
        chmod 700 "$root/root" "$root/root/.ssh"
        chroot "$root" dropbearkey -t ed25519 -f /etc/dropbear/host >/dev/null 2>&1
        touch "$folder/complete"
        [ -n "$(running)" ] || unregister
    fi
    [ -e "$folder/key" ] || ssh-keygen -q -t ed25519 -N '' -C colonnade-board -f "$folder/key"
    install -m 600 "$folder/key.pub" "$root/root/.ssh/authorized_keys"
    say "ready: $root"
}

configuration() { # ssh_config and known_hosts of all boards that run
    local name port key
    key=$(cat "$folder/host.pub")
    : >"$folder/known_hosts.new"
    : >"$folder/ssh_config.new"
    for name in $(running); do
        port=$(cat "$folder/run/$name.port")
        echo "[127.0.0.1]:$port $key" >>"$folder/known_hosts.new"
        printf 'Host %s\n  HostName 127.0.0.1\n  Port %s\n  User root\n  IdentityFile %s\n  IdentitiesOnly yes\n' \
            "$name" "$port" "$folder/key" >>"$folder/ssh_config.new"
        printf '  UserKnownHostsFile %s\n  GlobalKnownHostsFile none\n' "$folder/known_hosts" >>"$folder/ssh_config.new"
    done
    mv "$folder/known_hosts.new" "$folder/known_hosts"
    mv "$folder/ssh_config.new" "$folder/ssh_config"
}

start() {
    local name=${1:-board} port=${2:-2222} cpu=${3:-$default_cpu}
    needs_root
    [ -e "$folder/complete" ] || build
    [[ $name =~ ^[a-z0-9-]+$ ]] || die "$name: a name of a-z, 0-9 and -"
    stop_one "$name"
    register
    [ -s "$folder/host.pub" ] ||
        chroot "$root" dropbearkey -y -f /etc/dropbear/host | grep '^ssh-' | cut -d ' ' -f 1,2 >"$folder/host.pub"
    echo "$cpu" >"$folder/run/$name.cpu"
    echo "$port" >"$folder/run/$name.port"
    # Mounts live in a namespace of their own and disappear with it. -p 127.0.0.1: nobody else can connect.
    setsid unshare --mount --pid --fork --kill-child --propagation private bash -c '
        set -e
        root=$1
        mount --bind "$2" "$root/etc/board-cpu"
        mount -t proc proc "$root/proc"
        mount --rbind /sys "$root/sys"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs -o size=6m tmpfs "$root/mnt/small"
        exec chroot "$root" dropbear -F -E -s -j -k -p "127.0.0.1:$3" -r /etc/dropbear/host -P ""
    ' board "$root" "$folder/run/$name.cpu" "$port" </dev/null >"$folder/run/$name.log" 2>&1 9>&- &
    echo $! >"$folder/run/$name.pid"
    for _ in $(seq 200); do # until the shell's child has become unshare it does not count as a board, nor if it ended
        ! alive "$name" && kill -0 $! 2>/dev/null || break
        sleep 0.05
    done
    configuration
    for _ in $(seq 60); do
        if ssh -F "$folder/ssh_config" -o BatchMode=yes -o ConnectTimeout=20 "$name" true 2>/dev/null; then
            say "$name answers: ssh -F $folder/ssh_config $name"
            return 0
        fi
        alive "$name" || break
        sleep 0.5
    done
    tail -n 3 "$folder/run/$name.log" >&2
    stop_one "$name"
    die "$name did not start; see $folder/run/$name.log"
}

stop_one() {
    if alive "$1"; then kill -9 "$(cat "$folder/run/$1.pid")"; fi # its namespaces, and all in them, go with it
    rm -f "$folder/run/$1".{pid,port,cpu}
}

stop() {
    local name
    needs_root
    for name in ${1:-$(running)}; do stop_one "$name"; done
    [ -n "$(running)" ] || unregister
    [ ! -s "$folder/host.pub" ] || configuration
}

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9
case ${1:-} in
    build) build ;;
    start) start "${@:2}" ;;
    stop) stop "${@:2}" ;;
    clean) stop; rm -rf "$root" "$folder/complete" "$folder/host.pub" ;;
    *) sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
