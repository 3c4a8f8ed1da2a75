"""What Megatron-LM (core_r0.16) cannot run, including what its own argument parser lets through.

The parser accepts, among others, an expert grid larger than the world, mixture of experts with tensor but
without sequence parallelism, and interleaved schedules with a bad micro-batch remainder; such runs fail
minutes later, on every node.
"""

from __future__ import annotations

import math

from meshwright.planner.export.rules import (
    COMMON_RULES,
    Rule,
    divisors,
    nearest,
    nearest_multiples,
)
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["FP8_ALIGNMENT", "MEGATRON_RULES", "is_fully_sharded", "num_sharding_groups", "window_bites"]

#: Multiple that Transformer Engine asks of matrix dimensions: 16-byte rows of fp8, or 32-value MX blocks.
FP8_ALIGNMENT = {"fp8": 16, "fp8_block": 16, "mxfp8": 32}

_BIASES_ALL_NONE_OR_QKV = ((False, False, False), (True, False, False), (True, True, True))


def is_fully_sharded(plan: ParallelPlan) -> bool:
    """Return whether gradients (and weights) are sharded too, which is Megatron-FSDP's work."""
    return plan.sharding in ("zero2", "zero3", "hsdp")


def num_sharding_groups(plan: ParallelPlan) -> int:
    """Return how many replicas of the sharded state there are over dp."""
    return 1 if plan.sharding_group is None or plan.sharding == "none" else plan.dp // plan.sharding_group


def window_bites(job: TrainingJob) -> bool:
    """Return whether the sliding window is shorter than the sequence."""
    window = job.model.sliding_window
    return window is not None and window < job.workload.sequence_length


