"""What training pays to have experts on more ranks than their home: weights gathered, gradients scattered back.

Two uses. Materialised copies (Hecate, arXiv 2502.02581: SparseAllGather before and SparseReduceScatter after a layer):
the experts expected to be hot are copied to more ranks for one iteration, so that no rank waits for another. Smaller
groups (the switch between data and expert parallelism of Tutel, arXiv 2206.03382, section 3.2, and of FSDP's gathers):
tokens are exchanged among fewer ranks, each of which gathers more experts; with one rank left nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.costmodels.parallelism.dispatch import LinkRates, Traffic, exchange_time

__all__ = ["GatherTime", "gather_time", "gathered_experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherTime:
    """Seconds of gathering and scattering for one layer and iteration, and what of them nothing hides [s]."""

    forward: float
    backward: float
    exposed: float


def gathered_experts(num_experts: int, num_ranks: int, group_size: int) -> float:
    """Return the experts a rank gathers when every group of ``group_size`` ranks holds them all: ``E/g - E/n``."""
    return num_experts / group_size - num_experts / num_ranks


def gather_time(
    num_gathered: float,
    expert_bytes: float,
    gradient_bytes: float,
    rates: LinkRates,
    num_ranks: int,
    ranks_per_node: int,
    *,
    forward_window: float = 0.0,
    backward_window: float = 0.0,
) -> GatherTime:
    """Return the time of gathering experts from ranks all over the group, forward and again backward.

    Parameters
    ----------
    num_gathered : float
        Experts each rank gathers in one layer; it sends its own as often on average.
    expert_bytes, gradient_bytes : float
        Weights and gradients of one expert [B].
    rates : LinkRates
        Links of a rank.
    num_ranks, ranks_per_node : int
        Ranks that own the experts, and those of a node: the others' share of what is gathered crosses nodes.
    forward_window, backward_window : float
        Computation without experts that runs meanwhile in each direction [s].

    Notes
    -----
    Weights are freed after use and gathered again for the backward pass (re-materialisation), where gradients of the
    copies also return to their home: ``n W`` bytes forward, ``n (W + G)`` backward. Both directions of a link work at
    once, so that gradients leaving and weights arriving share the time of the longer.
    """
    if num_gathered <= 0.0 or num_ranks < 2:
        return GatherTime(forward=0.0, backward=0.0, exposed=0.0)
    forward = exchange_time(_traffic(num_gathered * expert_bytes, num_ranks, ranks_per_node), rates)
    scatter = exchange_time(_traffic(num_gathered * gradient_bytes, num_ranks, ranks_per_node), rates)
    # Gradients of a layer leave while the weights of the one before it arrive.
    backward = max(forward, scatter)
    exposed = max(0.0, forward - forward_window) + max(0.0, backward - backward_window)
    return GatherTime(forward=forward, backward=backward, exposed=exposed)


def _traffic(num_bytes: float, num_ranks: int, ranks_per_node: int) -> Traffic:
    """Return what one rank receives: owners are any of the other ranks alike."""
    near = (min(ranks_per_node, num_ranks) - 1.0) / (num_ranks - 1.0)
    return Traffic(between_nodes=num_bytes * (1.0 - near), inside_node=num_bytes * near)
