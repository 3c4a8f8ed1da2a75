"""vLLM: the value of ``--eplb-config`` (EPLBConfig). Upstream reads no placement file, only how many copies there are.

vLLM finds its own placement from what it measures while it runs; see the checkpoint permutation for a fixed one.
"""

from __future__ import annotations

import json

from meshwright.errors import SpecError
from meshwright.planner.placement.formats.tables import parse_json_text
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["read_vllm_redundant_experts", "write_vllm"]

_FIELDS = {
    "window_size": 1000,
    "step_interval": 3000,
    "num_redundant_experts": 0,
    "log_balancedness": False,
}


def write_vllm(placement: ExpertPlacement) -> str:
    """Return the configuration: the redundant experts of the placement, the rest as vLLM sets it."""
    redundant = placement.num_slots - placement.num_experts
    return json.dumps({**_FIELDS, "num_redundant_experts": redundant}) + "\n"


def read_vllm_redundant_experts(text: str, name: str) -> int:
    """Return the redundant experts of a configuration.

    Raises
    ------
    SpecError
        If the text is no such configuration.
    """
    document = parse_json_text(text, name)
    count = document.get("num_redundant_experts", 0) if isinstance(document, dict) else None
    if type(count) is not int or count < 0:
        raise SpecError(f"{name}: expected an object with num_redundant_experts, 0 or more")
    return count
