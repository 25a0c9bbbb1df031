"""The golden wire vectors cover the whole contract, are those that the protos give, and Python reads and writes them alike."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from hotgraph.v1.generation_pb2 import Usage
from tests.contract.vectors import FILE, FILES, messages, vectors, write

ENTRIES: list[dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))


def read(entry: dict[str, str]) -> Message:
    """The message of an entry, from its binary form."""
    kind: Descriptor = Default().FindMessageTypeByName(entry["type"])
    message: Message = GetMessageClass(kind).FromString(b64decode(entry["binary"]))
    return message


def set_names(message: Message) -> Iterator[str]:
    """The full names of the fields that are set in a message and in what it holds, and of the enum values in them."""
    for field, value in message.ListFields():
        yield field.full_name
        values = value if field.is_repeated else [value]
        for one in values:
            if field.message_type is not None:
                yield from set_names(one)
            elif field.enum_type is not None and one in field.enum_type.values_by_number:
                yield f"{field.enum_type.full_name}.{field.enum_type.values_by_number[one].name}"


@pytest.fixture(scope="module")
def covered() -> set[str]:
    return {name for entry in ENTRIES for name in set_names(read(entry))}


def missing_fields(kinds: list[Descriptor], covered: set[str]) -> list[str]:
    return [field.full_name for kind in kinds for field in kind.fields if field.full_name not in covered]


def test_every_field_of_every_message_is_set(covered: set[str]) -> None:
    """Each field of the contract is set in some vector, each message has a vector of its own, and there are 60 or more."""
    kinds = list(messages())
    assert sum(len(kind.fields) for kind in kinds) > 200
    assert missing_fields(kinds, covered) == [], "run: make vectors"
    assert {entry["type"] for entry in ENTRIES} == {kind.full_name for kind in kinds}
    assert len(ENTRIES) >= 60


def test_every_proto_file_is_walked() -> None:
    """No file of the contract is left out of the vectors."""
    protos = Path(__file__).resolve().parents[2] / "protos"
    names = {path.relative_to(protos).as_posix() for path in protos.rglob("*.proto")}
    assert {module.DESCRIPTOR.name for module in FILES} == names


def test_every_enum_value_that_a_field_can_have_is_there(covered: set[str]) -> None:
    """Each value but the zero, which is not sent, of each enum that is a field's type."""
    enums = {
        field.enum_type.full_name: field.enum_type for kind in messages() for field in kind.fields if field.enum_type
    }
    assert len(enums) >= 9
    for enum in enums.values():
        assert [v.name for v in enum.values if v.number and f"{enum.full_name}.{v.name}" not in covered] == []


def test_a_field_without_a_vector_is_found(covered: set[str]) -> None:
    """The check names a field that no vector sets."""
    one = Usage.DESCRIPTOR.fields[0].full_name
    assert missing_fields(list(messages()), covered - {one}) == [one]


def test_the_file_is_what_the_protos_give(tmp_path: Path) -> None:
    """What is committed is what the program writes, to the byte."""
    assert write(tmp_path / FILE.name) == len(ENTRIES)
    assert (tmp_path / FILE.name).read_bytes() == FILE.read_bytes(), "run: make vectors"


def test_names_are_unique() -> None:
    """No two vectors share a name."""
    names = [vector.name for vector in vectors()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_python_reads_and_writes_it(entry: dict[str, str]) -> None:
    """Binary and JSON are the same message, and either is written again as it stands."""
    binary, text = b64decode(entry["binary"]), entry["json"]
    message = read(entry)
    from_json = json_format.Parse(text, type(message)())
    assert from_json == message
    assert message.SerializeToString(deterministic=True) == binary
    assert from_json.SerializeToString(deterministic=True) == binary
    assert json_format.MessageToDict(message) == json.loads(text)
