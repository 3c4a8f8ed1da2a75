"""Each target says what it cannot run, with the values and the nearest ones that would do."""

from __future__ import annotations

import dataclasses

import pytest
from export_cases import DEEPSEEK, GPT_175B, LLAMA_8B, MIXTRAL, check_refusal, make_job, make_plan

from meshwright.planner.export import EXPORTERS
from meshwright.simcore.domain.layer_groups import LayerGroup

SP = {"sequence_parallel": True}


NODES = {"num_nodes": 4}


def changed(**fields):
    return make_job(dataclasses.replace(LLAMA_8B, **fields))


MEGATRON_REFUSALS = {
    "layers that do not add up": (make_job(), make_plan(30), ["30 layers", "has 32"]),
    "more GPUs than the cluster": (make_job(), make_plan(dp=32), ["32 GPUs", "has 16"]),
    "nodes left half empty": (
        make_job(num_nodes=4, batch=12),
        make_plan(dp=12),
        ["whole nodes of 8", "8 or 16"],
    ),
    "a batch that does not divide": (make_job(batch=100), make_plan(dp=8), ["100", "96 or 104"]),
    "vocabulary over stages": (make_job(), make_plan(dp=8, vocab_parallel="vocab_1"), ["vocab_1", "'none'"]),
    "experts without experts": (make_job(), make_plan(dp=8, ep=2), ["ep 2", "mixture-of-experts"]),
    "experts that do not divide": (
        make_job(MIXTRAL),
        make_plan(dp=8, ep=3),
        ["ep 3", "num_experts 8", "2 or 4"],
    ),
    "heads that do not divide": (
        make_job(num_nodes=3),
        make_plan(tp=3, dp=8),
        ["tp 3", "heads 32", "2 or 4"],
    ),
    "a width that does not divide": (
        changed(ffn_hidden_size=14338),
        make_plan(tp=4, dp=2),
        ["tp 4", "ffn_hidden_size 14338", "use tp 2"],
    ),
    "a sequence that cp cannot cut": (make_job(length=8190), make_plan(cp=2, dp=4), ["8190", "8188 or 8192"]),
    "a sequence that sp cannot cut": (make_job(length=8190), make_plan(tp=4, dp=2, **SP), ["8188 or 8192"]),
    "gpipe": (make_job(), make_plan(pp=2, dp=8, schedule="gpipe"), ["'gpipe'", "'1f1b'"]),
    "zero bubble": (make_job(), make_plan(pp=2, dp=8, schedule="zb_h1"), ["'zb_h1'", "'1f1b'"]),
    "interleaving with a remainder": (
        make_job(batch=12),
        make_plan(pp=4, vpp=2, dp=2),
        ["multiples of pp 4", "there are 6", "8 or 16"],
    ),
    "an empty inner stage": (
        make_job(),
        make_plan(pp=4, dp=4, layers_per_stage=(16, 0, 8, 8)),
        ["virtual stage 1", "0 layers"],
    ),
    "sharded gradients in a pipeline": (
        make_job(),
        make_plan(pp=2, dp=8, sharding="zero2"),
        ["'zero2'", "pp 1"],
    ),
    "hybrid in a pipeline": (
        make_job(),
        make_plan(pp=2, dp=8, sharding="hsdp", sharding_group=4),
        ["'hsdp'", "pp 1"],
    ),
    "zero2 in groups": (
        make_job(),
        make_plan(dp=16, sharding="zero2", sharding_group=8),
        ["sharding_group 8", "16"],
    ),
    "experts in groups": (
        make_job(MIXTRAL),
        make_plan(dp=16, sharding="zero1", sharding_group=8),
        ["sharding_group 8", "16"],
    ),
    "an expert grid that misses the world": (
        make_job(MIXTRAL, num_nodes=8),
        make_plan(dp=4, ep=8, pp=4, etp=2),
        ["etp 2 x ep 8", "4 ranks", "use ep 2"],
    ),
    "experts with tp but without sp": (
        make_job(MIXTRAL),
        make_plan(tp=2, dp=8),
        ["tp 2", "sequence_parallel"],
    ),
    "fp32": (make_job(precision="fp32"), make_plan(dp=8), ["'fp32'", "'bf16'"]),
    "nvfp4": (make_job(precision="nvfp4"), make_plan(dp=8), ["'nvfp4'", "'fp8'"]),
    "fp8 on odd sizes": (
        dataclasses.replace(changed(ffn_hidden_size=14344), workload=make_job(precision="fp8").workload),
        make_plan(dp=8),
        ["ffn_hidden_size 14344", "14336 or 14352"],
    ),
    "alibi": (changed(position_embedding="alibi"), make_plan(dp=8), ["ALiBi"]),
    "positions beyond the table": (
        make_job(GPT_175B, length=4096),
        make_plan(96, dp=8),
        ["4096", "2048 learned"],
    ),
    "a parallel block": (changed(has_parallel_block=True), make_plan(dp=8), ["has_parallel_block"]),
    "four norms": (changed(norms_per_layer=4), make_plan(dp=8), ["norms_per_layer 4"]),
    "no final norm": (changed(has_final_norm=False), make_plan(dp=8), ["final norm"]),
    "layernorm without bias": (
        changed(normalization="layernorm_nobias"),
        make_plan(dp=8),
        ["layernorm_nobias"],
    ),
    "a head with bias": (changed(has_head_bias=True), make_plan(dp=8), ["LM head"]),
    "biases on the MLP only": (changed(has_mlp_bias=True), make_plan(dp=8), ["biases", "MLP True"]),
    "a window cut by cp": (
        changed(sliding_window=4096),
        make_plan(dp=8, cp=2),
        ["sliding_window 4096", "cp 2", "'ring'", "'ulysses'"],
    ),
    "too few heads to swap": (
        make_job(**NODES),
        make_plan(tp=2, cp=16, cp_method="ulysses", sequence_parallel=True),
        ["'ulysses'", "16 ranks", "8 key/value heads", "4 ranks"],
    ),
    "latent attention that gathers": (
        make_job(DEEPSEEK, length=4096),
        make_plan(61, dp=8, cp=2, cp_method="all_gather"),
        ["multi-latent", "'all_gather'", "'ring'"],
    ),
    "a hierarchy on one node": (
        make_job(),
        make_plan(dp=4, cp=4, cp_method="hierarchical"),
        ["'hierarchical'", "4 of cp 4", "'ulysses'"],
    ),
    "a method without cp": (make_job(), make_plan(dp=8, cp_method="ulysses"), ["'ulysses'", "cp 1"]),
    "a V": (
        make_job(),
        make_plan(pp=2, vpp=2, dp=8, schedule="zb_v"),
        ["'zb_v'", "V", "'interleaved_1f1b'"],
    ),
    "two models": (make_job(), make_plan(pp=2, dp=8, schedule="dualpipe"), ["'dualpipe'", "'1f1b'"]),
    "experts in chunks": (
        make_job(MIXTRAL),
        make_plan(dp=16, ep=8, expert_overlap=2),
        ["expert_overlap 2", "--overlap-moe-expert-parallel-comm"],
    ),
    "a secondary group": (
        make_job(),
        make_plan(dp=16, sharding="zero3", secondary_group=8),
        ["secondary_group 8", "hpZ", "'hsdp'"],
    ),
    "states on a drive": (
        make_job(),
        make_plan(dp=16, sharding="zero1", optimizer_offload="nvme"),
        ["'nvme'", "deepspeed"],
    ),
    "whole states on the host": (
        make_job(),
        make_plan(dp=16, optimizer_offload="cpu"),
        ["optimizer_offload 'cpu'", "'zero1'"],
    ),
    "a share of nothing": (
        make_job(),
        make_plan(dp=16, optimizer_offload_fraction=0.5),
        ["optimizer_offload_fraction 0.5", "'none'"],
    ),
    "weights on the host": (
        make_job(),
        make_plan(dp=16, sharding="zero3", parameter_offload="cpu"),
        ["parameter_offload 'cpu'", "deepspeed"],
    ),
    "activations of a pipeline on the host": (
        make_job(),
        make_plan(dp=8, pp=2, activation_offload=True),
        ["activation_offload", "pp 2", "--fine-grained-activation-offloading"],
    ),
    "modules that the model lacks": (
        make_job(),
        make_plan(dp=16, recompute="selective", recompute_modules=("layernorm", "moe", "mla_up_proj")),
        ["mla_up_proj, moe", "none"],
    ),
    "norms under delayed scaling": (
        make_job(precision="fp8"),
        make_plan(dp=16, recompute="selective", recompute_modules=("layernorm",)),
        ["layernorm", "'fp8'", "'fp8_block'"],
    ),
    "a module inside another": (
        make_job(MIXTRAL),
        make_plan(dp=16, recompute="selective", recompute_modules=("moe", "moe_act")),
        ["moe_act"],
    ),
    "more recomputed layers than there are": (
        make_job(),
        make_plan(dp=4, pp=4, recompute="full", recompute_layers=9),
        ["recompute_layers 9", "8 layers"],
    ),
    "mxfp8 before Blackwell": (
        make_job(precision="mxfp8"),
        make_plan(dp=8),
        ["'mxfp8'", "hopper", "blackwell"],
    ),
    "groups that do not share experts": (
        make_job(dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, num_expert_groups=3))),
        make_plan(dp=8),
        ["num_expert_groups 3", "num_experts 8"],
    ),
    "groups with too few experts": (
        make_job(
            dataclasses.replace(
                MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, top_k=3, num_expert_groups=4, top_k_groups=1)
            )
        ),
        make_plan(dp=8),
        ["top_k 3", "1 to 2"],
    ),
    "multi-token prediction on a table of positions": (
        make_job(dataclasses.replace(GPT_175B, num_mtp_layers=1), length=2048),
        make_plan(96, dp=8),
        ["num_mtp_layers 1", "rope"],
    ),
    "adapters": (make_job(lora_rank=8), make_plan(dp=8), ["lora_rank 8", "Megatron-Bridge"]),
    "groups of layers": (
        make_job(),
        make_plan(dp=16, layer_groups=(LayerGroup(num_layers=32, sharding="zero3"),)),
        ["layer_groups"],
    ),
    "attention sinks": (changed(has_attention_sinks=True), make_plan(dp=8), ["has_attention_sinks"]),
    "norms over all heads": (
        changed(has_qk_norm=True, is_qk_norm_per_head=False),
        make_plan(dp=8),
        ["is_qk_norm_per_head"],
    ),
    "latent attention without rope": (
        make_job(dataclasses.replace(DEEPSEEK, position_embedding="none"), length=4096),
        make_plan(61, dp=8),
        ["multi-latent", "'none'"],
    ),
}
DEEPSPEED_REFUSALS = {
    "a pipeline": (make_job(), make_plan(pp=2, dp=8), ["pp 2", "PipelineModule", "megatron"]),
    "interleaving": (make_job(), make_plan(pp=2, vpp=2, dp=8), ["vpp 2", "1f1b"]),
    "gpipe": (make_job(), make_plan(pp=2, dp=8, schedule="gpipe"), ["'gpipe'"]),
    "zero2 in a pipeline": (make_job(), make_plan(pp=2, dp=8, sharding="zero2"), ["'zero2'", "'zero1'"]),
    "sequence parallelism": (make_job(), make_plan(tp=2, dp=8, **SP), ["sequence_parallel"]),
    "a ring": (make_job(), make_plan(cp=2, dp=8), ["'ring'", "'ulysses'"]),
    "ulysses with tp": (
        make_job(),
        make_plan(cp=2, tp=2, dp=4, cp_method="ulysses"),
        ["cp 2 (Ulysses)", "tp 2"],
    ),
    "ulysses over an odd number of ranks": (
        make_job(num_nodes=3),
        make_plan(cp=3, dp=8, cp_method="ulysses"),
        ["cp 3", "heads 32", "2 or 4"],
    ),
    "a sequence that ulysses cannot cut": (
        make_job(length=8190),
        make_plan(cp=4, dp=4, cp_method="ulysses"),
        ["8190", "8188 or 8192"],
    ),
    "tp under zero3": (make_job(), make_plan(tp=2, dp=8, sharding="zero3"), ["tp 2", "'zero2'"]),
    "tp beyond the key/value heads": (
        make_job(),
        make_plan(tp=16),
        ["tp 16", "num_query_groups 8", "use tp 8"],
    ),
    "hybrid sharding": (make_job(), make_plan(dp=16, sharding="hsdp", sharding_group=8), ["MiCS", "'zero3'"]),
    "zero1 in groups": (
        make_job(),
        make_plan(dp=16, sharding="zero1", sharding_group=8),
        ["sharding_group 16"],
    ),
    "split experts": (make_job(MIXTRAL), make_plan(dp=16, ep=4, etp=2), ["etp 2", "etp 1"]),
    "tp beside whole experts": (make_job(MIXTRAL), make_plan(dp=8, tp=2), ["tp 2", "ep 2"]),
    "an expert grid that misses the world": (
        make_job(MIXTRAL, num_nodes=1),
        make_plan(dp=4, ep=8),
        ["ep 8", "4 ranks", "use ep 4"],
    ),
    "experts in chunks": (
        make_job(MIXTRAL),
        make_plan(dp=16, ep=8, expert_overlap=2),
        ["expert_overlap 2", "Tutel"],
    ),
    "experts under zero3 with ulysses": (
        make_job(MIXTRAL),
        make_plan(dp=8, cp=2, ep=8, cp_method="ulysses", sharding="zero3"),
        ["ep 8", "cp", "'zero2'"],
    ),
    "offload with tp and experts": (
        make_job(MIXTRAL),
        make_plan(dp=8, tp=2, ep=8, sharding="zero1", optimizer_offload="cpu"),
        ["ep 8 with tp 2", "optimizer_offload"],
    ),
    "a capacity": (
        make_job(MIXTRAL, expert_capacity_factor=1.5),
        make_plan(dp=16),
        ["expert_capacity_factor 1.5"],
    ),
    "a secondary group of one": (
        make_job(),
        make_plan(dp=16, sharding="zero3", secondary_group=1),
        ["secondary_group 1", "2 or more"],
    ),
    "a secondary group beside ulysses": (
        make_job(),
        make_plan(dp=8, cp=2, cp_method="ulysses", sharding="zero3", secondary_group=4),
        ["secondary_group 4", "cp 2"],
    ),
    "whole states on the host": (
        make_job(),
        make_plan(dp=16, optimizer_offload="cpu"),
        ["'cpu'", "'none'", "zero1"],
    ),
    "states on a drive without zero3": (
        make_job(),
        make_plan(dp=16, sharding="zero2", optimizer_offload="nvme"),
        ["'nvme'", "'zero3'"],
    ),
    "a share of the states without zero3": (
        make_job(),
        make_plan(dp=16, sharding="zero2", optimizer_offload="cpu", optimizer_offload_fraction=0.5),
        ["optimizer_offload_fraction 0.5", "'zero3'"],
    ),
    "weights away and states here": (
        make_job(),
        make_plan(dp=16, sharding="zero3", parameter_offload="cpu"),
        ["parameter_offload 'cpu'", "optimizer_offload"],
    ),
    "activations on the host without recompute": (
        make_job(),
        make_plan(dp=16, activation_offload=True),
        ["cpu_checkpointing", "'full'"],
    ),
    "recompute of some layers": (
        make_job(),
        make_plan(dp=16, recompute="full", recompute_layers=8),
        ["recompute_layers 8"],
    ),
    "fp8": (make_job(precision="fp8"), make_plan(dp=16), ["'fp8'", "'bf16'"]),
    "selective recompute": (make_job(), make_plan(dp=16, recompute="selective"), ["'selective'", "'full'"]),
}


