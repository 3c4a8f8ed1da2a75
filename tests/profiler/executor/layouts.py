"""The layouts that are run, and how."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from meshwright.profiler.executor.serving_run import pool_execution
from meshwright.simcore.domain.execution import Execution, execution_text
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.serving import ServingPlan, ServingPool
from meshwright.simcore.domain.workload import TrainingWorkload

STEPS = 2
HARD_TIMEOUT = 150.0
DENSE = ModelSpec(
    name="dense",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    is_gated_mlp=True,
    has_tied_embeddings=False,
)
DEEP = dataclasses.replace(DENSE, num_layers=8)
# Everything that Llama does not have: biases, learned positions, layer norms, tied and padded tables, head norms.
ODD = dataclasses.replace(
    DENSE,
    vocab_size=67,
    is_gated_mlp=False,
    has_tied_embeddings=True,
    normalization="layernorm",
    position_embedding="learned",
    num_reserved_positions=2,
    has_embedding_norm=True,
    has_qkv_bias=True,
    has_attention_output_bias=True,
    has_mlp_bias=True,
    has_head_bias=True,
    has_qk_norm=True,
)
NARROW_TIED = dataclasses.replace(ODD, num_layers=2)
NARROW = dataclasses.replace(NARROW_TIED, has_tied_embeddings=False)
TWO_HEADS = dataclasses.replace(ODD, num_query_groups=2)
ONE_HEAD = dataclasses.replace(DENSE, num_query_groups=1)
MIXTURE = dataclasses.replace(
    DENSE,
    moe=MoeSpec(
        num_experts=4,
        top_k=2,
        moe_ffn_hidden_size=32,
        shared_ffn_hidden_size=32,
        num_dense_layers=1,
        has_shared_expert_gate=True,
        has_router_bias=True,
    ),
)
SANDWICH = dataclasses.replace(
    DENSE,
    norms_per_layer=4,
    normalization="layernorm_nobias",
    sliding_window=5,
    full_attention_interval=2,
)
# GPT-OSS: sinks beside the scores, every second layer windowed, biases of experts and router.
SINKS = dataclasses.replace(
    MIXTURE,
    has_qkv_bias=True,
    has_attention_output_bias=True,
    has_mlp_bias=True,
    has_attention_sinks=True,
    sliding_window=5,
    full_attention_interval=2,
)
ALIBI = dataclasses.replace(
    DENSE,
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=6,
    normalization="layernorm_nobias",
    position_embedding="alibi",
)
# DeepSeek-V2: latents of queries, keys and values, and experts in groups.
LATENT = dataclasses.replace(
    MIXTURE,
    num_query_groups=8,
    head_dim=12,
    mla=MlaSpec(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=MoeSpec(
        num_experts=8,
        top_k=3,
        moe_ffn_hidden_size=16,
        shared_ffn_hidden_size=32,
        num_dense_layers=1,
        num_expert_groups=4,
        top_k_groups=2,
    ),
)
# DeepSeek-V2-Lite: queries without a latent.
LATENT_LITE = dataclasses.replace(
    DENSE,
    num_query_groups=8,
    head_dim=12,
    has_qkv_bias=True,
    mla=MlaSpec(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
)
PARALLEL_BLOCK = dataclasses.replace(ODD, has_parallel_block=True, norms_per_layer=1)


def execution(model: ModelSpec, batch: int = 4, length: int = 16, **plan: Any) -> Execution:
    settings: dict[str, Any] = {"dp": 1, "micro_batch_size": 1, "schedule": "none", **plan}
    if "layers_per_stage" not in settings:
        parts = settings.get("pp", 1) * settings.get("vpp", 1)
        settings["layers_per_stage"] = (model.num_layers // parts,) * parts
    return Execution(
        model=model,
        plan=ParallelPlan(**settings),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length, precision="fp32"),
        device="cpu",
        num_steps=STEPS,
        num_warmup_steps=0,
        seed=7,
    )


def vocabulary_layouts() -> dict[str, dict[str, Any]]:
    """Layouts of a vocabulary that is split over stages, each run in the three ways to do that."""
    return {
        "pp2": {"model": NARROW, "pp": 2},
        "pp4": {"model": NARROW_TIED, "pp": 4, "batch": 8, "layers_per_stage": (0, 1, 1, 0)},
        "pp2_dp2_zero1": {"model": NARROW_TIED, "pp": 2, "dp": 2, "sharding": "zero1"},
    }


def layouts() -> dict[str, Execution]:
    """Every layout that is run, by name."""
    pp4 = {"pp": 4, "batch": 8}
    return {
        # The figures: each axis by itself, and together.
        "dp2": execution(DENSE, dp=2),
        "tp2": execution(DENSE, tp=2),
        "pp2": execution(DENSE, pp=2, schedule="1f1b"),
        "fsdp2_tp2": execution(DENSE, dp=2, tp=2, sequence_parallel=True, sharding="zero3"),
        "pp2_tp2_dp2": execution(DENSE, pp=2, tp=2, dp=2, schedule="1f1b"),
        "ep2": execution(MIXTURE, dp=2, ep=2),
        "cp2": execution(DENSE, cp=2),
        # Each schedule.
        "gpipe": execution(DENSE, schedule="gpipe", **pp4),
        "1f1b": execution(DENSE, schedule="1f1b", **pp4),
        "interleaved_1f1b": execution(DEEP, vpp=2, schedule="interleaved_1f1b", **pp4),
        "zb_h1": execution(DENSE, schedule="zb_h1", **pp4),
        "zb_h2": execution(DENSE, schedule="zb_h2", **pp4),
        "zb_v": execution(DEEP, vpp=2, schedule="zb_v", **pp4),
        "v_half": execution(DEEP, vpp=2, schedule="v_half", **pp4),
        "v_min": execution(DEEP, vpp=2, schedule="v_min", **pp4),
        "dualpipe": execution(DENSE, schedule="dualpipe", **pp4),
        "dualpipe_v": execution(DEEP, vpp=2, schedule="dualpipe_v", **pp4),
        # Uneven stages, tied tables on one rank, on two, and on both ends twice.
        "uneven": execution(
            DENSE, pp=2, schedule="zb_h1", layers_per_stage=(0, 4), vocab_parallel="redistributed"
        ),
        "odd_1f1b_zero1": execution(ODD, pp=2, dp=2, schedule="1f1b", sharding="zero1"),
        "odd_zb_v_zero3": execution(
            ODD, pp=2, vpp=2, dp=2, schedule="zb_v", sharding="zero3", layers_per_stage=(2, 1, 1, 0)
        ),
        "odd_dualpipe": execution(ODD, pp=2, dp=2, schedule="dualpipe", batch=8),
        "odd_1f1b_zero2": execution(ODD, pp=2, dp=2, schedule="1f1b", sharding="zero2"),
        # A vocabulary split over the stages: evenly or padded, tied or not, beside every other axis.
        **{
            f"{kind}_{name}": execution(vocab_parallel=kind, schedule="1f1b", **each)
            for kind in ("vocab_1", "vocab_2", "interlaced")
            for name, each in vocabulary_layouts().items()
        },
        "vocab_1_tp2_sp": execution(
            NARROW, pp=2, tp=2, schedule="1f1b", sequence_parallel=True, vocab_parallel="vocab_1"
        ),
        "vocab_2_tp2": execution(NARROW_TIED, pp=2, tp=2, schedule="1f1b", vocab_parallel="vocab_2"),
        "interlaced_zero3": execution(
            NARROW, pp=2, dp=2, schedule="1f1b", sharding="zero3", vocab_parallel="interlaced"
        ),
        # Sharding without a pipeline.
        "zero1": execution(DENSE, dp=2, sharding="zero1"),
        "zero2": execution(DENSE, dp=2, sharding="zero2"),
        "hsdp": execution(DENSE, dp=4, sharding="hsdp", sharding_group=2, batch=8),
        # Tensor parallelism of everything, and of one block with one sum.
        "odd_tp2": execution(ODD, tp=2),
        "odd_tp2_sp_zero1": execution(ODD, dp=2, tp=2, sequence_parallel=True, sharding="zero1"),
        "parallel_block_tp2": execution(PARALLEL_BLOCK, tp=2),
        "parallel_block_tp2_sp": execution(PARALLEL_BLOCK, tp=2, sequence_parallel=True),
        "sandwich_tp2_sp": execution(SANDWICH, tp=2, sequence_parallel=True),
        # Context parallelism.
        "cp4": execution(DENSE, cp=4, batch=2),
        "ulysses": execution(SANDWICH, cp=2, cp_method="ulysses"),
        "all_gather": execution(DENSE, cp=2, cp_method="all_gather"),
        "cp2_tp2_core": execution(DENSE, cp=2, tp=2, sequence_parallel=True, recompute="selective", batch=2),
        "cp2_fsdp": execution(DENSE, dp=2, cp=2, sharding="zero3"),
        # Experts.
        "ep4_tp2_sp": execution(MIXTURE, dp=2, tp=2, ep=4, sequence_parallel=True),
        "ep2_tp2_sp_zero3": execution(MIXTURE, dp=2, tp=2, ep=2, sequence_parallel=True, sharding="zero3"),
        "ep2_cp2_full": execution(MIXTURE, dp=2, cp=2, ep=2, recompute="full", batch=2),
        "ep2_parts": execution(
            MIXTURE,
            dp=2,
            ep=2,
            recompute="selective",
            recompute_modules=("layernorm", "mlp", "moe", "moe_act"),
        ),
        "ep2_zb_h1_full": execution(MIXTURE, pp=2, dp=2, ep=2, schedule="zb_h1", recompute="full"),
        # Everything at once.
        "interleaved_sp_zero1": execution(
            DENSE,
            pp=2,
            vpp=2,
            tp=2,
            dp=2,
            schedule="interleaved_1f1b",
            sequence_parallel=True,
            sharding="zero1",
            recompute="full",
            recompute_layers=1,
        ),
        "ep4_pp2_tp2": execution(
            MIXTURE, pp=2, tp=2, dp=2, ep=4, schedule="1f1b", sequence_parallel=True, sharding="zero1"
        ),
        # Experts split over ranks, and key/value heads that several ranks share.
        "etp2_ep2_tp2_sp": execution(MIXTURE, dp=2, tp=2, ep=2, etp=2, sequence_parallel=True),
        "etp2_zero3_moe": execution(
            MIXTURE, dp=4, etp=2, sharding="zero3", recompute="selective", recompute_modules=("moe",)
        ),
        "copied_kv_tp4_sp_zero1": execution(TWO_HEADS, tp=4, dp=2, sequence_parallel=True, sharding="zero1"),
        "copied_kv_tp2_zero3": execution(ONE_HEAD, tp=2, dp=2, sharding="zero3"),
        "sinks_ep2_tp2_sp": execution(SINKS, tp=2, ep=2, sequence_parallel=True),
        "alibi_tp2": execution(ALIBI, tp=2),
        # Latent attention.
        "latent_ep4_tp2_sp": execution(LATENT, dp=2, tp=2, ep=4, sequence_parallel=True, sharding="zero1"),
        "latent_zb_v": execution(LATENT, pp=2, vpp=2, schedule="zb_v", recompute="full"),
        "latent_lite_tp2": execution(
            LATENT_LITE, tp=2, recompute="selective", recompute_modules=("mla_up_proj", "core_attn")
        ),
        # Optimizer states and layers' inputs in host memory.
        "host_zero1_ep2": execution(
            MIXTURE,
            dp=2,
            ep=2,
            sharding="zero1",
            optimizer_offload="cpu",
            optimizer_offload_fraction=0.3,
            recompute="full",
            activation_offload=True,
        ),
        "host_ep2_zero3": execution(
            MIXTURE, dp=4, ep=2, sharding="zero3", optimizer_offload="cpu", optimizer_offload_fraction=0.7
        ),
        "host_zb_h1": execution(
            DENSE,
            pp=2,
            tp=2,
            schedule="zb_h1",
            sequence_parallel=True,
            recompute="full",
            activation_offload=True,
            optimizer_offload="cpu",
        ),
        # Weights on the host, states on a drive, and whatever layers keep.
        "host_weights_tp2_sp": execution(
            DENSE,
            dp=2,
            tp=2,
            sequence_parallel=True,
            sharding="zero3",
            parameter_offload="cpu",
            optimizer_offload="cpu",
            optimizer_offload_fraction=0.5,
        ),
        "host_weights_hsdp": execution(
            ODD, dp=4, sharding="hsdp", sharding_group=2, parameter_offload="cpu", optimizer_offload="nvme"
        ),
        "host_weights_pp2": execution(
            ODD, pp=2, dp=2, schedule="1f1b", sharding="zero3", parameter_offload="cpu"
        ),
        "drive_zero1": execution(
            MIXTURE,
            pp=2,
            dp=2,
            schedule="1f1b",
            sharding="zero1",
            optimizer_offload="nvme",
            optimizer_offload_fraction=0.6,
        ),
        "host_activations_zb_h1": execution(
            ODD, pp=2, tp=2, schedule="zb_h1", sequence_parallel=True, activation_offload=True
        ),
        "host_activations_zero3": execution(
            MIXTURE,
            dp=2,
            ep=2,
            sharding="zero2",
            recompute="selective",
            recompute_modules=("core_attn", "moe_act"),
            activation_offload=True,
        ),
        "host_activations_part": execution(
            DENSE, dp=2, sharding="zero3", recompute="full", recompute_layers=2, activation_offload=True
        ),
        # 16 bits: messages are half as long, sums of gradients are not.
        "bf16_zero1": in_bf16(execution(DENSE, dp=2, sharding="zero1")),
        "bf16_host": in_bf16(execution(DENSE, dp=2, optimizer_offload="cpu")),
        "bf16_drive": in_bf16(execution(DENSE, dp=2, optimizer_offload="nvme", activation_offload=True)),
        "bf16_host_weights": in_bf16(
            execution(DENSE, dp=2, sharding="zero3", parameter_offload="cpu", optimizer_offload="cpu")
        ),
        "bf16_zb_h1_zero3": in_bf16(execution(DENSE, pp=2, dp=2, schedule="zb_h1", sharding="zero3")),
    }


def served_layouts() -> dict[str, Execution]:
    """Replicas that are served, by name."""

    def served(model: ModelSpec, **pool: int) -> Execution:
        each = ServingPool(**pool)  # type: ignore[arg-type]
        plan = ServingPlan(engine="vllm", pools=(each,), precision="fp32", kv_precision="fp32")
        steps: dict[str, Any] = {"device": "cpu", "num_steps": STEPS, "num_warmup_steps": 0, "seed": 7}
        return pool_execution(model, plan, each, batch=2, prompt=6, **steps)

    return {
        "served_pp2": served(dataclasses.replace(DENSE, num_layers=3), pp=2),
        "served_ep2_tp2": served(MIXTURE, tp=2, ep=2),
        "served_attention_dp2_moe_tp2": served(MIXTURE, attention_dp=2, moe_tp=2),
        "served_all": served(MIXTURE, tp=2, pp=2, attention_dp=2, ep=2, moe_tp=2),
        "served_copied_kv": served(ONE_HEAD, tp=2),
        "served_latent_tp2": served(LATENT_LITE, tp=2),
        "served_sinks_ep2_tp2": served(SINKS, tp=2, ep=2),
        "served_latent_all": served(LATENT, tp=2, pp=2, attention_dp=2, ep=4),
    }


def in_bf16(each: Execution) -> Execution:
    return dataclasses.replace(each, workload=dataclasses.replace(each.workload, precision="bf16"))


def reference(each: Execution) -> Execution:
    """The same steps in a single process: one micro-batch with the whole batch."""
    plan = ParallelPlan(
        dp=1,
        micro_batch_size=each.workload.global_batch_size,
        schedule="none",
        layers_per_stage=(each.model.num_layers,),
    )
    return dataclasses.replace(each, plan=plan)


def run_layouts(layouts: dict[str, Execution], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run layouts, each on as many ranks as it needs (1, 2, 4 or 8); return the results of its ranks."""
    file = folder / "layouts.json"
    rows = [[name, each.plan.num_gpus, execution_text(each)] for name, each in layouts.items()]
    file.write_text(json.dumps(rows), encoding="utf-8")
    program = Path(__file__).with_name("layout_runs.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(program), str(file), str(folder)],
        # Compiled schedules pay off in long runs only.
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=HARD_TIMEOUT)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        logs = [path.read_text(encoding="utf-8") for path in folder.glob("process*.log")]
        # Those that lost a partner complain of the connection.
        first = min(logs, key=lambda log: ("onnection" in log, "imed out" in log), default="")
        raise AssertionError(output.decode()[-2000:] + first[-3000:])
    return {
        name: [
            json.loads((folder / f"{name}.{rank}").read_text(encoding="utf-8"))
            for rank in range(each.plan.num_gpus)
        ]
        for name, each in layouts.items()
    }
