#!/usr/bin/env bash
# Formatting, lints and tests of the Rust client. Run by tests/interop they call real daemons too. More arguments go to the
# tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./lock.sh
cargo fmt --check
cargo test --locked --quiet --all-features --all-targets -- "$@"
cargo test --locked --quiet --all-features --doc
if [ -n "${HOTGRAPH_INTEROP_REPORT:-}" ]; then
    {
        echo "language Rust $(rustc --version | cut -d ' ' -f 2)"
        echo "library tonic $(sed -n '/^name = "tonic"$/{n;s/^version = "\(.*\)"/\1/p}' Cargo.lock)"
    } >> "$HOTGRAPH_INTEROP_REPORT"
fi
