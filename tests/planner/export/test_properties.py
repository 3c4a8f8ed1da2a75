"""Whatever is not refused satisfies every divisibility rule, checked on the exported text alone."""

from __future__ import annotations

import dataclasses

from export_cases import GPT_175B, LLAMA_8B, MIXTRAL, make_job, make_plan
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.planner.export import EXPORTERS
from meshwright.planner.export.deepspeed import deepspeed_config
from meshwright.planner.export.megatron_arguments import megatron_arguments

small = st.sampled_from([1, 1, 2, 3, 4, 8])


@st.composite
def jobs_and_plans(draw):
    model = draw(st.sampled_from([LLAMA_8B, GPT_175B, MIXTRAL]))
    model = dataclasses.replace(model, num_layers=draw(st.sampled_from([24, 30, 32])))
    axes = {axis: draw(small) for axis in ("dp", "tp", "pp", "cp", "micro_batch_size")}
    if axes["pp"] > 1:
        axes["vpp"] = draw(st.sampled_from([1, 1, 2]))
    if model.moe is not None:
        axes |= {"ep": draw(small), "etp": draw(st.sampled_from([1, 1, 2]))}
    precision = draw(st.sampled_from(["bf16", "fp16", "fp8", "mxfp8", "fp32"]))
    length, batch = (
        draw(st.sampled_from([2048, 4096, 4100, 6144])),
        draw(st.sampled_from([96, 128, 384, 1536])),
    )
    job = make_job(model, num_nodes=512, length=length, batch=batch, precision=precision)
    try:
        plan = make_plan(
            model.num_layers,
            **axes,
            sequence_parallel=draw(st.booleans()) and axes["tp"] > 1,
            sharding=draw(st.sampled_from(["none", "zero1", "zero2", "zero3", "hsdp"])),
            sharding_group=draw(st.sampled_from([None, 1, 2, 4])),
            recompute=draw(st.sampled_from(["none", "selective", "full"])),
        )
    except SpecError:
        assume(False)
    return job, plan


def parse_options(job, plan):
    """Read the exported arguments as a command line: option -> value, or True."""
    options, last = {}, ""
    for word in (word for group in megatron_arguments(job, plan) for word in group.argv):
        if word.startswith("--"):
            assert word not in options
            options[word], last = True, word
        else:
            options[last] = int(word) if word.isdecimal() else word
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
            sum(int(stage.strip("EL").removeprefix("t*") or 0) for stage in stages) == options["--num-layers"]
        )
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

    if "--use-megatron-fsdp" in options:
        assert pp == 1
        assert options["--ckpt-format"] == "fsdp_dtensor"
    assert "--overlap-param-gather" not in options or "--overlap-grad-reduce" in options
    assert "--overlap-param-gather" not in options or "--use-distributed-optimizer" in options
    assert (dp * cp) % options.get("--num-distributed-optimizer-instances", 1) == 0


@settings(max_examples=300, deadline=None)
@given(jobs_and_plans())
def test_exported_deepspeed_batches_multiply(job_and_plan):
    job, plan = job_and_plan
    if EXPORTERS["deepspeed"].unsupported(job, plan):
        return
    config = deepspeed_config(job, plan)
    assert plan.num_gpus == plan.dp * plan.tp
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * plan.dp
    assert product == job.workload.global_batch_size
    assert config.get("train_batch_size", product) == product
    assert not ("bf16" in config and "fp16" in config)
    assert "tensor_parallel" not in config or config["zero_optimization"]["stage"] < 3


@settings(max_examples=200, deadline=None)
@given(jobs_and_plans())
def test_reasons_are_single_sentences(job_and_plan):
    for exporter in EXPORTERS.values():
        for reason in exporter.unsupported(*job_and_plan):
            assert reason.endswith(".")
            assert reason.isprintable()
            assert not reason.endswith("..")
