"""Real clients accept every exported plan: megatron-core, DeepSpeed and Accelerate, in a process of their own each."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from conformance_questions import CLIENTS, MEGATRON_GROUPS, TIER_1
from conformance_report import absent, exported_plans, row

from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.rank_groups import EXPERT_GROUPS, rank_groups


def checked_row(target, client, more):
    """Return the verdicts of a client that accepts all exports, and what it said of the questions added."""
    reason = absent(client, {})
    if reason is not None:
        pytest.skip(f"{reason}; install the extra 'conformance'")
    found = row(target, client, {}, more)
    assert [verdict for verdict in found.exports if verdict.error is not None] == []
    assert len(found.exports) >= 40
    assert found.missed == ()
    # The client looks at what it is given: some of what is broken it finds too.
    assert 0 < found.num_refused_by_client < len(found.asked)
    return found, [answer["error"] for answer in found.answers[len(found.exports) :]]


def test_every_target_has_a_client_and_three_are_asked_here():
    assert sorted(client for clients in CLIENTS.values() for client in clients if client in TIER_1) == sorted(
        TIER_1
    )


def test_deepspeed_accepts_every_export_in_the_world_of_its_plan():
    """Without a process group it would count one rank: refuse most of these, and believe a batch of its own."""
    first = next(item for item in exported_plans("deepspeed") if item.plan.dp > 1 and item.plan.tp == 1)
    index = exported_plans("deepspeed").index(first)

    def more(questions):
        wrong_batch, wrong_world, wrong_key = (copy.deepcopy(questions[index]) for _ in range(3))
        wrong_batch["config"]["train_batch_size"] += 1
        wrong_world["world"] = 1
        wrong_world["config"].pop("data_parallel_size", None)
        wrong_key["config"]["zero_optimization"]["stages"] = 3
        return [wrong_batch, wrong_world, wrong_key]

    _, (batch, world, key) = checked_row("deepspeed", "deepspeed", more)
    assert "train_batch_size" in batch
    assert "train_batch_size" in world
    assert "stages" in key


def test_accelerate_accepts_every_export_and_places_ranks_as_the_plan_does():
    def more(questions):
        path = Path(questions[0]["path"])
        other = path.with_name("other.yaml")
        other.write_text(path.read_text() + "unknown_key: 1\n")
        return [questions[0] | {"path": str(other)}, questions[0] | {"world": 10_000}]

    found, (key, world) = checked_row("accelerate", "accelerate", more)
    assert "unknown_key" in key
    assert "num_processes" in world
    for item, answer in zip(exported_plans("accelerate"), found.answers, strict=False):
        if not answer["mesh"]:
            assert item.plan.sharding == "none"
            continue
        names, shape, ranks = answer["mesh"]
        sizes = dict(zip(names, shape, strict=True))
        assert names == [name for name in ("dp_replicate", "dp_shard", "cp", "tp") if name in sizes]
        assert sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1) == item.plan.dp
        assert (sizes.get("cp", 1), sizes.get("tp", 1)) == (item.plan.cp, item.plan.tp)
        assert ranks == list(range(item.plan.num_gpus))


def test_megatron_core_accepts_every_export_and_groups_ranks_as_the_plan_does():
    def more(questions):
        unknown, heads = copy.deepcopy(questions[0]), copy.deepcopy(questions[0])
        unknown["arguments"] += ["--num-layers-in-the-middle", "4"]
        heads["arguments"] += ["--num-attention-heads", "7", "--tensor-model-parallel-size", "2"]
        return [unknown, heads]

    found, (unknown, heads) = checked_row("megatron", "megatron_core", more)
    assert "num_layers_in_the_middle" in unknown
    assert "num_attention_heads (7)" in heads
    num_layouts = 0
    for item, answer in zip(exported_plans("megatron"), found.answers, strict=False):
        order = RANK_ORDERS[0] if item.plan.device_mapping is None else item.plan.device_mapping.rank_order
        for ours, theirs in MEGATRON_GROUPS.items():
            # Without experts Megatron lays out a grid of them all the same, which nothing uses.
            if theirs in answer["created"] and (item.job.model.moe is not None or ours not in EXPERT_GROUPS):
                groups = rank_groups(item.plan, ours, order).tolist()
                assert sorted(groups) == sorted(answer["created"][theirs]), (item.name, ours)
                num_layouts += ours == "tp"
    assert num_layouts >= 80
