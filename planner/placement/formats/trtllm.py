"""TensorRT-LLM: the YAML of ``moe_config.load_balancer`` (examples/ep_load_balancer, MoeLoadBalancerConfig).

``initial_global_assignments`` maps the index of a layer in the model to the expert of every slot; with
``layer_updates_per_iter: 0`` the placement is static.
"""

from __future__ import annotations

import yaml

from meshwright.errors import SpecError
from meshwright.planner.placement.formats.tables import LayerTable, placement_of_rows
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["read_trtllm", "write_trtllm"]

_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def write_trtllm(placement: ExpertPlacement, table: LayerTable) -> str:
    """Return the text of the file."""
    rows = zip(table.moe_layers, placement.slots.tolist(), strict=True)
    assignments = "\n".join(f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in rows)
    return (
        f"num_slots: {placement.num_slots}\n"
        f"initial_global_assignments:\n{assignments}\n"
        "layer_updates_per_iter: 0\n"
    )


def read_trtllm(text: str, table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement of a file.

    Raises
    ------
    SpecError
        If the text is not such a file, or of another model.
    """
    # The strict reader of specs knows text keys only; here layers are numbers.
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise SpecError(f"{name}: is not YAML") from None
    is_known = isinstance(document, dict) and isinstance(document.get("initial_global_assignments"), dict)
    if not is_known or not set(document) <= _KEYS:
        raise SpecError(f"{name}: expected {', '.join(sorted(_KEYS))}")
    assignments, num_slots = document["initial_global_assignments"], document.get("num_slots")
    rows = []
    for layer in table.moe_layers:
        row = assignments.get(layer)
        if not isinstance(row, list):
            raise SpecError(f"{name}: initial_global_assignments has no layer {layer}")
        if len(row) != num_slots:
            raise SpecError(f"{name}: layer {layer} has {len(row)} slots; num_slots is {num_slots}")
        rows.append(row)
    return placement_of_rows(rows, table, name)
