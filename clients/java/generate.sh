#!/usr/bin/env bash
# Generates the stubs from protos/hotgraph/v1 into stubs/target/generated-sources. The build does it too whenever it must:
# they are not committed, since Java's are some eighty times as long as the protos. `generate.sh --check` fails when they, or the
# code on top of them, do not compile without a warning, or when that code is not formatted.
#
# Maven fetches protoc and its gRPC plugin in the versions that pom.xml pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v mvn >/dev/null || {
    echo "the Java client needs Maven 3.8 and a JDK 17, or newer ones, on PATH" >&2
    exit 1
}
if [ "${1:-}" = --check ]; then
    goals=(test-compile)
else
    goals=(--projects stubs --also-make generate-sources)
fi
mvn --batch-mode --no-transfer-progress --quiet -Dstyle.color=never "${goals[@]}"
