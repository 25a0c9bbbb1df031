#!/usr/bin/env bash
# Builds the Node client and runs its tests. Run by tests/interop they call real daemons too. More arguments go to `node --test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
tsc=node_modules/.bin/tsc
rm -rf dist build
"$tsc" -p tsconfig.json
"$tsc" -p tsconfig.test.json
"$tsc" -p tsconfig.examples.json
node --enable-source-maps --test --test-reporter=dot "$@" build/*.test.js
