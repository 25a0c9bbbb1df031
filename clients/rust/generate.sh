#!/usr/bin/env bash
# Generates src/v1 from protos/hotgraph/v1: messages and gRPC stubs, and the descriptors that canonical JSON needs.
# `generate.sh --check` changes nothing and fails when what is committed is not what would be generated. It builds no
# generator, which takes longer than all the tests: it compares the sums of what goes in and of what came out, as
# src/v1/sums keeps them.
#
# protoc is the one of grpcio-tools in the checkout's virtual environment (PYTHON names another Python that has it), the
# generator is the crate in generate/. Both are pinned, so that everybody generates the same bytes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir "$out/v1"
cd "$root/protos"
"$python" -m grpc_tools.protoc --proto_path=. --include_imports --include_source_info \
    --descriptor_set_out="$out/with_comments" hotgraph/v1/*.proto
"$python" -m grpc_tools.protoc --proto_path=. --include_imports --descriptor_set_out="$out/v1/descriptors.binpb" \
    hotgraph/v1/*.proto
cp "$here/generate/src/main.rs" "$out/generator"
grep -A 1 -E '^name = "(prettyplease|prost-build|tonic-build|tonic-prost-build)"$' "$here/versions.lock" > "$out/versions"

# Of the folder in $1.
sums() { (cd "$out" && sha256sum generator versions with_comments && cd "$1" && sha256sum descriptors.binpb hotgraph.v1.rs); }

if [ "${1:-}" = --check ]; then
    cmp "$out/v1/descriptors.binpb" "$here/src/v1/descriptors.binpb" && diff <(sums "$here/src/v1") "$here/src/v1/sums" && exit 0
    echo "clients/rust/src/v1 is not what the protos give: run make protos-rust" >&2
    exit 1
fi
"$here/lock.sh"
(cd "$here" && cargo run --locked --quiet --package hotgraph-generate -- "$out/with_comments" "$out/v1")
sums "$out/v1" > "$out/sums"
mv "$out/sums" "$out/v1/sums"
rm -rf "$here/src/v1"
cp -R "$out/v1" "$here/src/v1"
