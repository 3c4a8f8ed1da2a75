"""What a plan may ask of the placement: imbalance, traffic, layer time, dropped tokens."""

from __future__ import annotations

import pytest

from meshwright.costmodels.calibration_choice import load_device_calibration
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.placement.layout import best_layout, capacity_drop, placement_reach
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.simcore.domain.model_catalog import load_model

CLUSTER = resolve_cluster("dgx-h100:2")


def test_redundant_slots_lower_imbalance_and_traffic():
    none, some = (placement_reach(load_model("mixtral-8x7b"), CLUSTER, 16, extra) for extra in (8, 24))
    assert some.imbalance < none.imbalance
    assert some.remote_nodes_per_token < none.remote_nodes_per_token
    assert none.is_synthetic


def test_the_fastest_layout_comes_first():
    calibration = load_device_calibration(CLUSTER.node.gpu, CLUSTER.node)
    layouts = best_layout(
        load_model("mixtral-8x7b"),
        CLUSTER,
        calibration,
        ep=(4, 8, 16),
        redundant_experts=(0, 8),
        tokens_per_gpu=1024,
    )
    assert [(each.ep, each.redundant_experts) for each in sorted(layouts, key=lambda e: (e.ep, e.redundant_experts))] == [
        (4, 0), (4, 8), (8, 0), (8, 8), (16, 8),
    ]  # fmt: skip
    seconds = [each.layer_seconds for each in layouts]
    assert seconds == sorted(seconds)
    assert layouts[0].layer_seconds > 0.0


def test_a_smaller_capacity_drops_more():
    routing = draw_routing(2, 16, 2, 2000, 0)
    drops = [capacity_drop(routing, 2, factor, 500) for factor in (0.5, 1.0, 2.0, 16.0)]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] > 0.4
    assert drops[-1] == 0.0


def test_what_has_no_placement_is_refused():
    with pytest.raises(SpecError, match="has no experts"):
        placement_reach(load_model("llama-3-8b"), CLUSTER, 8)
    calibration = load_device_calibration(CLUSTER.node.gpu, CLUSTER.node)
    with pytest.raises(SpecError, match="no pair"):
        best_layout(load_model("mixtral-8x7b"), CLUSTER, calibration, ep=(16,), redundant_experts=(0,))
