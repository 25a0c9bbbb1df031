"""Kernels that are launched with the same arguments again and again, for little more than the price of the launch.

Triton looks at every argument of every launch to find the variant that it belongs to. For the host that is many times what the
launch itself is, and a step has hundreds; but a step is launched with the same places each time: its weights, its activations,
the cache. So a launch is kept under a key of all that may differ, and the next one goes straight to the driver. It keeps
addresses and no tensors: whoever gives the key says that what lies there is of the same kind.

It knows Triton's compiled kernels, none of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

import torch

MAX_KEPT: Final = 1 << 15
"""Launches; more than a large model has for all its graphs, at a kilobyte or two each. Beyond, all are forgotten."""

_kept: dict[Hashable, Callable[[], object]] = {}


class Place:
    """Where a tensor lies, for who asks a tensor for nothing else."""

    __slots__ = ("_address",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = tensor.data_ptr()

    def data_ptr(self) -> int:
        return self._address


class Described:
    """What a launch reads of a `TensorDescriptor`."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, descriptor: Any) -> None:
        self.base = Place(descriptor.base)
        self.shape = list(descriptor.shape)
        self.strides = list(descriptor.strides)
        self.padding = descriptor.padding


def places(*values: object) -> tuple[object, ...]:
    """For a key: of tensors their addresses and types, everything else as it is."""
    return tuple([(value.data_ptr(), value.dtype) if isinstance(value, torch.Tensor) else value for value in values])


def launched_again(key: Hashable) -> bool:
    """Whether there was a launch of this key before, which then was done once more, on the current stream."""
    again = _kept.get(key)
    if again is None:
        return False
    again()
    return True


def launch(key: Hashable, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Launches the kernel as Triton does, and keeps the launch under the key.

    key: all that may differ between two launches of this caller: where tensors lie, of which type and size they are, every
    number and option. Nothing is kept of a kernel that is interpreted.
    """
    compiled = kernel[grid](**arguments)
    if hasattr(compiled, "packed_metadata"):
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[key] = _ready(compiled, kernel, grid, arguments)


def _ready(compiled: Any, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Callable[[], object]:
    from triton.runtime import driver  # type: ignore[import-untyped]  # it comes without types

    parameters = kernel.signature.parameters
    values = tuple(_kept_value(arguments.get(name, parameters[name].default)) for name in kernel.arg_names)
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device, current_stream = driver.active.get_current_device(), driver.active.get_current_stream

    def again() -> None:
        # Neither hooks, which are for tools that watch launches in Python, nor what they would be told.
        run(x, y, z, current_stream(device), function, metadata, None, None, None, *values)

    return again


def _kept_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if hasattr(value, "block_shape"):
        return Described(value)
    return value
