"""What a placement of experts costs a layer: bytes and seconds of the all-to-all by how an engine dispatches.

Three ways to send a token to its experts: once to each node and from there once to each rank (deduplicated: DeepEP's
normal kernels, HybridEP); once per expert (full: DeepEP's low-latency kernels, an NCCL all-to-all); only where the
token is not already (coherent: ExFlow, arXiv 2401.08383). Bytes are per rank; a link's time is that of its busiest
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.hardware_specs.specs import ClusterSpec

__all__ = [
    "LOW_LATENCY_DISPATCH",
    "LinkRates",
    "Traffic",
    "capacity_rows",
    "coherent_traffic",
    "deduplicated_traffic",
    "dropped_rows",
    "exchange_time",
    "expected_places",
    "flow_shop_time",
    "full_traffic",
    "link_rates",
    "overlapped_layer_time",
    "tiled_rows",
]

# Rows of a tile of a grouped product (DeepGEMM and CUTLASS grouped GEMM).
_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """What one rank's links carry.

    Parameters
    ----------
    between_nodes, inside_node : float
        Bandwidth reached, per direction [B/s].
    latency : float
        Fixed time of one exchange [s].
    is_parallel : bool
        Both links work at once; else one after the other.
    """

    between_nodes: float
    inside_node: float
    latency: float
    is_parallel: bool = True


LOW_LATENCY_DISPATCH = LinkRates(between_nodes=42.0e9, inside_node=154.0e9, latency=24e-6)
"""DeepEP's low-latency kernels on 8 x H800 nodes with one 400 Gbit/s NIC per GPU.

The three constants are fitted to the 12 latencies of the table in its README (128 tokens, hidden 7168, top-8, FP8
dispatch and BF16 combine, 8 to 256 ranks), within 5 % of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes one rank sends in one direction of an exchange [B]."""

    between_nodes: float
    inside_node: float


def link_rates(cluster: ClusterSpec, efficiency: float = 0.84, latency: float = 24e-6) -> LinkRates:
    """Return what the links of a cluster carry in an all-to-all.

    Parameters
    ----------
    cluster : ClusterSpec
        The machines.
    efficiency : float
        Share of the NIC's bandwidth reached; 0.84 is what DeepEP reaches of 50 GB/s.
    latency : float
        Fixed time of one exchange [s].
    """
    node = cluster.node
    return LinkRates(
        between_nodes=node.nic_bandwidth_per_gpu * efficiency / cluster.fabric.oversubscription,
        # DeepEP's README: 153 to 158 GB/s of an H800's 200 GB/s per direction.
        inside_node=node.intra_link.bandwidth_bytes_per_second * 0.78,
        latency=latency + cluster.fabric.latency,
    )


def expected_places(
    num_experts: int, top_k: int, num_places: int, num_groups: int = 1, top_groups: int = 1
) -> float:
    """Return the expected distinct places (nodes or ranks) that a token's experts sit on, under uniform routing.

    Parameters
    ----------
    num_experts, top_k : int
        Experts of a layer and of a token.
    num_places : int
        Places that share the experts evenly, consecutive experts together.
    num_groups, top_groups : int
        Group-limited routing: the token first draws ``top_groups`` of ``num_groups`` groups of consecutive experts.

    Notes
    -----
    Exact: ``N (1 - C(E - E/N, k) / C(E, k))``; with groups, the probability to miss a place is averaged over how many
    of its groups were drawn (hypergeometric).
    """
    per_place = num_experts // num_places
    group_size = num_experts // num_groups
    drawn = top_groups * group_size
    if drawn < top_k:
        raise ValueError("a token cannot have more experts than its groups hold")
    missed = 0.0
    if num_places <= num_groups:
        groups_here = num_groups // num_places
        for hit in range(min(groups_here, top_groups) + 1):
            chance = (
                math.comb(groups_here, hit)
                * math.comb(num_groups - groups_here, top_groups - hit)
                / math.comb(num_groups, top_groups)
            )
            missed += chance * math.comb(drawn - hit * group_size, top_k) / math.comb(drawn, top_k)
    else:
        share = top_groups / num_groups
        missed = (1.0 - share) + share * math.comb(drawn - per_place, top_k) / math.comb(drawn, top_k)
    return num_places * (1.0 - missed)


def deduplicated_traffic(
    num_tokens: float,
    hidden_size: int,
    element_bytes: float,
    remote_nodes: float,
    ranks_reached: float,
    nodes_reached: float,
) -> Traffic:
    """Return the bytes of a dispatch that sends a token once to each node, which forwards it to its ranks.

    Parameters
    ----------
    num_tokens : float
        Tokens of one rank.
    hidden_size : int
        Elements of a token.
    element_bytes : float
        Of one element with its scales [B].
    remote_nodes : float
        Nodes other than its own that a token reaches, mean.
    ranks_reached, nodes_reached : float
        Distinct ranks and nodes a token reaches, mean; on each node one rank has it without forwarding.
    """
    token = num_tokens * hidden_size * element_bytes
    return Traffic(
        between_nodes=token * remote_nodes, inside_node=token * max(0.0, ranks_reached - nodes_reached)
    )


def full_traffic(
    num_tokens: float, hidden_size: int, element_bytes: float, top_k: int, num_ranks: int, ranks_per_node: int
) -> Traffic:
    """Return the bytes of a dispatch that sends every (token, expert) pair; see :func:`deduplicated_traffic`.

    Of the pairs, ``ranks_per_node / num_ranks`` stay on the node; the table of DeepEP counts the rank's own too.
    """
    num_bytes = num_tokens * top_k * hidden_size * element_bytes
    local = min(1.0, ranks_per_node / num_ranks)
    return Traffic(between_nodes=num_bytes * (1.0 - local), inside_node=num_bytes * local)


def coherent_traffic(
    num_tokens: float,
    hidden_size: int,
    element_bytes: float,
    top_k: int,
    locality: float,
    num_ranks: int,
    ranks_per_node: int,
) -> Traffic:
    """Return the bytes of a context-coherent dispatch: the pairs whose rank changes, to any other rank alike."""
    num_bytes = num_tokens * top_k * hidden_size * element_bytes * (1.0 - locality)
    local = (min(ranks_per_node, num_ranks) - 1.0) / max(num_ranks - 1.0, 1.0)
    return Traffic(between_nodes=num_bytes * (1.0 - local), inside_node=num_bytes * local)


def exchange_time(traffic: Traffic, rates: LinkRates, heat: float = 1.0) -> float:
    """Return the seconds of one exchange.

    Parameters
    ----------
    traffic : Traffic
        Bytes of the mean rank.
    rates : LinkRates
        Its links.
    heat : float
        Bytes of the busiest rank over the mean.
    """
    across = traffic.between_nodes * heat / rates.between_nodes
    inside = traffic.inside_node * heat / rates.inside_node
    return rates.latency + (max(across, inside) if rates.is_parallel else across + inside)


def capacity_rows(num_tokens: float, top_k: int, num_experts: int, factor: float) -> int:
    """Return the rows of each expert's buffer under a capacity factor: ``ceil(c T k / E)`` (GShard, arXiv 2006.16668)."""
    return math.ceil(factor * num_tokens * top_k / num_experts)


