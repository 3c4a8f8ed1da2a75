"""What plans Megatron-LM (core_r0.16) cannot run, including what its own argument parser lets through.

The parser accepts, among others, an expert grid larger than the world, mixture of experts with tensor but
without sequence parallelism, interleaved schedules with a bad micro-batch remainder, and head exchange between
more ranks than there are key/value heads; such runs fail minutes later, on every node.
"""

from __future__ import annotations

import math

from meshwright.planner.export.megatron_model_rules import MEGATRON_MODEL_RULES, mlp_widths
from meshwright.planner.export.rules import (
    COMMON_RULES,
    Rule,
    divisors,
    inner_stages_hold_layers,
    nearest,
    nearest_multiples,
    scales_have_settings,
    window_bites,
)
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MEGATRON_RULES", "head_exchange_ranks", "is_fully_sharded", "num_sharding_groups"]

_V_SHAPED = ("zb_v", "v_half", "v_min", "dualpipe_v")


def is_fully_sharded(plan: ParallelPlan) -> bool:
    """Return whether gradients (and weights) are sharded too, which is Megatron-FSDP's work."""
    return plan.sharding in ("zero2", "zero3", "hsdp")


def num_sharding_groups(plan: ParallelPlan) -> int:
    """Return how many replicas of the sharded state there are over dp."""
    return 1 if plan.sharding_group is None or plan.sharding == "none" else plan.dp // plan.sharding_group


