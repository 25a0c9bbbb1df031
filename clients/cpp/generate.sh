#!/usr/bin/env bash
# Generates the C++ stubs of protos/hotgraph/v1 into build/stubs, as every build does. They are not committed: the C++ code of one
# release of protoc compiles with the headers of that release alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
build=${BUILD:-$PWD/build}
cmake -S . -B "$build" >/dev/null
cmake --build "$build" --target hotgraph_stubs_sources
echo "$build/stubs"
