from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from meshwright.hardware_specs.catalog import load_node
from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.profiler.measured_setup import (
    DEFAULT_VOCAB_SIZE,
    IncompleteRowError,
    _redistributed_layers,
    measured_setup,
    unknown_features,
)
from meshwright.simcore.domain.model_catalog import load_model

MakeRun = Callable[..., MeasuredRun]


def refusal(run: MeasuredRun) -> str:
    with pytest.raises(IncompleteRowError) as caught:
        measured_setup(run)
    return str(caught.value)


def test_a_complete_row_is_taken_at_its_word(make_run: MakeRun) -> None:
    setup = measured_setup(make_run())
    model, plan, workload = setup.job.model, setup.plan, setup.job.workload
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (32, 4096, 14_336)
    assert (model.num_attention_heads, model.num_query_groups, model.vocab_size) == (32, 8, 128_256)
    assert model.is_gated_mlp
    assert not model.has_tied_embeddings
    assert (plan.dp, plan.tp, plan.pp, plan.micro_batch_size) == (16, 1, 1, 1)
    assert (plan.sharding, plan.recompute, plan.schedule) == ("zero3", "full", "none")
    assert (workload.global_batch_size, workload.sequence_length, workload.precision) == (64, 8192, "bf16")
    assert setup.job.software == "torchtitan"
    assert setup.job.cluster.num_gpus == 16
    assert setup.remarks == ()


@pytest.mark.parametrize(
    "column", ["n_layers", "hidden", "ffn_hidden", "n_heads", "seq_len", "n_gpus", "tp", "pp", "micro_batch"]
)
def test_what_has_no_default_is_named(make_run: MakeRun, column: str) -> None:
    assert refusal(make_run(**{column: ""})) == f"{column} is not stated"


@pytest.mark.parametrize(("column", "text"), [("global_batch", ""), ("recompute", ""), ("sharding", "")])
def test_recompute_sharding_and_batch_are_never_guessed(make_run: MakeRun, column: str, text: str) -> None:
    assert refusal(make_run(**{column: text})) == f"{column} is not stated"


def test_one_replica_needs_no_sharding(make_run: MakeRun) -> None:
    setup = measured_setup(make_run(sharding="", n_gpus=8, tp=8, sequence_parallel="y"))
    assert setup.plan.sharding == "none"
    assert setup.plan.sequence_parallel
    # A stated one has nothing to shard over.
    assert measured_setup(make_run(sharding="zero1", n_gpus=8, tp=8)).plan.sharding == "none"


@pytest.mark.parametrize(
    "column", ["n_gpus", "tp", "micro_batch", "global_batch", "vocab", "n_kv_heads", "cp"]
)
@pytest.mark.parametrize("text", ["many", "0", "-8", "2.5", "8x"])
def test_a_number_that_cannot_be_is_named(make_run: MakeRun, column: str, text: str) -> None:
    message = refusal(make_run(**{column: text}))
    assert message.startswith(f"{column}: '{text}' is not a whole number")


def test_whole_numbers_may_be_written_as_decimals(make_run: MakeRun) -> None:
    assert measured_setup(make_run(n_gpus="16.0", seq_len="8.192e3")).job.workload.sequence_length == 8192


@pytest.mark.parametrize("column", ["gated_mlp", "tied_embeddings", "sequence_parallel"])
def test_a_flag_is_y_or_n(make_run: MakeRun, column: str) -> None:
    assert refusal(make_run(**{column: "yes"})) == f"{column}: 'yes' is neither y nor n"


def test_replicas_follow_from_the_gpus(make_run: MakeRun) -> None:
    assert measured_setup(make_run(tp=2, pp=2, vpp=1, cp=2, n_gpus=32)).plan.dp == 4
    assert refusal(make_run(tp=3)) == "tp x pp x cp = 3 x 1 x 1 does not divide 16 GPUs"
    assert refusal(make_run(dp=8)) == "tp x pp x cp x dp = 8, but the row says 16 GPUs"


