"""No field is dropped silently: away from its default it changes the files, or the target refuses it."""

from __future__ import annotations

import dataclasses

import pytest
from export_cases import DEEPSEEK, MIXTRAL, make_job, make_plan
from export_strategies import jobs_and_plans
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.planner.export import EXPORTERS
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import ExpertRouting, TrainingWorkload

SP = {"sequence_parallel": True}
DENSE, SPARSE = make_job(num_nodes=8), make_job(MIXTRAL, num_nodes=8)

# field -> job, plan, what is changed. Both plans take the same GPUs where the field does not say otherwise.
CHANGES = {
    "dp": (DENSE, make_plan(dp=16), {"dp": 32}),
    "tp": (DENSE, make_plan(dp=16), {"tp": 2}),
    "pp": (DENSE, make_plan(dp=16), {"pp": 2, "schedule": "1f1b", "layers_per_stage": (16, 16)}),
    "vpp": (
        DENSE,
        make_plan(dp=16, pp=2),
        {"vpp": 2, "schedule": "interleaved_1f1b", "layers_per_stage": (8, 8, 8, 8)},
    ),
    "cp": (DENSE, make_plan(dp=8, sharding="zero3"), {"cp": 2}),
    "cp_method": (DENSE, make_plan(dp=8, cp=2, sharding="zero3"), {"cp_method": "all_gather"}),
    "ep": (SPARSE, make_plan(dp=16, sharding="zero2"), {"ep": 8}),
    "etp": (SPARSE, make_plan(dp=8, tp=2, ep=4, **SP, sharding="zero2"), {"etp": 2}),
    "expert_overlap": (SPARSE, make_plan(dp=16, ep=8, sharding="zero2"), {"expert_overlap": 2}),
    "sequence_parallel": (DENSE, make_plan(dp=8, tp=2, sharding="zero2"), SP),
    "micro_batch_size": (DENSE, make_plan(dp=16), {"micro_batch_size": 2}),
    "schedule": (DENSE, make_plan(dp=8, pp=2), {"schedule": "gpipe"}),
    "recompute": (DENSE, make_plan(dp=16), {"recompute": "full"}),
    "recompute_modules": (DENSE, make_plan(dp=16, recompute="selective"), {"recompute_modules": ("mlp",)}),
    "recompute_layers": (DENSE, make_plan(dp=16, recompute="full"), {"recompute_layers": 4}),
    "sharding": (DENSE, make_plan(dp=16), {"sharding": "zero2"}),
    "sharding_group": (DENSE, make_plan(dp=16, sharding="zero3"), {"sharding_group": 8}),
    "secondary_group": (DENSE, make_plan(dp=16, sharding="zero3"), {"secondary_group": 8}),
    "optimizer_offload": (DENSE, make_plan(dp=16, sharding="zero1"), {"optimizer_offload": "cpu"}),
    "optimizer_offload_fraction": (
        DENSE,
        make_plan(dp=16, sharding="zero1", optimizer_offload="cpu"),
        {"optimizer_offload_fraction": 0.5},
    ),
    "parameter_offload": (
        DENSE,
        make_plan(dp=16, sharding="zero3", optimizer_offload="cpu"),
        {"parameter_offload": "cpu"},
    ),
    "activation_offload": (DENSE, make_plan(dp=16), {"activation_offload": True}),
    "vocab_parallel": (DENSE, make_plan(dp=8, pp=2), {"vocab_parallel": "redistributed"}),
    "layers_per_stage": (DENSE, make_plan(dp=8, pp=2), {"layers_per_stage": (17, 15)}),
    "layer_groups": (
        DENSE,
        make_plan(dp=16),
        {"layer_groups": (LayerGroup(num_layers=32, recompute="full"),)},
    ),
}
PLACED = DeviceMapping(host_order=(1, 0))
CHANGES["device_mapping"] = (DENSE, make_plan(dp=16), {"device_mapping": PLACED})
EVEN = DENSE.workload.global_batch_size // (16 * make_plan(dp=16).micro_batch_size)
CHANGES["micro_batch_shares"] = (
    DENSE,
    make_plan(dp=16),
    {"micro_batch_shares": (EVEN + 1, EVEN - 1, *[EVEN] * 14)},
)
# field of the workload -> job that every target takes with make_plan(dp=16, ep=8, sharding="zero2") or without ep.
WORKLOADS = {
    "global_batch_size": {"global_batch_size": 256},
    "sequence_length": {"sequence_length": 4096},
    "precision": {"precision": "fp8"},
    "routing_imbalance": {"routing_imbalance": 1.5},
    "routing_by_ep": {"routing_by_ep": (ExpertRouting(ep=8, imbalance=1.5),)},
    "expert_capacity_factor": {"expert_capacity_factor": 1.25},
    "lora_rank": {"lora_rank": 8},
}


