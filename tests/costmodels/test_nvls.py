"""All-reduce in the switches, against published peaks."""

from __future__ import annotations

import pytest

from meshwright.costmodels.nvls import NvlinkGeneration, nvls_bus_bandwidth, usable_nvlink_bandwidth
from meshwright.errors import SpecError

# Peak bus bandwidth of nccl-tests' all-reduce over 8 GPUs [GB/s]: H100 and H200 from Azure's AI-benchmarking-guide
# (NCCL 2.18 to 2.20), H800 the constant of SimAI (aliyun/SimAI 1.7), GB200 2 x 4 GPUs from lixueduan.com.
PUBLISHED: dict[str, tuple[NvlinkGeneration, int, float]] = {
    "H100": ("hopper", 18, 478.9),
    "H200": ("hopper", 18, 480.0),
    "H800": ("hopper", 8, 215.0),
    "GB200": ("blackwell", 18, 811.0),
}


@pytest.mark.parametrize("gpu", PUBLISHED)
def test_published_peaks_are_within_three_percent(gpu: str) -> None:
    generation, num_links, published = PUBLISHED[gpu]
    assert nvls_bus_bandwidth(generation, num_links, 8) / 1e9 == pytest.approx(published, rel=0.03)


def test_the_gain_over_a_ring_approaches_twice_the_efficiency() -> None:
    ring = usable_nvlink_bandwidth("hopper", 18)
    assert ring == pytest.approx(370.8e9)
    gains = [nvls_bus_bandwidth("hopper", 18, size) / ring for size in (2, 8, 72, 10**6)]
    assert gains == sorted(gains)
    # Two ranks each send S and S/2: less than a ring between them.
    assert gains[0] == pytest.approx(0.85 * 2.0 / 3.0)
    assert gains[-1] == pytest.approx(1.7, rel=1e-5)


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(SpecError, match="at least 2 ranks"):
        nvls_bus_bandwidth("hopper", 18, 1)
    with pytest.raises(SpecError, match="at least 1 NVLink"):
        usable_nvlink_bandwidth("hopper", 0)
