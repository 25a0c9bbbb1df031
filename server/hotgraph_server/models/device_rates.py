"""About how fast a device computes, so that work can be cut into parts of about a length. It knows no model.

Orders of magnitude are what counts: a part that is estimated wrongly is longer or shorter than it should be, and as right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KERNEL_SECONDS = 3e-6  # of a small kernel, with the gap before it
PRODUCT_CYCLE_FLOPS = 2048  # of 16-bit tensor cores, for each multiprocessor: half of Hopper's, all of Ampere's
WIDE_SHARE = 1 / 8  # of that, for float32 without tensor cores


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Bytes read from memory and 16-bit floating-point operations, each per second, at best."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, device: torch.device) -> DeviceRates:
        """As the driver describes the GPU; for anything else, a few cores' rates."""
        if device.type != "cuda":
            return cls(bytes_per_second=2e10, flops_per_second=1e11)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            # Clocks are in kHz, the bus is in bits, and memory moves twice a cycle.
            bytes_per_second=_at_least_one(2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8),
            flops_per_second=_at_least_one(
                properties.multi_processor_count * properties.clock_rate * 1e3 * PRODUCT_CYCLE_FLOPS
            ),
        )

    def product_seconds(self, num_bytes: int, num_tokens: int, element_bytes: int) -> float:
        """A product of `num_tokens` rows with a weight of so many bytes, whose elements take `element_bytes` each."""
        flops = 2 * num_tokens * (num_bytes / element_bytes)
        flops_per_second = self.flops_per_second * (1 if element_bytes <= 2 else WIDE_SHARE)
        return KERNEL_SECONDS + max(num_bytes / self.bytes_per_second, flops / flops_per_second)


def _at_least_one(rate: float) -> float:
    """A driver may not tell a clock, and says 0. Then every part is taken for a long one, and is a turn of its own."""
    return max(rate, 1.0)
