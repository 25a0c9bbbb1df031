"""Reads a GGUF file: its metadata and, one at a time, its tensors as float32. It knows the format, not what a model is.

The format: magic, version, counts, key-value metadata, a table of tensors, then aligned tensor data. Everything the file
says about itself is checked against its real size before it is used, for the file may come from anywhere.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hotgraph_server.errors import ModelLoadError

SUPPORTED_VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT_BYTES = 32

# Metadata value types of the format with a fixed size, as `struct` spells them. 8 is a string, 9 an array.
_FIXED_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place: shape in torch's order, where its bytes start in the file, and how many there are."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class GgufFile:
    """An open GGUF file. The data stays on disk until a tensor is asked for. Raises ModelLoadError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelLoadError(f"{path}: cannot be read ({error})") from error
        self._offset = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
            raise ModelLoadError(f"{path}: is no readable GGUF file ({error})") from error

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama" or "qwen2"."""
        return str(self.metadata.get("general.architecture", ""))

    def read_tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values as float32, dequantised, in torch's order of dimensions. KeyError when there is none."""
        info = self.tensors[name]
        block_size, block_bytes = GGML_QUANT_SIZES[info.type]
        raw = np.frombuffer(self._data, dtype=np.uint8, count=info.num_bytes, offset=info.start)
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block_size * block_bytes)
        try:
            values = dequantize(rows, info.type)
        except NotImplementedError as error:
            raise ModelLoadError(f"{self.path}: {name}: type {info.type.name} cannot be dequantised") from error
        return np.array(values, dtype=np.float32, copy=True).reshape(info.shape)

    def _read_header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._data[:4] != b"GGUF":
            raise ValueError("no GGUF magic bytes")
        self._offset = 4
        version = self._number("I")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(f"version {version} is not supported")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if max(num_tensors, num_keys) > MAX_ENTRIES:
            raise ValueError("absurd counts in the header")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        table = [self._table_entry() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES))
        if alignment <= 0:
            raise ValueError("the alignment is no positive number")
        data_start = -(-self._offset // alignment) * alignment
        return metadata, {name: self._locate(name, shape, kind, data_start + at) for name, shape, kind, at in table}

    def _table_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
        dimensions = [self._number("Q") for _ in range(num_dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        return name, tuple(reversed(dimensions)), kind, offset  # the file puts the fastest-moving dimension first

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        quantisation = GGMLQuantizationType(kind)  # ValueError for a type this version of gguf does not know
        block_size, block_bytes = GGML_QUANT_SIZES[quantisation]
        if shape[-1] % block_size:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} are no multiple of the block size {block_size}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if start + num_bytes > len(self._data):
            raise ValueError(f"tensor {name!r} ends past the end of the file: truncated?")
        return TensorInfo(shape, quantisation, start, num_bytes)

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._offset)
        self._offset += struct.calcsize(f"<{kind}")
        return int(value)

    def _string(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._offset:
            raise ValueError("a string ends past the end of the file: truncated?")
        start, self._offset = self._offset, self._offset + length
        return self._data[start : self._offset].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            (value,) = self._fixed(kind, 1)
            return value
        element_kind, count = self._number("I"), self._number("Q")
        if count > len(self._data):
            raise ValueError("an array is longer than the file")
        if element_kind == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._fixed(element_kind, count))

    def _fixed(self, kind: int, count: int) -> tuple[Any, ...]:
        if kind not in _FIXED_FORMATS:
            raise ValueError(f"metadata of type {kind} is not supported")
        layout = f"<{count}{_FIXED_FORMATS[kind]}"
        values = struct.unpack_from(layout, self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return values
