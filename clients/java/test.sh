#!/usr/bin/env bash
# Formatting, build and tests of the Java client. Run by tests/interop they call real daemons too. More arguments go to Maven.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v mvn >/dev/null || {
    echo "the Java client needs Maven 3.8 and a JDK 17, or newer ones, on PATH" >&2
    exit 1
}
mvn --batch-mode --no-transfer-progress --quiet -Dstyle.color=never "$@" verify
