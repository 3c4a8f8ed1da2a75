"""What models and number formats Megatron-LM (core_r0.16) cannot run."""

from __future__ import annotations

from meshwright.planner.export.rules import Rule, fp8_runs_on_the_gpu, nearest_multiples
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MEGATRON_MODEL_RULES", "mlp_widths"]

#: Multiple that Transformer Engine asks of matrix dimensions: 16-byte rows of fp8, or 32-value MX blocks.
_FP8_ALIGNMENT = {"fp8": 16, "fp8_block": 16, "mxfp8": 32}

_BIASES_ALL_NONE_OR_QKV = ((False, False, False), (True, False, False), (True, True, True))


def mlp_widths(job: TrainingJob, plan: ParallelPlan) -> tuple[tuple[str, int, str, int], ...]:
    """Return name, width, axis and degree of each kind of MLP that the model has."""
    dense = ("ffn_hidden_size", job.model.ffn_hidden_size, "tp", plan.tp)
    moe = job.model.moe
    if moe is None:
        return (dense,)
    experts = ("moe_ffn_hidden_size", moe.moe_ffn_hidden_size, "etp", plan.etp)
    shared = ("shared_ffn_hidden_size", moe.shared_ffn_hidden_size, "tp", plan.tp)
    has_dense_layers = moe.num_dense_layers > 0 or moe.layer_frequency > 1
    return (dense, experts, shared) if has_dense_layers else (experts, shared)


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Formats that map to flags of the target."""
    precision = job.workload.precision
    if precision in ("bf16", "fp16", *_FP8_ALIGNMENT):
        return None
    near = "fp8" if precision in ("nvfp4", "int8", "int4_wo") else "bf16"
    return f"precision '{precision}' is not mapped to Megatron-LM flags; use '{near}'."


def fp8_matrices_align(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """fp8 matrices need aligned dimensions on every rank; Transformer Engine says so in the first step."""
    step = _FP8_ALIGNMENT.get(job.workload.precision)
    if step is None:
        return None
    model = job.model
    shards = plan.cp * (plan.tp if plan.sequence_parallel else 1)
    sizes = (
        ("hidden_size", model.hidden_size, 1),
        ("num_attention_heads x head_dim", model.num_attention_heads * model.head_dim, plan.tp),
        *((name, width, degree) for name, width, _, degree in mlp_widths(job, plan)),
        ("micro_batch_size x sequence_length", plan.micro_batch_size * job.workload.sequence_length, shards),
    )
    for name, size, ranks in sizes:
        if size % (step * ranks):
            return (
                f"{job.workload.precision} needs {name} {size} over {ranks} ranks in multiples of {step}; "
                f"use {nearest_multiples(size, step * ranks)} or precision 'bf16'."
            )
    return None


def positions_exist(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """ALiBi is absent; a learned table cannot be longer than it is."""
    model, length = job.model, job.workload.sequence_length
    if model.position_embedding == "alibi":
        return "Megatron-LM has no ALiBi positions; export a model with rope or learned positions."
    if model.position_embedding == "learned" and length > model.max_position_embeddings:
        return (
            f"sequence_length {length} exceeds the {model.max_position_embeddings} learned positions; "
            f"use {model.max_position_embeddings} or less."
        )
    if model.mla is not None and model.position_embedding != "rope":
        return f"multi-latent attention needs rope positions, not '{model.position_embedding}'."
    return None


def block_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """A Megatron layer is norm, attention, norm, MLP in sequence, with a final norm."""
    model = job.model
    if model.has_parallel_block:
        return "attention and MLP in parallel (has_parallel_block) do not exist; export a sequential block."
    if model.norms_per_layer != 2:
        return f"a layer has 2 norms, not norms_per_layer {model.norms_per_layer}; export a model with 2."
    if not model.has_final_norm or model.has_embedding_norm:
        return "a final norm is always there and an embedding norm never; export a model shaped like that."
    if model.normalization == "layernorm_nobias":
        return "normalization 'layernorm_nobias' does not exist; use 'layernorm' or 'rmsnorm'."
    return None


def biases_exist(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Linear biases come all together, for query/key/value only, or not at all; the head has none."""
    model = job.model
    if model.has_head_bias:
        return "the LM head has no bias; use has_head_bias false."
    biases = (model.has_qkv_bias, model.has_attention_output_bias, model.has_mlp_bias)
    if biases in _BIASES_ALL_NONE_OR_QKV:
        return None
    return (
        f"biases on qkv {biases[0]}, attention output {biases[1]}, MLP {biases[2]} cannot be combined; "
        "use all, none, or qkv only."
    )


def router_groups_divide(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Group-limited routing: groups share the experts evenly and those a token reaches hold enough of them."""
    moe = job.model.moe
    if moe is None or moe.num_expert_groups == 1:
        return None
    if moe.num_experts % moe.num_expert_groups:
        return f"num_expert_groups {moe.num_expert_groups} does not divide num_experts {moe.num_experts}."
    per_group = moe.num_experts // moe.num_expert_groups
    if moe.top_k < moe.top_k_groups or moe.top_k > per_group * moe.top_k_groups:
        return (
            f"top_k {moe.top_k} experts cannot be chosen from top_k_groups {moe.top_k_groups} groups of {per_group}; "
            f"use {moe.top_k_groups} to {per_group * moe.top_k_groups} experts."
        )
    return None


def multi_token_prediction_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Its modules take rope or no positions."""
    model = job.model
    if not model.num_mtp_layers or model.position_embedding in ("rope", "none"):
        return None
    return f"multi-token prediction (num_mtp_layers {model.num_mtp_layers}) needs rope or no positions."


def adapters_are_not_trained(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """pretrain_gpt.py trains all weights; adapters live in Megatron-Bridge's Python recipes."""
    rank = job.workload.lora_rank
    if rank is None:
        return None
    return (
        f"lora_rank {rank} has no option of pretrain_gpt.py; adapters are Megatron-Bridge's (a Python recipe); "
        "leave lora_rank out."
    )


def attention_sinks_and_norms_exist(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Norms of queries and keys are per head; sinks are not mapped."""
    model = job.model
    if model.has_attention_sinks:
        return "attention sinks (has_attention_sinks) are not mapped to Megatron-LM; export a model without them."
    if model.has_qk_norm and not model.is_qk_norm_per_head:
        return "query/key norms are per head in Megatron-LM (is_qk_norm_per_head); export a model like that."
    return None


MEGATRON_MODEL_RULES: tuple[Rule, ...] = (
    precision_exists,
    fp8_runs_on_the_gpu,
    fp8_matrices_align,
    positions_exist,
    block_exists,
    biases_exist,
    attention_sinks_and_norms_exist,
    router_groups_divide,
    multi_token_prediction_exists,
    adapters_are_not_trained,
)