def exported(target, job, plan):
    """Return the files of a bundle, None where the target refuses."""
    exporter = EXPORTERS[target]
    return None if exporter.unsupported(job, plan) else exporter.export(job, plan, "torchrun").files


def test_every_field_is_here():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(ParallelPlan)}
    assert set(WORKLOADS) == {field.name for field in dataclasses.fields(TrainingWorkload)}


@pytest.mark.parametrize("target", sorted(EXPORTERS))
@pytest.mark.parametrize("field", CHANGES)
def test_a_field_of_the_plan_shows_or_is_refused(field, target):
    job, plan, changes = CHANGES[field]
    assert field in changes
    after = exported(target, job, dataclasses.replace(plan, **changes))
    assert after is None or after != exported(target, job, plan)


@pytest.mark.parametrize("target", sorted(EXPORTERS))
@pytest.mark.parametrize("field", WORKLOADS)
def test_a_field_of_the_workload_shows_or_is_refused(field, target):
    # Accelerate has no expert axis.
    job, ep = (DENSE, 1) if target == "accelerate" else (SPARSE, 8)
    plan = make_plan(dp=16, ep=ep, sharding="zero2")
    assert exported(target, job, plan) is not None
    if job.model.moe is None and field in ("routing_imbalance", "routing_by_ep", "expert_capacity_factor"):
        return
    changed = dataclasses.replace(job, workload=dataclasses.replace(job.workload, **WORKLOADS[field]))
    after = exported(target, changed, plan)
    assert after is None or after != exported(target, job, plan)


def test_each_field_shows_in_some_target():
    silent = set()
    for field, (job, plan, changes) in CHANGES.items():
        pairs = [
            (exported(target, job, plan), exported(target, job, dataclasses.replace(plan, **changes)))
            for target in EXPORTERS
        ]
        if not any(before and after and before != after for before, after in pairs):
            silent.add(field)
    # No target can run these.
    assert silent == {"expert_overlap", "layer_groups", "micro_batch_shares"}


DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ParallelPlan)
    if field.default is not dataclasses.MISSING
}


def is_inert(plan, field):
    """Return whether the value says what the default does: all of dp, all layers, nobody to share with, Megatron's choice."""
    if field == "sharding":
        return plan.dp == 1 or plan.sharding_group == 1
    if field == "recompute_modules":
        # The only target that takes modules recomputes these where none are named (--recompute-modules).
        return set(plan.recompute_modules) == {"core_attn"}
    if field == "sharding_group":
        return plan.sharding == "none" or plan.sharding_group == plan.dp
    return field == "recompute_layers" and plan.recompute_layers >= max(plan.layers_per_stage)


@settings(max_examples=400, deadline=None)
@given(st.one_of(jobs_and_plans(), jobs_and_plans(suits_deepspeed=True)))
def test_what_is_taken_away_was_in_the_files(job_and_plan):
    job, plan = job_and_plan
    for target in EXPORTERS:
        before = exported(target, job, plan)
        if before is None:
            continue
        for field, default in DEFAULTS.items():
            if getattr(plan, field) == default or is_inert(plan, field):
                continue
            try:
                without = dataclasses.replace(plan, **{field: default})
            except SpecError:
                continue
            assert exported(target, job, without) != before, (target, field)


def test_expert_fields_of_a_model_show():
    plan = make_plan(61, dp=16, tp=2, ep=8, pp=4, **SP, sharding="zero1")
    job = make_job(DEEPSEEK, num_nodes=16, length=4096)
    before = exported("megatron", job, plan)
    for changes in ({"num_expert_groups": 4}, {"top_k_groups": 2}, {"shared_ffn_hidden_size": 4096}):
        moe = dataclasses.replace(DEEPSEEK.moe, **changes)
        changed = dataclasses.replace(job, model=dataclasses.replace(DEEPSEEK, moe=moe))
        assert exported("megatron", changed, plan) not in (None, before)
    without = dataclasses.replace(job, model=dataclasses.replace(DEEPSEEK, num_mtp_layers=0))
    assert exported("megatron", without, plan) not in (None, before)
