"""What every placement format shares: the model's layers, and rows of slots checked on the way in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["LayerTable", "parse_json_text", "placement_of_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Where a model's mixture-of-experts layers stand.

    Parameters
    ----------
    num_model_layers : int
        All layers, dense ones too.
    moe_layers : tuple[int, ...]
        Index of each mixture-of-experts layer in the model.
    num_experts : int
        Routed experts of a layer.
    num_ranks, ranks_per_node : int
        Expert parallel ranks, and those of a node.
    """

    num_model_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    num_ranks: int
    ranks_per_node: int


def parse_json_text(text: str, name: str) -> object:
    """Return the value of a JSON text.

    Raises
    ------
    SpecError
        If it is not JSON.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 0)
        raise SpecError(
            f"{name}:{line}: not valid JSON; give the file an engine or 'meshwright place' wrote"
        ) from None


def placement_of_rows(rows: Sequence[Sequence[int]], table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement whose slots are the rows, one per mixture-of-experts layer.

    Raises
    ------
    SpecError
        If the rows are not as many or as long as they must be, or hold anything but expert numbers.
    """
    if len(rows) != len(table.moe_layers):
        raise SpecError(
            f"{name}: {len(rows)} layers; the model has {len(table.moe_layers)} mixture-of-experts layers"
        )
    if len({len(row) for row in rows}) != 1 or not len(rows[0]):
        raise SpecError(f"{name}: the layers have different numbers of slots")
    if not all(type(each) is int for row in rows for each in row):
        raise SpecError(f"{name}: slots hold expert numbers only")
    slots: NDArray[np.int64] = np.asarray(rows, dtype=np.int64)
    try:
        return ExpertPlacement(
            slots=slots,
            num_experts=table.num_experts,
            num_ranks=table.num_ranks,
            ranks_per_node=table.ranks_per_node,
        )
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from None
