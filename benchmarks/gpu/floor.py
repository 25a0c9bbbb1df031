"""The least time a step can take: the bytes and FLOPs it cannot do without, at rates measured on the device in the same run.

`python -m benchmarks.gpu.floor --device cuda --config llama2-7b --out floor-llama2-7b.json`. Work is computed from a model's
sizes alone; it knows no kernels. What must come from memory are the weights, once, and the keys and values of earlier tokens;
new keys and values must go there. Activations and logits are told beside that and are not part of a floor: kernels hand them
to each other through the chip's cache. A floor is by copying bandwidth, with bytes read and written counted; a step mostly
reads, which is a little faster than copying, so a share of the floor may come near one and, in theory, pass it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import DTYPES, SHAPES, synchronize
from benchmarks.gpu.report import Report, device_of, dtype_of, machine_line, make_parser, numbers, say, summary_of

LOGIT_BYTES = 4  # float32, whatever the model's dtype
NUM_WARM_UPS = 3
RATE_SAMPLES = 20
RATE_GAP_SECONDS = 0.02  # back to back, large products run into a GPU's power limit
NUM_TOGETHER = 4  # runs between two events, so that a launch is a small part of what they tell


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a Llama-shaped model decides its work. `element_bytes`: of weights, activations and the KV cache."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    element_bytes: int

    @classmethod
    def of(cls, config_name: str, dtype: torch.dtype) -> Sizes:
        """Of a shape of `benchmarks/gpu/models.py`."""
        sizes = SHAPES[config_name].sizes
        return cls(
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]),
            vocabulary_size=sizes["vocab_size"],
            element_bytes=dtype.itemsize,
        )

    @property
    def query_size(self) -> int:
        """Elements of a token's queries in one layer."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step's rows, as (tokens in the cache before it, new tokens)."""

    rows: tuple[tuple[int, int], ...]

    @classmethod
    def decode(cls, batch: int, context: int) -> StepShape:
        """A new token for each of `batch` rows, which have `context` tokens already."""
        return cls(((context, 1),) * batch)

    @classmethod
    def prompt(cls, num_tokens: int) -> StepShape:
        """A lone prompt in one step."""
        return cls(((0, num_tokens),))

    @property
    def num_tokens(self) -> int:
        return sum(new for _, new in self.rows)

    @property
    def num_cached(self) -> int:
        return sum(context for context, _ in self.rows)

    @property
    def num_seen(self) -> int:
        """Pairs of a new token and a token that it attends to, itself included."""
        return sum(new * context + new * (new + 1) // 2 for context, new in self.rows)


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes by what they are, each read or written once, and FLOPs of matrix products (a multiplication and a sum are two)."""

    weight_bytes: int = 0
    kv_read_bytes: int = 0  # of tokens before the step
    kv_write_bytes: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))

    @property
    def memory_bytes(self) -> int:
        """What no cache can save."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes

    @property
    def all_bytes(self) -> int:
        """What kernels that are cut as in `ROLES` read and write."""
        return self.memory_bytes + self.activation_bytes + self.logits_bytes

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


PRODUCT_ROLES = ("qkv", "output", "gate_up", "down")
"""A layer's products, in their order."""
ROLES = ("embedding", "qkv", "attention", "output", "gate_up", "down", "head")
"""What every step does, each part a kernel (of a layer, but for the first and the last), with all the rest fused into it."""
EXTRA_ROLES = ("norm", "rope", "activation", "sampler")
"""What may have kernels of its own beside them. Their bytes are activations, or logits: no part of a floor."""


