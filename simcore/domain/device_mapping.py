"""Which machine and which GPU runs each rank of a plan: what a search of placements fills in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean

__all__ = ["RANK_ORDERS", "DeviceMapping", "RankOrder"]

RankOrder = Literal["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]
RANK_ORDERS: tuple[str, ...] = get_args(RankOrder)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMapping:
    """Where the ranks of a plan run.

    Every launcher numbers ranks host by host: rank ``r`` is local rank ``r % gpus_per_host`` of node
    ``r // gpus_per_host``. What is left to choose is which host is which node, which GPU is which local rank, and
    which axis of the plan the numbers run through first.

    Parameters
    ----------
    host_order : tuple[int, ...]
        Host of each node, by its place in the user's list of hosts; empty is the list's own order.
    gpu_orders : tuple[tuple[int, ...], ...]
        Physical GPU of each local rank, one row for each node, or a single row for all; empty is 0, 1, 2, ...
    rank_order : RankOrder
        Axes of the plan, fastest first. The first is Megatron's default, the second its
        ``--use-tp-pp-dp-mapping``.
    """

    host_order: tuple[int, ...] = ()
    gpu_orders: tuple[tuple[int, ...], ...] = ()
    rank_order: RankOrder = "tp-cp-ep-dp-pp"

    def __post_init__(self) -> None:
        if self.rank_order not in RANK_ORDERS:
            raise SpecError(
                f"device_mapping.rank_order: unknown order '{self.rank_order}'"
                f"{did_you_mean(self.rank_order, RANK_ORDERS) or '.'} Known: {', '.join(RANK_ORDERS)}."
            )
        _check_distinct("device_mapping.host_order", self.host_order)
        for node, row in enumerate(self.gpu_orders):
            _check_distinct(f"device_mapping.gpu_orders[{node}]", row)
            if len(row) != len(self.gpu_orders[0]) or not row:
                raise SpecError(
                    f"device_mapping.gpu_orders[{node}] has {len(row)} GPUs; every node has equally many, at least 1"
                )

    @property
    def is_identity(self) -> bool:
        """Whether hosts, GPUs and ranks stand in their natural order."""
        return (
            self.host_order == tuple(range(len(self.host_order)))
            and all(row == tuple(range(len(row))) for row in self.gpu_orders)
            and self.rank_order == RANK_ORDERS[0]
        )

    def check_fits(self, num_nodes: int, gpus_per_node: int) -> None:
        """Raise where the mapping is not one of so many nodes.

        Raises
        ------
        SpecError
            If hosts, rows or GPUs do not match.
        """
        if self.host_order and len(self.host_order) != num_nodes:
            raise SpecError(
                f"device_mapping.host_order names {len(self.host_order)} hosts, but the plan runs on {num_nodes} nodes"
            )
        if len(self.gpu_orders) not in (0, 1, num_nodes):
            raise SpecError(
                f"device_mapping.gpu_orders has {len(self.gpu_orders)} rows, but the plan runs on {num_nodes} nodes: "
                "give one row for all or one for each"
            )
        if self.gpu_orders and len(self.gpu_orders[0]) != gpus_per_node:
            raise SpecError(
                f"device_mapping.gpu_orders names {len(self.gpu_orders[0])} GPUs per node, but the plan uses "
                f"{gpus_per_node}"
            )

    def host_of_node(self, node: int) -> int:
        """Return the place of a node's host in the user's list."""
        return self.host_order[node] if self.host_order else node

    def gpus_of_node(self, node: int, gpus_per_node: int) -> tuple[int, ...]:
        """Return the physical GPU of each local rank of a node."""
        if not self.gpu_orders:
            return tuple(range(gpus_per_node))
        return self.gpu_orders[0] if len(self.gpu_orders) == 1 else self.gpu_orders[node]


def _check_distinct(where: str, numbers: tuple[int, ...]) -> None:
    for number, times in Counter(numbers).items():
        if number < 0 or times > 1:
            problem = "is negative" if number < 0 else f"occurs {times} times"
            raise SpecError(f"{where}: {number} {problem}; name each once, from 0")
