from __future__ import annotations

from typing import Any

import pytest

from meshwright.errors import SpecError
from meshwright.simcore.domain.layer_groups import (
    GROUP_RECOMPUTES,
    GROUP_SHARDINGS,
    LayerGroup,
    groups_by_stage,
    layer_groups_text,
    uniform_plan,
)
from meshwright.simcore.domain.plan import RECOMPUTES, SHARDINGS, ParallelPlan


def make_plan(*groups: LayerGroup, **changes: Any) -> ParallelPlan:
    values: dict[str, Any] = {
        "dp": 4,
        "tp": 2,
        "pp": 2,
        "micro_batch_size": 2,
        "schedule": "1f1b",
        "layers_per_stage": (3, 3),
        "layer_groups": groups,
    }
    return ParallelPlan(**values | changes)


THREE = LayerGroup(num_layers=3, tp=2)


def test_the_words_of_a_group_are_words_of_a_plan() -> None:
    assert set(GROUP_SHARDINGS) < set(SHARDINGS)
    assert GROUP_RECOMPUTES == RECOMPUTES


def test_groups_are_told_stage_by_stage_and_equal_stages_together() -> None:
    mixed = (
        LayerGroup(num_layers=2, tp=4, sequence_parallel=True),
        LayerGroup(num_layers=1, recompute="full"),
    )
    plan = make_plan(THREE, *mixed)
    assert groups_by_stage(plan) == ((THREE,), mixed)
    assert layer_groups_text(plan) == (
        "stage 0: 3 x tp 2 none none; stage 1: 2 x tp 4 sp none none + 1 x tp 1 none full"
    )
    assert layer_groups_text(make_plan(THREE, THREE)) == "stages 0-1: 3 x tp 2 none none"
    assert layer_groups_text(make_plan()) == ""
    named = LayerGroup(num_layers=3, recompute="selective", recompute_modules=("layernorm", "mlp"))
    single = make_plan(named, pp=1, schedule="none", layers_per_stage=(3,))
    assert layer_groups_text(single) == "3 x tp 1 none selective(layernorm+mlp)"


def test_a_stage_without_layers_has_no_groups() -> None:
    plan = make_plan(THREE, pp=3, layers_per_stage=(0, 3, 0))
    assert groups_by_stage(plan) == ((), (THREE,), ())
    assert layer_groups_text(plan) == "stage 0: no layers; stage 1: 3 x tp 2 none none; stage 2: no layers"


def test_the_uniform_plan_of_a_group_keeps_ranks_and_sequences() -> None:
    plan = make_plan(THREE, THREE)
    for tp in (1, 2, 4, 8):
        group = LayerGroup(num_layers=3, tp=tp, sharding="zero1", recompute="full")
        uniform = uniform_plan(plan, group)
        assert uniform.tp * uniform.dp == 8
        assert uniform.dp * uniform.micro_batch_size == 8
        assert (uniform.sharding, uniform.recompute, uniform.layer_groups) == ("zero1", "full", ())


@pytest.mark.parametrize(
    ("groups", "changes", "message"),
    [
        ((THREE,), {}, "stage 1 holds 3 layers, but groups end after 0"),
        ((LayerGroup(num_layers=6, tp=2),), {}, "stage 0 holds 3 layers, but groups end after 6"),
        ((THREE, THREE, THREE), {}, "hold 9 layers, but layers_per_stage adds up to 6"),
        ((THREE, LayerGroup(num_layers=3, tp=3)), {}, "tp 3 does not divide the 8 ranks"),
        ((THREE, LayerGroup(num_layers=3)), {"micro_batch_size": 1}, "tp 1 makes 8 replicas"),
        ((THREE, THREE), {"optimizer_offload": "cpu"}, "without offload"),
        ((THREE, THREE), {"recompute": "full", "recompute_layers": 1}, "leave out recompute_layers"),
        ((THREE, THREE), {"schedule": "zb_h1"}, "schedule none, gpipe or 1f1b"),
        (
            (LayerGroup(num_layers=1), LayerGroup(num_layers=1)) * 2,
            {"vpp": 2, "schedule": "interleaved_1f1b", "layers_per_stage": (1, 1, 1, 1)},
            "vpp 1",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    groups: tuple[LayerGroup, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make_plan(*groups, **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_layers": 1, "tp": 0}, "tp must be at least 1"),
        ({"num_layers": 1, "sharding": "hsdp"}, "unknown value 'hsdp'"),
        ({"num_layers": 1, "recompute": "ful"}, "did you mean 'full'"),
        ({"num_layers": 1, "sequence_parallel": True}, "needs tp > 1"),
    ],
)
def test_groups_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LayerGroup(**values)
