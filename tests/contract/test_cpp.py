"""What C++ compiles: the contract by the protoc of Debian 12, and the client's own copies of protos that are Google's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # it comes without types
from grpc_health.v1 import health_pb2
from grpc_tools import protoc as newest  # type: ignore[import-untyped]  # as above

from tests.contract.vectors import FILES

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
WIRE = ROOT / "clients" / "cpp" / "protos"
OLDEST = "3.21"  # of Debian 12 and Ubuntu 24.04
ORIGINALS = {
    "google.rpc": (error_details_pb2.DESCRIPTOR, status_pb2.DESCRIPTOR),
    "grpc.health.v1": (health_pb2.DESCRIPTOR,),
}


@pytest.fixture
def oldest() -> str:
    """The path of protoc 3.21: PROTOC, or the one on PATH."""
    path = os.environ.get("PROTOC") or shutil.which("protoc")
    if path is None:
        pytest.skip(f"no protoc on PATH: apt install protobuf-compiler on Debian 12 for {OLDEST}, or set PROTOC")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if not re.fullmatch(rf"libprotoc {re.escape(OLDEST)}\..*", version):
        pytest.skip(f"{path} is {version}, not {OLDEST}: set PROTOC to one of that release")
    return path


def own_files() -> list[FileDescriptorProto]:
    """The contract as the newest protoc reads it, without comments."""
    found = []
    for file in FILES:
        described = FileDescriptorProto()
        file.DESCRIPTOR.CopyToProto(described)
        found.append(described)
    return found


def read_set(path: Path) -> dict[str, FileDescriptorProto]:
    return {file.name: file for file in FileDescriptorSet.FromString(path.read_bytes()).file}


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Names in JSON that follow from the field's; libraries tell them or leave them out."""

    def clear(message: DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clear(nested)

    same = FileDescriptorProto()
    same.CopyFrom(file)
    for message in same.message_type:
        clear(message)
    return same


def test_the_contract_needs_no_edition() -> None:
    """Every file is proto3, which all releases of protoc know that know optional fields."""
    for file in own_files():
        assert file.syntax == "proto3", file.name
        assert not file.HasField("edition"), file.name


def test_the_oldest_protoc_reads_the_same_contract(oldest: str, tmp_path: Path) -> None:
    """protoc 3.21 takes every file, makes C++ of it, and finds in it what the newest one does."""
    wanted = {file.name: without_json_names(file) for file in own_files()}
    descriptors = tmp_path / "protos.binpb"
    command = [
        oldest,
        f"--proto_path={PROTOS}",
        f"--descriptor_set_out={descriptors}",
        f"--cpp_out={tmp_path}",
        *wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "it warns"
    assert {name: without_json_names(file) for name, file in read_set(descriptors).items()} == wanted
    for name in wanted:
        assert (tmp_path / name).with_suffix(".pb.h").stat().st_size > 0


def test_every_file_of_the_contract_is_taken() -> None:
    """The list that is checked is what stands in the folder."""
    assert sorted(file.name for file in own_files()) == sorted(
        path.relative_to(PROTOS).as_posix() for path in PROTOS.glob("hotgraph/v1/*.proto")
    )


def wire_file() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "wire.binpb"
        paths = [f"--proto_path={path}" for path in (WIRE, files("grpc_tools") / "_proto")]
        assert newest.main(["protoc", *paths, f"--descriptor_set_out={out}", "hotgraph/wire/wire.proto"]) == 0
        return read_set(out)["hotgraph/wire/wire.proto"]


def messages_of(package: str, items: list[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
    """Messages with their names, nested ones too; not the entries of maps, which are not written in a proto."""
    for message in items:
        name = f"{package}.{message.name}"
        yield name, message
        nested = [one for one in message.nested_type if not one.options.map_entry]
        yield from messages_of(name, nested)


def originals() -> dict[str, DescriptorProto]:
    """Google's messages under the names that ours have."""
    found: dict[str, DescriptorProto] = {}
    for descriptors in ORIGINALS.values():
        for descriptor in descriptors:
            described = FileDescriptorProto()
            descriptor.CopyToProto(described)
            found |= dict(messages_of("hotgraph.wire", list(described.message_type)))
    return found


def shape(message: DescriptorProto) -> dict[int, tuple[str, int, int, str]]:
    """Name, type, label and the type's name, by field number."""
    return {
        field.number: (
            field.name,
            field.type,
            field.label,
            re.sub(r"\.(google\.rpc|grpc\.health\.v1)\.", ".hotgraph.wire.", field.type_name),
        )
        for field in message.field
    }


def values(enums: list[EnumDescriptorProto]) -> dict[str, dict[str, int]]:
    return {enum.name: {value.name: value.number for value in enum.value} for enum in enums}


def test_the_copies_are_the_originals_on_the_wire() -> None:
    """Each field of wire.proto is that of google.rpc or grpc.health.v1 with its number, name and type; so are enums."""
    theirs = originals()
    ours = dict(messages_of("hotgraph.wire", list(wire_file().message_type)))
    assert len(ours) == 9
    for name, message in ours.items():
        assert shape(message).items() <= shape(theirs[name]).items(), name
        assert values(list(message.enum_type)) == values(list(theirs[name].enum_type)), name


def test_the_copies_have_names_of_their_own() -> None:
    """No file, package or message of wire.proto is one that another library in the process may bring."""
    file = wire_file()
    assert file.name == "hotgraph/wire/wire.proto"
    assert file.package == "hotgraph.wire"
