"""How each product of few rows is cut up: measured tables, the files they stand in, and `tuned`'s rule for all else.

It knows which tunings a kernel takes, not how they are found (`tuner.py` does), and of a model the sizes of its products. A
table is read once, when a model is loaded. Whatever is wrong with one, it is left aside with a warning, and the rule holds.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

import platformdirs
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hotgraph_server.files import write_whole
from hotgraph_server.kernels.few_rows import has_pdl
from hotgraph_server.kernels.few_rows_cuts import (
    MAX_ROWS,
    MAX_SUM_ROWS,
    ROW_CLASSES,
    DotTuning,
    SumTuning,
    Tuning,
    row_class,
    tuned,
)
from hotgraph_server.kernels.jit import next_power_of_two

FORMAT = 1
"""Of the file. Raise it when that changes, and when the kernels do so much that what was measured of them says nothing."""

MAX_FILE_BYTES = 4 << 20
SHIPPED_FOLDER = Path(__file__).with_name("tunings")

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_MAX_THREAD_BYTES = 512  # of the weight in flight, of the 1020 that a thread's registers hold
_MAX_UNROLLED_TILES = 64

logger = logging.getLogger("hotgraph.kernels")

Tunings: TypeAlias = Mapping[int, Tuning]
"""Of one product, by the number of rows, from 1 to MAX_ROWS."""


@dataclass(frozen=True, slots=True)
class ProductShape:
    """What a tuning is for. num_weight_rows: twice the outputs of a gated product; dtype: torch's name for it."""

    num_weight_rows: int
    num_inputs: int
    is_gated: bool
    is_normed: bool
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the weight, in 16 bits."""
        return 2 * self.num_weight_rows * self.num_inputs

    def rule(self, num_rows: int) -> Tuning:
        """What is taken when nothing was measured."""
        return tuned(num_rows, self.num_weight_rows, self.num_inputs, is_gated=self.is_gated, is_normed=self.is_normed)


@dataclass(frozen=True, slots=True)
class ChainShape:
    """The sizes of a decoder that products of few rows depend on."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    num_layers: int
    activation: str
    dtype: torch.dtype
    fuses_rope: bool  # whether `few_rows_qkv` makes queries, keys and values

    @property
    def products(self) -> Mapping[str, ProductShape]:
        """A layer's four in their order, and the head."""
        dtype = str(self.dtype).removeprefix("torch.")
        width = self.num_heads * self.head_dim

        def product(rows: int, inputs: int, *, is_gated: bool = False, is_normed: bool = False) -> ProductShape:
            return ProductShape(rows, inputs, is_gated, is_normed, dtype)

        return {
            "qkv": product(width + 2 * self.num_kv_heads * self.head_dim, self.hidden_size, is_normed=True),
            "output": product(self.hidden_size, width),
            "gate_up": product(2 * self.intermediate_size, self.hidden_size, is_gated=True, is_normed=True),
            "down": product(self.hidden_size, self.intermediate_size),
            "head": product(self.vocabulary_size, self.hidden_size, is_normed=True),
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """What a table was measured with. GPU and Triton decide whether it holds; driver and torch are told to people."""

    gpu: str
    driver_version: str
    torch_version: str
    triton_version: str

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The one we run on."""
        try:
            triton = metadata.version("triton")
        except metadata.PackageNotFoundError:
            triton = "none"
        return cls(torch.cuda.get_device_name(device), _driver_version(), torch.__version__, triton)

    @property
    def file_name(self) -> str:
        """Of its table: one for each kind of GPU."""
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") + ".json"


def fault(tuning: Tuning, shape: ProductShape, rows: int) -> str | None:
    """Why a product's kernel for the row class `rows` cannot take a tuning; None: it can.

    What passes compiles, needs no more shared memory than a GPU of compute capability 9.0 has, and keeps what is in flight in
    registers. The order of the triggers is no tuning: attention relies on it, so it has to be the rule's.
    """
    if isinstance(tuning, SumTuning) != (rows <= MAX_SUM_ROWS):
        return "is for another number of rows"
    if tuning.triggers_late != shape.rule(rows).triggers_late:
        return "lets the next kernel start at another time"
    if isinstance(tuning, SumTuning):
        num_tiles = -(-shape.num_inputs // tuning.tile)
        num_bytes = 2 * tuning.block_rows * tuning.tile * min(tuning.ahead, num_tiles) // (32 * tuning.num_warps)
        checks = {
            "block_rows": tuning.block_rows in (2, 4, 8, 16),
            "num_warps": tuning.num_warps in (1, 2, 4, 8, 16),
            "tile": _is_power_of_two(tuning.tile)
            and 256 * tuning.num_warps <= tuning.tile <= max(next_power_of_two(shape.num_inputs), 256)
            and num_tiles <= _MAX_UNROLLED_TILES,
            "ahead": 1 <= tuning.ahead <= 8,
        }
    else:
        num_bytes = 2 * tuning.block_rows * tuning.parts * tuning.ahead
        checks = {
            "block_rows": tuning.block_rows in (16, 32, 64),
            "parts": tuning.parts in (1, 2, 4, 8),
            "num_warps": tuning.num_warps in (2, 4, 8),
            "ahead": 1 <= tuning.ahead <= 16
            and (tuning.ahead - 1) * 32 * tuning.parts * tuning.num_warps < shape.num_inputs,
            "tokens_ahead": 1 <= tuning.tokens_ahead <= min(tuning.ahead, 4),
        }
    for name, is_sound in checks.items():
        if not is_sound:
            return f"{name} is {getattr(tuning, name)}"
    return f"{num_bytes} bytes are in flight a thread" if num_bytes > _MAX_THREAD_BYTES else None


@dataclass(frozen=True, slots=True)
class TuningTable:
    """Measured tunings by product and row class. source: where they come from, for people."""

    measured: Mapping[tuple[ProductShape, int], Tuning]
    source: str

    def tunings_of(self, shape: ProductShape) -> Tunings:
        """For every number of rows what was measured, else the rule's."""
        of_class = {rows: self.measured.get((shape, rows)) or shape.rule(rows) for rows in ROW_CLASSES}
        return {num_rows: of_class[row_class(num_rows)] for num_rows in range(1, MAX_ROWS + 1)}

    def over(self, other: TuningTable) -> TuningTable:
        """This one, and what only the other one has."""
        sources = [table.source for table in (self, other) if table.measured]
        return TuningTable(MappingProxyType({**other.measured, **self.measured}), " over ".join(sources))


NO_TUNINGS = TuningTable(MappingProxyType({}), "")
"""The rule for everything."""


class TuningFileError(Exception):
    """A file holds no table for this machine. The message is for people, and does not name the file."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Size = Annotated[int, Field(ge=1, lt=1 << 31)]


class _Sums(_Part):
    block_rows: _Size
    tile: _Size
    num_warps: _Size
    ahead: _Size


class _Dots(_Part):
    block_rows: _Size
    parts: _Size
    num_warps: _Size
    ahead: _Size
    tokens_ahead: _Size


class _Entry(_Part):
    dtype: Literal["float16", "bfloat16"]
    num_weight_rows: _Size
    num_inputs: _Size
    is_gated: bool
    is_normed: bool
    rows: Literal[1, 2, 8, 16]
    tuning: _Sums | _Dots

    def read(self) -> tuple[tuple[ProductShape, int], Tuning]:
        """Raises TuningFileError."""
        shape = ProductShape(self.num_weight_rows, self.num_inputs, self.is_gated, self.is_normed, self.dtype)
        is_late = shape.rule(self.rows).triggers_late
        sizes = self.tuning.model_dump()
        kind = SumTuning if isinstance(self.tuning, _Sums) else DotTuning
        tuning: Tuning = kind(**sizes, triggers_late=is_late)
        if problem := fault(tuning, shape, self.rows):
            product = f"{self.num_weight_rows}x{self.num_inputs}"
            raise TuningFileError(f"the tuning of {product} for {self.rows} rows cannot be used: {problem}")
        return (shape, self.rows), tuning


class _MachinePart(_Part):
    gpu: str
    driver_version: str
    torch_version: str
    triton_version: str


class _File(_Part):
    format: int
    machine: _MachinePart
    products: list[_Entry]


def cache_folder() -> Path:
    """The user's own, for tables measured on this host."""
    return platformdirs.user_cache_path("hotgraph") / "tunings"


def load_tunings(choice: str, device: torch.device) -> TuningTable:
    """What the setting `model.tuning` means on a device: "off", a file, or "auto", which is this host's over what is shipped.

    A table that is missing where a file was named, damaged, of another version or for another GPU is left aside with a warning.
    """
    if choice == "off" or not has_pdl(device):
        return NO_TUNINGS
    machine = Machine.of(device)
    if choice != "auto":
        return _read_or_warn(Path(choice), machine)
    tables = [_read_or_warn(folder / machine.file_name, machine) for folder in _folders() if _has(folder, machine)]
    table = NO_TUNINGS
    for other in tables:
        table = table.over(other)
    return table


def read_table(path: Path, machine: Machine) -> TuningTable:
    """A file's table for a machine. Raises TuningFileError, and OSError when it cannot be read."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise TuningFileError("it is too large for a table")
    text = path.read_bytes()
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TuningFileError(f"it is no JSON ({error})") from error
    # First, since a file of another version may look different in every other way.
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise TuningFileError(f"it is not of format {FORMAT}")
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise TuningFileError(f"{place}: {problem['msg']}") from error
    for name in ("gpu", "triton_version"):
        measured, ours = getattr(file.machine, name), getattr(machine, name)
        if measured != ours:
            raise TuningFileError(f"it was measured with {name.replace('_', ' ')} {measured!r}, this is {ours!r}")
    return TuningTable(MappingProxyType(dict(entry.read() for entry in file.products)), str(path))


def write_table(path: Path, machine: Machine, table: TuningTable) -> None:
    """Puts a table into a file, whole or not at all; folders are made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = sorted(table.measured.items(), key=lambda item: (*asdict(item[0][0]).values(), item[0][1]))
    lines = ",\n".join("    " + json.dumps(_entry(*key, tuning)) for key, tuning in entries)
    head = json.dumps(asdict(machine))
    text = f'{{\n  "format": {FORMAT},\n  "machine": {head},\n  "products": [\n{lines}\n  ]\n}}\n'
    write_whole(path, text, mode=0o644)


def store_table(path: Path, machine: Machine, table: TuningTable) -> None:
    """`write_table`; of a table for this machine that is there already, what the new one has not is kept. Raises OSError."""
    write_table(path, machine, table.over(_read_or_warn(path, machine)) if path.exists() else table)


def table_of(measured: Iterable[tuple[ProductShape, int, Tuning]], source: str) -> TuningTable:
    """A table of what was measured. It is our mistake when a tuning cannot be used."""
    found: dict[tuple[ProductShape, int], Tuning] = {}
    for shape, rows, tuning in measured:
        assert fault(tuning, shape, rows) is None, "only what can be used is tried"
        found[shape, rows] = tuning
    return TuningTable(MappingProxyType(found), source)


def _folders() -> tuple[Path, Path]:
    """Best first."""
    return cache_folder(), SHIPPED_FOLDER


def _has(folder: Path, machine: Machine) -> bool:
    return (folder / machine.file_name).exists()


def _read_or_warn(path: Path, machine: Machine) -> TuningTable:
    try:
        return read_table(path, machine)
    except OSError as error:
        logger.warning("the tunings in %s cannot be read and are left aside: %s", path, error.strerror or error)
    except TuningFileError as error:
        logger.warning("the tunings in %s are left aside: %s", path, error)
    return NO_TUNINGS


def _entry(shape: ProductShape, rows: int, tuning: Tuning) -> dict[str, object]:
    sizes = {name: value for name, value in asdict(tuning).items() if name != "triggers_late"}
    product = asdict(shape)
    return {"dtype": product.pop("dtype"), **product, "rows": rows, "tuning": sizes}


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _driver_version() -> str:
    """Of the kernel's module, as it tells it; "unknown" where it does not."""
    try:
        text = _VERSION_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found.group(1) if found else "unknown"
