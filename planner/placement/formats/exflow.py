"""ExFlow: CSV ``Expert,Node`` with the experts of all layers numbered through (YJHMITWEB/ExFlow, solutions/*.csv).

The published file says which rank holds an expert; there are no copies.
"""

from __future__ import annotations

import csv
import io

import numpy as np

from meshwright.errors import ExportError, SpecError
from meshwright.planner.placement.formats.tables import LayerTable, placement_of_rows
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["read_exflow", "write_exflow"]


def write_exflow(placement: ExpertPlacement, table: LayerTable) -> str:
    """Return the text of the file.

    Raises
    ------
    ExportError
        If an expert has copies, which the format cannot hold.
    """
    del table
    if placement.num_slots != placement.num_experts:
        raise ExportError("ExFlow's placement has one slot per expert; leave out --redundant-experts")
    ranks = placement.rank_of_slot[np.argsort(placement.slots, axis=1, kind="stable")]
    lines = [f"{expert},{rank}" for expert, rank in enumerate(ranks.ravel().tolist())]
    return "Expert,Node\n" + "\n".join(lines) + "\n"


def read_exflow(text: str, table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement of a file.

    Raises
    ------
    SpecError
        If the text is not such a file, or of another model.
    """
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or [cell.strip() for cell in rows[0]] != ["Expert", "Node"]:
        raise SpecError(f"{name}: expected the header Expert,Node")
    expected = len(table.moe_layers) * table.num_experts
    ranks = np.full(expected, -1, dtype=np.int64)
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        try:
            expert, rank = (int(float(cell)) for cell in row)
        except ValueError:
            raise SpecError(f"{name}:{number}: expected an expert and a node") from None
        if not (0 <= expert < expected and 0 <= rank < table.num_ranks) or ranks[expert] >= 0:
            raise SpecError(
                f"{name}:{number}: expert {expert} on node {rank}; experts are 0 to {expected - 1}, each once, nodes "
                f"0 to {table.num_ranks - 1}"
            )
        ranks[expert] = rank
    if (ranks < 0).any():
        raise SpecError(f"{name}: expert {int(np.argmin(ranks))} has no node")
    by_layer = ranks.reshape(len(table.moe_layers), table.num_experts)
    room = table.num_experts // table.num_ranks
    if (np.apply_along_axis(np.bincount, 1, by_layer, minlength=table.num_ranks) != room).any():
        raise SpecError(
            f"{name}: the nodes of a layer hold different numbers of experts; each must hold {room}"
        )
    return placement_of_rows(np.argsort(by_layer, axis=1, kind="stable").tolist(), table, name)
