"""Which expert sits in which slot of which rank, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["ExpertPlacement"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertPlacement:
    """Experts of every mixture-of-experts layer in the slots of the expert parallel ranks.

    Parameters
    ----------
    slots : NDArray[np.int64]
        Logical expert of each physical slot, shape ``(num_layers, num_slots)``; rank ``g`` owns slots
        ``g * num_slots / num_ranks`` to ``(g + 1) * num_slots / num_ranks - 1``.
    num_experts : int
        Logical experts of a layer; each has at least one slot.
    num_ranks : int
        Expert parallel ranks; divides the slots.
    ranks_per_node : int
        Consecutive ranks that share a node.
    """

    slots: NDArray[np.int64]
    num_experts: int
    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.slots.ndim != 2:
            raise SpecError("expert placement: slots must have one row per layer and one column per slot")
        num_layers, num_slots = self.slots.shape
        if num_slots % self.num_ranks:
            raise SpecError(f"expert placement: {num_slots} slots do not divide by {self.num_ranks} ranks")
        if self.slots.min(initial=0) < 0 or self.slots.max(initial=0) >= self.num_experts:
            raise SpecError(f"expert placement: experts are 0 to {self.num_experts - 1}")
        present = np.zeros((num_layers, self.num_experts), dtype=bool)
        np.put_along_axis(present, self.slots, True, axis=1)
        missing = np.argwhere(~present)
        if len(missing):
            layer, expert = missing[0]
            raise SpecError(f"expert placement: layer {layer} holds no copy of expert {expert}")

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers."""
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots over all ranks; those beyond the experts are redundant copies."""
        return int(self.slots.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank."""
        return self.num_slots // self.num_ranks

    @property
    def rank_of_slot(self) -> NDArray[np.int64]:
        """Rank of each slot, ``(num_slots,)``."""
        return np.arange(self.num_slots) // self.slots_per_rank