def test_a_batch_that_does_not_divide_is_named(make_run: MakeRun) -> None:
    assert "global_batch_size 60 is not a multiple of dp x micro_batch_size" in refusal(
        make_run(global_batch=60)
    )


@pytest.mark.parametrize(
    ("schedule", "vpp", "expected"),
    [
        ("", 1, ("1f1b", 1)),
        ("none", 1, ("1f1b", 1)),
        ("", 2, ("interleaved_1f1b", 2)),
        ("1f1b", "", ("1f1b", 1)),
        ("gpipe", "", ("gpipe", 1)),
        ("zb_h1", 1, ("zb_h1", 1)),
        ("interleaved_1f1b", 4, ("interleaved_1f1b", 4)),
        ("interleaved_1f1b", 1, ("1f1b", 1)),
    ],
)
def test_a_blank_schedule_follows_from_the_chunks(
    make_run: MakeRun, schedule: str, vpp: int | str, expected: tuple[str, int]
) -> None:
    plan = measured_setup(make_run(pp=2, schedule=schedule, vpp=vpp)).plan
    assert (plan.schedule, plan.vpp) == expected


@pytest.mark.parametrize("schedule", ["", "interleaved_1f1b"])
def test_chunks_are_never_guessed(make_run: MakeRun, schedule: str) -> None:
    assert "vpp is not stated" in refusal(make_run(pp=2, schedule=schedule))


def test_without_a_pipeline_schedule_and_chunks_do_not_matter(make_run: MakeRun) -> None:
    plan = measured_setup(make_run(pp=1, vpp=4, schedule="1f1b")).plan
    assert (plan.schedule, plan.vpp) == ("none", 1)


def test_embedding_and_loss_count_as_a_layer_where_layers_do_not_divide(make_run: MakeRun) -> None:
    layers = measured_setup(make_run(n_layers=126, pp=8, n_gpus=64, schedule="1f1b")).plan.layers_per_stage
    assert layers == (15, 16, 16, 16, 16, 16, 16, 15)


def test_a_blank_sharding_group_is_all_of_dp(make_run: MakeRun) -> None:
    assert measured_setup(make_run(sharding="hsdp")).plan.sharding_group is None
    assert measured_setup(make_run(sharding="hsdp", sharding_group=8)).plan.sharding_group == 8
    assert "sharding_group 3 must divide dp 16" in refusal(make_run(sharding="hsdp", sharding_group=3))


def test_dimensions_of_the_row_win_over_the_preset(make_run: MakeRun) -> None:
    preset = load_model("llama-3-8b")
    model = measured_setup(make_run(model="Llama-3-8B", n_layers=16, vocab=32_000)).job.model
    assert (model.num_layers, model.vocab_size) == (16, 32_000)
    assert model.position_embedding == preset.position_embedding


def test_what_the_row_does_not_state_comes_from_the_preset(make_run: MakeRun) -> None:
    names = (
        "n_layers",
        "hidden",
        "ffn_hidden",
        "gated_mlp",
        "n_heads",
        "n_kv_heads",
        "vocab",
        "tied_embeddings",
    )
    model = measured_setup(make_run(model="gemma-2-9b", **dict.fromkeys(names, ""))).job.model
    preset = load_model("gemma-2-9b")
    assert model.head_dim == preset.head_dim == 256
    assert (model.num_layers, model.vocab_size) == (preset.num_layers, preset.vocab_size)
    assert (model.sliding_window, model.has_tied_embeddings) == (preset.sliding_window, True)


def test_a_blank_head_size_is_an_even_share_unless_the_preset_has_that_shape(make_run: MakeRun) -> None:
    assert measured_setup(make_run()).job.model.head_dim == 128
    assert measured_setup(make_run(head_dim=96)).job.model.head_dim == 96
    other = {"hidden": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 8, "ffn_hidden": 16_384}
    assert measured_setup(make_run(model="gemma-2-9b", **other)).job.model.head_dim == 128


