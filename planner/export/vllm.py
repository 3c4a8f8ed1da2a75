"""Export to vLLM: ``vllm serve`` on one server or several, and pairs of prefill and decode pools.

Facts from vLLM 0.33.0 (vllm/engine/arg_utils.py, vllm/config/parallel.py, nixl/connector.py): with ``--nnodes`` the
rank of a server among the data parallel ranks follows from ``--node-rank``; servers but the first run ``--headless``;
the expert parallel size is implicit, tensor x data parallel ranks, or 1 without ``--enable-expert-parallel``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import ExportBundle, ExportFile, raise_reasons
from meshwright.planner.export.rules import server_size
from meshwright.planner.export.scripts import ArgumentGroup, args_file
from meshwright.planner.export.serving_base import (
    accuracy_notes,
    engine_is,
    pool_title,
    serving_notes,
    word_of,
)
from meshwright.planner.export.serving_rules import (
    COMMON_POOL_RULES,
    broken_pool_rules,
    plan_fits_cluster,
    step_holds_a_prompt,
)
from meshwright.planner.export.serving_scripts import (
    pool_script_name,
    pools_bundle,
    replica_shape,
    router_file,
    serving_file,
)
from meshwright.planner.serving.request_lengths import max_model_length
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["VllmExporter", "vllm_arguments", "vllm_reasons"]

VERSION = "0.33.0"
# Words of a plan -> values of an option; None where the option is left out.
_DTYPE: dict[str, str | None] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "bfloat16",
    "fp8_block": "bfloat16",
    "mxfp8": "bfloat16",
    "nvfp4": "bfloat16",
    "int8": "bfloat16",
    "int4_wo": "bfloat16",
}
_FROM_CHECKPOINT = ("fp8_block", "mxfp8", "nvfp4", "int8", "int4_wo")
_KV_DTYPE: dict[str, str | None] = {"bf16": "bfloat16", "fp16": "float16", "fp8": "fp8"}
# The scheduler mixes prompts and answers in every step; chunks are the only choice.
_POLICY: dict[str, str | None] = {
    "chunked_prefill": "--enable-chunked-prefill",
    "orca": "--no-enable-chunked-prefill",
}
# Attention kernels on GPUs take multiples of 16 (get_supported_kernel_block_sizes of the backends).
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_ROUTER = {"round_robin": "round_robin", "least_loaded": "power_of_two", "prefix_aware": "cache_aware"}
_KV_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}
_SIDE_PORT = {"prefill": 5600, "decode": 7600}


class VllmExporter:
    """vLLM's ``vllm serve``."""

    target = "vllm"
    target_version = VERSION
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "tp, pp, attention_dp; ep over all ranks of a stage or not at all (moe_tp); redundant experts",
            "replicas": "several on a server, or one over several servers",
            "pools": "aggregated; prefill and decode (NIXL), decode with pp 1",
            "policy": "chunked_prefill, orca",
            "cache": "block size, prefix cache, number of blocks",
            "precision": "fp32, fp16, bf16, fp8; fp8_block, mxfp8, nvfp4, int8, int4_wo from the checkpoint",
            "kv": "bf16, fp16, fp8",
            "drafts": "multi-token prediction",
            "router": "round_robin; least_loaded as power_of_two; prefix_aware as cache_aware (vllm-router)",
        }
    )

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why vLLM cannot run the plan; empty when it can."""
        wrong = engine_is(plan, "vllm")
        return vllm_reasons(job, plan) if wrong is None else (wrong,)

    def export(self, job: ServingJob, plan: ServingPlan) -> ExportBundle:
        """Return the arguments and the script of every pool, and the router's script.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_reasons(self.target, self.target_version, self.unsupported(job, plan))
        notes = (*serving_notes(job, plan, VERSION), *accuracy_notes(plan, _FROM_CHECKPOINT), *_notes(plan))
        pools = [_pool_files(job, plan, pool, notes) for pool in plan.pools]
        return pools_bundle(self.target, self.target_version, plan, pools, _router(job, plan), notes)


