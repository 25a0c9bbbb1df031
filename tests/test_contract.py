"""The contract of the wire: every name in it is explained, the linter is strict, and what stands cannot be broken unseen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parent.parent
IMAGE = Path(__file__).resolve().parent / "contract" / "v1.binpb"
BUF = Path(sys.executable).parent / "buf"

# Field numbers of descriptor.proto: the path to a thing in a file is made of them.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _MESSAGE_NESTED, _MESSAGE_ENUM, _MESSAGE_ONEOF = 2, 3, 4, 8
_ENUM_VALUE = _SERVICE_METHOD = 2

BAD_PROTO = """\
syntax = "proto3";

package hotgraph.v1;

// A message whose field nobody explains.
message Unexplained {
  string field = 1;
}
"""


def buf(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(BUF), *arguments], cwd=folder, capture_output=True, timeout=60)


def build(*arguments: str, folder: Path = ROOT) -> FileDescriptorSet:
    done = buf("build", "--as-file-descriptor-set", "--output", "-#format=binpb", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr.decode()
    return FileDescriptorSet.FromString(done.stdout)


def ours(files: FileDescriptorSet) -> dict[str, FileDescriptorProto]:
    return {file.name: file for file in files.file if file.package == "hotgraph.v1"}


@pytest.fixture(scope="module")
def contract() -> dict[str, FileDescriptorProto]:
    """The files of the contract with their comments, by name."""
    return ours(build())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the protos and buf's settings, to spoil."""
    for path in (ROOT / "protos").rglob("*.proto"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


Place = tuple[str, tuple[int, ...]]


def names(file: FileDescriptorProto) -> Iterator[Place]:
    """Everything with a name in a file: what it is called, and its path in the file."""
    for index, message in enumerate(file.message_type):
        yield from _names_of_message(message, (_FILE_MESSAGE, index))
    for index, enum in enumerate(file.enum_type):
        yield from _names_of_enum(enum, (_FILE_ENUM, index))
    for index, service in enumerate(file.service):
        yield from _names_of_service(service, (_FILE_SERVICE, index))


def _names_of_message(message: DescriptorProto, path: tuple[int, ...]) -> Iterator[Place]:
    yield message.name, path
    for index, field in enumerate(message.field):
        yield f"{message.name}.{field.name}", (*path, _MESSAGE_FIELD, index)
    for index, oneof in enumerate(message.oneof_decl):
        is_optional = any(field.proto3_optional and field.oneof_index == index for field in message.field)
        if not is_optional:  # the compiler makes a oneof of each optional field
            yield f"{message.name}.{oneof.name}", (*path, _MESSAGE_ONEOF, index)
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _names_of_message(nested, (*path, _MESSAGE_NESTED, index))
    for index, enum in enumerate(message.enum_type):
        yield from _names_of_enum(enum, (*path, _MESSAGE_ENUM, index))


def _names_of_enum(enum: EnumDescriptorProto, path: tuple[int, ...]) -> Iterator[Place]:
    yield enum.name, path
    for index, value in enumerate(enum.value):
        yield f"{enum.name}.{value.name}", (*path, _ENUM_VALUE, index)


def _names_of_service(service: ServiceDescriptorProto, path: tuple[int, ...]) -> Iterator[Place]:
    yield service.name, path
    for index, method in enumerate(service.method):
        yield f"{service.name}.{method.name}", (*path, _SERVICE_METHOD, index)


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}


def test_everything_is_explained(contract: dict[str, FileDescriptorProto]) -> None:
    """Every service, method, message, field, oneof, enum and enum value has a comment that is a sentence or more."""
    num_names = 0
    unexplained = []
    for file in contract.values():
        by_path = comments(file)
        for name, path in names(file):
            num_names += 1
            comment = by_path.get(path, "")
            if len(comment) < 3 or not comment.rstrip().endswith((".", ":", "?")):
                unexplained.append(f"{file.name}: {name}: {comment!r}")
    assert unexplained == []
    assert num_names > 300


def test_the_contract_is_where_its_package_says(contract: dict[str, FileDescriptorProto]) -> None:
    """All files are in hotgraph/v1, and the three services are there, each in a file of its own."""
    assert all(name.startswith("hotgraph/v1/") for name in contract)
    services = {service.name: name for name, file in contract.items() for service in file.service}
    assert sorted(services) == ["AdminService", "GraphService", "InferenceService"]
    assert len(set(services.values())) == 3


