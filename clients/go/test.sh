#!/usr/bin/env bash
# Formatting, vet and tests of the Go client. Run by tests/interop they call real daemons too. More arguments go to `go test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
go=$(./find_go.sh)
unformatted=$("$(dirname "$("$go" env GOROOT)/bin/go")/gofmt" -l .)
if [ -n "$unformatted" ]; then
    printf 'not formatted: %s\n' "$unformatted" >&2
    exit 1
fi
"$go" vet ./...
"$go" test -count=1 "$@" ./...
