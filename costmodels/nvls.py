"""All-reduce in the NVLink switches (NVLS, NVLink SHARP): its bus bandwidth in closed form."""

from __future__ import annotations

from typing import Literal

from meshwright.errors import SpecError

__all__ = ["NvlinkGeneration", "in_switch_gain", "nvls_bus_bandwidth", "usable_nvlink_bandwidth"]

NvlinkGeneration = Literal["hopper", "blackwell"]

# NVIDIA/nccl, src/graph/tuning.cc (nvlsEfficiency) and topo.h (bandwidth of one NVLink, per direction [B/s]).
_EFFICIENCY: dict[NvlinkGeneration, float] = {"hopper": 0.85, "blackwell": 0.74}
_LINK_BANDWIDTH: dict[NvlinkGeneration, float] = {"hopper": 20.6e9, "blackwell": 40.1e9}
# Generation of the switches that reduce, by kind of link.
_REDUCING: dict[str, NvlinkGeneration] = {"nvlink4": "hopper", "nvlink5": "blackwell"}


def usable_nvlink_bandwidth(generation: NvlinkGeneration, num_links: int) -> float:
    """Return what NCCL gets of a GPU's NVLinks, per direction [B/s]; less than the data sheet's figure."""
    if num_links < 1:
        raise SpecError(f"nvls: a GPU needs at least 1 NVLink, not {num_links}")
    return num_links * _LINK_BANDWIDTH[generation]


def nvls_bus_bandwidth(generation: NvlinkGeneration, num_links: int, num_ranks: int) -> float:
    """Return the peak bus bandwidth of an all-reduce that the switches reduce [B/s].

    Parameters
    ----------
    generation : NvlinkGeneration
        Of the GPUs.
    num_links : int
        NVLinks per GPU: 18, or 8 of an H800.
    num_ranks : int
        GPUs, all below the same switches; at least 2.

    Notes
    -----
    Each GPU sends its whole buffer ``S`` to the reducing switches and stores the ``S/n`` it owns once, for the
    switches to multicast: ``t = S (1 + 1/n) / (eta B)``, so with nccl-tests' factor ``2(n-1)/n`` the bus bandwidth is
    ``eta B 2(n-1)/(n+1)``. Published peaks, all of 8 GPUs, lie within 2.5 %; other ``n`` are untested.
    """
    if num_ranks < 2:
        raise SpecError(f"nvls: an all-reduce needs at least 2 ranks, not {num_ranks}")
    usable = usable_nvlink_bandwidth(generation, num_links)
    return usable * _gain(generation, num_ranks)


def in_switch_gain(link_kind: str, num_ranks: float) -> float:
    """Return the bus bandwidth of an all-reduce in the switches over that of a ring; 0 for links that do not reduce.

    ``link_kind`` is that of a spec: ``nvlink4``, ``nvlink5``, ...
    """
    generation = _REDUCING.get(link_kind)
    return 0.0 if generation is None else _gain(generation, num_ranks)


def _gain(generation: NvlinkGeneration, num_ranks: float) -> float:
    return _EFFICIENCY[generation] * 2.0 * (num_ranks - 1.0) / (num_ranks + 1.0)