def test_blank_key_value_heads_are_all_heads(make_run: MakeRun) -> None:
    assert measured_setup(make_run(n_kv_heads="")).job.model.num_query_groups == 32


def test_a_blank_vocabulary_is_assumed_and_said(make_run: MakeRun) -> None:
    setup = measured_setup(make_run(vocab=""))
    assert setup.job.model.vocab_size == DEFAULT_VOCAB_SIZE == 50_304
    assert setup.remarks == ("vocab 50304 assumed",)
    preset = measured_setup(make_run(model="llama-3-8b", vocab=""))
    assert preset.job.model.vocab_size == 128_256
    assert preset.remarks == ()


@pytest.mark.parametrize("is_gated", [True, False])
def test_an_unnamed_model_follows_the_recipe_of_its_mlp(make_run: MakeRun, is_gated: bool) -> None:
    model = measured_setup(make_run(gated_mlp="y" if is_gated else "n", tied_embeddings="")).job.model
    recipe = load_model("llama-2-7b" if is_gated else "gpt3-175b")
    for field in (
        "normalization",
        "position_embedding",
        "has_mlp_bias",
        "has_qkv_bias",
        "has_tied_embeddings",
    ):
        assert getattr(model, field) == getattr(recipe, field), field


def test_blank_precision_is_bf16(make_run: MakeRun) -> None:
    assert measured_setup(make_run(precision="")).job.workload.precision == "bf16"


def test_a_bare_gpu_means_its_usual_node(make_run: MakeRun) -> None:
    cluster = measured_setup(make_run()).job.cluster
    assert cluster.node == load_node("dgx-h100")
    assert cluster.num_nodes == 2
    half = measured_setup(make_run(gpus_per_node=4)).job.cluster
    assert (half.node.num_gpus, half.num_nodes) == (4, 4)
    # NICs stay one share per GPU.
    assert half.node.nic_bandwidth_per_gpu == cluster.node.nic_bandwidth_per_gpu
    rack = measured_setup(make_run(gpu="GB200", gpus_per_node=4)).job.cluster
    assert rack.node.num_gpus == 72


def test_the_bandwidth_between_nodes_is_that_of_the_row(make_run: MakeRun) -> None:
    node = measured_setup(make_run(internode_gbit_per_node=800)).job.cluster.node
    assert node.num_nics * node.nic.bandwidth_bytes_per_second == 800e9 / 8
    assert node.nic_bandwidth_per_gpu == 100e9 / 8


def test_a_named_cluster_wins(make_run: MakeRun) -> None:
    cluster = measured_setup(make_run(cluster="aws-p5:2", gpus_per_node=4)).job.cluster
    assert cluster.node == load_node("aws-p5")
    assert "unknown node 'aws-p55'" in refusal(make_run(cluster="aws-p55:2"))


@pytest.mark.parametrize(
    ("name", "lender"),
    [
        ("", "megatron-core"),
        ("somebodys-fork", "megatron-core"),
        ("nemo", "megatron-core"),
        ("megatron-2022", "megatron-2021"),
        ("megatron-deepspeed-2023", "megatron-deepspeed-2022"),
    ],
)
def test_software_without_a_generation_borrows_one_and_says_so(
    make_run: MakeRun, name: str, lender: str
) -> None:
    setup = measured_setup(make_run(software=name))
    assert setup.job.software == lender
    assert setup.remarks == (f"software '{name or 'blank'}' borrows the overheads of {lender}",)


@pytest.mark.parametrize(
    ("software", "flash", "kernel"),
    [
        ("torchtitan", "", None),
        ("torchtitan", "y", None),
        ("torchtitan", "n", "unfused"),
        ("megatron-2021", "", None),
        ("megatron-2021", "y", "flash_2"),
        ("megatron-core", "n", "unfused"),
    ],
)
def test_flash_attention_changes_only_what_the_software_does_otherwise(
    make_run: MakeRun, software: str, flash: str, kernel: str | None
) -> None:
    assert measured_setup(make_run(software=software, flash_attention=flash)).attention_kernel == kernel


