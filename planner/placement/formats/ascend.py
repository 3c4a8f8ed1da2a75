"""vLLM-Ascend and MindIE: the expert map of ``eplb_config.expert_map_path``, experts by layer and device."""

from __future__ import annotations

import json

import numpy as np

from meshwright.errors import ExportError, SpecError
from meshwright.planner.placement.formats.tables import LayerTable, parse_json_text, placement_of_rows
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["read_ascend", "write_ascend"]


def write_ascend(placement: ExpertPlacement, table: LayerTable) -> str:
    """Return the text of the file; layers are numbered from the first mixture-of-experts layer.

    Raises
    ------
    ExportError
        If a rank holds an expert twice, for which a device's map has no place.
    """
    del table
    layers = []
    ranks = np.sort(placement.slots.reshape(placement.num_layers, placement.num_ranks, -1), axis=2)
    twice = np.argwhere(ranks[..., 1:] == ranks[..., :-1])
    if len(twice):
        layer, rank, place = twice[0]
        raise ExportError(
            f"vLLM-Ascend holds an expert once on a device, but layer {layer} has expert {ranks[layer, rank, place]} twice "
            f"on rank {rank}; use fewer redundant experts"
        )
    for layer, row in enumerate(
        placement.slots.reshape(placement.num_layers, placement.num_ranks, -1).tolist()
    ):
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(row)]
        layers.append({"layer_id": layer, "device_count": placement.num_ranks, "device_list": devices})
    document = {"moe_layer_count": placement.num_layers, "layer_list": layers}
    return json.dumps(document, separators=(",", ":")) + "\n"


def read_ascend(text: str, table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement of a file.

    Raises
    ------
    SpecError
        If the text is not such a file, or of another model.
    """
    document = parse_json_text(text, name)
    try:
        assert isinstance(document, dict)
        layers = sorted(document["layer_list"], key=lambda each: int(each["layer_id"]))
        rows = []
        for layer in layers:
            devices = sorted(layer["device_list"], key=lambda each: int(each["device_id"]))
            if len({len(each["device_expert"]) for each in devices}) != 1 or len(devices) != table.num_ranks:
                raise SpecError(
                    f"{name}: layer {layer['layer_id']} has {len(devices)} devices or devices of different sizes; "
                    f"expected {table.num_ranks} alike"
                )
            rows.append([expert for each in devices for expert in each["device_expert"]])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(
            f"{name}: expected moe_layer_count and layer_list with layer_id and device_list (device_id, device_expert)"
        ) from None
    return placement_of_rows(rows, table, name)