def role_work(sizes: Sizes, step: StepShape) -> dict[str, Work]:
    """The work of each of ROLES and EXTRA_ROLES, summed over all layers.

    As in our decoder, the last layer goes on after attention with the last token of each row, when rows have several.
    """
    tokens, rows = step.num_tokens, len(step.rows)
    deep, size = sizes.num_layers, sizes.element_bytes
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    late_tokens = (deep - 1) * tokens + rows  # that go through what comes after attention, over all layers

    def product(num_inputs: int, num_outputs: int, through: int, num_weights: int, **others: int) -> Work:
        """Of `num_weights` matrices, which `through` tokens go through in all; `others` in place of what would follow."""
        found = {
            "weight_bytes": num_weights * num_inputs * num_outputs * size,
            "activation_bytes": through * (num_inputs + num_outputs) * size,
            "flops": 2 * through * num_inputs * num_outputs,
        }
        return Work(**(found | others))

    new_kv_bytes = deep * tokens * sizes.kv_size * size
    norms = Work(weight_bytes=deep * hidden * size)
    residual = Work(activation_bytes=late_tokens * hidden * size)  # read, and written as the product's own output
    gate_up = product(hidden, 2 * inner, late_tokens, deep, activation_bytes=late_tokens * (hidden + inner) * size)
    qkv = product(
        hidden,
        sizes.query_size + sizes.kv_size,
        deep * tokens,
        deep,
        activation_bytes=deep * tokens * (hidden + sizes.query_size) * size,
        kv_write_bytes=new_kv_bytes,
    )
    attention = Work(
        kv_read_bytes=deep * step.num_cached * sizes.kv_size * size,
        activation_bytes=deep * tokens * 2 * sizes.query_size * size + new_kv_bytes,
        flops=4 * deep * sizes.query_size * step.num_seen,
    )
    logits_bytes = rows * sizes.vocabulary_size * LOGIT_BYTES
    head = product(
        hidden, sizes.vocabulary_size, rows, 1, activation_bytes=rows * hidden * size, logits_bytes=logits_bytes
    )
    qkv_elements = sizes.query_size + sizes.kv_size
    return {
        "embedding": Work(weight_bytes=tokens * hidden * size, activation_bytes=tokens * hidden * size),
        "qkv": qkv + norms,
        "attention": attention,
        "output": product(sizes.query_size, hidden, late_tokens, deep) + residual,
        "gate_up": gate_up + norms,
        "down": product(inner, hidden, late_tokens, deep) + residual,
        "head": head + Work(weight_bytes=hidden * size),
        "norm": Work(activation_bytes=2 * (deep * tokens + late_tokens + rows) * hidden * size),
        "rope": Work(activation_bytes=2 * deep * tokens * qkv_elements * size),
        "activation": Work(activation_bytes=3 * late_tokens * inner * size),
        "sampler": Work(logits_bytes=logits_bytes),
    }


def step_work(sizes: Sizes, step: StepShape) -> Work:
    """Of all ROLES together."""
    found = role_work(sizes, step)
    return sum((found[role] for role in ROLES), Work())


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device was measured to do, each per second. `read_bytes`: of a large sum, which only reads."""

    copy_bytes: float
    read_bytes: float
    product_flops: float

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Rates:
        """Of what `measure_rates` returned: medians."""
        return cls(*(measured[name]["per_second"] for name in ("copy", "read", "product")))


def floor_seconds(work: Work, rates: Rates) -> float:
    """What must be moved at the copying bandwidth, or what must be computed at the products' rate: the longer one.

    As if all of a step's bytes and FLOPs overlapped, which kernels that wait for each other cannot quite do.
    """
    return max(work.memory_bytes / rates.copy_bytes, work.flops / rates.product_flops)


def floor_cell(sizes: Sizes, step: StepShape, rates: Rates) -> dict[str, Any]:
    """A step's work and floor, for a result."""
    work = step_work(sizes, step)
    is_memory = work.memory_bytes / rates.copy_bytes >= work.flops / rates.product_flops
    return {
        "work": work.to_dict(),
        "floor_seconds": floor_seconds(work, rates),
        "bound": "memory" if is_memory else "products",
    }


# What the device does.


def measure_rates(device: torch.device, dtype: torch.dtype, *, num_samples: int = RATE_SAMPLES) -> dict[str, Any]:
    """A large copy, a large sum and a large matrix product, with raw samples; `per_second` is by the median.

    To be called before the model takes the memory: it takes 4 GiB of a GPU for a while.
    """
    is_cuda = device.type == "cuda"
    found = _measure_bytes(device, 2 << 30 if is_cuda else 4 << 20, num_samples)
    found["product"] = _measure_product(device, dtype, 8192 if is_cuda else 128, num_samples)
    if is_cuda:
        torch.cuda.empty_cache()
    return found


def _measure_bytes(device: torch.device, num_bytes: int, num_samples: int) -> dict[str, Any]:
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.float32, device=device)
    return {
        "copy": _rate(lambda: target.copy_(source), 2 * num_bytes, device, num_samples),
        "read": _rate(lambda: torch.sum(source, dim=0, out=total), num_bytes, device, num_samples),
    }


def _measure_product(device: torch.device, dtype: torch.dtype, side: int, num_samples: int) -> dict[str, Any]:
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    room = torch.empty(side, side, dtype=dtype, device=device)
    found = _rate(lambda: torch.mm(left, right, out=room), 2 * side**3, device, num_samples)
    return {"what": f"{side} x {side} x {side}, {str(dtype).removeprefix('torch.')}", **found}


def _rate(work: Callable[[], object], amount: int, device: torch.device, num_samples: int) -> dict[str, Any]:
    """`amount`: bytes or FLOPs of one run."""
    for _ in range(NUM_WARM_UPS):
        work()
    synchronize(device)
    samples = []
    for _ in range(num_samples):
        if device.type == "cuda":
            time.sleep(RATE_GAP_SECONDS)
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(NUM_TOGETHER):
                work()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / NUM_TOGETHER)
        else:
            begin_seconds = time.perf_counter()
            work()
            samples.append(time.perf_counter() - begin_seconds)
    found = summary_of(samples)
    return {"amount": amount, "per_second": amount / found["summary"]["p50"], **found}


# Tables.


