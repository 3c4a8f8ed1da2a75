from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import ALL_LAYERS, PlanColumns
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.constraints import CONSTRAINTS, apply_constraints
from meshwright.planner.space import SearchLimits, enumerate_space, plan_of_row
from meshwright.planner.space_block import concatenate
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import CP_METHODS, SCHEDULES_KNOWN, SHARDINGS, ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.schedules import SCHEDULES

FREE = SearchLimits()


def make_context(
    model: str = "llama-3-8b",
    cluster: str = "dgx-h100:2",
    *,
    batch: int = 48,
    length: int = 2048,
    software: str = "megatron-core",
    **model_changes: object,
) -> CostContext:
    job = TrainingJob(
        model=replace(load_model(model), **model_changes),  # type: ignore[arg-type]  # checked by the class
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software=software,
    )
    return cost_context(job)


def job_of(context: CostContext) -> TrainingJob:
    return TrainingJob(
        model=context.model,
        cluster=context.cluster,
        workload=context.workload,
        software=context.software.id,
    )


def space(context: CostContext, limits: SearchLimits = FREE) -> PlanColumns:
    return concatenate(list(enumerate_space(context, limits, (context.cluster.num_gpus,))))


@functools.cache
def one_context() -> CostContext:
    return make_context()


def space_row(context: CostContext) -> PlanColumns:
    plan = ParallelPlan(dp=16, micro_batch_size=1, schedule="none", layers_per_stage=(32,))
    return PlanColumns.from_plans([plan], context.workload.global_batch_size)


def kept_by(name: str, context: CostContext, limits: SearchLimits = FREE) -> PlanColumns:
    constraint = next(constraint for constraint in CONSTRAINTS if constraint.name == name)
    columns = space(context)
    return columns.take(constraint.holds(context, columns, limits))


def test_every_candidate_is_kept_or_counted_once() -> None:
    context = make_context()
    columns, rejections = space(context), {}
    feasible = apply_constraints(context, columns, FREE, rejections)
    assert 0 < len(feasible) < len(columns)
    assert len(feasible) + sum(rejections.values()) == len(columns)
    assert list(rejections) == [constraint.name for constraint in CONSTRAINTS]


def test_counts_add_up_over_blocks() -> None:
    context = make_context()
    once: dict[str, int] = {}
    apply_constraints(context, space(context), FREE, once)
    twice = dict(once)
    apply_constraints(context, space(context), FREE, twice)
    assert twice == {name: 2 * count for name, count in once.items()}


def test_what_is_kept_satisfies_every_constraint() -> None:
    context = make_context()
    feasible = apply_constraints(context, space(context), FREE, {})
    for constraint in CONSTRAINTS:
        assert constraint.holds(context, feasible, FREE).all(), constraint.name
        assert constraint.sentence


def test_every_feasible_plan_can_be_scheduled() -> None:
    limits = SearchLimits(allowed={"schedule": tuple(SCHEDULES)})
    context = make_context(num_layers=6)
    feasible = apply_constraints(context, space(context, limits), limits, {})
    assert {SCHEDULES_KNOWN[code] for code in np.unique(feasible.schedule)} == set(SCHEDULES)
    kept = np.random.default_rng(7).choice(len(feasible), 2000, replace=False)
    for row in kept:
        plan = plan_of_row(job_of(context), feasible, int(row))
        schedule = SCHEDULES[plan.schedule]
        # Raises where a schedule does not exist for these numbers.
        schedule.check(plan.pp, plan.vpp * schedule.num_model_copies, plan.num_micro_batches(48))
        assert plan.pp * plan.vpp <= 6 or plan.layers_per_stage == (0, *(1,) * 6, 0)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp=st.integers(1, 12),
    vpp=st.integers(1, 4),
    batches=st.integers(1, 40),
)
def test_a_schedule_is_kept_exactly_where_it_can_be_built(name: str, pp: int, vpp: int, batches: int) -> None:
    constraint = next(constraint for constraint in CONSTRAINTS if constraint.name == "schedule")
    context = one_context()
    columns = replace(
        space_row(context),
        schedule=np.array([SCHEDULES_KNOWN.index(name)]),
        pp=np.array([pp]),
        vpp=np.array([vpp]),
        num_micro_batches=np.array([batches]),
    )
    schedule = SCHEDULES[name]
    try:
        schedule.check(pp, vpp * schedule.num_model_copies, batches)
        exists = True
    except SpecError:
        exists = False
    assert constraint.holds(context, columns, FREE).tolist() == [exists]


def test_activations_are_offloaded_with_all_layers_recomputed_or_none() -> None:
    columns = kept_by("offload", make_context(num_layers=8))
    away = columns.take(columns.activation_offload)
    assert len(away) > 0
    assert np.all(away.recompute_layers == ALL_LAYERS)


def test_weights_are_offloaded_only_where_they_are_gathered_layer_by_layer() -> None:
    columns = kept_by("offload", make_context(num_layers=8))
    away = columns.take(columns.parameter_offload > 0)
    assert len(away) > 0
    assert np.all(away.pp == 1)
    assert np.all(away.sharding >= SHARDINGS.index("zero3"))


