"""Tokens grouped by the experts they are expected to need, against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.placement.evaluation import remote_nodes
from meshwright.planner.placement.request import PlacementRequest
from meshwright.planner.placement.routing import routing_from_tokens
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing
from meshwright.planner.placement.token_groups import speculative_grouping
from meshwright.simcore.domain.expert_placement import ExpertPlacement

STRONG = SyntheticRouting(topic_strength=3.0, persistence=0.9)


def blocks(num_tokens, num_layers=3):
    """Tokens of two kinds: experts 0 to 3 in every layer, or 4 to 7."""
    generator = np.random.default_rng(0)
    kind = np.arange(num_tokens) % 2
    generator.shuffle(kind)
    within = np.stack([generator.permutation(4)[:2] for _ in range(num_tokens * num_layers)])
    return (within.reshape(num_layers, num_tokens, 2) + 4 * kind[None, :, None]).astype(np.int16)


def placed(slots, num_layers=3, num_ranks=4):
    return ExpertPlacement(
        slots=np.tile(np.asarray(slots), (num_layers, 1)),
        num_experts=8,
        num_ranks=num_ranks,
        ranks_per_node=num_ranks // 2,
    )


def test_tokens_that_keep_to_half_the_experts_stay_on_their_node():
    result = speculative_grouping(placed(np.arange(8)), blocks(400), blocks(400), batch=100)
    assert result.num_homes == 2
    assert result.is_of_nodes
    # Every token needs one node; foretold from the layer before, it is its own. The first layer foretells nothing.
    assert result.by_chance.remote_nodes == pytest.approx(0.5, abs=0.08)
    assert result.grouped.remote_nodes[0] == result.by_chance.remote_nodes[0]
    # Kinds are even over all tokens but not in a batch of 100: what does not fit goes elsewhere.
    assert (result.grouped.remote_nodes[1:] < 0.1).all()
    assert result.grouped.remote_nodes[1:] == pytest.approx(result.foreknown.remote_nodes[1:])
    assert (result.grouped.local_pairs[1:] > 0.9).all()


def test_experts_apart_leave_nothing_to_group():
    apart = placed([0, 4, 1, 5, 2, 6, 3, 7])
    result = speculative_grouping(apart, blocks(400), blocks(400), batch=100)
    assert result.grouped.local_pairs == pytest.approx(0.5, abs=0.06)


def test_homes_by_chance_are_what_the_measure_of_a_placement_says():
    routing = draw_routing(3, 16, 2, 6000, 0)
    placement = ExpertPlacement(
        slots=np.tile(np.arange(16), (3, 1)), num_experts=16, num_ranks=8, ranks_per_node=2
    )
    result = speculative_grouping(placement, routing.tokens[:, :3000], routing.tokens[:, 3000:])
    together, remote = remote_nodes(placement, routing.tokens[:, 3000:], "nearest")
    assert result.by_chance.nodes == pytest.approx(together, rel=1e-12)
    assert result.by_chance.remote_nodes == pytest.approx(remote, rel=0.03)


def test_every_home_takes_as_many_tokens():
    """Without copies a rank's load does not depend on homes; with one of everything everywhere it does."""
    everywhere = placed([*range(8), *range(8)], num_ranks=2)
    result = speculative_grouping(everywhere, blocks(400), blocks(400), batch=100)
    assert result.grouped.imbalance == pytest.approx(1.0, abs=1e-12)
    assert result.grouped.local_pairs == pytest.approx(1.0)


@pytest.mark.parametrize("dispatch", ["deduplicated", "full"])
def test_a_placement_for_grouped_tokens_beats_eplb_on_held_out_tokens(dispatch):
    routing = draw_routing(4, 64, 6, 16_000, 0, STRONG)
    request = PlacementRequest(
        routing=routing,
        num_slots=64,
        num_ranks=16,
        ranks_per_node=4,
        objective="joint",
        dispatch=dispatch,
        top_k=6,
        is_grouping_tokens=True,
    )
    answer = solve_placement(request, certificates=False)
    eplb = speculative_grouping(
        answer.baseline,
        routing.tokens[:, :8000],
        routing.tokens[:, 8000:],
        is_deduplicated=dispatch == "deduplicated",
    )
    grouped, by_chance = answer.grouping.grouped, answer.grouping.by_chance
    assert grouped.local_pairs.mean() > 1.2 * by_chance.local_pairs.mean()
    if dispatch == "deduplicated":
        assert grouped.remote_nodes.mean() < min(
            0.97 * by_chance.remote_nodes.mean(), eplb.grouped.remote_nodes.mean()
        )
    else:
        assert grouped.local_pairs.mean() > eplb.grouped.local_pairs.mean()
    assert answer.held_out.imbalance <= answer.baseline_held_out.imbalance + 0.04
    assert any("hand tokens out anew" in warning for warning in answer.warnings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "balance"}, "objectives traffic and joint"),
        ({"objective": "joint", "dispatch": "coherent"}, "deduplicated or full"),
    ],
)
def test_what_grouping_does_not_go_with_is_said(fields, message):
    routing = draw_routing(2, 8, 2, 500, 0)
    with pytest.raises(SpecError, match=message):
        solve_placement(
            PlacementRequest(
                routing=routing,
                num_slots=8,
                num_ranks=4,
                ranks_per_node=2,
                is_grouping_tokens=True,
                **fields,
            )
        )


def test_one_layer_foretells_nothing():
    routing = routing_from_tokens(blocks(100, 1), 8, "trace.npz")
    with pytest.raises(SpecError, match="at least two mixture-of-experts layers"):
        solve_placement(
            PlacementRequest(
                routing=routing, num_slots=8, num_ranks=4, ranks_per_node=2, is_grouping_tokens=True
            )
        )