def test_buf_lint_passes() -> None:
    """The contract is clean under STANDARD and COMMENTS."""
    done = buf("lint")
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("", BAD_PROTO, "COMMENT_FIELD"),
        ("// Says hello.\n", "", "COMMENT_SERVICE"),
        ("HelloRequest) returns", "HelloResponse) returns", "RPC_REQUEST_RESPONSE_UNIQUE"),
    ],
)
def test_buf_lint_refuses(copied: Path, old: str, new: str, rule: str) -> None:
    """A contract with something unexplained or against the rules fails, and the rule is named."""
    good = (
        'syntax = "proto3";\n\npackage hotgraph.v1;\n\n// Says hello.\nservice HelloService {\n  // Hello.\n'
        "  rpc Hello(HelloRequest) returns (HelloResponse);\n}\n\n// Asks.\nmessage HelloRequest {}\n\n"
        "// Answers.\nmessage HelloResponse {}\n"
    )
    path = copied / "protos/hotgraph/v1/hello_service.proto"
    path.write_text(good)
    assert buf("lint", folder=copied).returncode == 0
    path.write_text(good.replace(old, new, 1) if old else new)
    done = buf("lint", "--error-format", "json", folder=copied)
    assert done.returncode != 0
    assert rule in done.stdout.decode()


def test_the_image_is_the_contract_as_it_stands() -> None:
    """tests/contract/v1.binpb holds all of the contract, so that `buf breaking` guards all of it. After a change that
    adds something: `make contract`."""
    image = ours(build("--exclude-source-info", str(IMAGE)))
    assert image == ours(build("--exclude-source-info")), "run: make contract"


def test_buf_breaking_passes() -> None:
    """The contract breaks nothing of the image."""
    done = buf("breaking", "--against", str(IMAGE))
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("admin_service.proto", "  uint64 num_finished = 7;\n", "", "FIELD_NO_DELETE"),
        ("admin_service.proto", "  rpc Drain(DrainRequest) returns (DrainResponse);\n", "", "RPC_NO_DELETE"),
        ("generation.proto", "repeated uint32 ids = 1;", "repeated uint32 ids = 2;", "FIELD_NO_DELETE"),
        ("generation.proto", "optional float temperature = 1;", "optional double temperature = 1;", "FIELD_SAME_TYPE"),
        ("generation.proto", "repeated uint32 ids = 1;", "repeated uint32 identifiers = 1;", "FIELD_SAME_NAME"),
        ("inference_service.proto", "returns (stream GenerateResponse)", "returns (GenerateResponse)", "STREAMING"),
        ("error_reason.proto", "ERROR_REASON_INTERNAL = 17;", "ERROR_REASON_INTERNAL = 70;", "ENUM_VALUE_NO_DELETE"),
    ],
)
def test_buf_breaking_refuses(copied: Path, file: str, old: str, new: str, rule: str) -> None:
    """A field or a method that is gone, a field that is renumbered, renamed or of another type, a stream that is none any
    more and a lost enum value fail."""
    path = copied / "protos/hotgraph/v1" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    done = buf("breaking", "--against", str(IMAGE), "--error-format", "json", folder=copied)
    assert done.returncode != 0
    assert rule in done.stdout.decode()


def take(folder: Path) -> subprocess.CompletedProcess[bytes]:
    """`make contract` in a copy of the repository's protos, with this environment's buf."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "--assume-old=.venv/.dev", f"BIN={BUF.parent}", "contract"]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=60)


def test_make_contract_takes_no_break(copied: Path) -> None:
    """The image, which is the last contract that was agreed on and comes with every clone, is replaced by one that adds
    something, and left as it is by one that breaks something."""
    image = copied / "tests" / "contract" / "v1.binpb"
    image.parent.mkdir(parents=True)
    shutil.copy(IMAGE, image)
    path = copied / "protos/hotgraph/v1/admin_service.proto"
    text, field = path.read_text(), "  uint64 num_finished = 7;\n"
    assert field in text
    path.write_text(text.replace(field, ""))
    done = take(copied)
    assert done.returncode != 0
    assert b'field "7" with name "num_finished"' in done.stdout
    assert image.read_bytes() == IMAGE.read_bytes()
    path.write_text(text + "// New.\nmessage New {}\n")
    assert take(copied).returncode == 0
    assert "New" in [message.name for file in build(str(image)).file for message in file.message_type]


def test_adding_breaks_nothing(copied: Path) -> None:
    """A new optional field and a new message are no break."""
    path = copied / "protos/hotgraph/v1/generation.proto"
    text = path.read_text()
    old = "repeated uint32 ids = 1;"
    assert old in text
    path.write_text(
        text.replace(old, old + "\n  // New.\n  optional uint32 more = 2;", 1) + "// New.\nmessage New {}\n"
    )
    done = buf("breaking", "--against", str(IMAGE), folder=copied)
    assert done.returncode == 0, done.stdout.decode()