def rates_line(measured: Mapping[str, Any]) -> str:
    """One line that says what floors are made of."""
    rates = Rates.of(measured)
    return (
        f"Measured in the same run: copy {rates.copy_bytes / 1e12:.3f} TB/s (read and written bytes), "
        f"sum {rates.read_bytes / 1e12:.3f} TB/s, "
        f"product ({measured['product']['what']}) {rates.product_flops / 1e12:.1f} TFLOP/s."
    )


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of a result of this program."""
    results = result["results"]
    lines = []
    for title, column, cells in (
        (f"Decode steps at context {result['settings']['context']}", "batch", results["decode"]),
        ("Lone prompts", "prompt tokens", results["prompt"]),
    ):
        lines += [
            f"{title} of {result['settings']['config']}: the least each takes",
            "",
            f"| {column} | weights, MB | KV read, MB | KV written, MB | activations, MB | logits, MB | GFLOP | ms | by |",
            "|" + "---|" * 9,
        ]
        for name, cell in cells.items():
            work = cell["work"]
            megabytes = [
                work[f"{kind}_bytes"] / 1e6 for kind in ("weight", "kv_read", "kv_write", "activation", "logits")
            ]
            figures = [*(f"{value:.1f}" for value in megabytes), f"{work['flops'] / 1e9:.1f}"]
            figures += [f"{cell['floor_seconds'] * 1e3:.3f}", cell["bound"]]
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
        lines.append("")
    lines += [rates_line(results["rates"]), "", machine_line(result["environment"])]
    return "\n".join(lines)


def latency_cells(result: dict[str, Any], rates: Rates) -> dict[str, dict[str, dict[str, float]]]:
    """For each cell of a result of `benchmarks.gpu.latency`: its p50, its floor, and the floor's share of it.

    By level ("in process TTFT", ...) and by prompt tokens or batch. Contexts of batches are those at their middle.
    """
    settings = result["settings"]
    name = settings["dtype"] or ("float16" if settings["device"] == "cuda" else "float32")
    sizes = Sizes.of(settings["config"], DTYPES[name])
    context = settings["batch_prompt"] + settings["batch_tokens"] // 2
    found: dict[str, dict[str, dict[str, float]]] = {}
    for level in ("in process", "gRPC"):
        if level not in result["results"]:
            continue
        measured = result["results"][level]
        found[f"{level} TTFT"] = {
            length: _share(part, sizes, StepShape.prompt(int(length)), rates)
            for length, part in measured["ttft"].items()
        }
        found[f"{level} TPOT"] = {
            batch: _share(part["tpot"], sizes, StepShape.decode(int(batch), context), rates)
            for batch, part in measured["tpot"].items()
            if part["tpot"]["summary"] is not None
        }
    return found


def _share(part: dict[str, Any], sizes: Sizes, step: StepShape, rates: Rates) -> dict[str, float]:
    seconds = part["summary"]["p50"]
    floor = floor_seconds(step_work(sizes, step), rates)
    return {"seconds": seconds, "floor_seconds": floor, "share": floor / seconds}


def latency_tables(result: dict[str, Any], measured: Mapping[str, Any]) -> str:
    """Markdown of `latency_cells`. measured: rates, of `measure_rates`."""
    lines = []
    for level, cells in latency_cells(result, Rates.of(measured)).items():
        column = "prompt tokens" if level.endswith("TTFT") else "batch"
        lines += [
            f"Share of the floor, {level}",
            "",
            f"| {column} | p50, ms | floor, ms | floor's share |",
            "|---|---|---|---|",
        ]
        for name, cell in cells.items():
            seconds, floor = cell["seconds"] * 1e3, cell["floor_seconds"] * 1e3
            lines.append(f"| {name} | {seconds:.2f} | {floor:.2f} | {cell['share']:.0%} |")
        lines.append("")
    return "\n".join([*lines, rates_line(measured)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check failed."""
    parser = make_parser("The least time that steps can take on this device.")
    parser.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache of each row of a batch")
    parser.add_argument(
        "--prompts", type=numbers, default=(10, 16, 32, 64, 100, 128, 200, 256, 300, 400, 500, 512, 1024, 2048)
    )
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args(argv)
    report = Report("floor", arguments)
    device, dtype = device_of(arguments), dtype_of(arguments)
    measured = measure_rates(device, dtype)
    sizes, rates = Sizes.of(arguments.config, dtype), Rates.of(measured)
    report.check("the rates are above zero", is_passed=all(value > 0 for value in asdict(rates).values()))
    report.results["rates"] = measured
    report.results["decode"] = {
        str(batch): floor_cell(sizes, StepShape.decode(batch, arguments.context), rates) for batch in arguments.batches
    }
    report.results["prompt"] = {
        str(length): floor_cell(sizes, StepShape.prompt(length), rates) for length in arguments.prompts
    }
    status = report.finish(arguments.out)
    say(tables(report.to_dict()))
    return status


if __name__ == "__main__":
    sys.exit(main())
