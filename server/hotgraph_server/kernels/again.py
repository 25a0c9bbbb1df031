"""Kernels that are launched again and again, for little more than the price of the launch.

Triton looks at every argument of every launch to find the variant that it belongs to. For the host that is many times what the
launch itself is, and a step has hundreds. But layers differ in where their tensors lie, and steps of one shape in nothing: so
what Triton found is kept under a key of all that it looked at, and the next launch with that key goes straight to the driver,
with the places of its own tensors. It keeps no tensors.

It knows Triton's compiled kernels, none of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

MAX_KEPT: Final = 1 << 14
"""Variants, at a kilobyte or two each: more than a model has for all shapes of its graphs. Beyond, all are forgotten."""

ALIGNMENT: Final = 16
"""Bytes. Whether a tensor begins at a multiple of them is what Triton looks at, beside its type."""

_kept: dict[Hashable, Callable[[Sequence[int | None]], object]] = {}


class Found(NamedTuple):
    """Tensors of a launch: under which key it is kept, and where they lie; None for one that is not given."""

    key: Hashable
    addresses: list[int | None]


class Described:
    """What a launch reads of a `TensorDescriptor`, whose tensor lies elsewhere now. It is its own `base`."""

    __slots__ = ("_address", "padding", "shape", "strides")

    def __init__(self, address: int, shape: list[int], strides: list[int], padding: str) -> None:
        self._address = address
        self.shape = shape
        self.strides = strides
        self.padding = padding

    @property
    def base(self) -> Described:
        return self

    def data_ptr(self) -> int:
        return self._address


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Mapping[str, torch.Tensor | None], numbers: Mapping[str, Any]
) -> None:
    """`kernel[grid](**tensors, **numbers)`. `numbers`: all that are no tensors, and Triton's options; they can be hashed."""
    key = (id(kernel), grid, *numbers.items())
    if not launched_again(key, tensors):
        launch_as(key, kernel, grid, tensors, {**tensors, **numbers})


def launched_again(key: Hashable, tensors: Mapping[str, torch.Tensor | None]) -> bool:
    """Whether there was a launch under this key with tensors of these types, which then was done once more, with these
    tensors in their places, on the current stream."""
    found = _find(key, tensors)
    again = _kept.get(found.key)
    if again is None:
        return False
    again(found.addresses)
    return True


def launch_as(
    key: Hashable,
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, torch.Tensor | None],
    arguments: Mapping[str, Any],
) -> None:
    """`kernel[grid](**arguments)`, which is kept for `launched_again`.

    key: all that may differ between two launches of this caller but the tensors' places and types: the kernel, the grid,
    sizes, numbers and options. tensors: those among the arguments, by their names; there each may be viewed as of another
    type, or be described. Nothing is kept of a kernel that is interpreted.
    """
    compiled = kernel[grid](**arguments)
    if hasattr(compiled, "packed_metadata"):
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[_find(key, tensors).key] = _again(compiled, kernel, grid, tensors, arguments)


def _find(key: Hashable, tensors: Mapping[str, torch.Tensor | None]) -> Found:
    types: list[Hashable] = [key]
    addresses: list[int | None] = []
    for tensor in tensors.values():
        if tensor is None:
            types.append(None)
            addresses.append(None)
        else:
            address = tensor.data_ptr()
            types.append(tensor.dtype)
            if address % ALIGNMENT:
                types.append(False)
            addresses.append(address)
    return Found(tuple(types), addresses)


def _again(
    compiled: Any,
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, torch.Tensor | None],
    arguments: Mapping[str, Any],
) -> Callable[[Sequence[int | None]], object]:
    from triton.runtime import driver  # type: ignore[import-untyped]  # it comes without types

    parameters = kernel.signature.parameters
    template = [arguments.get(name, parameters[name].default) for name in kernel.arg_names]
    order = list(tensors)
    plain: list[tuple[int, int]] = []  # places: of the parameter, and among the tensors
    described: list[tuple[int, int, list[int], list[int], str]] = []  # the same, and what the descriptor says
    for index, name in enumerate(kernel.arg_names):
        value = template[index]
        if hasattr(value, "block_shape"):
            shape = list(value.shape), list(value.strides)
            described.append((index, order.index(name), *shape, value.padding))
            template[index] = None
        elif isinstance(value, torch.Tensor):
            plain.append((index, order.index(name)))
            template[index] = None
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device, current_stream = driver.active.get_current_device(), driver.active.get_current_stream

    def again(addresses: Sequence[int | None]) -> None:
        values = template.copy()
        for index, place in plain:
            values[index] = addresses[place]
        for index, place, shape, strides, padding in described:
            address = addresses[place]
            assert address is not None
            values[index] = Described(address, shape, strides, padding)
        # Neither hooks, which are for tools that watch launches in Python, nor what they would be told.
        run(x, y, z, current_stream(device), function, metadata, None, None, None, *values)

    return again
