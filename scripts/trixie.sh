#!/usr/bin/env bash
# Fetches packages of Debian 13: scripts/trixie.sh FOLDER ARCHITECTURE PACKAGE ...
#
# FOLDER then holds their .deb files. apt has folders of its own for it: nothing of the system changes, and what the
# packages depend on does not come. Mirrors are those of the system's sources, and then the one that has everything.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: scripts/trixie.sh FOLDER ARCHITECTURE PACKAGE ..." >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
architecture=$2
packages=("${@:3}")
work=$(mktemp -d "$folder/apt.XXXXXX")
trap 'rm -rf "$work"' EXIT
apt=(apt-get -q -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o "Dir::State=$work" -o "Dir::State::Lists=$work/lists" -o "Dir::State::status=$work/status"
    -o "Dir::Cache=$work/cache" -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture"
    -o Acquire::Languages=none -o APT::Sandbox::User=root
    -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o Acquire::Retries=1)

mirrors() {
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
        sed -nE 's#^(URIs:|deb)[[:space:]]+(\[[^]]*\][[:space:]]+)?(https?://[^[:space:]]+/debian)/?([[:space:]].*)?$#\3#p'
    echo http://deb.debian.org/debian
}

fetch() { # MIRROR
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $1 trixie main" >"$work/sources.list" &&
        "${apt[@]}" update &&
        (cd "$folder" && "${apt[@]}" download "${packages[@]}")
}

mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
: >"$work/status"
while read -r mirror; do
    ! fetch "$mirror" </dev/null || exit 0
done < <(mirrors | awk '!seen[$0]++')
exit 1
