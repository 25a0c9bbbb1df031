#!/usr/bin/env bash
# Puts the pinned ghz into .tools/bin of this checkout, and prints its path. Does nothing when it is there already.
exec "$(dirname "${BASH_SOURCE[0]}")/install_tool.sh" github.com/bojand/ghz/cmd/ghz v0.121.0 1.23
