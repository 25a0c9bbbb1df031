#!/usr/bin/env bash
# Generates src/gen from protos/hotgraph/v1: messages and services, of gRPC's health and of google.rpc's error details too.
# `generate.sh --check` changes nothing and fails when what is committed is not what would be generated.
#
# protoc is the one of grpcio-tools in the checkout's virtual environment (PYTHON names another Python that has it), the
# plugin the one that package-lock.json pins, so that everybody generates the same bytes. The protos that are not ours come
# from Python packages: health as the descriptor in its stubs, since that package has no .proto.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
"$here/install.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/gen"
(cd "$root/protos" && "$python" - "$work/protos.binpb" hotgraph/v1/*.proto) <<'PYTHON'
import sys
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_tools import protoc

out, *names = sys.argv[1:]
well_known = str(files("grpc_tools") / "_proto")
common = str(Path(status_pb2.__file__).parents[2])
flags = [f"--proto_path={path}" for path in (".", common, well_known)]
flags += ["--include_imports", "--include_source_info", f"--descriptor_set_out={out}"]
if protoc.main(["protoc", *flags, *names, "google/rpc/error_details.proto", "google/rpc/status.proto"]):
    sys.exit(1)
with open(out, "rb+") as file:
    protos = FileDescriptorSet.FromString(file.read())
    health_pb2.DESCRIPTOR.CopyToProto(protos.file.add())
    file.seek(0)
    file.write(protos.SerializeToString())
PYTHON

cd "$root/protos"
"$python" -m grpc_tools.protoc "--descriptor_set_in=$work/protos.binpb" \
    "--plugin=protoc-gen-es=$here/node_modules/.bin/protoc-gen-es" \
    "--es_out=$work/gen" --es_opt=target=ts,import_extension=js \
    hotgraph/v1/*.proto google/rpc/error_details.proto google/rpc/status.proto grpc_health/v1/health.proto

if [ "${1:-}" = --check ]; then
    diff --recursive --brief "$work/gen" "$here/src/gen" || {
        echo "clients/node/src/gen is not what the protos give: run make protos-node" >&2
        exit 1
    }
    exit 0
fi
rm -rf "$here/src/gen"
mkdir -p "$here/src"
cp -R "$work/gen" "$here/src/gen"
