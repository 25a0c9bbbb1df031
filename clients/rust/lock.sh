#!/usr/bin/env bash
# Writes Cargo.lock from versions.lock, which is the same but for the registry's name: where crates come from is a matter of
# each machine. `lock.sh --keep` writes versions.lock from Cargo.lock, after a change of Cargo.toml or a `cargo update`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v cargo >/dev/null || {
    echo "the Rust client needs cargo and Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer on PATH" >&2
    exit 1
}

if [ "${1:-}" = --keep ]; then
    sed 's|^source = .*|source = "the registry"|' Cargo.lock > versions.lock
    exit 0
fi
if [ -f Cargo.lock ] && cmp -s versions.lock <(sed 's|^source = .*|source = "the registry"|' Cargo.lock); then
    exit 0
fi
# What cargo writes by itself tells what it calls the registry here.
rm -f Cargo.lock
cargo generate-lockfile --quiet
source=$(grep '^source = ' Cargo.lock | sort -u)
[ "$(wc -l <<< "$source")" = 1 ] || {
    echo "cargo takes crates from more than one place: ${source//$'\n'/, }" >&2
    exit 1
}
sed "s|^source = .*|$source|" versions.lock > Cargo.lock