def tensor_parallel_divides_attention(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Query heads split over tp; key/value heads split or are replicated evenly."""
    heads, groups = job.model.num_attention_heads, job.model.num_query_groups
    splits_groups = job.model.mla is None
    fitting = [d for d in divisors(heads) if not splits_groups or groups % d == 0 or d % groups == 0]
    if plan.tp in fitting:
        return None
    return (
        f"tp {plan.tp} does not split num_attention_heads {heads} with num_query_groups {groups}; "
        f"use tp {nearest(plan.tp, fitting)}."
    )


def tensor_parallel_divides_mlp(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Each MLP's width splits over its tensor-parallel ranks."""
    for name, width, axis, degree in _mlp_widths(job, plan):
        if width % degree:
            return f"{axis} {degree} does not divide {name} {width}; use {axis} {nearest(degree, divisors(width))}."
    return None


def _mlp_widths(job: TrainingJob, plan: ParallelPlan) -> tuple[tuple[str, int, str, int], ...]:
    """Return name, width, axis and degree of each kind of MLP that the model has."""
    dense = ("ffn_hidden_size", job.model.ffn_hidden_size, "tp", plan.tp)
    moe = job.model.moe
    if moe is None:
        return (dense,)
    experts = ("moe_ffn_hidden_size", moe.moe_ffn_hidden_size, "etp", plan.etp)
    shared = ("shared_ffn_hidden_size", moe.shared_ffn_hidden_size, "tp", plan.tp)
    has_dense_layers = moe.num_dense_layers > 0 or moe.layer_frequency > 1
    return (dense, experts, shared) if has_dense_layers else (experts, shared)


def sequence_splits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Context parallelism cuts 2 cp chunks (causal balance); sequence parallelism cuts each share by tp."""
    step = 2 * plan.cp if plan.cp > 1 else 1
    if plan.sequence_parallel:
        step = math.lcm(step, plan.cp * plan.tp)
    length = job.workload.sequence_length
    if length % step == 0:
        return None
    return (
        f"sequence_length {length} does not split over cp {plan.cp} and tp {plan.tp}; "
        f"use {nearest_multiples(length, step)}."
    )


def schedule_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Megatron-LM has 1F1B and interleaved 1F1B."""
    if plan.schedule in ("none", "1f1b", "interleaved_1f1b"):
        return None
    near = "interleaved_1f1b" if plan.vpp > 1 else "1f1b"
    return f"schedule '{plan.schedule}' does not exist in Megatron-LM; use '{near}'."


def interleaving_fills_groups(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Interleaved 1F1B runs micro-batches in groups of pp; the parser does not look, the schedule does."""
    per_step = plan.dp * plan.micro_batch_size
    batch = job.workload.global_batch_size
    if plan.schedule != "interleaved_1f1b" or batch % per_step:
        return None
    count = batch // per_step
    if count % plan.pp == 0:
        return None
    return (
        f"interleaved_1f1b needs micro-batches in multiples of pp {plan.pp} but there are {count}; "
        f"use global_batch_size {nearest_multiples(batch, per_step * plan.pp)}."
    )


def inner_stages_hold_layers(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Only the first and the last stage have work (embedding, loss) without layers."""
    empty = [index for index, count in enumerate(plan.layers_per_stage[1:-1], start=1) if count == 0]
    if not empty:
        return None
    return f"virtual stage {empty[0]} of layers_per_stage holds 0 layers; give it at least 1."


def sharding_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Megatron-FSDP has no pipeline, and replicates only whole zero3 groups."""
    if is_fully_sharded(plan) and plan.pp > 1:
        return f"sharding '{plan.sharding}' (Megatron-FSDP) needs pp 1, not {plan.pp}; use 'zero1' or pp 1."
    if plan.sharding == "zero2" and num_sharding_groups(plan) > 1:
        return (
            f"zero2 cannot be kept inside sharding_group {plan.sharding_group}; use sharding_group {plan.dp}."
        )
    if job.model.moe is not None and num_sharding_groups(plan) > 1:
        return (
            f"experts cannot be sharded inside sharding_group {plan.sharding_group}; "
            f"use sharding_group {plan.dp} (all of dp)."
        )
    return None


def expert_grid_fits_world(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The expert grid etp x ep x pp must divide the world; the parser does not look."""
    stage = plan.num_gpus // plan.pp
    if job.model.moe is None or stage % (plan.etp * plan.ep) == 0:
        return None
    fitting = [d for d in divisors(job.model.moe.num_experts) if stage % (plan.etp * d) == 0]
    fix = (
        f"use ep {nearest(plan.ep, fitting)}" if fitting else f"use etp {nearest(plan.etp, divisors(stage))}"
    )
    return (
        f"etp {plan.etp} x ep {plan.ep} does not divide the {stage} ranks of a stage (tp x cp x dp); {fix}."
    )


def experts_with_tp_need_sp(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The first forward pass of a MoE layer refuses tp without sequence parallelism."""
    if job.model.moe is None or plan.tp == 1 or plan.sequence_parallel:
        return None
    return f"mixture of experts with tp {plan.tp} needs sequence_parallel; turn it on or use tp 1."


def expert_biases_need_etp_1(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Biases of experts are not split."""
    if job.model.moe is None or plan.etp == 1 or not job.model.has_mlp_bias:
        return None
    return f"experts with biases need etp 1, not {plan.etp}."


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Formats that map to flags of the target."""
    precision = job.workload.precision
    if precision in ("bf16", "fp16", *FP8_ALIGNMENT):
        return None
    near = "fp8" if precision in ("nvfp4", "int8", "int4_wo") else "bf16"
    return f"precision '{precision}' is not mapped to Megatron-LM flags; use '{near}'."


def fp8_matrices_align(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """fp8 matrices need aligned dimensions on every rank; Transformer Engine says so in the first step."""
    step = FP8_ALIGNMENT.get(job.workload.precision)
    if step is None:
        return None
    model = job.model
    shards = plan.cp * (plan.tp if plan.sequence_parallel else 1)
    sizes = (
        ("hidden_size", model.hidden_size, 1),
        ("num_attention_heads x head_dim", model.num_attention_heads * model.head_dim, plan.tp),
        *((name, width, degree) for name, width, _, degree in _mlp_widths(job, plan)),
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


def attention_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Windows cannot be cut by ring attention; norms of queries and keys are per head; sinks are not mapped."""
    model = job.model
    if window_bites(job) and plan.cp > 1:
        return (
            f"sliding_window {model.sliding_window} does not go with cp {plan.cp} (p2p); use cp 1 or "
            f"sequence_length {model.sliding_window} or less."
        )
    if model.has_attention_sinks:
        return "attention sinks (has_attention_sinks) are not mapped to Megatron-LM; export a model without them."
    if model.has_qk_norm and not model.is_qk_norm_per_head:
        return "query/key norms are per head in Megatron-LM (is_qk_norm_per_head); export a model like that."
    return None


MEGATRON_RULES: tuple[Rule, ...] = (
    *COMMON_RULES,
    tensor_parallel_divides_attention,
    tensor_parallel_divides_mlp,
    sequence_splits,
    schedule_exists,
    interleaving_fills_groups,
    inner_stages_hold_layers,
    sharding_exists,
    expert_grid_fits_world,
    experts_with_tp_need_sp,
    expert_biases_need_etp_1,
    precision_exists,
    fp8_matrices_align,
    positions_exist,
    block_exists,
    biases_exist,
    attention_exists,
)
