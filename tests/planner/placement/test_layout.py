"""What a plan may ask of the placement: imbalance, traffic, dropped tokens."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.placement.eplb import eplb_slots
from meshwright.planner.placement.layout import capacity_drop, placement_reach
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.simcore.domain.expert_placement import ExpertPlacement
from meshwright.simcore.domain.model_catalog import load_model

CLUSTER = resolve_cluster("dgx-h100:2")


def test_redundant_slots_lower_imbalance_and_traffic():
    none, some = (placement_reach(load_model("mixtral-8x7b"), CLUSTER, 16, extra) for extra in (8, 24))
    assert some.imbalance < none.imbalance
    assert some.remote_nodes_per_token < none.remote_nodes_per_token
    assert none.is_synthetic


def test_a_smaller_capacity_drops_more():
    routing = draw_routing(2, 16, 2, 2000, 0)
    drops = [capacity_drop(routing, 2, factor, 500) for factor in (0.5, 1.0, 2.0, 16.0)]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] > 0.4
    assert drops[-1] == 0.0


def test_copies_of_busy_experts_drop_less():
    routing = draw_routing(2, 16, 2, 2000, 0)
    slots = eplb_slots(routing.loads, 24, 1, 1, 8)
    placement = ExpertPlacement(slots=slots, num_experts=16, num_ranks=8, ranks_per_node=8)
    assert capacity_drop(routing, 2, 1.0, 500, placement) < capacity_drop(routing, 2, 1.0, 500)


def test_what_has_no_placement_is_refused():
    with pytest.raises(SpecError, match="has no experts"):
        placement_reach(load_model("llama-3-8b"), CLUSTER, 8)
