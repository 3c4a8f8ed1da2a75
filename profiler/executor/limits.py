"""What the executor cannot run, and why: it refuses rather than runs something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from meshwright.errors import SpecError
from meshwright.profiler.executor.vocabulary_order import KINDS_OVER_STAGES
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.model import MlaSpec, ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES

__all__ = ["unsupported"]

_PRECISIONS = ("fp32", "tf32", "bf16")
# Fields that are built and run, or refused below by their value. One that is added later is refused until it is here.
_MODEL_FIELDS = frozenset(
    (
        *("name", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
        *("head_dim", "vocab_size", "max_position_embeddings", "is_gated_mlp", "has_tied_embeddings"),
        *("normalization", "norms_per_layer", "has_final_norm", "has_embedding_norm", "position_embedding"),
        *(
            "num_reserved_positions",
            "has_qkv_bias",
            "has_attention_output_bias",
            "has_mlp_bias",
            "has_head_bias",
        ),
        *(
            "has_attention_sinks",
            "has_qk_norm",
            "is_qk_norm_per_head",
            "has_parallel_block",
            "sliding_window",
        ),
        *("full_attention_interval", "moe", "mla", "num_mtp_layers"),
    )
)
_PLAN_FIELDS = frozenset(
    (
        *("dp", "tp", "pp", "vpp", "cp", "cp_method", "ep", "etp", "expert_overlap", "sequence_parallel"),
        *("micro_batch_size", "schedule", "recompute", "recompute_modules", "recompute_layers", "sharding"),
        *("sharding_group", "secondary_group", "optimizer_offload", "optimizer_offload_fraction"),
        *("parameter_offload", "activation_offload", "vocab_parallel", "layers_per_stage", "layer_groups"),
        "device_mapping",
    )
)
_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def unsupported(execution: Execution, *, is_served: bool = False) -> tuple[str, ...]:
    """Return the reasons why an execution cannot run; empty when it can.

    Each names a field and its value, and what would run.

    Parameters
    ----------
    execution : Execution
        What is to run.
    is_served : bool
        Without a pipeline schedule, and with the same tokens on all tensor parallel ranks.
    """
    return (
        *_of_model(execution, is_served),
        *_of_layout(execution, is_served),
        *(() if is_served else _of_batch(execution)),
        *_of_levers(execution),
    )


def _of_model(execution: Execution, is_served: bool) -> Iterator[str]:
    model = execution.model
    length = execution.workload.sequence_length
    for name in _unknown(model, _MODEL_FIELDS):
        yield f"{name} {getattr(model, name)} is not built; leave it out of the model"
    if model.mla is not None:
        yield from _of_latent_attention(execution, model.mla)
    # Of a model that is served they only draft.
    if model.num_mtp_layers and not is_served:
        yield f"num_mtp_layers {model.num_mtp_layers}: multi-token prediction is not built; run the model with 0"
    is_windowed = model.sliding_window is not None and model.sliding_window < length
    if is_windowed and execution.plan.cp > 1 and execution.plan.cp_method != "ulysses":
        yield (
            f"sliding_window {model.sliding_window} is not built for cp_method {execution.plan.cp_method}; use ulysses,"
            " or cp 1"
        )
    if execution.plan.cp > 1 and model.has_attention_sinks:
        yield "has_attention_sinks is not built for cp > 1; use cp 1"
    if execution.plan.cp > 1 and model.position_embedding == "alibi":
        yield "position_embedding alibi is not built for cp > 1; use cp 1"
    name, width = "head_dim", model.head_dim
    if model.mla is not None:
        name, width = "qk_rope_head_dim", model.mla.qk_rope_head_dim
    if model.position_embedding == "rope" and width % 2:
        yield f"{name} {width} has no planes to turn; rotary positions need an even one"
    if model.position_embedding == "learned" and model.max_position_embeddings < length:
        yield (
            f"sequence_length {length} exceeds max_position_embeddings {model.max_position_embeddings}, which are"
            " learned; use shorter sequences"
        )
    if model.has_qk_norm and not model.is_qk_norm_per_head:
        yield "has_qk_norm over all heads together is not built; set is_qk_norm_per_head"
    block, built = ("parallel", (1, 2)) if model.has_parallel_block else ("sequential", (2, 4))
    if model.norms_per_layer not in built:
        yield (
            f"norms_per_layer {model.norms_per_layer} of a {block} layer is not built; use {built[0]} or {built[1]}"
        )
    if model.has_parallel_block and model.norms_per_layer == 2 and execution.plan.tp > 1:
        yield (
            "norms_per_layer 2 of a parallel layer is not built for tp > 1: its halves have different inputs; use tp 1"
        )
    moe = model.moe
    if moe is None:
        return
    if model.has_parallel_block:
        yield "has_parallel_block is not built with experts; set it to false"
    if moe.num_experts % moe.num_expert_groups:
        yield f"num_experts {moe.num_experts} is no multiple of num_expert_groups {moe.num_expert_groups}; use one"
    elif moe.num_experts // moe.num_expert_groups * moe.top_k_groups < moe.top_k:
        yield f"top_k_groups {moe.top_k_groups} hold fewer experts than top_k {moe.top_k}; use more groups"
    if execution.workload.capacity_at(execution.plan.ep) is not None:
        yield "expert_capacity_factor is not built: no token is dropped; leave it out"


def _of_latent_attention(execution: Execution, mla: MlaSpec) -> Iterator[str]:
    model = execution.model
    known = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in _unknown(mla, frozenset(known)):
        yield f"{name} {getattr(mla, name)} of latent attention is not built; leave it out of mla"
    if execution.plan.cp > 1:
        yield "mla, latent attention, is not built for cp > 1; use cp 1"
    for name in ("has_qk_norm", "has_parallel_block", "has_attention_sinks"):
        if getattr(model, name):
            yield f"{name} is not built with mla, latent attention; set it to false"
    if model.sliding_window is not None:
        yield "sliding_window is not built with mla, latent attention; leave it out"
    if model.position_embedding == "alibi":
        yield "position_embedding alibi is not built with mla, latent attention; use rope"


def _of_layout(execution: Execution, is_served: bool) -> Iterator[str]:
    model, plan = execution.model, execution.plan
    moe = model.moe
    for name in _unknown(plan, _PLAN_FIELDS):
        yield f"{name} {getattr(plan, name)} is not run; leave it out of the plan"
    for name, value in _undivided(model, plan.tp):
        possible = [tp for tp in range(1, model.num_attention_heads + 1) if not _undivided(model, tp)]
        yield f"tp {plan.tp} does not divide {name} {value}; use one of {', '.join(map(str, possible))}"
    length = execution.workload.sequence_length
    pieces = plan.cp if plan.cp == 1 or plan.cp_method == "ulysses" else 2 * plan.cp
    if length % pieces:
        yield (
            f"sequence_length {length} does not divide into {pieces} pieces for cp {plan.cp} ({plan.cp_method}); use a"
            f" multiple of {pieces}"
        )
    elif plan.sequence_parallel and length // plan.cp % plan.tp:
        yield (
            f"sequence_parallel splits the {length // plan.cp} tokens of a rank, which tp {plan.tp} does not divide;"
            f" use a sequence_length that is a multiple of {plan.cp * plan.tp}"
        )
    if plan.cp > 1 and plan.cp_method == "hierarchical":
        yield "cp_method hierarchical is not built; use ring, ulysses or all_gather"
    held = max(model.num_query_groups // plan.tp, 1)
    if plan.cp > 1 and plan.cp_method == "ulysses" and held % plan.cp:
        yield (
            f"cp_method ulysses with cp {plan.cp} does not divide the {held} key/value heads of a rank, and copies none;"
            " use ring or all_gather"
        )
    for name, degree, of in (
        ("etp", plan.etp, ("moe_ffn_hidden_size", moe.moe_ffn_hidden_size if moe else 0)),
        ("ep", plan.ep, ("num_experts", moe.num_experts if moe else 0)),
    ):
        if degree > 1 and moe is None:
            yield f"{name} {degree} splits experts, and the model has none; use 1"
        elif of[1] % degree:
            yield f"{name} {degree} does not divide {of[0]} {of[1]}; use a divisor"
    if plan.etp > 1 and model.has_mlp_bias:
        yield f"etp {plan.etp} is not run with has_mlp_bias, as in Megatron-Core: experts with biases need etp 1; use it"
    if plan.tp * plan.cp * plan.dp % (plan.ep * plan.etp):
        experts = f"ep {plan.ep} x etp {plan.etp}" if plan.etp > 1 else f"ep {plan.ep}"
        yield f"{experts} does not divide the {plan.tp * plan.cp * plan.dp} ranks of a stage; use a divisor"
    if moe is not None and plan.tp > 1 and not (plan.sequence_parallel or is_served):
        yield "sequence_parallel is false, and experts with tp > 1 need it, as in Megatron-Core; set it to true"
    if plan.device_mapping is not None and plan.device_mapping.rank_order != RANK_ORDERS[0]:
        yield f"device_mapping.rank_order {plan.device_mapping.rank_order} is not run; use {RANK_ORDERS[0]}"
    if plan.layer_groups:
        yield "layer_groups, strategies of their own for some layers, are not run; plan without layer_wise"
    if plan.vocab_parallel in KINDS_OVER_STAGES:
        yield from _of_vocabulary(plan)
    if plan.expert_overlap > 1:
        yield f"expert_overlap {plan.expert_overlap} is not run; use 1"
    is_group = plan.sharding_group is not None and plan.sharding_group < plan.dp
    if is_group and plan.sharding in ("zero1", "zero2"):
        yield f"sharding_group {plan.sharding_group} is not run with {plan.sharding}; use zero3 or hsdp, or no group"
    if is_group and moe is not None:
        yield f"sharding_group {plan.sharding_group} is not run with experts; leave it out"
    if plan.schedule == "dualpipe" and plan.sharding in ("zero2", "zero3", "hsdp"):
        yield (
            f"schedule dualpipe, which holds two copies of the model, is not run with {plan.sharding}; use dualpipe_v, or"
            " sharding none or zero1"
        )


def _undivided(model: ModelSpec, tp: int) -> list[tuple[str, int]]:
    """Return what tensor parallel ranks cannot share out evenly: names and numbers of the model."""
    groups = 0 if model.mla else model.num_query_groups
    # More ranks than key/value heads hold copies of them.
    is_copied = groups and tp % groups == 0
    widths = (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", 0 if is_copied else groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("shared_ffn_hidden_size", model.moe.shared_ffn_hidden_size if model.moe else 0),
    )
    return [(name, width) for name, width in widths if width % tp]


def _of_vocabulary(plan: ParallelPlan) -> Iterator[str]:
    """Yield why a vocabulary is not split over the stages."""
    what = f"vocab_parallel '{plan.vocab_parallel}'"
    if plan.pp == 1:
        yield f"{what} splits the vocabulary over stages and needs pp > 1; with pp 1 use 'none'"
    elif plan.schedule != "1f1b":
        yield f"{what} is run with schedule 1f1b and vpp 1, not with {plan.schedule}; use 1f1b, or 'none'"


def _of_batch(execution: Execution) -> Iterator[str]:
    plan = execution.plan
    try:
        num_micro_batches = plan.num_micro_batches(execution.workload.global_batch_size)
        schedule = SCHEDULES[plan.schedule]
        chunks = plan.vpp * schedule.num_model_copies
        schedule.check(plan.pp, chunks, num_micro_batches)
    except SpecError as error:
        yield str(error)
        return
    if plan.vocab_parallel in KINDS_OVER_STAGES:
        # Every stage holds a slice of the tables.
        return
    num_virtual = len(plan.layers_per_stage)
    for stage, virtual in enumerate(schedule.placement(plan.pp, chunks).tolist()):
        held = [each % num_virtual for each in virtual]
        if not any(plan.layers_per_stage[each] or each in (0, num_virtual - 1) for each in held):
            yield f"layers_per_stage leaves stage {stage} no layer and no table to train; give it a layer"


def _of_levers(execution: Execution) -> Iterator[str]:
    plan, workload = execution.plan, execution.workload
    if workload.precision not in _PRECISIONS:
        yield (
            f"precision {workload.precision} is not run: its scaled products are the frameworks' own kernels;"
            f" the executor runs {', '.join(_PRECISIONS)}"
        )
    elif workload.precision == "tf32" and execution.device == "cpu":
        yield "precision tf32 needs a GPU; use fp32 on a processor"
    if workload.lora_rank is not None:
        yield f"lora_rank {workload.lora_rank}: low-rank adapters are not built; leave it out to train all weights"
    if plan.parameter_offload == "nvme":
        yield "parameter_offload 'nvme' is not run; use cpu"
    if plan.parameter_offload != "none":
        shards = (plan.sharding_group or plan.dp) * plan.cp
        if shards == 1 or (execution.model.moe is not None and plan.expert_dp == 1):
            what = "weights" if shards == 1 else "experts"
            yield f"parameter_offload of {what} that no other rank shares is not run: FSDP gathers none; use none"
    if plan.secondary_group is not None:
        yield f"secondary_group {plan.secondary_group} (hpZ) is not run; leave it out"
    for module in plan.recompute_modules:
        if module not in _MODULES:
            yield f"recompute_modules: '{module}' is not built; use some of {', '.join(_MODULES)}"


def _unknown(spec: ModelSpec | MlaSpec | ParallelPlan, known: frozenset[str]) -> list[str]:
    """Return the fields that are not known here and say something."""
    return [
        field.name
        for field in dataclasses.fields(spec)
        if field.name not in known and getattr(spec, field.name) != field.default
    ]
