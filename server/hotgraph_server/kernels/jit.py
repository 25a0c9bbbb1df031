"""Triton's compiler, with types, and with nothing to import where torch comes without Triton. It knows no kernel.

Rules for what is compiled with it: no argument that grows with a step (its tokens, its rows) chooses a variant, so that one
eager step of a model loads all that a capture needs; and nothing is tuned by trying, which would run and wait in the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

try:
    import triton  # type: ignore[import-untyped]  # it comes without types
    import triton.language as tl  # type: ignore[import-untyped]  # as above
except ModuleNotFoundError:  # torch brings it on Linux only; elsewhere there is no NVIDIA GPU to run on
    triton = tl = None

__all__ = ["Kernel", "jit", "next_power_of_two", "tl"]


class Kernel(Protocol):
    """A function for the GPU: `kernel[grid](arguments)` queues it on the current stream."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


def jit(*, unspecialized: Sequence[str] = (), unaligned: Sequence[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Compiles a function when it is first launched with these types.

    `unspecialized`: integers whose value must not choose a variant, as Triton else does for 1 and for multiples of 16.
    `unaligned`: pointers whose alignment must not.
    """

    def compiled(function: Callable[..., None]) -> Any:
        if triton is None:
            return function
        return triton.jit(function, do_not_specialize=unspecialized, do_not_specialize_on_alignment=unaligned)

    return compiled


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, which is 1 at least. Triton's blocks have such sizes."""
    return 1 << (number - 1).bit_length()
