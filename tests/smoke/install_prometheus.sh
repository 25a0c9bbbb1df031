#!/usr/bin/env bash
# Puts prometheus and promtool, which tests/integration/test_prometheus.py wants, into .tools/bin of this checkout, and prints
# their paths. Does nothing when they are there already, or on PATH.
#
# They are taken from the package `prometheus` of Debian or one that is built on it: fetched and checked by apt, unpacked, and
# nothing is installed. Needs no root; lists of packages that are missing are fetched into a folder of its own. Exit status:
# 1 they could not be had or are too old, 3 there is no apt here.
set -euo pipefail

oldest=2.40          # what the alert rules are written for
patience_seconds=100 # for the lists and for the package, each

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$root/.tools/bin

# Whether $1 is a promtool that is new enough.
is_new_enough() {
    local found
    found=$("$1" --version 2>/dev/null | sed -n 's/^promtool, version \([0-9.]*\).*/\1/p') || return 1
    [ -n "$found" ] && [ "$(printf '%s\n' "$oldest" "$found" | sort -V | head -n 1)" = "$oldest" ]
}

# apt without a question, without root, and without waiting long for hosts that do not answer.
apt() {
    timeout "$patience_seconds" apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=0 -o Acquire::http::Timeout=10 \
        -o Acquire::https::Timeout=10 -o Acquire::Languages=none "$@" </dev/null >&2
}

for place in "" "$folder/"; do
    if prometheus=$(command -v "${place}prometheus") && promtool=$(command -v "${place}promtool") && is_new_enough "$promtool"; then
        printf '%s\n' "$prometheus" "$promtool"
        exit 0
    fi
done
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "prometheus is not here, and neither is apt to fetch it" >&2
    exit 3
fi

mkdir -p "$folder"
# Into a folder of its own first: a download that is cut leaves nothing half-made behind.
new=$(mktemp -d "$folder/.new-XXXXXX")
trap 'rm -rf "$new"' EXIT
cd "$new"
echo "fetching prometheus from this system's packages" >&2
if ! apt download prometheus 2>/dev/null; then
    # Lists are missing or old. Whether one of several sources cannot be reached does not matter: the package decides.
    mkdir -p state/lists/partial cache/archives/partial
    own=(-o "Dir::State=$new/state" -o Dir::State::status=/var/lib/dpkg/status -o "Dir::Cache=$new/cache")
    apt "${own[@]}" update 2>/dev/null || true
    if ! apt "${own[@]}" download prometheus; then
        echo "prometheus cannot be had: apt's messages are above" >&2
        exit 1
    fi
fi
dpkg --extract prometheus_*.deb package
if ! is_new_enough package/usr/bin/promtool; then
    echo "the prometheus of this system is older than $oldest, or does not run here" >&2
    exit 1
fi
mv package/usr/bin/promtool "$folder/promtool"
mv package/usr/bin/prometheus "$folder/prometheus"
printf '%s\n' "$folder/prometheus" "$folder/promtool"
