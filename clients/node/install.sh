#!/usr/bin/env bash
# Installs what package-lock.json pins into node_modules, unless it is there. Needs Node 20 or newer and an npm registry.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck disable=SC2016  # what node is given is JavaScript's
node -e 'if (parseInt(process.versions.node) < 20) { console.error(`needs Node 20 or newer, not ${process.version}`); process.exit(1) }'
if ! cmp -s package-lock.json node_modules/.installed-lock; then
    npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
    cp package-lock.json node_modules/.installed-lock
fi