def test_experts_divide_and_tensor_parallelism_with_them_splits_the_sequence() -> None:
    columns = kept_by("expert_parallel", make_context("mixtral-8x7b", "dgx-h100:1"))
    assert np.all(8 % columns.ep == 0)
    assert np.all((columns.tp * columns.cp * columns.dp) % (columns.ep * columns.etp) == 0)
    assert np.all((columns.tp == 1) | columns.sequence_parallel)
    dense = kept_by("expert_parallel", make_context())
    assert np.all((dense.ep == 1) & (dense.etp == 1))


def test_all_to_all_needs_a_key_value_head_for_every_rank() -> None:
    columns = kept_by("context_parallel", make_context(length=65_536, batch=16, num_layers=4))
    ulysses = columns.take((columns.cp > 1) & (columns.cp_method == CP_METHODS.index("ulysses")))
    assert len(ulysses) > 0
    assert np.all(8 % (ulysses.tp * ulysses.cp) == 0)
    ring = columns.take(columns.cp_method == CP_METHODS.index("ring"))
    assert ring.cp.max() == 16


@pytest.mark.parametrize(
    ("heads", "groups", "ffn", "kept"),
    [
        (32, 8, 14_336, {1, 2, 4, 8, 16}),
        # One key/value head is copied to every rank; 71 heads divide by nothing.
        (32, 1, 14_336, {1, 2, 4, 8, 16}),
        (71, 1, 18_176, {1}),
        (12, 4, 14_336, {1, 2, 4}),
        (32, 8, 1002, {1, 2}),
        # Six shared heads cannot be dealt evenly to 4 ranks.
        (12, 6, 14_336, {1, 2}),
    ],
)
def test_tensor_parallelism_divides_heads_and_width(
    heads: int, groups: int, ffn: int, kept: set[int]
) -> None:
    context = make_context(
        num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn, cluster="dgx-h100:2"
    )
    assert set(kept_by("tensor_parallel", context).tp.tolist()) == kept


def test_sequence_parallelism_divides_the_sequence() -> None:
    columns = kept_by("sequence_parallel", make_context(length=2052))
    split = columns.take(columns.sequence_parallel)
    assert set(split.tp.tolist()) == {2, 4}
    assert set(columns.tp.tolist()) == {1, 2, 4, 8, 16}


def test_the_batch_divides_into_micro_batches() -> None:
    columns = kept_by("batch", make_context(batch=24))
    assert np.all(24 % (columns.dp * columns.micro_batch_size) == 0)
    assert set(columns.dp.tolist()) == {1, 2, 4, 8}
    assert np.all(columns.dp * columns.micro_batch_size * columns.num_micro_batches == 24)


def test_interleaving_needs_even_chunks_and_whole_groups_of_micro_batches() -> None:
    columns = kept_by("interleaving", make_context(batch=24, num_layers=12))
    interleaved = columns.take(columns.schedule == SCHEDULES_KNOWN.index("interleaved_1f1b"))
    assert set(zip(interleaved.pp.tolist(), interleaved.vpp.tolist(), strict=True)) == {
        (2, 2),
        (2, 3),
        (2, 6),
        (4, 3),
        # Fourteen virtual stages: embedding and loss stand alone.
        (2, 7),
    }
    assert np.all(interleaved.num_micro_batches % interleaved.pp == 0)


def test_only_software_that_keeps_gathered_weights_shards_them_under_a_pipeline() -> None:
    strict = kept_by("sharding", make_context(software="megatron-core"))
    # Codes from 2 up are ZeRO-2, ZeRO-3 and HSDP.
    assert not np.any((strict.pp > 1) & (strict.sharding >= 2))
    loose = kept_by("sharding", make_context(software="torchtitan"))
    assert np.any((loose.pp > 1) & (loose.sharding >= 2))


@pytest.mark.parametrize("headroom", [0.0, 0.05, 0.5])
def test_memory_is_what_the_device_reports_less_the_headroom(headroom: float) -> None:
    context = make_context("llama-3-70b", "dgx-h100:1", batch=8, num_layers=8)
    limits = SearchLimits(memory_headroom=headroom)
    usable = context.gpu.memory_bytes * (1 - headroom)
    columns, kept = space(context), kept_by("memory", context, limits)
    assert len(kept) == int((peak_memory(context, columns) <= usable).sum())
    assert 0 < len(kept) < len(columns)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("tp", (2, 16)),
        ("dp", (1,)),
        ("schedule", ("gpipe", "none")),
        ("recompute", ("selective",)),
        ("sharding", ("zero3", "hsdp")),
        ("sequence_parallel", (True,)),
    ],
)
def test_user_limits_keep_exactly_the_allowed_values(key: str, values: tuple[int | str, ...]) -> None:
    context = make_context()
    limits = SearchLimits(allowed={key: values})
    kept = kept_by("user_limits", context, limits)
    # Rows that no plan can be made of (more chunks than layers) are other constraints' business.
    fits = (kept.pp * kept.vpp <= 32) & (48 % (kept.dp * kept.micro_batch_size) == 0)
    kept = kept.take(fits & (kept.recompute_layers > 0) & (kept.parameter_offload == 0))
    rows = np.random.default_rng(3).integers(0, len(kept), 2000)
    found = {getattr(plan_of_row(job_of(context), kept, int(row)), key) for row in rows}
    assert found == set(values)
