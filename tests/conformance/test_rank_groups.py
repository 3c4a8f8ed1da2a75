"""Our rank groups are those that megatron-core's ``initialize_model_parallel`` creates, in both of its orders."""

from __future__ import annotations

import pytest
from conformance_clients import ask
from conformance_questions import MEGATRON_GROUPS
from conformance_report import absent

from meshwright.errors import SpecError
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.rank_groups import rank_groups

DEFAULT, PIPELINE_FIRST = RANK_ORDERS
# Groups that the asking rank names itself too.
_OWN = ("tp", "cp", "dp", "dp_cp", "pp", "ep", "etp", "edp")
# dp, tp, pp, cp, ep, etp: what Megatron takes in its default order.
LAYOUTS = (
    (1, 1, 1, 1, 1, 1),
    (8, 1, 1, 1, 1, 1),
    (1, 8, 1, 1, 1, 8),
    (1, 1, 8, 1, 1, 1),
    (1, 1, 1, 8, 1, 1),
    (2, 2, 2, 1, 1, 2),
    (4, 2, 2, 1, 1, 2),
    (2, 2, 2, 2, 1, 2),
    (3, 2, 2, 1, 1, 2),
    (4, 2, 2, 1, 4, 1),
    (2, 2, 2, 2, 8, 1),
    (8, 1, 2, 1, 8, 1),
    (8, 2, 1, 1, 4, 2),
    (4, 4, 2, 1, 8, 1),
    (4, 4, 2, 1, 2, 4),
    (2, 4, 2, 2, 8, 2),
    (16, 2, 2, 1, 16, 1),
    (2, 1, 4, 4, 4, 1),
    (6, 2, 2, 1, 3, 1),
    (2, 8, 4, 1, 16, 1),
)
# The same with pp before dp: as many replicas of experts as of dense layers.
PIPELINE_FIRST_LAYOUTS = (
    (8, 1, 1, 1, 1, 1),
    (2, 2, 2, 1, 1, 2),
    (4, 2, 2, 1, 2, 1),
    (2, 2, 2, 2, 4, 1),
    (4, 4, 2, 1, 2, 2),
    (2, 2, 4, 4, 8, 1),
    (3, 2, 2, 1, 2, 1),
)
# What Megatron refuses: grids that miss the world, and pp before dp with other replicas of experts.
REFUSED = (
    (DEFAULT, (4, 1, 1, 1, 8, 1)),
    (DEFAULT, (2, 2, 2, 1, 2, 4)),
    (DEFAULT, (3, 1, 2, 1, 2, 1)),
    (PIPELINE_FIRST, (4, 2, 2, 1, 4, 1)),
    (PIPELINE_FIRST, (2, 2, 2, 2, 1, 2)),
    (PIPELINE_FIRST, (8, 1, 2, 1, 8, 1)),
)


def plan_of(degrees):
    dp, tp, pp, cp, ep, etp = degrees
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        etp=etp,
        micro_batch_size=1,
        schedule="none" if pp == 1 else "1f1b",
        layers_per_stage=(1,) * pp,
    )


def asked(order, degrees, rank):
    plan = plan_of(degrees)
    sizes = {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "context_parallel_size": plan.cp,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.etp,
    }
    return {
        "groups": sizes | {"order": order},
        "world": plan.num_gpus,
        "rank": rank,
        "shows_groups": True,
    }


def test_groups_equal_those_of_megatron_core():
    reason = absent("megatron_core", {})
    if reason is not None:
        pytest.skip(f"{reason}; install the extra 'conformance'")
    cases = [(DEFAULT, degrees) for degrees in LAYOUTS]
    cases += [(PIPELINE_FIRST, degrees) for degrees in PIPELINE_FIRST_LAYOUTS]
    # The last rank of a world sees its own groups; every rank creates all of them.
    questions = [asked(order, degrees, plan_of(degrees).num_gpus - 1) for order, degrees in cases]
    refused = [asked(order, degrees, 0) for order, degrees in REFUSED]
    answers = ask("megatron_core", [*questions, *refused])
    for (order, degrees), answer in zip(cases, answers, strict=False):
        assert answer["error"] is None, (order, degrees, answer["error"])
        for ours, theirs in MEGATRON_GROUPS.items():
            groups = rank_groups(plan_of(degrees), ours, order).tolist()
            assert sorted(groups) == sorted(answer["created"][theirs]), (order, degrees, ours)
            if ours in _OWN:
                (own,) = answer["created"][f"OWN_{ours.upper()}"]
                assert own in groups
                assert plan_of(degrees).num_gpus - 1 in own
    for (order, degrees), answer in zip(REFUSED, answers[len(cases) :], strict=True):
        assert answer["error"] is not None, (order, degrees)
        with pytest.raises(SpecError):
            rank_groups(plan_of(degrees), "ep", order)


@pytest.mark.parametrize("order", RANK_ORDERS)
def test_groups_of_a_kind_part_the_world(order):
    plan = plan_of((2, 2, 2, 2, 4, 1))
    for group in MEGATRON_GROUPS:
        ranks = rank_groups(plan, group, order)
        assert sorted(ranks.ravel().tolist()) == list(range(plan.num_gpus))
        assert (ranks[:, 1:] > ranks[:, :-1]).all()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'edp'"):
        rank_groups(plan_of(LAYOUTS[1]), "edpp")
    with pytest.raises(SpecError, match="tp-cp-ep-pp-dp"):
        rank_groups(plan_of(LAYOUTS[1]), "dp", "tp-pp-dp")
