#!/usr/bin/env bash
# Generates hotgraph/v1 from protos/hotgraph/v1: messages and gRPC stubs. `generate.sh --check` changes nothing and fails
# when what is committed is not what would be generated.
#
# protoc is the one of grpcio-tools in the checkout's virtual environment (PYTHON names another Python that has it), the
# plugins are built by Go into .tools/bin of the checkout the first time, which needs a Go module proxy. All three are
# pinned, so that everybody generates the same bytes. The protos name no Go package: what is theirs is said here.
set -euo pipefail

protoc_gen_go=v1.36.12
protoc_gen_go_grpc=v1.6.2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
go=$("$here/find_go.sh")
python=${PYTHON:-$root/.venv/bin/python}
plugins=$root/.tools/bin/protoc-gen-go-$protoc_gen_go-$protoc_gen_go_grpc

if [ ! -d "$plugins" ]; then
    mkdir -p "$root/.tools/bin"
    new=$(mktemp -d "$root/.tools/bin/.new-XXXXXX")
    trap 'rm -rf "$new"' EXIT
    GOBIN=$new GOFLAGS=-buildvcs=false "$go" install "google.golang.org/protobuf/cmd/protoc-gen-go@$protoc_gen_go"
    GOBIN=$new GOFLAGS=-buildvcs=false "$go" install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$protoc_gen_go_grpc"
    mv "$new" "$plugins"
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
module=$(sed -n 's/^module //p' "$here/go.mod")
options=(paths=source_relative)
cd "$root/protos"
for file in hotgraph/v1/*.proto; do
    options+=("M$file=$module/hotgraph/v1;hotgraphv1")
done
arguments=(--proto_path=. --go_out="$out" --go-grpc_out="$out")
for option in "${options[@]}"; do
    arguments+=("--go_opt=$option" "--go-grpc_opt=$option")
done
PATH=$plugins:$PATH "$python" -m grpc_tools.protoc "${arguments[@]}" hotgraph/v1/*.proto

if [ "${1:-}" = --check ]; then
    diff --recursive --brief "$out/hotgraph/v1" "$here/hotgraph/v1" || {
        echo "clients/go/hotgraph/v1 is not what the protos give: run make protos-go" >&2
        exit 1
    }
    exit 0
fi
rm -rf "$here/hotgraph/v1"
mkdir -p "$here/hotgraph"
cp -R "$out/hotgraph/v1" "$here/hotgraph/v1"
