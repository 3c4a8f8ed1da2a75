"""Export to SGLang: ``sglang.launch_server`` on one server or several, and pairs of prefill and decode pools.

Facts from SGLang 0.5.23 (srt/arg_groups/fields, parallel_hook.py, pd_disaggregation_hook.py): ``--tp-size`` counts all
ranks of a stage, attention data parallel ones too; experts are split over what ``--ep-size`` leaves of them; limits on
requests and on prefill tokens are given for all attention data parallel ranks together; ``--enable-dp-attention``
gave way to ``--attn-dp-size``, and ``--dp-size`` counts replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import ExportBundle, ExportFile, raise_reasons
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
)
from meshwright.planner.export.serving_scripts import (
    pool_script_name,
    pools_bundle,
    router_file,
    serving_file,
)
from meshwright.planner.serving.request_lengths import max_model_length
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["SglangExporter", "sglang_arguments", "sglang_reasons"]

VERSION = "0.5.23"
# Words of a plan -> values of an option; None where the option is left out.
_DTYPE: dict[str, str | None] = {
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
# A cache in fp16 is that of a model in fp16.
_KV_DTYPE: dict[str, str | None] = {
    "bf16": "bf16",
    "fp16": "auto",
    "fp8": "fp8_e4m3",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
_POLICY: dict[str, str | None] = {"prefill_first": None, "chunked_prefill": "--enable-mixed-chunk"}
_PAGE_SIZES = (1, 16, 32, 64, 128, 256)
_ROUTER = {"round_robin": "round_robin", "least_loaded": "power_of_two", "prefix_aware": "cache_aware"}
_BOOTSTRAP_PORT = 8998


class SglangExporter:
    """SGLang's ``python -m sglang.launch_server``."""

    target = "sglang"
    target_version = VERSION
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "tp, pp, attention_dp, ep, moe_tp, redundant experts",
            "replicas": "several on a server, or one over several servers",
            "pools": "aggregated; prefill and decode (NIXL)",
            "policy": "prefill_first, chunked_prefill (mixed chunks, without drafts)",
            "cache": "page size, prefix cache, number of tokens",
            "precision": "fp16, bf16, fp8; fp8_block, mxfp8, nvfp4, int8, int4_wo from the checkpoint",
            "kv": "bf16, fp8, mxfp8, nvfp4; fp16 with precision fp16",
            "drafts": "multi-token prediction (NEXTN)",
            "router": "round_robin; least_loaded as power_of_two; prefix_aware as cache_aware (sglang-router)",
        }
    )

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why SGLang cannot run the plan; empty when it can."""
        wrong = engine_is(plan, "sglang")
        return sglang_reasons(job, plan) if wrong is None else (wrong,)

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
        return pools_bundle(self.target, self.target_version, plan, pools, _router(plan), notes)


def sglang_reasons(job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
    """Return every reason why SGLang itself cannot run the plan, whoever starts it."""
    plan_rules = (plan_fits_cluster, _precision_exists, _kv_precision_exists, _half_cache_of_half_model)
    pool_rules = (*COMMON_POOL_RULES, _policy_exists, _page_exists, _mixed_chunks_without_drafts)
    return broken_pool_rules(job, plan, plan_rules, pool_rules)


def sglang_arguments(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> tuple[ArgumentGroup, ...]:
    """Return the arguments of a pool's replicas, the same on every server.

    Parameters
    ----------
    job, plan, pool : ServingJob, ServingPlan, ServingPool
        A pool of a plan that breaks no rule of the target.
    """
    groups = [
        ArgumentGroup(
            name="PARALLEL_ARGS", comment="Ranks of one replica.", options=tuple(_parallel(job, pool))
        ),
        ArgumentGroup(
            name="MODEL_ARGS", comment="Number formats and longest request.", options=tuple(_model(job, plan))
        ),
        ArgumentGroup(name="SCHEDULER_ARGS", comment="What one step holds.", options=tuple(_scheduler(pool))),
        ArgumentGroup(name="CACHE_ARGS", comment="KV cache.", options=tuple(_cache(pool))),
    ]
    if pool.num_speculative_tokens:
        groups.append(
            ArgumentGroup(
                name="SPECULATIVE_ARGS",
                comment="Drafted tokens; the last number counts the verified token too.",
                options=(
                    ("--speculative-algorithm", "NEXTN"),
                    ("--speculative-num-steps", str(pool.num_speculative_tokens)),
                    ("--speculative-eagle-topk", "1"),
                    ("--speculative-num-draft-tokens", str(pool.num_speculative_tokens + 1)),
                ),
            )
        )
    if pool.role != "aggregated":
        groups.append(
            ArgumentGroup(
                name="TRANSFER_ARGS",
                comment="How the KV cache travels between the pools.",
                options=(
                    ("--disaggregation-mode", pool.role),
                    ("--disaggregation-transfer-backend", "nixl"),
                ),
            )
        )
    return tuple(groups)


def _parallel(job: ServingJob, pool: ServingPool) -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = [
        ("--tp-size", str(pool.tp * pool.attention_dp)),
        ("--pp-size", str(pool.pp)),
    ]
    if pool.attention_dp > 1:
        options.append(("--attn-dp-size", str(pool.attention_dp)))
    if job.model.moe is not None:
        options.append(("--ep-size", str(pool.ep)))
    if pool.redundant_experts:
        options += [("--ep-num-redundant-experts", str(pool.redundant_experts)), ("--enable-eplb",)]
    return options


def _model(job: ServingJob, plan: ServingPlan) -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = [("--dtype", str(_DTYPE[plan.precision]))]
    if plan.precision == "fp8":
        options.append(("--quantization", "fp8"))
    return [
        *options,
        ("--kv-cache-dtype", str(_KV_DTYPE[plan.kv_precision])),
        ("--context-length", str(max_model_length(job))),
    ]


def _scheduler(pool: ServingPool) -> list[tuple[str, ...]]:
    tokens = str(pool.max_num_batched_tokens * pool.attention_dp)
    options: list[tuple[str, ...]] = [
        ("--max-running-requests", str(pool.max_num_sequences * pool.attention_dp)),
        ("--chunked-prefill-size", tokens),
        # Several prompts of one step together, too.
        ("--max-prefill-tokens", str(pool.max_num_batched_tokens)),
    ]
    mixed = _POLICY[pool.policy]
    return [*options, (mixed,)] if mixed is not None else options


def _cache(pool: ServingPool) -> list[tuple[str, ...]]:
    options: list[tuple[str, ...]] = [("--page-size", str(pool.block_size))]
    if not pool.has_prefix_cache:
        options.append(("--disable-radix-cache",))
    elif pool.role == "decode":
        options.append(("--disaggregation-decode-enable-radix-cache",))
    if pool.kv_cache_tokens is not None:
        whole = pool.kv_cache_tokens // pool.block_size * pool.block_size
        options.append(("--max-total-tokens", str(whole)))
    return options


def _pool_files(
    job: ServingJob, plan: ServingPlan, pool: ServingPool, notes: tuple[str, ...]
) -> tuple[ExportFile, ...]:
    title, stem = pool_title(job, plan, pool, f"SGLang {VERSION}"), pool_script_name(pool)
    groups = sglang_arguments(job, plan, pool)
    words = [
        'python3 -m sglang.launch_server --model-path "$MODEL"',
        '--host 0.0.0.0 --port "$PORT"',
        *(f'"${{{group.name}[@]}}"' for group in groups),
    ]
    exports: tuple[str, ...] = ()
    if pool.role == "prefill":
        # The router names the same port for the replica of this place.
        exports = (f'BOOTSTRAP_PORT="${{BOOTSTRAP_PORT:-$(({_BOOTSTRAP_PORT} + REPLICA))}}"',)
        words.append('--disaggregation-bootstrap-port "$BOOTSTRAP_PORT"')
    script = serving_file(
        job,
        pool,
        title=title,
        sources=(f"{stem}_args.sh",),
        words=words,
        exports=exports,
        node_words=(
            '--nnodes "$NNODES" --node-rank "$NODE_RANK"',
            '--dist-init-addr "$MASTER_ADDR:$MASTER_PORT"',
        ),
    )
    return ExportFile(f"{stem}_args.sh", args_file(title, groups, notes, script.name)), script


def _router(plan: ServingPlan) -> ExportFile | None:
    words = [
        "python3 -m sglang_router.launch_router",
        '--host 0.0.0.0 --port "$PORT"',
        f"--policy {_ROUTER[plan.router]}",
    ]
    if plan.is_disaggregated:
        words.append("--pd-disaggregation")
    return router_file(
        plan,
        title="Meshwright: sglang-router 0.3.2 in front of the replicas.",
        words=words,
        aggregated_option="--worker-urls",
        prefill_words=f'--prefill "$url" "${{BOOTSTRAP_PORT:-$(({_BOOTSTRAP_PORT} + index))}}"',
        decode_words='--decode "$url"',
    )


def _notes(plan: ServingPlan) -> tuple[str, ...]:
    notes = [
        "Share of GPU memory, CUDA graphs and kernels keep SGLang's defaults; add options to the script's call."
    ]
    if plan.router == "least_loaded" and any(pool.num_replicas > 1 for pool in plan.pools):
        notes.append("Router least_loaded is written as power_of_two: the less loaded of two replicas drawn.")
    if plan.is_disaggregated:
        notes.append("Pools on different servers need NIXL's transport (UCX) to reach each other.")
    if plan.is_disaggregated and plan.pools[1].has_prefix_cache:
        notes.append("SGLang calls the prefix cache of decode servers experimental.")
    return tuple(notes)


def _precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    return word_of("precision", plan.precision, _DTYPE, "SGLang")


def _kv_precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    return word_of("kv_precision", plan.kv_precision, _KV_DTYPE, "SGLang")


def _half_cache_of_half_model(job: ServingJob, plan: ServingPlan) -> str | None:
    if plan.kv_precision != "fp16" or plan.precision == "fp16":
        return None
    return f"kv_precision 'fp16' goes with precision 'fp16' in SGLang, not '{plan.precision}'; use 'bf16'."


def _policy_exists(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    return word_of("policy", pool.policy, _POLICY, "SGLang")


def _page_exists(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    if pool.block_size in _PAGE_SIZES:
        return None
    return f"block_size {pool.block_size} is none of SGLang's page sizes {', '.join(map(str, _PAGE_SIZES))}."


def _mixed_chunks_without_drafts(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Speculation switches mixed chunks off without a word (speculative_hook.py)."""
    if pool.policy != "chunked_prefill" or pool.num_speculative_tokens == 0:
        return None
    return (
        f"policy 'chunked_prefill' does not go with num_speculative_tokens {pool.num_speculative_tokens} in SGLang; "
        "use policy 'prefill_first' or 0 drafted tokens."
    )
