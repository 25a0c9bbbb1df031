"""Golden wire vectors: messages of the contract in binary and canonical JSON, for the tests of every client language.

They are made of the descriptors alone, the same on every machine: `python -m tests.contract.vectors` (`make vectors`)
writes them to `vectors.json`, a list of objects: name, type (of the message), binary (base64) and json (its text). A field
that is added to the contract changes the vectors of its message and no others. It knows nothing of what the fields mean,
so that most of these messages would be refused as requests.
"""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from hotgraph.v1 import (
    admin_service_pb2,
    error_reason_pb2,
    generation_pb2,
    graph_pb2,
    graph_service_pb2,
    inference_service_pb2,
    model_pb2,
)

FILE = Path(__file__).resolve().parent / "vectors.json"
FILES = (
    admin_service_pb2,
    error_reason_pb2,
    generation_pb2,
    graph_pb2,
    graph_service_pb2,
    inference_service_pb2,
    model_pb2,
)

TEXTS = (
    "plain",
    "naïve 😀 漢字 \u202eright to left",
    'tab\tnewline\nnul\0bell\x07escape\x1bdelete\x7f"quotes"\\',
    "e\u0301 is not é",  # not normalised: a client must leave it as it is
)
WELL_KNOWN_DURATION = "google.protobuf.Duration"
WELL_KNOWN_TIMESTAMP = "google.protobuf.Timestamp"
WELL_KNOWN_FIELD_MASK = "google.protobuf.FieldMask"

Value = Any


