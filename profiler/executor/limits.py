"""What the executor cannot run, and why: it refuses rather than runs something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from meshwright.errors import SpecError
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
    """Return the reasons why an execution cannot run, each one sentence; empty when it can.

    Parameters
    ----------
    execution : Execution
        What is to run.
    is_served : bool
        Without a pipeline schedule, and with the same tokens on all tensor parallel ranks.
    """
    return (
        *_of_model(execution),
        *_of_layout(execution, is_served),
        *(() if is_served else _of_batch(execution)),
        *_of_levers(execution),
    )


def _of_model(execution: Execution) -> Iterator[str]:
    model = execution.model
    length = execution.workload.sequence_length
    for name in _unknown(model, _MODEL_FIELDS):
        yield f"{name} {getattr(model, name)} is not built"
    if model.mla is not None:
        yield from _of_latent_attention(execution, model.mla)
    if model.num_mtp_layers:
        yield f"multi-token prediction ({model.num_mtp_layers} modules) is not built"
    is_windowed = model.sliding_window is not None and model.sliding_window < length
    if is_windowed and execution.plan.cp > 1 and execution.plan.cp_method != "ulysses":
        yield f"a sliding window of {model.sliding_window} is not built for cp_method {execution.plan.cp_method}"
    if execution.plan.cp > 1 and model.has_attention_sinks:
        yield "attention sinks are not built for cp > 1"
    if execution.plan.cp > 1 and model.position_embedding == "alibi":
        yield "ALiBi positions are not built for cp > 1"
    rotary_dim = model.head_dim if model.mla is None else model.mla.qk_rope_head_dim
    if model.position_embedding == "rope" and rotary_dim % 2:
        yield f"rotary positions need an even head_dim, not {rotary_dim}"
    if model.position_embedding == "learned" and model.max_position_embeddings < length:
        yield f"sequences of {length} exceed the {model.max_position_embeddings} learned positions"
    if model.has_qk_norm and not model.is_qk_norm_per_head:
        yield "query and key norms over all heads together are not built"
    if model.norms_per_layer not in ((1, 2) if model.has_parallel_block else (2, 4)):
        block = "parallel" if model.has_parallel_block else "sequential"
        yield f"{model.norms_per_layer} norms in a {block} layer are not built"
    if model.has_parallel_block and model.norms_per_layer == 2 and execution.plan.tp > 1:
        yield "a parallel block with two norms is not built for tp > 1: its halves have different inputs"
    moe = model.moe
    if moe is None:
        return
    if model.has_parallel_block:
        yield "parallel blocks with experts are not built"
    if moe.num_experts % moe.num_expert_groups:
        yield f"{moe.num_experts} experts do not divide into {moe.num_expert_groups} groups"
    elif moe.num_experts // moe.num_expert_groups * moe.top_k_groups < moe.top_k:
        yield f"{moe.top_k_groups} groups of experts hold fewer than top_k {moe.top_k}"
    if execution.workload.capacity_at(execution.plan.ep) is not None:
        yield "an expert capacity factor is not built: no token is dropped"


def _of_latent_attention(execution: Execution, mla: MlaSpec) -> Iterator[str]:
    model = execution.model
    known = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in _unknown(mla, frozenset(known)):
        yield f"{name} {getattr(mla, name)} of latent attention is not built"
    if execution.plan.cp > 1:
        yield "latent attention is not built for cp > 1"
    for name in ("has_qk_norm", "has_parallel_block", "has_attention_sinks"):
        if getattr(model, name):
            yield f"latent attention is not built with {name}"
    if model.sliding_window is not None:
        yield "latent attention is not built with a sliding window"
    if model.position_embedding == "alibi":
        yield "latent attention is not built with ALiBi positions"


def _of_layout(execution: Execution, is_served: bool) -> Iterator[str]:
    model, plan = execution.model, execution.plan
    moe = model.moe
    for name in _unknown(plan, _PLAN_FIELDS):
        yield f"{name} {getattr(plan, name)} is not run"
    groups = 0 if model.mla else model.num_query_groups
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", 0 if groups and plan.tp % groups == 0 else groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("shared_ffn_hidden_size", moe.shared_ffn_hidden_size if moe else 0),
    ):
        if value % plan.tp:
            yield f"tp {plan.tp} does not divide {name} {value}"
    length = execution.workload.sequence_length
    pieces = plan.cp if plan.cp == 1 or plan.cp_method == "ulysses" else 2 * plan.cp
    if length % pieces:
        yield f"sequences of {length} do not divide into {pieces} pieces for cp {plan.cp} ({plan.cp_method})"
    elif plan.sequence_parallel and length // plan.cp % plan.tp:
        yield f"tp {plan.tp} does not divide the {length // plan.cp} tokens of a rank (sequence parallel)"
    if plan.cp > 1 and plan.cp_method == "hierarchical":
        yield "hierarchical context parallelism is not built; use ring, ulysses or all_gather"
    held = max(model.num_query_groups // plan.tp, 1)
    if plan.cp > 1 and plan.cp_method == "ulysses" and held % plan.cp:
        yield (
            f"ulysses with cp {plan.cp} does not divide the {held} key/value heads"
            " of a rank (they are not copied)"
        )
    if plan.etp > 1 and (moe is None or moe.moe_ffn_hidden_size % plan.etp):
        width = f"moe_ffn_hidden_size {moe.moe_ffn_hidden_size}" if moe else "a model without experts"
        yield f"etp {plan.etp} does not divide {width}"
    if plan.etp > 1 and model.has_mlp_bias:
        yield "experts with biases need etp 1, as in Megatron-Core"
    if plan.ep > 1 and (moe is None or moe.num_experts % plan.ep):
        yield f"ep {plan.ep} does not divide {moe.num_experts if moe else 'a model without'} experts"
    if plan.tp * plan.cp * plan.dp % (plan.ep * plan.etp):
        experts = f"ep {plan.ep} x etp {plan.etp}" if plan.etp > 1 else f"ep {plan.ep}"
        yield f"{experts} does not divide the {plan.tp * plan.cp * plan.dp} ranks of a stage"
    if moe is not None and plan.tp > 1 and not (plan.sequence_parallel or is_served):
        yield "experts with tp > 1 need sequence parallelism, as in Megatron-Core"
    if plan.device_mapping is not None and plan.device_mapping.rank_order != RANK_ORDERS[0]:
        yield f"rank order {plan.device_mapping.rank_order} is not run; {RANK_ORDERS[0]} is"
    if plan.layer_groups:
        yield "layer groups with strategies of their own are not run"
    # Redistributed layers are those that the stages name.
    if plan.vocab_parallel not in ("none", "redistributed"):
        yield f"vocabulary parallelism over stages ('{plan.vocab_parallel}') is not run"
    if plan.expert_overlap > 1:
        yield f"expert_overlap {plan.expert_overlap} is not run"
    is_group = plan.sharding_group is not None and plan.sharding_group < plan.dp
    if is_group and plan.sharding in ("zero1", "zero2"):
        yield f"{plan.sharding} inside groups of {plan.sharding_group} is not run; zero3 and hsdp are"
    if is_group and moe is not None:
        yield "sharding groups with experts are not run"
    if plan.schedule == "dualpipe" and plan.sharding in ("zero2", "zero3", "hsdp"):
        yield f"dualpipe, which holds two copies of the model, is not run with {plan.sharding}"


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
    num_virtual = len(plan.layers_per_stage)
    for stage, virtual in enumerate(schedule.placement(plan.pp, chunks).tolist()):
        held = [each % num_virtual for each in virtual]
        if not any(plan.layers_per_stage[each] or each in (0, num_virtual - 1) for each in held):
            yield f"stage {stage} holds no layer and no table: it has nothing to train"


def _of_levers(execution: Execution) -> Iterator[str]:
    plan, workload = execution.plan, execution.workload
    if workload.precision not in _PRECISIONS:
        yield (
            f"precision {workload.precision} is not run: its scaled products are the frameworks' own kernels;"
            f" the executor runs {', '.join(_PRECISIONS)}"
        )
    elif workload.precision == "tf32" and execution.device == "cpu":
        yield "precision tf32 needs a GPU"
    if workload.lora_rank is not None:
        yield "low-rank adapters are not built"
    if plan.optimizer_offload == "nvme":
        yield "optimizer_offload 'nvme' is not run; cpu is"
    if plan.parameter_offload != "none":
        yield f"parameter_offload '{plan.parameter_offload}' is not run"
    if plan.activation_offload and (plan.recompute != "full" or plan.recompute_layers is not None):
        yield (
            "activation_offload is run where recompute is full, of all layers: what rests on the host is then the"
            " layers' inputs"
        )
    if plan.secondary_group is not None:
        yield f"secondary_group {plan.secondary_group} (hpZ) is not run"
    for module in plan.recompute_modules:
        if module not in _MODULES:
            yield f"recompute of '{module}' is not built; it recomputes {', '.join(_MODULES)}"


def _unknown(spec: ModelSpec | MlaSpec | ParallelPlan, known: frozenset[str]) -> list[str]:
    """Return the fields that are not known here and say something."""
    return [
        field.name
        for field in dataclasses.fields(spec)
        if field.name not in known and getattr(spec, field.name) != field.default
    ]
