"""The safetensors files of a folder as one mapping from names to tensors, checked before use. It knows no architecture.

Only safetensors: formats that can run code when they are read are refused, whatever else the folder says.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.json_file import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".pkl")
MAX_HEADER_BYTES = 100 << 20  # the format's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a header says of one tensor, and the file it stands in."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint(Mapping[str, torch.Tensor]):
    """Every tensor of a folder, read when asked for.

    Made with `open_checkpoint`. A tensor on the CPU may share the file's pages, so it must not be written to.
    """

    def __init__(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.entries = dict(entries)
        self._files: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises KeyError for a name that is not there, ModelLoadError for a file that went bad since it was checked."""
        entry = self.entries[name]
        try:
            if entry.path not in self._files:
                self._files[entry.path] = safe_open(entry.path, framework="pt", device="cpu")
            tensor = self._files[entry.path].get_tensor(name)
        except Exception as error:  # the library has one error type, which is not exported everywhere
            raise ModelLoadError(f"{entry.path}: {name} cannot be read ({error})") from error
        return tensor  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type most of the values have."""
        counts: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        floating = {dtype: count for dtype, count in counts.items() if dtype.is_floating_point}
        return max(floating, key=lambda dtype: floating[dtype], default=torch.float32)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks every file's header and size against each other and the index. Raises ModelLoadError naming the file."""
    index_path = folder / INDEX
    if not index_path.is_file():
        return Checkpoint(folder, read_header(_single_file(folder)))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelLoadError(f"{index_path}: has no weight_map")
    entries: dict[str, TensorEntry] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index_path}: {name!r} is no safetensors file of the folder")
        entries |= read_header(folder / name)
    for name, file_name in weight_map.items():
        if name not in entries or entries[name].path.name != file_name:
            raise ModelLoadError(f"{folder / file_name}: has no tensor {name}, which {INDEX} says it has")
    return Checkpoint(folder, entries)


def _single_file(folder: Path) -> Path:
    path = folder / SINGLE
    if path.is_file():
        return path
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelLoadError(f"{folder / INDEX}: is missing, and there are {len(files)} safetensors files")
    unsafe = sorted(entry.name for entry in folder.iterdir() if entry.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise ModelLoadError(
            f"{folder / unsafe[0]}: only safetensors are read, since formats like this one can run code;"
            " convert the weights to safetensors first"
        )
    raise ModelLoadError(f"{path}: is missing")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """What one safetensors file holds. Checks that its tensors fill it exactly. Raises ModelLoadError naming the file.

    The format: the header's length as u64, the header as JSON, then the data; offsets count from the data's start.
    """
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(MAX_HEADER_BYTES, num_bytes - 8):
                raise ModelLoadError(f"{path}: its header does not fit into the file: truncated or damaged")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: is missing") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: its header is damaged ({error})") from error
    try:
        return _check_entries(path, header, num_bytes - 8 - header_bytes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path}: its header is damaged ({error})") from error


def _check_entries(path: Path, header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelLoadError(f"{path}: {name} has the unknown type {entry['dtype']!r}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
        if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ModelLoadError(f"{path}: {name} does not have the bytes of its type and shape")
        entries[name] = TensorEntry(path, dtype, shape)
        ranges.append((start, end))
    position = 0
    for start, end in sorted(ranges):
        if start != position:
            raise ModelLoadError(f"{path}: its tensors overlap or leave gaps")
        position = end
    if position != data_bytes:
        raise ModelLoadError(
            f"{path}: its tensors need {position} bytes, but it has {data_bytes}: truncated or damaged"
        )
    return entries
