#!/usr/bin/env bash
# Puts the pinned grpcurl into .tools/bin of this checkout, and prints its path. Does nothing when it is there already.
exec "$(dirname "${BASH_SOURCE[0]}")/install_tool.sh" github.com/fullstorydev/grpcurl/cmd/grpcurl v1.9.4 1.25
