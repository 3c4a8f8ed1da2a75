"""Random jobs and plans over every field, most of them at their default so that targets accept enough of them."""

from __future__ import annotations

import dataclasses

from export_cases import DEEPSEEK, GPT_175B, LLAMA_8B, MIXTRAL, make_job, make_plan
from hypothesis import assume
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import RECOMPUTE_MODULES, partition_layers, partition_with_ends

small = st.sampled_from([1, 1, 1, 2, 2, 4, 4, 8, 8, 3])


def rarely(*others, default):
    """Return a strategy that draws the default nine times of ten."""
    return st.integers(0, 9).flatmap(
        lambda number: st.sampled_from(others) if number == 9 else st.just(default)
    )


@st.composite
def models(draw):
    model = draw(st.sampled_from([LLAMA_8B, GPT_175B, MIXTRAL, DEEPSEEK]))
    if model is not DEEPSEEK:
        model = dataclasses.replace(model, num_layers=draw(st.sampled_from([24, 30, 32])))
    return dataclasses.replace(model, num_mtp_layers=draw(rarely(1, default=0)))


@st.composite
def jobs(draw, model):
    workload = {"lora_rank": draw(rarely(8, 16, default=None))}
    if model.moe is not None:
        workload |= {
            "routing_imbalance": draw(rarely(1.5, 2.0, default=1.0)),
            "expert_capacity_factor": draw(rarely(1.0, 1.25, default=None)),
        }
    return make_job(
        model,
        num_nodes=512,
        length=2048 if model.position_embedding == "learned" else draw(rarely(4100, 6144, default=4096)),
        batch=draw(st.sampled_from([96, 128, 384, 1536])),
        precision=draw(rarely("fp16", "fp8", "mxfp8", "fp8_block", "fp32", default="bf16")),
        architecture=draw(rarely("hopper", default="blackwell")),
        software=draw(st.sampled_from(["megatron-core", "torchtitan"])),
        **workload,
    )


@st.composite
def stages(draw, num_layers, pp):
    """Draw schedule, chunks and layers of every virtual stage."""
    if pp == 1:
        return {"schedule": "none", "layers_per_stage": (num_layers,)}
    schedule = draw(
        st.sampled_from(["1f1b", "1f1b", "interleaved_1f1b", "gpipe", "zb_h1", "zb_v", "dualpipe_v", "v_min"])
    )
    vpp = {"interleaved_1f1b": draw(st.sampled_from([2, 3])), "zb_v": 2, "dualpipe_v": 2, "v_min": 2}.get(
        schedule, 1
    )
    layers = partition_layers(num_layers, pp * vpp)
    if draw(rarely(True, default=False)):
        layers = partition_with_ends(num_layers, pp * vpp, max(0, layers[0] - 1), max(0, layers[-1] - 2))
    return {"schedule": schedule, "vpp": vpp, "layers_per_stage": layers}


@st.composite
def jobs_and_plans(draw, suits_deepspeed=False):
    """Draw a job and a plan; without what DeepSpeed never has, if so wished, or it would refuse nearly all."""
    model = draw(models())
    job = draw(jobs(model))
    axes = {axis: draw(small) for axis in ("dp", "tp", "pp", "cp", "micro_batch_size")}
    methods = ["ring", "ulysses", "all_gather", "hierarchical"]
    if suits_deepspeed:
        axes |= {"pp": 1, "tp": draw(rarely(2, 4, default=1))}
        methods = ["ulysses"]
    if model.moe is not None:
        axes |= {"ep": draw(small), "etp": draw(st.sampled_from([1, 1, 2]))}
    sharding = draw(st.sampled_from(["none", "none", "zero1", "zero1", "zero2", "zero3", "zero3", "hsdp"]))
    recompute = draw(
        st.sampled_from(["none", "full"] if suits_deepspeed else ["none", "none", "selective", "full"])
    )
    modules = st.lists(st.sampled_from(RECOMPUTE_MODULES), max_size=2, unique=True).map(tuple)
    offload = rarely("cpu", "nvme", default="none")
    optimizer_offload = draw(offload)
    fields = {
        "cp_method": "ring" if axes["cp"] == 1 else draw(st.sampled_from(methods)),
        "expert_overlap": draw(rarely(2, 4, default=1)) if model.moe else 1,
        "sequence_parallel": axes["tp"] > 1 and draw(rarely(suits_deepspeed, default=not suits_deepspeed)),
        "sharding": sharding,
        "sharding_group": draw(rarely(1, 2, 4, default=None)),
        "secondary_group": draw(rarely(1, 2, 4, default=None)) if sharding == "zero3" else None,
        "recompute": recompute,
        "recompute_modules": draw(modules) if recompute == "selective" else (),
        "recompute_layers": draw(rarely(1, 4, 40, default=None)) if recompute == "full" else None,
        "optimizer_offload": optimizer_offload,
        "optimizer_offload_fraction": 1.0 if optimizer_offload == "none" else draw(st.sampled_from([1.0, 0.5])),
        "parameter_offload": draw(offload) if sharding in ("zero3", "hsdp") else "none",
        "activation_offload": draw(rarely(True, default=False)),
        "vocab_parallel": draw(rarely("redistributed", "vocab_1", default="none")) if axes["pp"] > 1 else "none",
    }  # fmt: skip
    try:
        plan = make_plan(model.num_layers, **axes, **fields, **draw(stages(model.num_layers, axes["pp"])))
    except SpecError:
        assume(False)
    return job, plan
