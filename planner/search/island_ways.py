"""Ways to lay a plan's degrees over the islands of a mixed cluster: stages on islands, or replicas on islands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping

__all__ = ["Island", "IslandWay", "Split", "island_orders", "islands_of", "ways_of_degrees"]

Split = Literal["stages", "replicas"]
# Orders of the islands that are tried; those of four different ones are 24.
_MOST_ORDERS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """Consecutive nodes of one kind with links of their own.

    Parameters
    ----------
    name : str
        As the cluster file calls it.
    kind : int
        Place in ``ClusterSpec.kinds``.
    nodes : tuple[int, ...]
        Their places in the cluster.
    links : tuple[float | None, float | None]
        Bandwidth and latency of its own, where it states them: islands of one kind and size that differ in nothing
        may stand for each other.
    """

    name: str
    kind: int
    nodes: tuple[int, ...]
    links: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandWay:
    """How a plan lies on islands.

    Parameters
    ----------
    split : Split
        ``stages``: every pipeline stage, with all its replicas, on one island; ``replicas``: every replica, with all
        its stages, on one island.
    islands : tuple[Island, ...]
        In the order of the stages or replicas.
    kinds : tuple[int, ...]
        Kind of each stage, or of each replica.
    device_mapping : DeviceMapping | None
        What makes ranks lie so; None where their natural order does.
    """

    split: Split
    islands: tuple[Island, ...]
    kinds: tuple[int, ...]
    device_mapping: DeviceMapping | None


def islands_of(cluster: ClusterSpec) -> tuple[Island, ...]:
    """Return the islands of a mixed cluster, in the order of its nodes."""
    assert cluster.topology is not None
    kinds, islands, first = cluster.kind_of_node, [], 0
    for island in cluster.topology.islands:
        nodes = tuple(range(first, first + island.num_nodes))
        links = (island.bandwidth, island.latency)
        islands.append(Island(name=island.name, kind=kinds[first], nodes=nodes, links=links))
        first += island.num_nodes
    return tuple(islands)


def island_orders(islands: Sequence[Island]) -> list[tuple[Island, ...]]:
    """Return the orders of islands that differ; of more than two dozen the first, the cluster's own among them."""
    found: dict[tuple[object, ...], tuple[Island, ...]] = {}
    for order in itertools.permutations(islands):
        found.setdefault(tuple((each.kind, len(each.nodes), each.links) for each in order), order)
        if len(found) == _MOST_ORDERS:
            break
    return list(found.values())


def ways_of_degrees(
    cluster: ClusterSpec, orders: Sequence[tuple[Island, ...]], *, tp: int, cp: int, pp: int, dp: int
) -> Iterator[IslandWay]:
    """Yield the ways in which plans of some degrees lie on all nodes of some islands.

    Stages or replicas of which a part would lie on another island are left out, whatever its kind: their tensor and
    data parallel collectives would cross the link between the islands.
    """
    per_node, inner = cluster.node.num_gpus, tp * cp
    sizes = [len(island.nodes) * per_node for island in orders[0]]
    if all(size % (inner * dp) == 0 for size in sizes) and pp > 1:
        for order in orders:
            yield _way(cluster, "stages", order, inner * dp, is_pipeline_inner=False)
    if all(size % (inner * pp) == 0 for size in sizes):
        # Which replica comes first changes nothing.
        yield _way(cluster, "replicas", orders[0], inner * pp, is_pipeline_inner=pp > 1)


def _way(
    cluster: ClusterSpec, split: Split, order: tuple[Island, ...], ranks: int, *, is_pipeline_inner: bool
) -> IslandWay:
    per_node = cluster.node.num_gpus
    hosts = tuple(node for island in order for node in island.nodes)
    mapping = DeviceMapping(
        host_order=() if hosts == tuple(range(cluster.num_nodes)) else hosts,
        rank_order="tp-cp-ep-pp-dp" if is_pipeline_inner else "tp-cp-ep-dp-pp",
    )
    kinds = tuple(island.kind for island in order for _ in range(len(island.nodes) * per_node // ranks))
    is_natural = not mapping.host_order and mapping.rank_order == RANK_ORDERS[0]
    return IslandWay(split=split, islands=order, kinds=kinds, device_mapping=None if is_natural else mapping)
