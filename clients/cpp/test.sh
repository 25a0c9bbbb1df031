#!/usr/bin/env bash
# Formatting, build and tests of the C++ client, and of a program that uses it in both ways. Run by tests/interop they call real
# daemons too. More arguments go to the tests. BUILD names the folder to build in, JOBS how many compilers run at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
build=${BUILD:-$PWD/build}
jobs=${JOBS:-$(nproc)}

# Quietly, but for a command that fails.
quietly() {
    local log
    log=$(mktemp)
    "$@" >"$log" 2>&1 || { cat "$log" >&2; rm "$log"; return 1; }
    rm "$log"
}

if command -v clang-format >/dev/null; then
    find include src tests examples -name '*.[ch]pp' -print0 | xargs -0 clang-format --dry-run -Werror
else
    echo "clang-format is not there: formatting is not checked" >&2
fi
quietly cmake -S . -B "$build" -DHOTGRAPH_WERROR=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=
quietly cmake --build "$build" -j "$jobs"

# A program of somebody else's, with the installed package and with the sources.
quietly cmake --install "$build" --prefix "$build/installed"
for way in package sources; do
    quietly cmake -S tests/consumer -B "$build/consumer-$way" -DWAY="$way" -DCMAKE_PREFIX_PATH="$build/installed"
    quietly cmake --build "$build/consumer-$way" -j "$jobs"
    "$build/consumer-$way/consumer"
done

"$build/hotgraph_tests" --gtest_brief=1 "$@"
