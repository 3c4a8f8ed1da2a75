"""SGLang: ``--init-expert-location FILE.json`` (python/sglang/srt/eplb/expert_location.py).

The object holds ``physical_to_logical_map`` alone, for its keys become arguments: one row per layer of the model,
dense ones too, with the expert of every physical slot; rank ``g`` owns the ``g``-th run of slots.
"""

from __future__ import annotations

import json

from meshwright.errors import SpecError
from meshwright.planner.placement.formats.tables import LayerTable, parse_json_text, placement_of_rows
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["KEY", "read_sglang", "write_sglang"]

KEY = "physical_to_logical_map"


def write_sglang(placement: ExpertPlacement, table: LayerTable) -> str:
    """Return the text of the file; dense layers get the experts in order."""
    plain = [slot % placement.num_experts for slot in range(placement.num_slots)]
    rows: list[list[int]] = [plain] * table.num_model_layers
    for layer, row in zip(table.moe_layers, placement.slots.tolist(), strict=True):
        rows[layer] = row
    lines = ",\n".join("    " + json.dumps(row, separators=(",", ":")) for row in rows)
    return f'{{\n  "{KEY}": [\n{lines}\n  ]\n}}\n'


def read_sglang(text: str, table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement of a file; rows of dense layers are skipped.

    Raises
    ------
    SpecError
        If the text is not such a file, or of another model.
    """
    document = parse_json_text(text, name)
    if not isinstance(document, dict) or set(document) != {KEY} or not isinstance(document[KEY], list):
        raise SpecError(f"{name}: expected one key '{KEY}' with a list of rows")
    rows = document[KEY]
    if not all(isinstance(row, list) for row in rows):
        raise SpecError(f"{name}: '{KEY}' holds something that is not a row of slots")
    if len(rows) == table.num_model_layers:
        rows = [rows[layer] for layer in table.moe_layers]
    return placement_of_rows(rows, table, name)