def vllm_reasons(job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
    """Return every reason why vLLM itself cannot run the plan, whoever starts it."""
    plan_rules = (plan_fits_cluster, _precision_exists, _kv_precision_exists)
    pool_rules = (
        *COMMON_POOL_RULES,
        _experts_whole_or_split,
        _data_parallel_fills_servers,
        _policy_exists,
        step_holds_a_prompt,
        _block_exists,
        _decode_has_one_stage,
    )
    return broken_pool_rules(job, plan, plan_rules, pool_rules)


def vllm_arguments(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> tuple[ArgumentGroup, ...]:
    """Return the arguments of a pool's replicas, the same on every server.

    Parameters
    ----------
    job, plan, pool : ServingJob, ServingPlan, ServingPool
        A pool of a plan that breaks no rule of the target.
    """
    parallel: list[tuple[str, ...]] = [
        ("--tensor-parallel-size", str(pool.tp)),
        ("--pipeline-parallel-size", str(pool.pp)),
    ]
    if pool.attention_dp > 1:
        parallel.append(("--data-parallel-size", str(pool.attention_dp)))
    if pool.ep > 1:
        # No option gives the size: it is tp x data parallel size.
        parallel.append(("--enable-expert-parallel",))
    if pool.redundant_experts:
        copies = {"num_redundant_experts": pool.redundant_experts}
        parallel += [("--enable-eplb",), ("--eplb-config", json.dumps(copies))]
    model: list[tuple[str, ...]] = [("--dtype", str(_DTYPE[plan.precision]))]
    if plan.precision == "fp8":
        model.append(("--quantization", "fp8"))
    model += [
        ("--kv-cache-dtype", str(_KV_DTYPE[plan.kv_precision])),
        ("--max-model-len", str(max_model_length(job))),
    ]
    scheduler = (
        (str(_POLICY[pool.policy]),),
        ("--max-num-seqs", str(pool.max_num_sequences)),
        ("--max-num-batched-tokens", str(pool.max_num_batched_tokens)),
    )
    cache: list[tuple[str, ...]] = [
        ("--block-size", str(pool.block_size)),
        ("--enable-prefix-caching" if pool.has_prefix_cache else "--no-enable-prefix-caching",),
    ]
    if pool.kv_cache_tokens is not None:
        cache.append(("--num-gpu-blocks-override", str(pool.kv_cache_tokens // pool.block_size)))
    groups = [
        ArgumentGroup(name="PARALLEL_ARGS", comment="Ranks of one replica.", options=tuple(parallel)),
        ArgumentGroup(name="MODEL_ARGS", comment="Number formats and longest request.", options=tuple(model)),
        ArgumentGroup(name="SCHEDULER_ARGS", comment="What one step holds.", options=scheduler),
        ArgumentGroup(name="CACHE_ARGS", comment="KV cache.", options=tuple(cache)),
    ]
    if pool.num_speculative_tokens:
        drafts = {"method": "mtp", "num_speculative_tokens": pool.num_speculative_tokens}
        groups.append(
            ArgumentGroup(
                name="SPECULATIVE_ARGS",
                comment="Drafted tokens.",
                options=(("--speculative-config", json.dumps(drafts)),),
            )
        )
    if pool.role != "aggregated":
        transfer = {"kv_connector": "NixlConnector", "kv_role": _KV_ROLE[pool.role]}
        groups.append(
            ArgumentGroup(
                name="TRANSFER_ARGS",
                comment="How the KV cache travels between the pools.",
                options=(("--kv-transfer-config", json.dumps(transfer)),),
            )
        )
    return tuple(groups)


def _pool_files(
    job: ServingJob, plan: ServingPlan, pool: ServingPool, notes: tuple[str, ...]
) -> tuple[ExportFile, ...]:
    title, stem = pool_title(job, plan, pool, f"vLLM {VERSION}"), pool_script_name(pool)
    groups = vllm_arguments(job, plan, pool)
    exports: tuple[str, ...] = ()
    if pool.role != "aggregated":
        # One port per data parallel rank, from that of the replica on.
        port = f"{_SIDE_PORT[pool.role]} + SLOT * {pool.attention_dp}"
        exports = (
            "# Where the other pool finds this replica's KV cache.",
            'read -r -a ADDRESSES <<<"$(hostname -I)"',
            'export VLLM_NIXL_SIDE_CHANNEL_HOST="${VLLM_NIXL_SIDE_CHANNEL_HOST:-${ADDRESSES[0]}}"',
            f'export VLLM_NIXL_SIDE_CHANNEL_PORT="${{VLLM_NIXL_SIDE_CHANNEL_PORT:-$(({port}))}}"',
        )
    script = serving_file(
        job,
        pool,
        title=title,
        sources=(f"{stem}_args.sh",),
        words=(
            'vllm serve "$MODEL"',
            '--host 0.0.0.0 --port "$PORT"',
            *(f'"${{{group.name}[@]}}"' for group in groups),
        ),
        exports=exports,
        node_words=(
            '--nnodes "$NNODES" --node-rank "$NODE_RANK"',
            '--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"',
        ),
        follower_words=("--headless",),
    )
    return ExportFile(f"{stem}_args.sh", args_file(title, groups, notes, script.name)), script


def _router(job: ServingJob, plan: ServingPlan) -> ExportFile | None:
    words = ["vllm-router", '--host 0.0.0.0 --port "$PORT"', f"--policy {_ROUTER[plan.router]}"]
    if plan.is_disaggregated:
        words.append("--vllm-pd-disaggregation")
    return router_file(
        plan,
        title="Meshwright: vllm-router 0.1.17 in front of the replicas.",
        words=words,
        aggregated_option="--worker-urls",
        prefill_words='--prefill "$url"',
        decode_words='--decode "$url"',
    )


def _notes(plan: ServingPlan) -> tuple[str, ...]:
    notes = [
        "Share of GPU memory, CUDA graphs and kernels keep vLLM's defaults; add options to the script's call."
    ]
    if plan.router == "least_loaded" and any(pool.num_replicas > 1 for pool in plan.pools):
        notes.append("Router least_loaded is written as power_of_two: the less loaded of two replicas drawn.")
    if plan.is_disaggregated:
        notes.append("Pools on different servers need NIXL's transport (UCX) to reach each other.")
    return tuple(notes)


def _precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    return word_of("precision", plan.precision, _DTYPE, "vLLM")


def _kv_precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    return word_of("kv_precision", plan.kv_precision, _KV_DTYPE, "vLLM")


def _policy_exists(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    return word_of("policy", pool.policy, _POLICY, "vLLM")


def _experts_whole_or_split(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """The expert parallel size is implicit: all ranks of a stage, or one."""
    if pool.ep == 1 or pool.moe_tp == 1:
        return None
    ranks = pool.tp * pool.attention_dp
    return (
        f"moe_tp {pool.moe_tp} with ep {pool.ep}: vLLM shares experts out over all {ranks} ranks or over none; "
        f"use moe_tp 1 and ep {ranks}, or moe_tp {ranks} and ep 1."
    )


def _data_parallel_fills_servers(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Every server holds equally many whole data parallel ranks, or a data parallel rank whole servers."""
    size, rank = server_size(job.cluster_of(pool.role)), pool.tp * pool.pp
    if replica_shape(job, pool).num_servers == 1 or size % rank == 0 or rank % size == 0:
        return None
    return (
        f"a data parallel rank of tp {pool.tp} x pp {pool.pp} neither divides nor fills servers of {size} GPUs; "
        f"change tp or pp."
    )


def _block_exists(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    if pool.block_size in _BLOCK_SIZES:
        return None
    return f"block_size {pool.block_size} is none of vLLM's {', '.join(map(str, _BLOCK_SIZES))}."


def _decode_has_one_stage(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """NIXL's connector counts transfers per consumer rank, so decode has one stage."""
    if pool.role != "decode" or pool.pp == 1:
        return None
    return (
        f"pp {pool.pp} of a decode pool is not supported by vLLM's NIXL connector; use pp 1 and a larger tp."
    )
