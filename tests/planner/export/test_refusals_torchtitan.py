"""What torchtitan cannot run, in both releases or in one of them."""

from __future__ import annotations

import dataclasses

import pytest
from export_cases import DEEPSEEK, LLAMA_8B, MIXTRAL, check_refusal, make_job, make_plan

from meshwright.planner.export import EXPORTERS

BOTH = {
    "heads that do not divide": (
        make_job(),
        make_plan(tp=16, sequence_parallel=True),
        ["tp 16", "num_query_groups 8"],
    ),
    "a sequence that does not split": (
        make_job(length=8188),
        make_plan(dp=4, tp=8, sequence_parallel=True, sharding="zero3"),
        ["8188", "8184 or 8192"],
    ),
    "a handmade schedule of two chunks": (
        make_job(),
        make_plan(dp=8, pp=2, vpp=2, schedule="zb_h2"),
        ["'zb_h2'", "has vpp 1"],
    ),
    "a V of one chunk, as a table": (
        make_job(),
        make_plan(dp=8, pp=2, schedule="v_min"),
        ["'v_min'", "has vpp 2"],
    ),
    "two models": (make_job(), make_plan(dp=8, pp=2, schedule="dualpipe"), ["'dualpipe'", "'dualpipe_v'"]),
    "a V of one chunk": (make_job(), make_plan(dp=8, pp=2, schedule="zb_v"), ["'zb_v'", "vpp 2"]),
    "too few micro-batches": (
        make_job(batch=16),
        make_plan(dp=4, pp=4, micro_batch_size=2),
        ["'1f1b'", "4 micro-batches or more", "there are 2", "global_batch_size 32"],
    ),
    "too few micro-batches for both directions": (
        make_job(batch=24),
        make_plan(dp=4, pp=4, vpp=2, schedule="dualpipe_v"),
        ["'dualpipe_v'", "8 micro-batches or more", "there are 6"],
    ),
    "rounds of unequal size": (
        make_job(batch=36),
        make_plan(dp=4, pp=4, vpp=2),
        ["'interleaved_1f1b'", "9 micro-batches", "32 or 48"],
    ),
    "an empty inner stage": (
        make_job(),
        make_plan(pp=4, dp=4, layers_per_stage=(16, 0, 8, 8)),
        ["virtual stage 1", "0 layers"],
    ),
    "tied embeddings in a pipeline": (
        make_job(dataclasses.replace(LLAMA_8B, has_tied_embeddings=True)),
        make_plan(dp=8, pp=2),
        ["has_tied_embeddings", "pp 2"],
    ),
    "zero1": (make_job(), make_plan(dp=16, sharding="zero1"), ["'zero1'", "'zero2'"]),
    "cp without sharding": (
        make_job(),
        make_plan(cp=2, cp_method="all_gather"),
        ["cp 2", "'zero3'", "'none'"],
    ),
    "a secondary group": (
        make_job(),
        make_plan(dp=16, sharding="zero3", secondary_group=8),
        ["secondary_group 8", "'hsdp'"],
    ),
    "experts across replicas": (
        make_job(MIXTRAL),
        make_plan(dp=16, ep=8, sharding="hsdp", sharding_group=4),
        ["ep 8", "4 ranks", "use ep 4"],
    ),
    "whole experts under tp": (
        make_job(MIXTRAL),
        make_plan(dp=8, tp=2, sequence_parallel=True, sharding="zero3"),
        ["etp 1 with ep 1", "etp 2"],
    ),
    "experts in chunks": (
        make_job(MIXTRAL),
        make_plan(dp=16, ep=8, sharding="zero3", expert_overlap=2),
        ["expert_overlap 2"],
    ),
    "a capacity": (
        make_job(MIXTRAL, expert_capacity_factor=1.5),
        make_plan(dp=16, ep=8, sharding="zero3"),
        ["expert_capacity_factor 1.5"],
    ),
    "named modules": (
        make_job(),
        make_plan(dp=16, sharding="zero3", recompute="selective", recompute_modules=("mlp",)),
        ["recompute_modules mlp"],
    ),
    "some layers": (
        make_job(),
        make_plan(dp=16, sharding="zero3", recompute="full", recompute_layers=8),
        ["recompute_layers 8"],
    ),
    "a drive": (
        make_job(),
        make_plan(dp=16, sharding="zero3", parameter_offload="nvme", optimizer_offload="nvme"),
        ["'nvme'", "deepspeed"],
    ),
    "states away and weights here": (
        make_job(),
        make_plan(dp=16, sharding="zero3", optimizer_offload="cpu"),
        ["optimizer_offload 'cpu'", "enable_cpu_offload"],
    ),
    "activations away": (
        make_job(),
        make_plan(dp=16, sharding="zero3", activation_offload=True),
        ["activation_offload"],
    ),
    "fp16": (make_job(precision="fp16"), make_plan(dp=16, sharding="zero3"), ["'fp16'", "'bf16'"]),
    "blocks of fp8": (
        make_job(precision="fp8_block"),
        make_plan(dp=16, sharding="zero3"),
        ["'fp8_block'", "'fp8'"],
    ),
    "vocabulary over stages": (
        make_job(),
        make_plan(dp=8, pp=2, vocab_parallel="interlaced"),
        ["'interlaced'", "'redistributed'"],
    ),
}
ONLY_0_3 = {
    "one scale per tensor": (
        make_job(precision="fp8", software="torchtitan"),
        make_plan(dp=16, sharding="zero3"),
        ["one scale per row", "float8_rowwise", "torchtitan-0.2"],
    ),
    "a ring": (make_job(), make_plan(dp=8, cp=2, sharding="zero3"), ["'ring'", "'all_gather'"]),
    "split experts": (
        make_job(MIXTRAL),
        make_plan(dp=8, tp=2, ep=4, etp=2, sequence_parallel=True, sharding="zero3"),
        ["etp 2 with ep 4", "etp 1"],
    ),
    "overlapped experts": (
        make_job(MIXTRAL),
        make_plan(dp=8, pp=2, vpp=2, ep=4, schedule="dualpipe_v", sharding="zero3"),
        ["'dualpipe_v'", "ep 4", "torchtitan-0.2"],
    ),
    "positions beyond rope": (
        make_job(length=262144),
        make_plan(dp=16, sharding="zero3"),
        ["sequence_length 262144", "131072"],
    ),
    "multi-token prediction of a family without": (
        make_job(dataclasses.replace(LLAMA_8B, num_mtp_layers=1)),
        make_plan(dp=16, sharding="zero3"),
        ["num_mtp_layers 1", "llama3"],
    ),
    "multi-token prediction in a pipeline": (
        make_job(DEEPSEEK, length=4096),
        make_plan(61, dp=8, pp=2, sharding="zero3"),
        ["num_mtp_layers 1", "pp 2"],
    ),
    "adapters of experts": (
        make_job(MIXTRAL, lora_rank=8),
        make_plan(dp=16, ep=8, sharding="zero3"),
        ["lora_rank 8", "experts"],
    ),
}
ONLY_0_2 = {
    "ulysses": (
        make_job(),
        make_plan(dp=8, cp=2, cp_method="ulysses", sharding="zero3"),
        ["'ulysses'", "'ring' or 'all_gather'"],
    ),
    "a ring of flex attention": (
        make_job(dataclasses.replace(DEEPSEEK, num_mtp_layers=0), length=4096),
        make_plan(61, dp=8, cp=2, sharding="zero3"),
        ["cp 2", "deepseek_v3"],
    ),
    "tp alone": (make_job(), make_plan(dp=8, tp=2, sharding="zero3"), ["tp 2", "sequence_parallel"]),
    "replicas with another axis": (
        make_job(),
        make_plan(dp=8, pp=2),
        ["'none'", "DDP", "'zero2'"],
    ),
    "experts split by half of tp": (
        make_job(MIXTRAL),
        make_plan(dp=4, tp=4, ep=4, etp=2, sequence_parallel=True, sharding="zero3"),
        ["etp 2", "tp 4"],
    ),
    "recompute beside overlapped experts": (
        make_job(MIXTRAL),
        make_plan(dp=8, pp=2, vpp=2, ep=4, schedule="dualpipe_v", sharding="zero3", recompute="full"),
        ["'dualpipe_v'", "'full'"],
    ),
    "adapters": (make_job(lora_rank=8), make_plan(dp=16, sharding="zero3"), ["lora_rank 8", "0.3"]),
    "multi-token prediction": (
        make_job(DEEPSEEK, length=4096),
        make_plan(61, dp=16, sharding="zero3"),
        ["num_mtp_layers 1"],
    ),
}