@dataclass(frozen=True, slots=True)
class Vector:
    """A message and its name."""

    name: str
    message: Message

    @property
    def binary(self) -> bytes:
        """Fields in the order of their numbers."""
        return self.message.SerializeToString(deterministic=True)

    @property
    def json(self) -> str:
        """Canonical JSON: lowerCamelCase, enum names, 64-bit numbers as text, no field that has its default."""
        return json_format.MessageToJson(self.message, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


@dataclass(frozen=True, slots=True)
class Style:
    """How the fields of one vector are filled.

    Lists hold three, or one where they are inside of another message. salt makes its values others than another style's.
    limits: the numbers at the ends of their ranges. zeros: fields that tell absent from zero hold zero, all others are
    absent. enums: no field is set but those with names for their values. member is the number of the one set in a oneof,
    counted from 0.
    """

    name: str
    salt: int = 0
    limits: bool = False
    zeros: bool = False
    enums: bool = False
    member: int = 0
    list_length: int = 3

    def inside(self, index: int = 0) -> Style:
        """For the message in a field, at this place of a list."""
        return replace(self, salt=self.salt + index, member=0, list_length=1)


TYPICAL, LIMITS, ZEROS = Style("typical"), Style("limits", salt=1, limits=True), Style("zeros", zeros=True)


def messages() -> Iterator[Descriptor]:
    """Every message of the contract, by file and name."""
    for module in FILES:
        file = module.DESCRIPTOR
        yield from (file.message_types_by_name[name] for name in sorted(file.message_types_by_name))


def vectors() -> list[Vector]:
    """For each message vectors of each style that says something new, for each member of its oneofs and value of its enums."""
    made: list[Vector] = []
    for kind in messages():
        seen: set[bytes] = set()
        has_scalars = any(field.message_type is None for field in kind.fields)
        styles = [TYPICAL, LIMITS, ZEROS] if has_scalars else [TYPICAL]  # the rest is said by what it holds
        num_members = max((len(oneof.fields) for oneof in _oneofs(kind)), default=1)
        styles += [Style(f"member_{i}", salt=i + 1, member=i) for i in range(1, num_members)]
        num_values = max((len(field.enum_type.values) for field in kind.fields if field.enum_type), default=0)
        styles += [Style(f"value_{i}", salt=i - 1, enums=True) for i in range(1, num_values)]
        for style in styles:
            vector = Vector(f"{_snake(kind.name)}.{style.name}", _message(kind, style))
            if vector.binary not in seen:
                seen.add(vector.binary)
                made.append(vector)
    made += [Vector(f"graph_key.enum_{number}", _graph_key(number)) for number in (-1, 77)]
    return made


def _graph_key(sampler: int) -> Message:
    """An enum value that this version of the contract does not know, as a newer peer may send it."""
    return graph_pb2.GraphKey.FromString(graph_pb2.GraphKey(tokens=1).SerializeToString() + _varint_field(3, sampler))


def _varint_field(number: int, value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative enum takes ten bytes
    encoded = bytearray([number << 3])
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded) + bytes([value])


def _oneofs(kind: Descriptor) -> list[Any]:
    """The oneofs that stand in the contract, not those that the compiler makes of optional fields."""
    return [oneof for oneof in kind.oneofs if not (len(oneof.fields) == 1 and oneof.name.startswith("_"))]


def _message(kind: Descriptor, style: Style) -> Message:
    message: Message = GetMessageClass(kind)()
    if kind.full_name == WELL_KNOWN_DURATION:
        message.seconds, message.nanos = _duration(style)  # type: ignore[attr-defined]
        return message
    if kind.full_name == WELL_KNOWN_TIMESTAMP:
        message.seconds, message.nanos = _timestamp(style)  # type: ignore[attr-defined]
        return message
    if kind.full_name == WELL_KNOWN_FIELD_MASK:
        message.paths.extend([] if style.zeros else ["limit_bytes", "stall_budget_per_second"])  # type: ignore[attr-defined]
        return message
    left_out = {
        field.number
        for oneof in _oneofs(kind)
        for i, field in enumerate(oneof.fields)
        if i != style.member % len(oneof.fields)
    }
    for field in kind.fields:
        if field.number not in left_out and (field.enum_type is not None or not style.enums):
            _set(message, field, style)
    return message


def _set(message: Message, field: FieldDescriptor, style: Style) -> None:
    if field.is_repeated:
        if style.zeros:
            return
        values = getattr(message, field.name)
        for i in range(style.list_length):
            if field.message_type is None:
                values.append(_scalar(field, style, i))
            else:
                values.add().CopyFrom(_message(field.message_type, style.inside(i)))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(_message(field.message_type, style.inside()))
    elif not style.zeros:
        setattr(message, field.name, _scalar(field, style, 0))
    elif field.has_presence:
        setattr(message, field.name, field.default_value)


def _scalar(field: FieldDescriptor, style: Style, index: int) -> Value:
    """A value of the field's type. Which one depends on the field's name, the style and the place in the list."""
    seed = zlib.crc32(f"{field.full_name} {style.salt} {index}".encode())
    if field.enum_type is not None:
        numbers = [value.number for value in field.enum_type.values]
        if style.limits:
            return numbers[-1 - index % len(numbers)]
        return numbers[1 + (style.salt + index) % (len(numbers) - 1)]
    make = SCALARS[field.type]
    return make(seed, style.limits, index)


def _unsigned(num_bits: int) -> Callable[[int, bool, int], int]:
    def make(seed: int, is_limit: bool, index: int) -> int:
        if is_limit:
            return ((1 << num_bits) - 1, 1 << (num_bits - 1), 1)[index % 3]
        # Of every length in bytes, and never 0, which would not be sent.
        wide = seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        return (wide >> (64 - num_bits) >> seed % num_bits) or 1

    return make


def _signed(seed: int, is_limit: bool, index: int) -> int:
    return (-(1 << 31), (1 << 31) - 1, -1)[index % 3] if is_limit else seed % 1000 + 1


def _float32(seed: int, is_limit: bool, index: int) -> float:
    if is_limit:  # near the largest (some read no JSON of the very largest), the least normal one, infinity
        return (3.3999999521443642e38, 1.1754943508222875e-38, float("-inf"))[(seed + index) % 3]
    rounded: float = struct.unpack("<f", struct.pack("<f", (seed % 20001 - 10000) / 1000 or 0.1))[0]
    return rounded


def _bytes(seed: int, is_limit: bool, index: int) -> bytes:
    return bytes(range(256)) if is_limit else "é€😀".encode()[index : index + 1 + seed % 5]


def _text(seed: int, is_limit: bool, index: int) -> str:
    return "漢\0" * 40 if is_limit and seed % 3 == 0 else TEXTS[(seed + index) % len(TEXTS)]


SCALARS: dict[int, Callable[[int, bool, int], Value]] = {
    FieldDescriptor.TYPE_UINT32: _unsigned(32),
    FieldDescriptor.TYPE_UINT64: _unsigned(64),
    FieldDescriptor.TYPE_INT32: _signed,
    FieldDescriptor.TYPE_FLOAT: _float32,
    FieldDescriptor.TYPE_BOOL: lambda seed, is_limit, index: True,
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_BYTES: _bytes,
}
"""How each scalar type is filled. A contract that takes up another type fails with KeyError: give it a row."""


def _duration(style: Style) -> tuple[int, int]:
    if style.zeros:
        return 0, 0
    if style.limits:
        return ((315_576_000_000, 999_999_999), (-315_576_000_000, -999_999_999), (0, -1))[(style.salt - 1) % 3]
    return ((1, 500_000_000), (0, 1_234_000), (60, 0), (0, 7))[style.salt % 4]


def _timestamp(style: Style) -> tuple[int, int]:
    if style.zeros:
        return 0, 0
    if style.limits:  # the last and the first that there are, and one before 1970
        return ((253_402_300_799, 999_999_999), (-62_135_596_800, 0), (-1, 1))[(style.salt - 1) % 3]
    return ((1_795_312_800, 123_456_789), (1_795_312_800, 120_000_000), (951_782_400, 0))[style.salt % 3]


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def write(path: Path) -> int:
    """Writes all vectors into the file. Their number."""
    made = [
        {
            "name": vector.name,
            "type": vector.message.DESCRIPTOR.full_name,
            "binary": b64encode(vector.binary).decode(),
            "json": vector.json,
        }
        for vector in vectors()
    ]
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(made)


if __name__ == "__main__":
    print(f"{write(FILE)} vectors in {FILE}")