@pytest.mark.parametrize("case", MEGATRON_REFUSALS)
def test_megatron_refuses(case):
    check_refusal("megatron", *MEGATRON_REFUSALS[case])


@pytest.mark.parametrize("case", DEEPSPEED_REFUSALS)
def test_deepspeed_refuses(case):
    check_refusal("deepspeed", *DEEPSPEED_REFUSALS[case])


@pytest.mark.parametrize("target", sorted(EXPORTERS))
def test_narrow_storage_is_never_dropped_without_a_word(target):
    job = dataclasses.replace(make_job(), features=("bf16_moments", "deepep", "fp8_activations"))
    reasons = " ".join(EXPORTERS[target].unsupported(job, make_plan(dp=8)))
    assert "features bf16_moments, fp8_activations" in reasons
    assert "leave them out" in reasons


@pytest.mark.parametrize("target", sorted(set(EXPORTERS) - {"torchtitan", "torchtitan-0.2"}))
def test_scales_per_row_are_torchtitans_alone(target):
    job = make_job(precision="fp8", software="torchtitan", features=("float8_rowwise",))
    reasons = " ".join(EXPORTERS[target].unsupported(job, make_plan(dp=8)))
    assert "feature float8_rowwise" in reasons
    assert "target torchtitan" in reasons