def test_features_are_switches_and_unknown_ones_are_listed_once(make_run: MakeRun) -> None:
    run = make_run(features="eager;async_tp;balanced_routing;parallel_block")
    setup = measured_setup(run)
    assert setup.features == {"eager", "async_tp"}
    assert setup.job.model.has_parallel_block
    assert unknown_features((run, run, make_run(features="zesty;compile"))) == ("zesty",)


def test_a_torchtitan_local_batch_runs_as_one_micro_batch_per_stage(make_run: MakeRun) -> None:
    # 16 GPUs in 4 stages: 4 replicas, each with a local batch of 16.
    row = {"pp": 4, "schedule": "1f1b", "micro_batch": 16, "global_batch": 64}
    setup = measured_setup(make_run(**row))
    assert setup.plan.micro_batch_size == 4
    assert setup.plan.num_micro_batches(64) == 4
    assert setup.remarks == ("local batch 16 run as 4 micro-batches",)
    other = measured_setup(make_run(**row, software="megatron-core"))
    assert other.plan.micro_batch_size == 16


def test_redistribution_moves_layers_from_the_last_stage_to_the_middle(make_run: MakeRun) -> None:
    row = {"n_gpus": 8, "pp": 8, "schedule": "1f1b", "vocab": 128_000, "gated_mlp": "n", "hidden": 3072}
    row |= {"ffn_hidden": 12_288, "n_heads": 24, "n_kv_heads": 24}
    layers = measured_setup(make_run(**row, vocab_parallel="redistributed")).plan.layers_per_stage
    even = measured_setup(make_run(**row)).plan.layers_per_stage
    assert even == (4,) * 8
    assert sum(layers) == 32
    assert layers[0] == 4
    assert layers[-1] < 4
    assert max(layers[1:-1]) == 5
    # The artifact's own file, stage by stage.
    model = replace(
        load_model("gpt3-175b"), num_layers=32, hidden_size=3072, ffn_hidden_size=12288,
        num_attention_heads=24, num_query_groups=24, vocab_size=256_000,
    )  # fmt: skip
    assert _redistributed_layers(model, 8) == (4, 4, 4, 5, 5, 5, 5, 0)


def test_experts_come_from_the_row_then_from_the_preset(make_run: MakeRun) -> None:
    named = measured_setup(make_run(n_experts=8, topk=2, moe_ffn=4096, ep=2))
    moe = named.job.model.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.moe_ffn_hidden_size, named.plan.ep) == (8, 2, 4096, 2)
    preset = load_model("mixtral-8x7b")
    cells = {
        "n_layers": 32,
        "hidden": 4096,
        "ffn_hidden": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab": 32000,
    }
    of_preset = measured_setup(make_run(model="mixtral-8x7b", ep=8, **cells)).job.model
    assert of_preset.moe == preset.moe


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"n_experts": 8}, "topk is not stated"),
        ({"n_experts": 8, "topk": 2}, "moe_ffn is not stated"),
        ({"gpu": "H100-79GB"}, "unknown GPU 'H100-79GB'"),
        ({"gpu": ""}, "unknown GPU ''"),
        ({"sharding": "fsdp"}, "plan.sharding: unknown value 'fsdp'"),
        ({"recompute": "some"}, "plan.recompute: unknown value 'some'"),
        ({"precision": "fp7"}, "unknown precision 'fp7'"),
        ({"pp": 2, "schedule": "1f2b"}, "plan.schedule: unknown value '1f2b'; did you mean '1f1b'"),
        ({"pp": 2, "vpp": 2, "schedule": "gpipe"}, "does not go with vpp 2"),
        ({"n_kv_heads": 7}, "num_attention_heads 32 must be a multiple"),
        ({"n_layers": 1, "pp": 2, "schedule": "1f1b"}, "1 layers cannot fill 2 virtual stages"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_its_reason(
    make_run: MakeRun, cells: dict[str, object], message: str
) -> None:
    assert message in refusal(make_run(**cells))
