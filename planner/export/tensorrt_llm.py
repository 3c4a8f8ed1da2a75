"""Export to TensorRT-LLM: ``trtllm-serve`` with a YAML of options, and its server in front of a pair of pools.

Facts from TensorRT-LLM 1.2 (docs: commands/trtllm-serve, features/disagg-serving; llmapi/llm_args.py; llmapi/
disagg_utils.py): ``tensor_parallel_size`` counts all ranks of a stage, and attention data parallelism takes all of
them or none; a replica over several servers is one MPI world, started through ``trtllm-llmapi-launch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.hardware_specs.spec_writing import dump_yaml
from meshwright.planner.export.base import ExportBundle, ExportFile, raise_reasons
from meshwright.planner.export.scripts import label, required_variables
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
    MODEL_VARIABLE,
    pool_script_name,
    replica_shape,
    serving_file,
)
from meshwright.planner.serving.request_lengths import max_model_length
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = ["TensorrtLlmExporter", "tensorrt_llm_options", "tensorrt_llm_reasons"]

VERSION = "1.2"
_DTYPE: dict[str, str | None] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "auto",
    "fp8_block": "auto",
    "mxfp8": "auto",
    "nvfp4": "auto",
    "int4_wo": "auto",
}
_FROM_CHECKPOINT = ("fp8", "fp8_block", "mxfp8", "nvfp4", "int4_wo")
# A cache in the format of the model, or a smaller one.
_KV_DTYPE: dict[str, str | None] = {"bf16": "auto", "fp16": "auto", "fp8": "fp8", "nvfp4": "nvfp4"}
_POLICY: dict[str, str | None] = {"inflight": "off", "chunked_prefill": "on"}
_ROUTER: dict[str, str | None] = {
    "round_robin": "round_robin",
    "least_loaded": "load_balancing",
    "prefix_aware": "kv_cache_aware",
}


class TensorrtLlmExporter:
    """TensorRT-LLM's ``trtllm-serve`` on its PyTorch backend."""

    target = "tensorrt-llm"
    target_version = VERSION
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "tp, pp, ep, moe_tp; attention_dp with tp 1; redundant experts with attention_dp",
            "replicas": "one aggregated; several prefill and decode; over several servers by Slurm",
            "pools": "aggregated; prefill and decode",
            "policy": "inflight, chunked_prefill",
            "cache": "block size, prefix cache (block reuse), number of tokens",
            "precision": "fp16, bf16; fp8, fp8_block, mxfp8, nvfp4, int4_wo from the checkpoint",
            "kv": "bf16 or fp16 as the model, fp8, nvfp4",
            "drafts": "multi-token prediction",
            "router": "round_robin, least_loaded, prefix_aware, of prefill and decode pools",
        }
    )

    def unsupported(self, job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
        """Return every reason why TensorRT-LLM cannot run the plan; empty when it can."""
        wrong = engine_is(plan, "trtllm")
        if wrong is not None:
            return (wrong,)
        reasons = tensorrt_llm_reasons(job, plan)
        unrouted = _aggregated_needs_no_router(plan)
        return reasons if unrouted is None else (*reasons, unrouted)

    def export(self, job: ServingJob, plan: ServingPlan) -> ExportBundle:
        """Return the YAML and the script of every pool, and the script of the server in front of a pair.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_reasons(self.target, self.target_version, self.unsupported(job, plan))
        notes = (*serving_notes(job, plan, VERSION), *accuracy_notes(plan, _FROM_CHECKPOINT), *_notes())
        files: list[ExportFile] = []
        commands = []
        for pool in plan.pools:
            files += _pool_files(job, plan, pool, notes)
            starts = (
                f"sbatch {files[-1].name}" if files[-1].name.endswith("sbatch") else f"bash {files[-1].name}"
            )
            commands.append(f"MODEL=/path/to/checkpoint {starts}")
        if plan.is_disaggregated:
            files.append(_front_server(plan))
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=tuple(files),
            launch_command=" and ".join(commands),
            notes=notes,
        )


def tensorrt_llm_reasons(job: ServingJob, plan: ServingPlan) -> tuple[str, ...]:
    """Return every reason why TensorRT-LLM itself cannot run the plan, whoever starts it."""
    plan_rules = (plan_fits_cluster, _runs_on_nvidia, _precision_exists, _kv_precision_exists)
    pool_rules = (
        *COMMON_POOL_RULES,
        _attention_data_parallel_takes_all,
        _copies_need_attention_dp,
        _policy_exists,
        step_holds_a_prompt,
        _block_is_a_power_of_two,
    )
    return broken_pool_rules(job, plan, plan_rules, pool_rules)


def tensorrt_llm_options(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> dict[str, object]:
    """Return the options of a pool's replicas, by their names in ``LlmArgs``.

    Parameters
    ----------
    job, plan, pool : ServingJob, ServingPlan, ServingPool
        A pool of a plan that breaks no rule of the target.
    """
    cache: dict[str, object] = {
        "dtype": _KV_DTYPE[plan.kv_precision],
        "tokens_per_block": pool.block_size,
        "enable_block_reuse": pool.has_prefix_cache,
    }
    if pool.kv_cache_tokens is not None:
        cache["max_tokens"] = pool.kv_cache_tokens // pool.block_size * pool.block_size
    options: dict[str, object] = {
        "backend": "pytorch",
        "dtype": _DTYPE[plan.precision],
        "tensor_parallel_size": pool.tp * pool.attention_dp,
        "pipeline_parallel_size": pool.pp,
        "enable_attention_dp": pool.attention_dp > 1,
    }
    if job.model.moe is not None:
        options |= {"moe_expert_parallel_size": pool.ep, "moe_tensor_parallel_size": pool.moe_tp}
        if pool.redundant_experts:
            slots = job.model.moe.num_experts + pool.redundant_experts
            # WIDEEP is the backend that has slots for copies; it moves two layers' experts per iteration.
            options["moe_config"] = {
                "backend": "WIDEEP",
                "load_balancer": {"num_slots": slots, "layer_updates_per_iter": 2},
            }
    options |= {
        "max_batch_size": pool.max_num_sequences,
        "max_num_tokens": pool.max_num_batched_tokens,
        "max_seq_len": max_model_length(job),
        "enable_chunked_prefill": pool.policy == "chunked_prefill",
        "kv_cache_config": cache,
    }
    if pool.num_speculative_tokens:
        options["speculative_config"] = {
            "decoding_type": "MTP",
            "num_nextn_predict_layers": pool.num_speculative_tokens,
        }
    if pool.role != "aggregated":
        options["cache_transceiver_config"] = {"backend": "DEFAULT"}
        # The overlap scheduler does not run on servers that only prefill.
        options["disable_overlap_scheduler"] = pool.role == "prefill"
    return options


def _pool_files(
    job: ServingJob, plan: ServingPlan, pool: ServingPool, notes: tuple[str, ...]
) -> tuple[ExportFile, ExportFile]:
    title, stem = pool_title(job, plan, pool, f"TensorRT-LLM {VERSION}"), pool_script_name(pool)
    head = "\n".join([f"# {title}", *(f"# Note: {note}" for note in notes)])
    options = ExportFile(f"{stem}.yaml", head + "\n" + dump_yaml(tensorrt_llm_options(job, plan, pool)))
    if replica_shape(job, pool).num_servers > 1:
        return options, _slurm_file(job, pool, title)
    script = serving_file(
        job,
        pool,
        title=title,
        sources=(),
        words=(
            'trtllm-serve "$MODEL"',
            '--host 0.0.0.0 --port "$PORT"',
            f'--extra_llm_api_options "$EXPORT_DIR/{options.name}"',
        ),
    )
    return options, script


def _slurm_file(job: ServingJob, pool: ServingPool, title: str) -> ExportFile:
    shape, stem = replica_shape(job, pool), pool_script_name(pool)
    name = f"{stem}.sbatch"
    last = pool.num_replicas - 1
    array = f"#SBATCH --array=0-{last}\n" if last else ""
    text = f"""#!/usr/bin/env bash
#SBATCH --job-name=meshwright-{label(job.model.name)}-{stem}
#SBATCH --nodes={shape.num_servers}
#SBATCH --ntasks-per-node={shape.gpus_per_server}
#SBATCH --gpus-per-node={shape.gpus_per_server}
{array}#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# {title}
# One MPI rank per GPU{", one array element per replica" if last else ""}. Submit from the folder of this file, or set
# EXPORT_DIR to it. Rank 0 answers on PORT of its server.
set -euo pipefail

EXPORT_DIR="${{EXPORT_DIR:-${{SLURM_SUBMIT_DIR:-$PWD}}}}"
if [[ ! -f "$EXPORT_DIR/{stem}.yaml" ]]; then
  echo "{name}: no {stem}.yaml in $EXPORT_DIR; submit from its folder or set EXPORT_DIR" >&2
  exit 2
fi

{required_variables((MODEL_VARIABLE,))}

srun --mpi="${{MPI_TYPE:-pmix}}" --kill-on-bad-exit=1 trtllm-llmapi-launch \\
  trtllm-serve "$MODEL" \\
  --host 0.0.0.0 --port "${{PORT:-8000}}" \\
  --extra_llm_api_options "$EXPORT_DIR/{stem}.yaml" \\
  "$@"
"""
    return ExportFile(name, text, is_executable=True)


def _front_server(plan: ServingPlan) -> ExportFile:
    prefill, decode = plan.pools
    variables = (
        ("PREFILL_URLS", "the host:port of the prefill replicas, separated by spaces"),
        ("DECODE_URLS", "the host:port of the decode replicas, separated by spaces"),
    )
    text = f"""#!/usr/bin/env bash
# Meshwright: the server in front of the prefill and decode replicas, TensorRT-LLM {VERSION}.
# Run once, where every replica can be reached.
set -euo pipefail

{required_variables(variables)}

PORT="${{PORT:-8080}}"
if ! [[ "$PORT" =~ ^[0-9]{{1,5}}$ ]]; then
  echo "router.sh: PORT $PORT is not a port" >&2
  exit 2
fi
CONFIG="$(mktemp)"
trap 'rm -f -- "$CONFIG"' EXIT

list_servers() {{ # name of the section, replicas of the plan, name of the variable, its words
  local section="$1" count="$2" variable="$3" url
  shift 3
  if [[ "$#" -ne "$count" ]]; then
    echo "router.sh: the plan has $count $section, but $variable names $#" >&2
    exit 2
  fi
  printf '%s:\\n  num_instances: %s\\n  router:\\n    type: {_ROUTER[plan.router]}\\n  urls:\\n' "$section" "$count"
  for url in "$@"; do
    if ! [[ "$url" =~ ^[A-Za-z0-9._-]+:[0-9]{{1,5}}$ ]]; then
      echo "router.sh: $url in $variable is not host:port" >&2
      exit 2
    fi
    printf '    - "%s"\\n' "$url"
  done
}}

read -r -a PREFILL <<<"$PREFILL_URLS"
read -r -a DECODE <<<"$DECODE_URLS"
{{
  printf 'hostname: 0.0.0.0\\nport: %s\\nbackend: pytorch\\n' "$PORT"
  list_servers context_servers {prefill.num_replicas} PREFILL_URLS "${{PREFILL[@]}}"
  list_servers generation_servers {decode.num_replicas} DECODE_URLS "${{DECODE[@]}}"
}} >"$CONFIG"

trtllm-serve disaggregated -c "$CONFIG" "$@"
"""
    return ExportFile("router.sh", text, is_executable=True)


def _notes() -> tuple[str, ...]:
    return (
        "Share of GPU memory, CUDA graphs and kernels keep TensorRT-LLM's defaults; add keys to the YAML.",
        "Limits on sequences and tokens hold per rank where attention data parallelism is on.",
    )


def _runs_on_nvidia(job: ServingJob, plan: ServingPlan) -> str | None:
    vendor = job.cluster.gpu.vendor
    if vendor.lower() == "nvidia":
        return None
    return f"TensorRT-LLM runs on NVIDIA GPUs, not on {label(vendor)}; use engine 'vllm' or 'sglang'."


def _precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    return word_of("precision", plan.precision, _DTYPE, "TensorRT-LLM")


def _kv_precision_exists(job: ServingJob, plan: ServingPlan) -> str | None:
    reason = word_of("kv_precision", plan.kv_precision, _KV_DTYPE, "TensorRT-LLM")
    if reason is not None or _KV_DTYPE[plan.kv_precision] != "auto":
        return reason
    model = "fp16" if plan.precision == "fp16" else "bf16"
    if plan.kv_precision == model:
        return None
    return f"kv_precision '{plan.kv_precision}' must be that of the model, '{model}', or fp8 or nvfp4."


def _policy_exists(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    return word_of("policy", pool.policy, _POLICY, "TensorRT-LLM")


def _attention_data_parallel_takes_all(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """``enable_attention_dp`` is a switch: every rank of a stage holds the whole attention."""
    if pool.attention_dp == 1 or pool.tp == 1:
        return None
    ranks = pool.tp * pool.attention_dp
    return (
        f"attention_dp {pool.attention_dp} with tp {pool.tp}: TensorRT-LLM's attention data parallelism takes all "
        f"{ranks} ranks; use attention_dp {ranks} with tp 1, or attention_dp 1 with tp {ranks}."
    )


def _copies_need_attention_dp(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """The WIDEEP backend asserts attention data parallelism and whole experts (fused_moe_wide_ep.py)."""
    if not pool.redundant_experts or (pool.attention_dp > 1 and pool.moe_tp == 1):
        return None
    return (
        f"redundant_experts {pool.redundant_experts} need TensorRT-LLM's WIDEEP backend, which runs with attention_dp and "
        f"moe_tp 1, not attention_dp {pool.attention_dp} and moe_tp {pool.moe_tp}."
    )


def _block_is_a_power_of_two(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    size = pool.block_size
    if size & (size - 1) == 0:
        return None
    lower = 1 << (size.bit_length() - 1)
    return f"block_size {size} is not a power of two; use {lower} or {2 * lower}."


def _aggregated_needs_no_router(plan: ServingPlan) -> str | None:
    if plan.is_disaggregated or plan.pools[0].num_replicas == 1:
        return None
    return (
        f"num_replicas {plan.pools[0].num_replicas}: trtllm-serve has no router for aggregated replicas; "
        "export with --to dynamo, whose frontend has one."
    )
