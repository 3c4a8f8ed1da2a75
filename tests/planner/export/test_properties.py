"""Whatever is not refused satisfies every divisibility rule, checked on the exported text alone."""

from __future__ import annotations

import math

from export_strategies import jobs_and_plans
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.planner.export import EXPORTERS
from meshwright.planner.export.deepspeed_config import deepspeed_config
from meshwright.planner.export.megatron_arguments import megatron_arguments
from meshwright.planner.export.torchtitan_settings import torchtitan_settings


def parse_options(job, plan):
    """Read the exported arguments as a command line: option -> value, list of values, or True."""
    options = {}
    for option, *values in (option for group in megatron_arguments(job, plan) for option in group.options):
        assert option not in options
        assert option.startswith("--")
        read = [int(value) if value.isdecimal() else value for value in values]
        options[option] = read[0] if len(read) == 1 else read or True
    return options


@settings(max_examples=400, deadline=None)
@given(jobs_and_plans())
def test_exported_megatron_arguments_divide(job_and_plan):
    job, plan = job_and_plan
    if EXPORTERS["megatron"].unsupported(job, plan):
        return
    options = parse_options(job, plan)
    tp, pp, cp = (
        options[f"--{axis}-parallel-size"] for axis in ("tensor-model", "pipeline-model", "context")
    )
    world = plan.num_gpus
    assert world % (tp * pp * cp) == 0
    dp = world // (tp * pp * cp)
    assert dp == plan.dp
    batch, micro_batch = options["--global-batch-size"], options["--micro-batch-size"]
    assert batch % (micro_batch * dp) == 0

    heads = options["--num-attention-heads"]
    groups = options.get("--num-query-groups", heads)
    assert heads % tp == 0
    assert groups % tp == 0 or tp % groups == 0
    length = options["--seq-length"]
    assert options["--max-position-embeddings"] >= length
    assert cp == 1 or length % (2 * cp) == 0
    if "--sequence-parallel" in options:
        assert tp > 1
        assert (length // cp) % tp == 0

    if "--pipeline-model-parallel-layout" in options:
        stages = options["--pipeline-model-parallel-layout"].split("|")
        assert stages[0].startswith("E")
        assert stages[-1].endswith("L")
        assert len(stages) % pp == 0
        vpp = len(stages) // pp
        assert (
            sum(int(stage.strip("ELm").removeprefix("t*") or 0) for stage in stages)
            == options["--num-layers"]
        )
        assert stages[-1].count("m") == options.get("--mtp-num-layers", 0)
    else:
        assert options["--num-layers"] % pp == 0
        per_stage = options["--num-layers"] // pp
        per_virtual = options.get("--num-layers-per-virtual-pipeline-stage", per_stage)
        assert per_stage % per_virtual == 0
        vpp = per_stage // per_virtual
    assert vpp == plan.vpp
    if vpp > 1:
        assert pp > 1
        assert (batch // (micro_batch * dp)) % pp == 0

    if "--num-experts" in options:
        ep, etp = options["--expert-model-parallel-size"], options["--expert-tensor-parallel-size"]
        assert options["--num-experts"] % ep == 0
        assert world % (etp * ep * pp) == 0
        assert options["--moe-ffn-hidden-size"] % etp == 0
        assert tp == 1 or "--sequence-parallel" in options
    else:
        assert options["--ffn-hidden-size"] % tp == 0
        assert "--expert-model-parallel-size" not in options

    method = options.get("--cp-comm-type", "p2p")
    sizes = options.get("--hierarchical-context-parallel-sizes", [1, cp] if method == "p2p" else [cp, 1])
    assert ("--hierarchical-context-parallel-sizes" in options) == (method == "a2a+p2p")
    assert math.prod(sizes) == cp
    if method in ("a2a", "a2a+p2p"):
        swapped = heads if "--multi-latent-attention" in options else groups
        assert swapped % (tp * sizes[0]) == 0

    if "--optimizer-cpu-offload" in options:
        assert "--use-precision-aware-optimizer" in options
        assert "--use-distributed-optimizer" in options
        assert "--use-megatron-fsdp" not in options
    if "--cpu-offloading-num-layers" in options:
        assert 0 < options["--cpu-offloading-num-layers"] < options["--num-layers"]
        assert pp == 1
        assert "--recompute-granularity" not in options
    if options.get("--recompute-granularity") == "full":
        assert 1 <= options["--recompute-num-layers"] <= max(plan.layers_per_stage)

    if "--use-megatron-fsdp" in options:
        assert pp == 1
        assert options["--ckpt-format"] == "fsdp_dtensor"
    assert "--overlap-param-gather" not in options or "--overlap-grad-reduce" in options
    assert "--overlap-param-gather" not in options or "--use-distributed-optimizer" in options
    assert (dp * cp) % options.get("--num-distributed-optimizer-instances", 1) == 0


@settings(max_examples=300, deadline=None)
@given(jobs_and_plans(suits_deepspeed=True))
def test_exported_deepspeed_batches_multiply(job_and_plan):
    job, plan = job_and_plan
    if EXPORTERS["deepspeed"].unsupported(job, plan):
        return
    config = deepspeed_config(job, plan)
    assert plan.num_gpus == plan.dp * plan.tp * config.get("sequence_parallel_size", 1)
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * plan.dp
    assert product == job.workload.global_batch_size
    assert config.get("train_batch_size", product) == product
    assert not ("bf16" in config and "fp16" in config)
    zero = config["zero_optimization"]
    assert "tensor_parallel" not in config or zero["stage"] < 3
    assert zero.get("offload_param") is None or zero["stage"] == 3
    assert zero.get("offload_optimizer") is None or zero["stage"] >= 1
    assert zero.get("offload_optimizer", {}).get("ratio", 1.0) == 1.0 or zero["stage"] == 3
    assert plan.dp % zero.get("zero_hpz_partition_size", 1) == 0
    paths = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
    assert all(("nvme_path" in section) == (section.get("device") == "nvme") for section in paths)
    assert ("aio" in config) == any(section.get("device") == "nvme" for section in paths)
    if "expert_parallel" in config:
        ep = config["expert_parallel"]["autoep_size"]
        assert job.model.moe.num_experts % ep == plan.num_gpus % ep == 0


@settings(max_examples=400, deadline=None)
@given(jobs_and_plans(), st.sampled_from(["torchtitan", "torchtitan-0.2"]))
def test_exported_torchtitan_degrees_multiply(job_and_plan, target):
    job, plan = job_and_plan
    exporter = EXPORTERS[target]
    if exporter.unsupported(job, plan):
        return
    settings_ = torchtitan_settings(job, plan, exporter.target_version)
    parallel, training = settings_["parallelism"], settings_["training"]
    replicas, shards = (parallel[f"data_parallel_{kind}_degree"] for kind in ("replicate", "shard"))
    tp, pp, cp, ep = (
        parallel[f"{axis}_parallel_degree"] for axis in ("tensor", "pipeline", "context", "expert")
    )
    assert replicas * shards * cp * tp * pp == plan.num_gpus
    assert replicas * shards == plan.dp
    etp = parallel.get("expert_tensor_parallel_degree", 1)
    assert ep == 1 or (shards * cp * tp) % (ep * etp) == 0
    accumulation, remainder = divmod(training["global_batch_size"], training["local_batch_size"] * plan.dp)
    assert remainder == 0
    if pp == 1:
        assert training["local_batch_size"] == plan.micro_batch_size
        assert "module_fqns_per_model_part" not in parallel
        return
    assert accumulation == 1
    count = training["local_batch_size"] // parallel["pipeline_parallel_microbatch_size"]
    assert count == plan.num_micro_batches(job.workload.global_batch_size)
    stages = parallel["module_fqns_per_model_part"]
    assert len(stages) % pp == 0
    modules = [module for stage in stages for module in stage]
    layers = [module for module in modules if module.startswith("layers.")]
    assert layers == [f"layers.{index}" for index in range(job.model.num_layers)]
    assert modules[0] == "tok_embeddings"
    assert modules[-2] == "norm"
    assert len(modules) == len(layers) + 3


@settings(max_examples=200, deadline=None)
@given(jobs_and_plans())
def test_reasons_are_single_sentences(job_and_plan):
    for exporter in EXPORTERS.values():
        for reason in exporter.unsupported(*job_and_plan):
            assert reason.endswith(".")
            assert reason.isprintable()
            assert not reason.endswith("..")


@settings(max_examples=300, deadline=None)
@given(st.one_of(jobs_and_plans(), jobs_and_plans(suits_deepspeed=True)))
def test_limits_of_the_search_reject_no_plan_that_the_target_takes(job_and_plan):
    job, plan = job_and_plan
    # As columns hold them: nothing is 0.
    values = {
        "secondary_group": plan.secondary_group or 0,
        "recompute_modules": int(bool(plan.recompute_modules)),
    }
    for exporter in EXPORTERS.values():
        if exporter.unsupported(job, plan):
            continue
        for field, allowed in exporter.search_limits.items():
            assert values.get(field, getattr(plan, field)) in allowed
