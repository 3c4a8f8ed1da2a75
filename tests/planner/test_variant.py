"""Forced fields: what they say, and how far the rest of a plan follows."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.variant import VARIANT_FIELDS, force_fields, parse_fields
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers

MODEL = load_model("llama-3-8b")
CLUSTER = resolve_cluster("dgx-h100:2")


def make_plan(**changes: object) -> ParallelPlan:
    pp, vpp = int(str(changes.get("pp", 2))), int(str(changes.get("vpp", 1)))
    defaults: dict[str, object] = {
        "dp": 4,
        "tp": 2,
        "pp": 2,
        "micro_batch_size": 1,
        "schedule": "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b",
        "sharding": "zero1",
        "layers_per_stage": partition_layers(MODEL.num_layers, pp * vpp),
    }
    return ParallelPlan(**(defaults | changes))  # type: ignore[arg-type]  # keywords are checked by the class


def force(plan: ParallelPlan, text: str) -> ParallelPlan:
    return force_fields(MODEL, CLUSTER, plan, parse_fields(text))


def test_fields_are_read_by_their_kind():
    assert parse_fields(
        " tp = 8, sequence_parallel=yes,recompute=selective,recompute_modules=mlp+moe,optimizer_offload_fraction=0.5"
    ) == {
        "tp": 8,
        "sequence_parallel": True,
        "recompute": "selective",
        "recompute_modules": ("mlp", "moe"),
        "optimizer_offload_fraction": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp", "'tp': write field=value"),
        ("tp=8,,pp=2", "'': write field=value"),
        ("tp=", "'tp=': write field=value"),
        ("tpp=8", "unknown plan field 'tpp'; did you mean 'tp'?"),
        ("layers_per_stage=8", "unknown plan field 'layers_per_stage'"),
        ("tp=8,tp=4", "tp is given twice"),
        ("tp=0", "tp: expected a whole number above zero, not '0'"),
        ("tp=two", "tp: expected a whole number above zero, not 'two'"),
        ("tp=-8", "not '-8'"),
        ("sequence_parallel=maybe", "sequence_parallel: expected yes or no"),
        ("sharding=zero4", "sharding: unknown value 'zero4'; did you mean 'zero"),
        ("optimizer_offload_fraction=half", "expected a number from 0 to 1"),
    ],
)
def test_a_mistake_in_a_field_is_named(text, says):
    with pytest.raises(SpecError) as caught:
        parse_fields(text)
    assert says in str(caught.value)


def test_every_field_of_a_plan_can_be_forced_but_its_layers_and_places():
    of_plan = set(ParallelPlan.__slots__)
    assert of_plan - set(VARIANT_FIELDS) == {
        "layers_per_stage",
        "layer_groups",
        "device_mapping",
        "micro_batch_shares",
    }
    assert set(VARIANT_FIELDS) <= of_plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp=4", {"tp": 4, "dp": 2, "pp": 2}),
        ("tp=8,pp=1", {"tp": 8, "pp": 1, "dp": 2, "schedule": "none", "layers_per_stage": (32,)}),
        ("pp=4", {"pp": 4, "dp": 2, "schedule": "1f1b", "layers_per_stage": (8,) * 4}),
        ("vpp=2", {"vpp": 2, "schedule": "interleaved_1f1b", "layers_per_stage": (8,) * 4}),
        ("schedule=zb_h1", {"schedule": "zb_h1", "vpp": 1}),
        ("schedule=zb_v", {"schedule": "zb_v", "vpp": 2, "layers_per_stage": (8,) * 4}),
        ("schedule=interleaved_1f1b", {"vpp": 2}),
        ("dp=2", {"dp": 2, "tp": 2, "pp": 2}),
        ("cp=2", {"cp": 2, "dp": 2}),
        ("tp=8", {"dp": 1, "sharding": "none"}),
        ("tp=1", {"dp": 8, "sharding": "zero1"}),
        ("micro_batch_size=4", {"micro_batch_size": 4, "dp": 4, "layers_per_stage": (16, 16)}),
    ],
)
def test_the_rest_follows_what_is_forced(text, expected):
    variant = force(make_plan(), text)
    assert {name: getattr(variant, name) for name in expected} == expected


def test_unforced_fields_stay():
    plan = make_plan(recompute="full", recompute_layers=4, micro_batch_size=2)
    assert force(plan, "tp=4") == make_plan(
        tp=4, dp=2, recompute="full", recompute_layers=4, micro_batch_size=2
    )


def test_an_interleaved_plan_keeps_its_chunks_and_loses_them_with_its_pipeline():
    plan = make_plan(vpp=2)
    assert force(plan, "pp=4").vpp == 2
    assert force(plan, "pp=4").schedule == "interleaved_1f1b"
    assert (force(plan, "pp=1").vpp, force(plan, "pp=1").schedule) == (1, "none")
    assert force(plan, "vpp=1").schedule == "1f1b"
    assert force(plan, "schedule=1f1b").vpp == 1


def test_a_zero_bubble_schedule_stays_while_there_are_stages():
    plan = make_plan(schedule="zb_h1")
    assert force(plan, "pp=4").schedule == "zb_h1"
    assert force(plan, "vpp=2").schedule == "interleaved_1f1b"
    assert force(plan, "pp=1").schedule == "none"


def test_what_needs_tensor_parallelism_or_a_group_ends_with_it():
    plan = make_plan(pp=1, dp=8, sequence_parallel=True, sharding="hsdp", sharding_group=4)
    assert not force(plan, "tp=1").sequence_parallel
    assert force(plan, "tp=1").sharding_group == 4
    assert force(plan, "tp=8").sharding_group is None


def test_details_of_recompute_and_sharding_end_with_them():
    plan = make_plan(pp=1, dp=8, sharding="zero3", secondary_group=8, parameter_offload="cpu")
    variant = force(plan, "sharding=zero1")
    assert (variant.secondary_group, variant.parameter_offload) == (None, "none")
    assert force(make_plan(recompute="full", recompute_layers=2), "recompute=none").recompute_layers is None


def test_a_layer_wise_plan_becomes_uniform():
    groups = (
        LayerGroup(num_layers=16, tp=2, sharding="zero1"),
        LayerGroup(num_layers=16, tp=2, sharding="zero1", recompute="full"),
    )
    plan = make_plan(layer_groups=groups)
    assert force(plan, "tp=4").layer_groups == ()
    assert force(plan, "schedule=gpipe").layer_groups == groups


def test_layers_that_cannot_be_spread_are_left_to_the_pipeline_constraint():
    variant = force(make_plan(), "pp=8,vpp=5,tp=1")
    assert variant.layers_per_stage == (0,) * 40


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=3", "tp x cp x pp = 6 does not divide the plan's 16 GPUs"),
        ("tp=16,pp=2", "= 32 does not divide the plan's 16 GPUs"),
        ("dp=8", "tp x cp x pp x dp = 4 x 8 = 32 GPUs, but the cluster has 16"),
        ("tp=1,sequence_parallel=yes", "sequence_parallel needs tp > 1"),
        ("pp=1,vpp=2", "vpp > 1 needs pp > 1"),
        ("schedule=none", "'none' does not go with pp 2"),
        ("schedule=1f1b,vpp=2", "'1f1b' does not go with vpp 2"),
        ("recompute_modules=mlp", "goes with recompute 'selective'"),
        ("recompute=selective,recompute_modules=mpl", "unknown module 'mpl'"),
        ("optimizer_offload_fraction=2", "must lie in 0..1"),
        ("sharding_group=3", "must divide dp 4"),
    ],
)
def test_a_contradiction_is_an_error(text, says):
    with pytest.raises(SpecError) as caught:
        force(make_plan(), text)
    assert says in str(caught.value)
