"""What a device's trace says of steps: where each begins and ends, which kernel does what for which layer, and for how long.

It knows spans with names, and how our decoder orders its work; it traces nothing itself and knows no engine. Kernels of a step
may overlap (programmatic dependent launch): then the second one waits for a good part of its span. So each has two times: its
span, and what it *adds* to the step, from the end of all before it to its own end. What is added, and the gaps in which nothing
ran, sum up to the step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.floor import PRODUCT_ROLES

NAME_LENGTH = 60
LAST_KERNELS = ("_finish_kernel", "_write_ring_kernel")
"""Of a step, by its sampler."""

PRODUCT, PART = "product", "part of a product"
KINDS = (
    (PART, r"splitk\w*reduce|memset"),
    (PRODUCT, r"(sums|dots|tiles)_kernel|nvjet|gemm|gemv|cutlass|xmma|wgmma"),
    ("attention", r"decode_kernel|tile_kernel|attention|flash"),
    ("norm", r"norm_kernel"),
    ("rope", r"rope"),
    ("activation", r"gated_activation"),
    ("sampler", r"_blocks_kernel|_finish_kernel|_write_ring_kernel"),
    ("prepare", r"_prepare_kernel"),
    ("embedding", r"index_?select|gather|indexing"),
)
"""What a kernel is for, as far as its name alone says; the first that matches."""
OTHER = "other"
PRODUCTS = "products"  # all of them, where it cannot be told which is which
_IN_LAYERS = frozenset({*PRODUCT_ROLES, "attention", "norm", "rope", "activation"})


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, or a copy, as it ran: microseconds on the device's clock."""

    name: str
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Part:
    """A span with its place in a step. `layer` is None for what is of no layer, or where that cannot be told.

    added_us: from the end of all before it in the step to its own end, or 0. gap_us: between the two, when nothing ran.
    """

    span: Span
    role: str
    layer: int | None
    added_us: float
    gap_us: float


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One step in the order of its kernels' begins."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """From the begin of the first kernel to the end of the last."""
        return (max(part.span.end_us for part in self.parts) - self.parts[0].span.begin_us) / 1e6

    @property
    def gap_seconds(self) -> float:
        return sum(part.gap_us for part in self.parts) / 1e6

    @property
    def overlap_seconds(self) -> float:
        """By how much all spans together are longer than what they add."""
        return sum(part.span.end_us - part.span.begin_us - part.added_us for part in self.parts) / 1e6


def spans_of(profiler: Any) -> list[Span]:
    """What ran on the device, in the order of its begin. profiler: torch's, stopped."""
    found = [
        Span(short_name(event.name), event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    return sorted(found, key=lambda span: span.begin_us)


def short_name(name: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters, as far as it still tells kernels apart."""
    bare = re.sub(r"\(anonymous namespace\)::|at::native::|void |<unnamed>::", "", name)
    functor = re.search(r"(\w+(?:Functor|Op|_kernel_cuda|Ops)\w*)", bare[bare.find("<") :]) if "<" in bare else None
    head = re.split(r"[<(]", bare)[0]
    return (f"{head} {functor.group(1)}" if functor else head)[:NAME_LENGTH]


def kind_of(name: str) -> str:
    """Of KINDS, or OTHER."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def whole_steps(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of each step that is there from its first kernel to its last. spans: in the order of their begins.

    A trace begins anywhere: what stands before the first end of a step is left out, and what follows the last one.
    """
    steps: list[list[Span]] = []
    current: list[Span] | None = None
    for span in spans:
        if current is not None:
            current.append(span)
        if span.name in LAST_KERNELS:
            if current is not None:
                steps.append(current)
            current = []
    return steps


def lone_steps(spans: Sequence[Span]) -> list[list[Span]]:
    """The same for a trace that begins before the first step does."""
    steps: list[list[Span]] = [[]]
    for span in spans:
        steps[-1].append(span)
        if span.name in LAST_KERNELS:
            steps.append([])
    return steps[:-1]


def roles_of(names: Sequence[str], num_layers: int) -> list[tuple[str, int | None]] | None:
    """Role and layer of each of a step's kernels, by their order; None where the names do not tell.

    A layer's products come in the order of PRODUCT_ROLES, with attention behind the first, and the head's product is the last.
    """
    kinds = [kind_of(name) for name in names]
    if kinds.count(PRODUCT) != len(PRODUCT_ROLES) * num_layers + 1:
        return None
    found: list[tuple[str, int | None]] = []
    product_role = OTHER
    num_products = 0
    for kind in kinds:
        layer, place = divmod(num_products, len(PRODUCT_ROLES))
        if kind == "attention" and place != 1:
            return None
        if kind == PRODUCT:
            role = product_role = PRODUCT_ROLES[place] if layer < num_layers else "head"
            num_products += 1
        elif kind == PART:
            role = product_role  # of the product before it, whose layer the count may have left
            layer = (num_products - 1) // len(PRODUCT_ROLES)
        else:
            role = kind
        found.append((role, layer if role in _IN_LAYERS and layer < num_layers else None))
    return found


def _plain_roles(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """What names alone say."""
    return [(PRODUCTS if kind in (PRODUCT, PART) else kind, None) for kind in map(kind_of, names)]


def trace_step(spans: Sequence[Span], num_layers: int) -> tuple[TracedStep, bool]:
    """One step of `spans`, in the order of their begins, and whether each product's role could be told."""
    names = [span.name for span in spans]
    roles = roles_of(names, num_layers)
    reached = spans[0].begin_us
    parts = []
    for span, (role, layer) in zip(spans, roles or _plain_roles(names), strict=True):
        added = max(0.0, span.end_us - max(reached, span.begin_us))
        parts.append(Part(span, role, layer, added, max(0.0, span.begin_us - reached)))
        reached = max(reached, span.end_us)
    return TracedStep(tuple(parts)), roles is not None