@pytest.mark.parametrize("target", ["torchtitan", "torchtitan-0.2"])
@pytest.mark.parametrize("case", BOTH)
def test_both_releases_refuse(case, target):
    check_refusal(target, *BOTH[case])


@pytest.mark.parametrize("case", ONLY_0_3)
def test_the_release_0_3_refuses(case):
    check_refusal("torchtitan", *ONLY_0_3[case])


@pytest.mark.parametrize("case", ONLY_0_2)
def test_the_release_0_2_refuses(case):
    check_refusal("torchtitan-0.2", *ONLY_0_2[case])


@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v", "dualpipe_v"])
@pytest.mark.parametrize("target", ["torchtitan", "torchtitan-0.2"])
def test_layers_are_not_compiled_where_torch_refuses_it(schedule, target):
    vpp = 1 if schedule == "zb_h1" else 2
    plan = make_plan(dp=8, pp=2, vpp=vpp, schedule=schedule, sharding="zero3")
    bundle = EXPORTERS[target].export(make_job(), plan, "torchrun")
    settings = bundle.files[1].text
    assert "--compile.components loss\n" in settings or 'components = ["loss"]\n' in settings
    assert any("only the loss is compiled" in note for note in bundle.notes)


@pytest.mark.parametrize(
    ("features", "recipe", "gathers_wider"),
    [((), "tensorwise", True), (("float8_rowwise",), "rowwise", False)],
)
def test_the_release_0_2_is_told_the_recipe_that_was_predicted(features, recipe, gathers_wider):
    job = make_job(precision="fp8", software="torchtitan", features=features)
    plan = make_plan(dp=8, tp=2, sequence_parallel=True, sharding="zero3")
    bundle = EXPORTERS["torchtitan-0.2"].export(job, plan, "torchrun")
    assert f'recipe_name = "{recipe}"\n' in bundle.files[1].text
    assert any("gathers for tp in 16 bits" in note for note in bundle.notes) is gathers_wider


def test_the_release_0_3_is_told_its_only_recipe():
    job = make_job(precision="fp8", software="torchtitan", features=("float8_rowwise",))
    bundle = EXPORTERS["torchtitan"].export(job, make_plan(dp=16, sharding="zero3"), "torchrun")
    assert any('Float8LinearConverter.Config(recipe_name="rowwise", ' in each.text for each in bundle.files)
