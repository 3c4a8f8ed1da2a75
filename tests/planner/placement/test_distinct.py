"""Copies on different ranks: none twice, nothing lost, balance kept."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import ExportError
from meshwright.planner.placement.balance import balance_slots
from meshwright.planner.placement.distinct import copies_apart
from meshwright.planner.placement.evaluation import imbalance, rank_loads
from meshwright.planner.placement.formats.ascend import read_ascend, write_ascend
from meshwright.planner.placement.formats.tables import LayerTable
from meshwright.simcore.domain.expert_placement import ExpertPlacement

TABLE = LayerTable(num_model_layers=2, moe_layers=(0, 1), num_experts=4, num_ranks=2, ranks_per_node=2)


def doubled():
    return ExpertPlacement(
        slots=np.array([[0, 0, 1, 2, 3, 1], [0, 1, 2, 3, 0, 1]]),
        num_experts=4,
        num_ranks=2,
        ranks_per_node=2,
    )


def test_a_second_copy_moves_to_where_it_weighs_least():
    loads = np.array([[8.0, 2.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    apart = copies_apart(doubled(), loads)
    # Expert 0 of layer 0 goes to rank 1 against expert 3, the one that keeps ranks even: 4 + 1 + 4 and 2 + 1 + 4.
    assert sorted(apart.slots[0].tolist()) == sorted(doubled().slots[0].tolist())
    assert {frozenset(row) for row in apart.slots[0].reshape(2, 3).tolist()} == {
        frozenset((0, 1, 2)),
        frozenset((0, 1, 3)),
    }
    assert (apart.slots[1] == doubled().slots[1]).all()


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(256, 32, 288), (128, 16, 160), (16, 8, 32)])
def test_copies_apart_stay_balanced(experts, ranks, slots):
    loads = np.random.default_rng(0).lognormal(0.0, 0.8, (3, experts))
    before = ExpertPlacement(
        slots=balance_slots(loads, slots, ranks), num_experts=experts, num_ranks=ranks, ranks_per_node=ranks
    )
    after = copies_apart(before, loads)
    rows = np.sort(after.slots.reshape(3, ranks, -1), axis=2)
    assert (rows[..., 1:] != rows[..., :-1]).all()
    assert (np.sort(after.slots) == np.sort(before.slots)).all()
    worse = imbalance(rank_loads(after, loads)).mean() - imbalance(rank_loads(before, loads)).mean()
    assert worse < 0.02


def test_vllm_ascend_gets_no_file_with_an_expert_twice_on_a_device():
    with pytest.raises(ExportError, match="expert 0 twice on rank 0"):
        write_ascend(doubled(), TABLE)
    apart = copies_apart(doubled(), np.ones((2, 4)))
    assert (read_ascend(write_ascend(apart, TABLE), TABLE, "map.json").slots == apart.slots).all()
