"""Tests of device_rates.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hotgraph_server.models.device_rates import KERNEL_SECONDS, DeviceRates


def test_a_product_is_bound_by_bytes_or_by_operations() -> None:
    """Few tokens take the weight's time through memory, many their operations' time, and neither less than a kernel."""
    rates = DeviceRates(bytes_per_second=4e12, flops_per_second=5e14)
    assert rates.product_seconds(32, 1, 2) == pytest.approx(KERNEL_SECONDS, rel=1e-3)
    assert rates.product_seconds(4 << 20, 1, 2) == rates.product_seconds(4 << 20, 8, 2)
    assert rates.product_seconds(400_000_000, 8, 2) == pytest.approx(1e-4 + KERNEL_SECONDS)
    assert rates.product_seconds(400_000_000, 1000, 2) == pytest.approx(8e-4 + KERNEL_SECONDS)
    assert rates.product_seconds(800_000_000, 1000, 4) == pytest.approx(64e-4 + KERNEL_SECONDS)  # no tensor cores


@pytest.mark.parametrize("clock", [3_201_000, 0])
def test_rates_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    """An H200's description gives its 4.9 TB/s; where a clock is not told, parts are long ones, and nothing is divided by 0."""
    described = SimpleNamespace(
        memory_clock_rate=clock, memory_bus_width=6144, multi_processor_count=132, clock_rate=1_980_000
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    rates = DeviceRates.of(torch.device("cuda:0"))
    assert rates.flops_per_second == pytest.approx(5.35e14, rel=0.01)
    if clock:
        assert rates.bytes_per_second == pytest.approx(4.92e12, rel=0.01)
    else:
        assert rates.product_seconds(1 << 20, 1, 2) > 1.0
    assert DeviceRates.of(torch.device("cpu")).bytes_per_second > 0
