from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from meshwright.costmodels.collectives import collective_time, place_group
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.layer_groups import layer_group_costs, layer_group_memory
from meshwright.costmodels.layer_strategies import relayout_times
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import LayerGroup, uniform_plan
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import iteration_time


def make_context(
    model: str = "llama-2-7b",
    cluster: str = "dgx-a100-40:1",
    *,
    batch: int = 64,
    length: int = 2048,
    software: str = "megatron-core",
    num_layers: int = 8,
) -> CostContext:
    job = TrainingJob(
        model=replace(load_model(model), num_layers=num_layers),
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software=software,
    )
    return cost_context(job)


def make_plan(groups: tuple[LayerGroup, ...] = (), **changes: object) -> ParallelPlan:
    values: dict[str, object] = {
        "dp": 4,
        "tp": 2,
        "micro_batch_size": 2,
        "schedule": "none",
        "layers_per_stage": (8,),
        "layer_groups": groups,
    }
    return ParallelPlan(**values | changes)  # type: ignore[arg-type]  # a mapping of the fields


def random_uniform(rng: np.random.Generator, context: CostContext) -> ParallelPlan:
    """Return a plan of eight layers whose stages all fill the cluster."""
    pp = int(rng.choice([1, 2, 4]))
    tp = int(rng.choice([t for t in (1, 2, 4) if t * pp <= 8]))
    num_gpus = context.cluster.num_gpus
    dp = num_gpus // (tp * pp)
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        micro_batch_size=int(rng.choice([1, 2])),
        schedule="none" if pp == 1 else "1f1b",
        sequence_parallel=bool(tp > 1 and rng.integers(2)),
        sharding=str(rng.choice(["none", "zero1", "zero2", "zero3"])),  # type: ignore[arg-type]  # its words
        recompute=str(rng.choice(["none", "selective", "full"])),  # type: ignore[arg-type]  # its words
        layers_per_stage=partition_layers(context.model.num_layers, pp),
    )


def as_groups(plan: ParallelPlan, split: int = 0) -> ParallelPlan:
    """Return a uniform plan with its layers stated as groups, ``split`` of the first stage apart."""
    groups = []
    for stage, layers in enumerate(plan.layers_per_stage):
        parts = (split, layers - split) if stage == 0 and 0 < split < layers else (layers,)
        groups += [
            LayerGroup(
                num_layers=part,
                tp=plan.tp,
                sequence_parallel=plan.sequence_parallel,
                sharding=plan.sharding,  # type: ignore[arg-type]  # none of these plans is hsdp
                recompute=plan.recompute,
            )
            for part in parts
        ]
    return replace(plan, layer_groups=tuple(groups))


@pytest.mark.parametrize("seed", range(60))
def test_groups_that_are_alike_cost_and_hold_what_the_uniform_plan_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    context = make_context(
        str(rng.choice(["llama-2-7b", "gpt2-xl", "llama-3-8b"])),
        str(rng.choice(["dgx-a100-40:1", "dgx-h100:2", "l40s-8:1"])),
        software=str(rng.choice(["megatron-core", "megatron-2023", "torchtitan", "llm-foundry-fsdp1"])),
    )
    plan = random_uniform(rng, context)
    grouped = as_groups(plan, split=int(rng.integers(0, 3)))
    uniform, layered = iteration_costs(context, plan), layer_group_costs(context, grouped)
    for field in fields(uniform):
        expected, found = getattr(uniform, field.name), getattr(layered, field.name)
        if expected is None:
            assert found is None
            continue
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-15), field.name
    held, found = plan_memory(context, plan), layer_group_memory(context, grouped)
    for field in fields(held):
        # Differences of sums of some 1e11 bytes leave less than a byte.
        assert np.allclose(getattr(found, field.name), getattr(held, field.name), rtol=1e-12, atol=0.1)


@pytest.mark.parametrize(("cp", "ep"), [(1, 4), (2, 1), (2, 2)])
def test_groups_of_a_mixture_of_experts_cost_and_hold_what_the_uniform_plan_does(cp: int, ep: int) -> None:
    context = make_context("mixtral-8x7b", "dgx-h100:1", length=4096)
    uniform = make_plan(
        dp=4 // cp,
        cp=cp,
        ep=ep,
        sequence_parallel=True,
        sharding="zero1",
        recompute="full",
        micro_batch_size=2,
    )
    grouped = as_groups(uniform, split=3)
    grouped_costs, costs = layer_group_costs(context, grouped), iteration_costs(context, uniform)
    for name in ("forward_time", "backward_time", "gradient_reduce_time", "optimizer_time"):
        assert getattr(grouped_costs, name) == pytest.approx(getattr(costs, name), rel=1e-12)
    held, found = plan_memory(context, uniform), layer_group_memory(context, grouped)
    assert found.total == pytest.approx(held.total, rel=1e-12)