def dropped_rows(loads: NDArray[np.float64], capacity: float) -> float:
    """Return the share of (token, expert) pairs that find their expert's buffer full."""
    return float(np.maximum(loads - capacity, 0.0).sum() / loads.sum())


def tiled_rows(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows a grouped product computes for each expert: whole tiles of 128."""
    result: NDArray[np.float64] = np.ceil(loads / _TILE) * _TILE
    return result


def flow_shop_time(stages: Sequence[float], degree: int) -> float:
    """Return the makespan of ``degree`` equal chunks through stages that each handle one chunk at a time [s].

    ``sum(t) + (degree - 1) max(t)`` with the times of one chunk (Tutel, arXiv 2206.03382, section 3.3).

    Parameters
    ----------
    stages : Sequence[float]
        Seconds of one chunk in each stage.
    degree : int
        Chunks.
    """
    return sum(stages) + (degree - 1) * max(stages)


def overlapped_layer_time(
    dispatch: float, experts: float, combine: float, latency: float, degree: int, *, is_shared: bool = True
) -> float:
    """Return the seconds of dispatch, experts and combine cut into chunks that overlap.

    Parameters
    ----------
    dispatch, experts, combine : float
        Seconds of the whole batch.
    latency : float
        Part of an exchange that every chunk pays anew [s].
    degree : int
        Chunks; 1 is no overlap.
    is_shared : bool
        Both exchanges use the same links, so that one chunk's dispatch and another's combine wait for each other.

    Notes
    -----
    On shared links every chunk crosses the network twice: its makespan is at least the network's whole work plus one
    chunk of experts, and at least the experts' whole work plus one dispatch and one combine of a chunk.
    """
    if degree == 1:
        return dispatch + experts + combine
    first = latency + max(0.0, dispatch - latency) / degree
    last = latency + max(0.0, combine - latency) / degree
    middle = experts / degree
    if not is_shared:
        return flow_shop_time((first, middle, last), degree)
    return max(degree * (first + last) + middle, experts + first + last)