def test_every_reason_is_listed_at_once():
    job = make_job(dataclasses.replace(LLAMA_8B, position_embedding="alibi"), precision="int8", length=8191)
    reasons = EXPORTERS["megatron"].unsupported(job, make_plan(tp=2, dp=8, cp=1, **SP))
    assert len(reasons) == 3


def test_a_window_as_long_as_the_sequence_is_full_attention():
    bundle = EXPORTERS["megatron"].export(changed(sliding_window=8192), make_plan(dp=8, cp=2), "torchrun")
    assert "--window-size" not in bundle.files[1].text


def test_a_rack_wide_domain_is_launched_per_server_of_four():
    job = make_job(num_nodes=1, gpus_per_node=72, architecture="blackwell")
    launch = EXPORTERS["megatron"].export(job, make_plan(dp=32, tp=2), "torchrun").files[2].text
    assert 'NNODES="${NNODES:-16}"' in launch
    assert 'GPUS_PER_NODE="${GPUS_PER_NODE:-4}"' in launch


def test_key_value_heads_may_be_replicated_in_megatron():
    job = make_job(num_nodes=2)
    assert EXPORTERS["megatron"].unsupported(job, make_plan(tp=16, sequence_parallel=True)) == ()


def test_the_table_names_each_exporter_by_its_target():
    assert {name: exporter.target for name, exporter in EXPORTERS.items()} == {
        name: name for name in EXPORTERS
    }


def test_a_window_goes_with_exchanges_that_see_the_whole_sequence():
    for method in ("ulysses", "all_gather"):
        job, plan = changed(sliding_window=4096), make_plan(dp=8, cp=2, cp_method=method)
        assert "--window-size" in EXPORTERS["megatron"].export(job, plan, "torchrun").files[1].text