def test_a_stage_is_the_sum_of_its_layers_and_their_changes_of_layout() -> None:
    context = make_context()
    one, other = LayerGroup(num_layers=5, tp=2), LayerGroup(num_layers=3, tp=8, sequence_parallel=True)
    plan = make_plan((one, other))
    costs = layer_group_costs(context, plan)
    times = relayout_times(context, plan, [(2, False), (8, True)])
    parts = [
        iteration_costs(context, replace(uniform_plan(plan, group), layers_per_stage=(layers,)))
        for group in (one, other)
        for layers in (0, group.num_layers)
    ]
    changes = times[0, 1] + times[1, 0]
    forward = parts[1].forward_time + parts[3].forward_time - parts[2].forward_time
    backward = parts[1].backward_time + parts[3].backward_time - parts[2].backward_time
    assert costs.forward_time[0] == pytest.approx(forward[0] + changes)
    assert costs.backward_time[0] == pytest.approx(backward[0] + changes)
    # Layers of other ranks' groups synchronise on their own, after those that share the embedding's.
    alone = replace(uniform_plan(plan, other), layers_per_stage=(3,))
    context_alone = replace(context, model=replace(context.model, vocab_size=1, has_tied_embeddings=True))
    table = iteration_costs(context_alone, alone).gradient_reduce_time
    together = iteration_costs(context, replace(uniform_plan(plan, one), layers_per_stage=(5,)))
    assert costs.gradient_reduce_time[0] == pytest.approx(
        together.gradient_reduce_time[0] + table[0], rel=1e-3
    )


def test_a_rank_holds_the_states_of_all_layers_and_works_for_the_neediest() -> None:
    context = make_context()
    kept = LayerGroup(num_layers=5, tp=2, sharding="zero1")
    freed = LayerGroup(num_layers=3, tp=2, sharding="zero1", recompute="full")
    plan = make_plan((kept, freed), sharding="zero1")
    memory = layer_group_memory(context, plan)
    whole, none = (
        plan_memory(context, replace(uniform_plan(plan, group), layers_per_stage=(8,)))
        for group in (freed, kept)
    )
    assert memory.activations[0] == pytest.approx(5 / 8 * none.activations[0] + 3 / 8 * whole.activations[0])
    assert memory.working_set[0] == pytest.approx(whole.working_set[0])
    assert memory.working_set[0] > none.working_set[0]
    assert memory.optimizer_states[0] == pytest.approx(whole.optimizer_states[0])
    assert none.total[0] > memory.total[0] > whole.total[0]


def test_sharding_of_some_layers_saves_their_share_of_the_states() -> None:
    context = make_context(num_layers=8)
    groups = (LayerGroup(num_layers=4, tp=2), LayerGroup(num_layers=4, tp=2, sharding="zero1"))
    plan = make_plan(groups)
    mixed, none, all_sharded = (
        layer_group_memory(context, make_plan(parts)).optimizer_states[0]
        for parts in (
            plan.layer_groups,
            (replace(groups[0], num_layers=8),),
            (replace(groups[1], num_layers=8),),
        )
    )
    assert mixed == pytest.approx((none + all_sharded) / 2)


def test_relayouts_cost_a_gather_over_the_larger_group_and_only_where_something_is_missing() -> None:
    context = make_context()
    plan = make_plan()
    layouts = [(1, False), (2, False), (8, False), (8, True)]
    times = relayout_times(context, plan, layouts)
    assert np.all(np.diag(times) == 0.0)
    # Whole activations of a larger group contain those of a smaller.
    assert times[2, 0] == times[2, 1] == times[1, 0] == times[2, 3] == 0.0
    assert times[0, 1] > 0.0
    tokens = 8 * 2048
    gather = collective_time(
        "all_gather",
        np.array([2.0 * tokens * context.model.hidden_size]),
        place_group(np.array([8.0]), np.array([1.0]), 8),
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )[0]
    assert times[3, 2] == pytest.approx(gather)
    for via in range(4):
        assert np.all(times <= times[:, [via]] + times[[via]] + 1e-18)


def test_context_parallel_parts_move_with_another_tp() -> None:
    context = make_context()
    with_cp = make_plan(dp=2, cp=2)
    assert relayout_times(context, with_cp, [(2, False), (1, False)])[0, 1] > 0.0
    assert relayout_times(context, with_cp, [(2, False), (2, True)])[0, 1] == 0.0


def test_a_prediction_of_a_layered_plan_is_that_of_its_own_costs_and_memory() -> None:
    context = make_context()
    groups = (LayerGroup(num_layers=5, tp=2), LayerGroup(num_layers=3, tp=4, recompute="full"))
    plan = make_plan(groups)
    prediction = predict(context, plan)
    assert prediction.iteration_time == iteration_time(layer_group_costs(context, plan), "none")
    assert prediction.memory.total[0] == layer_group_memory(context, plan).total[0]
    bare, full = (
        predict(context, replace(plan, layer_groups=(), recompute=recompute))
        for recompute in ("none", "full")
    )
    share = prediction.hfu / prediction.mfu
    assert bare.hfu / bare.mfu < share < full.hfu / full.mfu
    assert share == pytest.approx(5 / 8 * bare.hfu / bare.mfu + 3 / 8 * full.hfu / full.mfu)


def test_models_whose_first_layers_differ_are_refused() -> None:
    context = make_context("deepseek-v3", "dgx-h100:8", num_layers=8)
    plan = make_plan((LayerGroup(num_layers=8, tp=2),), dp=32)
    with pytest.raises(SpecError, match="layers that are all alike"):
        layer_group_costs(context, plan)
    with pytest.raises(SpecError, match="layers that are all alike"):
        layer_group_memory(context, plan)