def head_exchange_ranks(job: TrainingJob, plan: ParallelPlan) -> int:
    """Return the ranks that swap sequence for heads: all of cp, those of one node, or 1.

    The same as :func:`meshwright.costmodels.parallelism.context.head_exchange_degree`, for one plan.
    """
    if plan.cp_method == "ulysses":
        return plan.cp
    if plan.cp_method == "hierarchical":
        return math.gcd(plan.cp, max(1, job.cluster.node.num_gpus // plan.tp))
    return 1


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
    for name, width, axis, degree in mlp_widths(job, plan):
        if width % degree:
            return f"{axis} {degree} does not divide {name} {width}; use {axis} {nearest(degree, divisors(width))}."
    return None


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


def context_parallel_method_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Transformer Engine (2.11, context_parallel.py) limits each exchange, when the first layer runs."""
    if plan.cp == 1:
        return None
    model, inner = job.model, head_exchange_ranks(job, plan)
    if plan.cp_method == "hierarchical" and inner in (1, plan.cp):
        near = "ring" if inner == 1 else "ulysses"
        return (
            f"cp_method 'hierarchical' needs a cp group with several ranks on each of several nodes, but {inner} of "
            f"cp {plan.cp} share a node; use '{near}'."
        )
    if model.mla is not None and plan.cp_method in ("ulysses", "all_gather"):
        return f"multi-latent attention does not go with cp_method '{plan.cp_method}'; use 'ring' or 'hierarchical'."
    if window_bites(job) and plan.cp_method in ("ring", "hierarchical"):
        return (
            f"sliding_window {model.sliding_window} does not go with cp {plan.cp} and cp_method '{plan.cp_method}'; "
            f"use 'ulysses', 'all_gather', cp 1 or sequence_length {model.sliding_window} or less."
        )
    groups = model.num_attention_heads if model.mla is not None else model.num_query_groups
    if inner > 1 and groups % (plan.tp * inner):
        fitting = [d for d in divisors(plan.cp) if groups % (plan.tp * d) == 0] or [1]
        return (
            f"cp_method '{plan.cp_method}' swaps sequence for heads over {inner} ranks, which with tp {plan.tp} do not "
            f"share {groups} key/value heads evenly; use 'ring' or {nearest(inner, fitting)} ranks."
        )
    return None


def schedule_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Megatron-LM has 1F1B and interleaved 1F1B."""
    if plan.schedule in ("none", "1f1b", "interleaved_1f1b"):
        return None
    near = "interleaved_1f1b" if plan.vpp > 1 else "1f1b"
    also = " (it places chunks in a loop, never in a V)" if plan.schedule in _V_SHAPED else ""
    return f"schedule '{plan.schedule}' does not exist in Megatron-LM{also}; use '{near}'."


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


def secondary_weights_exist(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """A second copy of sharded weights near by is ZeRO++'s."""
    if plan.secondary_group is None:
        return None
    return (
        f"secondary_group {plan.secondary_group} (ZeRO++ hpZ) does not exist in Megatron-LM; leave it out, "
        "use sharding 'hsdp' or target deepspeed."
    )


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


def experts_are_not_chunked(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Its own overlap of the expert all-to-all pairs micro-batches of two model chunks; it cuts none."""
    if plan.expert_overlap == 1:
        return None
    return (
        f"expert_overlap {plan.expert_overlap} cuts a layer's tokens in chunks, which Megatron-LM does not; it has "
        "--overlap-moe-expert-parallel-comm, between micro-batches; use expert_overlap 1."
    )


def recompute_modules_exist(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """A module that the model lacks is recomputed nowhere; fp8 with delayed scaling excludes two."""
    moe, modules = job.model.moe, set(plan.recompute_modules)
    absent = set()
    if moe is None:
        absent |= {"moe", "moe_act", "shared_experts"}
    elif not moe.num_dense_layers and moe.layer_frequency == 1:
        absent |= {"mlp"}
    if moe is not None and not moe.shared_ffn_hidden_size:
        absent |= {"shared_experts"}
    if job.model.mla is None:
        absent |= {"mla_up_proj"}
    missing = sorted(modules & absent)
    if missing:
        return f"recompute_modules {', '.join(missing)}: the model has none; leave them out."
    if {"moe", "moe_act"} <= modules:
        return "recompute_modules moe recomputes moe_act too; name one of them."
    delayed = sorted(modules & {"layernorm", "moe_act"})
    if job.workload.precision == "fp8" and delayed:
        return (
            f"recompute_modules {', '.join(delayed)} does not go with precision 'fp8' (delayed scaling); "
            "use 'fp8_block', 'mxfp8' or 'bf16'."
        )
    return None


def recompute_layers_fit(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The number of recomputed layers counts those of one virtual stage."""
    most = max(plan.layers_per_stage)
    if plan.recompute_layers is None or plan.recompute_layers <= most:
        return None
    return f"recompute_layers {plan.recompute_layers} is more than the {most} layers of a virtual stage; use {most}."


def optimizer_offload_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The hybrid optimizer works on the distributed optimizer's shards and on host memory only."""
    if plan.optimizer_offload == "none":
        return None
    if plan.optimizer_offload == "nvme":
        return "optimizer_offload 'nvme' does not exist in Megatron-LM; use 'cpu' or target deepspeed."
    if plan.sharding != "zero1":
        return (
            f"optimizer_offload 'cpu' needs the distributed optimizer without FSDP (sharding 'zero1'), not "
            f"'{plan.sharding}'; use 'zero1'."
        )
    return None


def weights_stay_on_the_device(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Only optimizer states and activations leave the device."""
    if plan.parameter_offload == "none":
        return None
    return f"parameter_offload '{plan.parameter_offload}' does not exist in Megatron-LM; use 'none' or target deepspeed."


def activation_offload_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Whole layers are offloaded without pipeline and recompute; elsewhere only single modules are."""
    if not plan.activation_offload:
        return None
    if plan.pp > 1 or plan.recompute != "none":
        return (
            f"activation_offload needs pp 1 and recompute 'none' in Megatron-LM (here pp {plan.pp}, recompute "
            f"'{plan.recompute}'); its --fine-grained-activation-offloading moves single modules only."
        )
    if plan.num_layers == 1:
        return "activation_offload leaves the last layer on the device and needs 2 layers or more."
    return None


def rank_order_fits_experts(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Off the default order, dense layers and experts must have equally many replicas (parallel_state.py)."""
    mapping = plan.device_mapping
    if mapping is None or mapping.rank_order == RANK_ORDERS[0] or plan.pp == 1:
        return None
    if job.model.moe is None and plan.cp > 1:
        # The grid of experts exists without them, with etp equal to tp and the ranks of cp among its replicas.
        return (
            f"rank_order '{mapping.rank_order}' needs cp 1, not {plan.cp}; use rank_order '{RANK_ORDERS[0]}'."
        )
    if job.model.moe is None or plan.ep * plan.etp == plan.tp * plan.cp:
        return None
    return (
        f"rank_order '{mapping.rank_order}' needs ep {plan.ep} x etp {plan.etp} to be tp {plan.tp} x cp {plan.cp}; "
        f"use rank_order '{RANK_ORDERS[0]}'."
    )


MEGATRON_RULES: tuple[Rule, ...] = (
    *COMMON_RULES,
    scales_have_settings,
    rank_order_fits_experts,
    *MEGATRON_MODEL_RULES,
    tensor_parallel_divides_attention,
    tensor_parallel_divides_mlp,
    sequence_splits,
    context_parallel_method_exists,
    schedule_exists,
    interleaving_fills_groups,
    inner_stages_hold_layers,
    sharding_exists,
    secondary_weights_exist,
    expert_grid_fits_world,
    experts_with_tp_need_sp,
    expert_biases_need_etp_1,
    experts_are_not_chunked,
    recompute_modules_exist,
    recompute_layers_fit,
    optimizer_offload_exists,
    weights_stay_on_the_device,
    activation_offload_exists,
)
