"""Jobs and plans the export tests share, built without any catalog, and the golden cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from meshwright.errors import UnsupportedByTargetError
from meshwright.hardware_specs.specs import ClusterSpec, FabricSpec, GpuSpec, LinkSpec, NodeSpec
from meshwright.planner.export import EXPORTERS, ExportBundle, Launcher
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.plan import ParallelPlan, ScheduleName, partition_layers
from meshwright.simcore.domain.workload import Precision, TrainingWorkload

GOLDEN = Path(__file__).parent / "golden"

LLAMA_8B = ModelSpec(
    name="llama-3-8b",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    is_gated_mlp=True,
    has_tied_embeddings=False,
)
LLAMA_405B = dataclasses.replace(
    LLAMA_8B,
    name="llama-3.1-405b",
    num_layers=126,
    hidden_size=16384,
    ffn_hidden_size=53248,
    num_attention_heads=128,
    max_position_embeddings=131072,
)
GPT_175B = ModelSpec(
    name="gpt3-175b",
    num_layers=96,
    hidden_size=12288,
    ffn_hidden_size=49152,
    num_attention_heads=96,
    num_query_groups=96,
    head_dim=128,
    vocab_size=50257,
    max_position_embeddings=2048,
    is_gated_mlp=False,
    has_tied_embeddings=True,
    normalization="layernorm",
    position_embedding="learned",
    has_qkv_bias=True,
    has_attention_output_bias=True,
    has_mlp_bias=True,
)
MIXTRAL = dataclasses.replace(
    LLAMA_8B,
    name="mixtral-8x7b",
    vocab_size=32000,
    max_position_embeddings=32768,
    moe=MoeSpec(num_experts=8, top_k=2, moe_ffn_hidden_size=14336),
)
WINDOWED = dataclasses.replace(
    LLAMA_8B,
    name="windowed",
    sliding_window=4096,
    full_attention_interval=2,
    has_qk_norm=True,
    moe=MoeSpec(num_experts=8, top_k=1, moe_ffn_hidden_size=8192, layer_frequency=2, num_dense_layers=1),
)
DEEPSEEK = dataclasses.replace(
    LLAMA_8B,
    name="deepseek-v3",
    num_layers=61,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    num_query_groups=128,
    vocab_size=129280,
    max_position_embeddings=4096,
    num_mtp_layers=1,
    mla=MlaSpec(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MoeSpec(
        num_experts=256,
        top_k=8,
        moe_ffn_hidden_size=2048,
        shared_ffn_hidden_size=2048,
        num_dense_layers=3,
        num_expert_groups=8,
        top_k_groups=4,
        has_router_bias=True,
    ),
)


def make_cluster(
    num_nodes: int, architecture: str = "hopper", num_gpus: int = 8, vendor: str = "nvidia"
) -> ClusterSpec:
    """Return a cluster of made-up but plausible machines; no export depends on their speed."""
    gpu = GpuSpec(
        id="test-gpu",
        name="test GPU",
        vendor=vendor,
        architecture=architecture,
        peak_flops_per_second={"bf16": 1e15},
        memory_bytes=8e10,
        memory_bandwidth_bytes_per_second=3e12,
        num_sms=132,
        l2_bytes=5e7,
        power_watts=700.0,
        scale_up=LinkSpec(kind="nvlink4", bandwidth_bytes_per_second=4.5e11, latency=1e-6),
        host_link=LinkSpec(kind="pcie5", bandwidth_bytes_per_second=6e10, latency=1e-6),
    )
    node = NodeSpec(
        id="test-node",
        name="test node",
        gpu=gpu,
        num_gpus=num_gpus,
        topology="switch",
        nic=LinkSpec(kind="infiniband", bandwidth_bytes_per_second=5e10, latency=5e-6),
        num_nics=8,
        power_watts=10000.0,
    )
    fabric = FabricSpec(id="test-fabric", name="test fabric", kind="infiniband", latency=5e-6)
    return ClusterSpec(id="test-cluster", node=node, num_nodes=num_nodes, fabric=fabric)


def make_job(
    model: ModelSpec = LLAMA_8B,
    *,
    num_nodes: int = 2,
    batch: int = 128,
    length: int = 8192,
    precision: Precision = "bf16",
    architecture: str = "hopper",
    gpus_per_node: int = 8,
    vendor: str = "nvidia",
    software: str = "megatron-core",
    features: tuple[str, ...] = (),
    **workload: object,
) -> TrainingJob:
    """Return a job of a model on made-up machines; further keywords are fields of the workload."""
    return TrainingJob(
        model=model,
        cluster=make_cluster(num_nodes, architecture, gpus_per_node, vendor),
        workload=TrainingWorkload(
            global_batch_size=batch,
            sequence_length=length,
            precision=precision,
            **workload,  # type: ignore[arg-type]  # keywords are checked by the class
        ),
        software=software,
        features=features,
    )


def make_plan(num_layers: int = 32, **changes: object) -> ParallelPlan:
    """Return a plan whose schedule and stages follow from pp and vpp unless they are given."""
    pp, vpp = int(str(changes.get("pp", 1))), int(str(changes.get("vpp", 1)))
    schedule: ScheduleName = "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "1f1b"
    defaults: dict[str, object] = {
        "dp": 1,
        "micro_batch_size": 1,
        "schedule": schedule,
        "layers_per_stage": partition_layers(num_layers, pp * vpp),
    }
    return ParallelPlan(**(defaults | changes))  # type: ignore[arg-type]  # keywords are checked by the class


#: name -> target, launcher, job, plan. Each is one folder of tests/planner/export/golden.
CASES: dict[str, tuple[str, Launcher, TrainingJob, ParallelPlan]] = {
    "megatron_3d_slurm": (
        "megatron",
        "slurm",
        make_job(),
        make_plan(dp=4, tp=2, pp=2, sequence_parallel=True, sharding="zero1", recompute="selective"),
    ),
    "megatron_uneven_interleaved": (
        "megatron",
        "slurm",
        make_job(LLAMA_405B, num_nodes=256, batch=2048, precision="fp8"),
        make_plan(126, dp=16, tp=8, pp=16, vpp=2, sequence_parallel=True, sharding="zero1"),
    ),
    "megatron_context_parallel_interleaved": (
        "megatron",
        "torchrun",
        make_job(num_nodes=8, architecture="blackwell", length=131072),
        make_plan(dp=4, tp=2, pp=4, vpp=2, cp=2, sequence_parallel=True, recompute="full"),
    ),
    "megatron_fsdp_hybrid": (
        "megatron",
        "torchrun",
        make_job(num_nodes=4),
        make_plan(dp=32, sharding="hsdp", sharding_group=8),
    ),
    "megatron_gpt_biases": (
        "megatron",
        "torchrun",
        make_job(GPT_175B, num_nodes=16, batch=1536, length=2048, precision="fp16"),
        make_plan(96, dp=2, tp=8, pp=8, recompute="full"),
    ),
    "megatron_windows": (
        "megatron",
        "torchrun",
        make_job(WINDOWED, length=16384, architecture="cdna3", vendor="amd"),
        make_plan(dp=8, tp=2, sequence_parallel=True, sharding="zero3"),
    ),
    "megatron_experts": (
        "megatron",
        "torchrun",
        make_job(MIXTRAL, num_nodes=4),
        make_plan(dp=8, tp=2, pp=2, ep=8, sequence_parallel=True, sharding="zero1"),
    ),
    "megatron_latent_attention": (
        "megatron",
        "slurm",
        make_job(
            DEEPSEEK, num_nodes=32, batch=4096, length=4096, precision="fp8_block", architecture="hopper"
        ),
        make_plan(
            61, dp=16, tp=2, pp=8, ep=32, sequence_parallel=True, sharding="zero1", recompute="selective"
        ),
    ),
    "megatron_part_of_a_node": (
        "megatron",
        "slurm",
        make_job(num_nodes=1),
        make_plan(dp=2, tp=2, sharding="zero1"),
    ),
    "megatron_hierarchical_context": (
        "megatron",
        "torchrun",
        make_job(num_nodes=4, length=131072, batch=32),
        make_plan(dp=1, tp=2, cp=16, cp_method="hierarchical", sequence_parallel=True, sharding="zero1"),
    ),
    "megatron_offload": (
        "megatron",
        "torchrun",
        make_job(num_nodes=1),
        make_plan(
            dp=8,
            sharding="zero1",
            optimizer_offload="cpu",
            optimizer_offload_fraction=0.75,
            activation_offload=True,
        ),
    ),
    "megatron_capacity": (
        "megatron",
        "torchrun",
        make_job(MIXTRAL, num_nodes=4, expert_capacity_factor=1.25),
        make_plan(
            dp=16,
            tp=2,
            ep=8,
            sequence_parallel=True,
            sharding="zero1",
            recompute="selective",
            recompute_modules=("layernorm", "moe_act"),
        ),
    ),
    "megatron_placed": (
        "megatron",
        "slurm",
        make_job(num_nodes=4),
        make_plan(
            dp=4,
            tp=4,
            pp=2,
            sequence_parallel=True,
            device_mapping=DeviceMapping(
                host_order=(2, 0, 3, 1), gpu_orders=((0, 1, 2, 3, 7, 6, 5, 4),), rank_order="tp-cp-ep-pp-dp"
            ),
        ),
    ),
    "megatron_kubernetes": ("megatron", "kubernetes", make_job(), make_plan(dp=8, tp=2, sharding="zero1")),
    "megatron_bridge_experts": (
        "megatron-bridge",
        "torchrun",
        make_job(MIXTRAL, num_nodes=4, expert_capacity_factor=1.25),
        make_plan(
            dp=4,
            tp=2,
            pp=4,
            ep=8,
            sequence_parallel=True,
            sharding="zero1",
            recompute="selective",
            recompute_modules=("moe_act",),
            layers_per_stage=(7, 9, 9, 7),
        ),
    ),
    "megatron_recompute_some": (
        "megatron",
        "torchrun",
        make_job(),
        make_plan(dp=4, pp=4, recompute="full", recompute_layers=3, layers_per_stage=(9, 9, 8, 6)),
    ),
    "deepspeed_infinity": (
        "deepspeed",
        "torchrun",
        make_job(),
        make_plan(
            dp=16,
            sharding="zero3",
            recompute="full",
            optimizer_offload="nvme",
            parameter_offload="nvme",
            activation_offload=True,
        ),
    ),
    "deepspeed_secondary": (
        "deepspeed",
        "torchrun",
        make_job(),
        make_plan(
            dp=16,
            sharding="zero3",
            secondary_group=8,
            optimizer_offload="cpu",
            optimizer_offload_fraction=0.5,
        ),
    ),
    "deepspeed_ulysses": (
        "deepspeed",
        "torchrun",
        make_job(length=131072, batch=16),
        make_plan(dp=2, cp=8, cp_method="ulysses", sharding="zero3", recompute="full"),
    ),
    "deepspeed_autoep": (
        "deepspeed",
        "torchrun",
        make_job(MIXTRAL),
        make_plan(dp=16, ep=8, sharding="zero2", recompute="full"),
    ),
    "torchtitan_3d_slurm": (
        "torchtitan",
        "slurm",
        make_job(num_nodes=4, software="torchtitan"),
        make_plan(
            dp=4,
            tp=4,
            pp=2,
            vpp=2,
            sequence_parallel=True,
            sharding="zero3",
            recompute="selective",
            layers_per_stage=(9, 8, 8, 7),
        ),
    ),
    "torchtitan_float8_adapters": (
        "torchtitan",
        "torchrun",
        make_job(
            LLAMA_405B,
            num_nodes=32,
            precision="fp8",
            lora_rank=16,
            software="torchtitan",
            features=("float8_rowwise",),
        ),
        make_plan(
            126,
            dp=16,
            tp=8,
            cp=2,
            cp_method="all_gather",
            sequence_parallel=True,
            sharding="hsdp",
            sharding_group=8,
            recompute="full",
        ),
    ),
    "torchtitan_experts": (
        "torchtitan",
        "torchrun",
        make_job(
            DEEPSEEK,
            num_nodes=32,
            batch=1024,
            length=4096,
            precision="mxfp8",
            architecture="blackwell",
            software="torchtitan",
        ),
        make_plan(61, dp=128, tp=2, ep=64, sequence_parallel=True, sharding="zero3"),
    ),
    "torchtitan_schedule_table": (
        "torchtitan",
        "torchrun",
        make_job(batch=24, software="torchtitan"),
        make_plan(
            dp=4, pp=4, vpp=2, schedule="v_half", sharding="zero3", layers_per_stage=(4, 4, 4, 4, 4, 4, 4, 4)
        ),
    ),
    "torchtitan_unregistered": (
        "torchtitan",
        "torchrun",
        make_job(MIXTRAL, software="torchtitan"),
        make_plan(
            dp=16, ep=8, sharding="zero3", parameter_offload="cpu", optimizer_offload="cpu", recompute="full"
        ),
    ),
    "torchtitan_0_2_ring": (
        "torchtitan-0.2",
        "torchrun",
        make_job(length=131072, batch=32, precision="fp8", software="torchtitan"),
        make_plan(dp=2, tp=2, cp=4, sequence_parallel=True, sharding="zero3", recompute="full"),
    ),
    "torchtitan_0_2_dual_pipe": (
        "torchtitan-0.2",
        "slurm",
        make_job(MIXTRAL, num_nodes=4, batch=256, software="torchtitan"),
        make_plan(
            dp=8,
            tp=1,
            pp=4,
            vpp=2,
            ep=8,
            schedule="dualpipe_v",
            sharding="zero2",
            layers_per_stage=(3, 4, 4, 5, 5, 4, 4, 3),
        ),
    ),
    "deepspeed_zero3": (
        "deepspeed",
        "torchrun",
        make_job(),
        make_plan(dp=16, sharding="zero3", recompute="full"),
    ),
    "deepspeed_zero1_slurm": (
        "deepspeed",
        "slurm",
        make_job(num_nodes=4, precision="fp32"),
        make_plan(dp=32, sharding="zero1", micro_batch_size=2),
    ),
    "deepspeed_autotp": (
        "deepspeed",
        "torchrun",
        make_job(precision="fp16"),
        make_plan(dp=4, tp=4, sharding="zero2"),
    ),
}


def export_case(name: str) -> ExportBundle:
    """Return the bundle of a golden case."""
    target, launcher, job, plan = CASES[name]
    return EXPORTERS[target].export(job, plan, launcher)


def check_refusal(target: str, job: TrainingJob, plan: ParallelPlan, words: list[str]) -> None:
    """Assert that exactly one reason holds all the words, and that an export raises with every reason."""
    exporter = EXPORTERS[target]
    reasons = exporter.unsupported(job, plan)
    matching = [reason for reason in reasons if all(word in reason for word in words)]
    assert len(matching) == 1, reasons
    assert matching[0].endswith(".")
    assert "\n" not in matching[0]
    with pytest.raises(UnsupportedByTargetError) as error:
        exporter.export(job, plan, "torchrun")
    assert all(reason in str(error.value) for reason in reasons)
    assert exporter.target_version in str(error.value)
