"""What torchtitan cannot run, in the releases 0.2.1 and 0.3.0 and the torch schedules both build on.

Few of these are checked before the model is built: a batch too small for a schedule, a pipeline of a model with tied
embeddings and a schedule on compiled layers end the run once every rank has started.
"""

from __future__ import annotations

from meshwright.costmodels.software import load_software
from meshwright.planner.export.rules import (
    COMMON_RULES,
    Rule,
    divisors,
    fp8_runs_on_the_gpu,
    inner_stages_hold_layers,
    nearest,
    nearest_multiples,
    ranks_in_natural_order,
)
from meshwright.planner.export.torchtitan_flavors import find_flavor
from meshwright.planner.export.torchtitan_schedule import PLACED_LIKE, schedule_fits
from meshwright.planner.export.torchtitan_settings import SCHEDULE_NAMES, sharding_degrees
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["TORCHTITAN_0_2_RULES", "TORCHTITAN_0_3_RULES"]

_NEAR_SCHEDULE = {"dualpipe": "dualpipe_v"}
_TWO_CHUNKS = ("zb_v", "v_half", "v_min", "dualpipe_v")


def tensor_parallel_divides(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Every rank gets whole heads, of keys and values too, and an equal part of each MLP."""
    model = job.model
    sizes = {"num_attention_heads": model.num_attention_heads}
    if model.mla is None:
        sizes["num_query_groups"] = model.num_query_groups
    if model.moe is None or model.moe.num_dense_layers or model.moe.layer_frequency > 1:
        sizes["ffn_hidden_size"] = model.ffn_hidden_size
    if model.moe is not None and model.moe.shared_ffn_hidden_size:
        sizes["shared_ffn_hidden_size"] = model.moe.shared_ffn_hidden_size
    fitting = divisors(*sizes.values())
    if plan.tp in fitting:
        return None
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"tp {plan.tp} does not divide {listed}; use tp {nearest(plan.tp, fitting)}."


def sequence_splits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The trainer asks for a multiple of 2 cp times the ranks of sequence parallelism."""
    step = (2 * plan.cp if plan.cp > 1 else 1) * (plan.tp if plan.sequence_parallel else 1)
    length = job.workload.sequence_length
    if length % step == 0:
        return None
    return (
        f"sequence_length {length} does not split over cp {plan.cp} and tp {plan.tp}; "
        f"use {nearest_multiples(length, step)}."
    )


def schedule_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Names of torch.distributed.pipelining, or a table of one copy of the model; a V has two chunks per stage."""
    if plan.schedule == "none":
        return None
    if plan.schedule not in (*SCHEDULE_NAMES, *PLACED_LIKE):
        return (
            f"schedule '{plan.schedule}' does not exist in torchtitan; use '{_NEAR_SCHEDULE[plan.schedule]}'."
        )
    chunks = 2 if plan.schedule in _TWO_CHUNKS else 1
    if plan.schedule != "interleaved_1f1b" and plan.vpp != chunks:
        return f"schedule '{plan.schedule}' has vpp {chunks} in torchtitan, not {plan.vpp}."
    return None


def micro_batches_suffice(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The constructors of the schedules ask for enough micro-batches, or for whole rounds of them."""
    per_step = plan.dp * plan.micro_batch_size
    batch = job.workload.global_batch_size
    if plan.pp == 1 or batch % per_step:
        return None
    count = batch // per_step
    least = {"1f1b": plan.pp, "dualpipe_v": 2 * plan.pp}.get(plan.schedule, 1)
    if count < least:
        return (
            f"schedule '{plan.schedule}' needs {least} micro-batches or more but there are {count}; "
            f"use global_batch_size {least * per_step} or a smaller micro_batch_size."
        )
    rounds = max(1, count // plan.pp)
    if plan.schedule in ("interleaved_1f1b", "zb_h1") and count % rounds:
        return (
            f"schedule '{plan.schedule}' runs rounds of equal size but {count} micro-batches make {rounds} unequal "
            f"ones; use global_batch_size {nearest_multiples(batch, per_step * plan.pp)}."
        )
    return None


def pipeline_without_tied_embeddings(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """One stage would own the table, another would need it."""
    if plan.pp == 1 or not job.model.has_tied_embeddings:
        return None
    return f"tied embeddings (has_tied_embeddings) do not go with pp {plan.pp} in torchtitan; use pp 1."


def sharding_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """FSDP2 shards gradients at least, and its mesh spans cp."""
    if plan.sharding == "zero1":
        return "sharding 'zero1' does not exist in torchtitan (FSDP2); use 'zero2' or 'none'."
    if plan.sharding == "none" and plan.cp > 1:
        return f"torchtitan shards weights over the cp {plan.cp} ranks; use sharding 'zero3', not 'none', or cp 1."
    if plan.secondary_group is not None:
        return f"secondary_group {plan.secondary_group} (ZeRO++ hpZ) does not exist in torchtitan; use sharding 'hsdp'."
    return None


def expert_grid_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Expert parallelism takes ranks of dp_shard, cp and tp, none of the replicas."""
    if job.model.moe is None or plan.ep == 1:
        return None
    ranks = sharding_degrees(plan)[1] * plan.cp * plan.tp
    if ranks % (plan.ep * plan.etp) == 0:
        return None
    fitting = [d for d in divisors(job.model.moe.num_experts) if ranks % (plan.etp * d) == 0] or [1]
    return (
        f"ep {plan.ep} x etp {plan.etp} does not divide the {ranks} ranks that share weights (shards x cp x tp); "
        f"use ep {nearest(plan.ep, fitting)}."
    )


def whole_experts_split_by_tp(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Without expert parallelism, experts are split like any other matrix."""
    moe = job.model.moe
    if moe is None or plan.ep > 1:
        return None
    if plan.etp != plan.tp:
        return f"etp {plan.etp} with ep 1: torchtitan splits experts over tp {plan.tp}; use etp {plan.tp} or ep 2."
    if moe.moe_ffn_hidden_size % plan.etp:
        fitting = divisors(moe.moe_ffn_hidden_size)
        return (
            f"etp {plan.etp} does not divide moe_ffn_hidden_size {moe.moe_ffn_hidden_size}; "
            f"use {nearest(plan.etp, fitting)}."
        )
    return None


def experts_take_what_comes(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Routing is dropless, and no layer cuts its tokens in chunks."""
    if plan.expert_overlap > 1:
        return (
            f"expert_overlap {plan.expert_overlap} cuts a layer's tokens in chunks, which torchtitan does not; "
            "use expert_overlap 1."
        )
    factor = job.workload.capacity_at(plan.ep)
    if job.model.moe is None or factor is None:
        return None
    return f"expert_capacity_factor {factor:g} does not exist in torchtitan, which drops no tokens; leave it out."


def recompute_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Policies hold for all layers; the selective one picks operators itself."""
    if plan.recompute_modules:
        return (
            f"recompute_modules {', '.join(plan.recompute_modules)}: torchtitan's selective policy picks operators "
            "itself; leave them out."
        )
    if plan.recompute_layers is None or plan.recompute_layers >= max(plan.layers_per_stage):
        return None
    return (
        f"recompute_layers {plan.recompute_layers}: torchtitan recomputes all layers or none; leave it out."
    )


def offload_is_all_or_nothing(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """One switch moves weights, gradients and optimizer states of FSDP to host memory."""
    kinds = (plan.optimizer_offload, plan.parameter_offload)
    if "nvme" in kinds:
        return "offload to 'nvme' does not exist in torchtitan; use 'cpu' or target deepspeed."
    if plan.activation_offload:
        return "activation_offload does not exist in torchtitan; use recompute instead."
    if kinds in (("none", "none"), ("cpu", "cpu")) and plan.optimizer_offload_fraction == 1.0:
        return None
    return (
        f"optimizer_offload '{kinds[0]}' (fraction {plan.optimizer_offload_fraction:g}) with parameter_offload "
        f"'{kinds[1]}': torchtitan offloads both whole or neither (enable_cpu_offload); use 'cpu' for both."
    )


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Formats of mixed precision and of the quantization converters."""
    precision = job.workload.precision
    if precision in ("fp32", "bf16", "fp8", "mxfp8"):
        return None
    near = {"fp8_block": "fp8", "nvfp4": "mxfp8"}.get(precision, "bf16")
    return f"precision '{precision}' is not mapped to torchtitan; use '{near}'."


def fp8_scales_by_row(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The converter of 0.3 has no other recipe (quantization/float8.py), and a prediction should know."""
    if job.workload.precision != "fp8" or "float8_rowwise" in job.features:
        return None
    if not load_software(job.software).fp8_rowwise_cast_factor:
        # The prediction is for other software altogether, which a note says.
        return None
    return (
        "precision 'fp8' has one scale per row in torchtitan 0.3, one per tensor in the prediction; add the feature "
        "float8_rowwise or use target torchtitan-0.2."
    )


def sequence_parallel_comes_with_tp(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The tensor parallel plans of 0.2 are written for sequence parallelism."""
    if plan.tp == 1 or plan.sequence_parallel:
        return None
    return f"tp {plan.tp} always has sequence_parallel in torchtitan 0.2; turn it on."


def context_parallel_on_sdpa(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Ring attention of 0.2 wraps scaled dot product attention, which its DeepSeek models do not use."""
    if plan.cp == 1:
        return None
    if plan.cp_method not in ("ring", "all_gather"):
        return f"cp_method '{plan.cp_method}' does not exist in torchtitan 0.2; use 'ring' or 'all_gather'."
    flavor = find_flavor(job.model, "0.2.1")
    if flavor is not None and not flavor.has_ring_attention:
        return f"cp {plan.cp} does not go with the flex attention of {flavor.family} in torchtitan 0.2; use cp 1."
    return None


def replicas_stand_alone(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """DDP of 0.2 goes with no other axis."""
    if plan.sharding != "none" or plan.dp == 1 or (plan.num_gpus == plan.dp and plan.ep == 1):
        return None
    return f"sharding 'none' with dp {plan.dp} is DDP, which in torchtitan 0.2 goes with no other axis; use 'zero2'."


def experts_split_by_all_of_tp(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The expert mesh of 0.2 splits experts over all of tp or not at all."""
    if job.model.moe is None or plan.ep == 1 or plan.etp in (1, plan.tp):
        return None
    return f"etp {plan.etp} is neither 1 nor tp {plan.tp}, as torchtitan 0.2 asks; use one of them."


def overlapped_experts_are_not_recomputed(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The overlap of the expert all-to-all under DualPipeV excludes checkpoints (dual_pipe_v.py)."""
    if plan.schedule != "dualpipe_v" or plan.ep == 1 or plan.recompute == "none":
        return None
    return f"schedule 'dualpipe_v' with ep {plan.ep} excludes recompute '{plan.recompute}' in torchtitan 0.2; use 'none'."


def only_weights_of_the_model(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The trainer of 0.2 knows neither adapters nor multi-token prediction."""
    if job.workload.lora_rank is not None:
        return f"lora_rank {job.workload.lora_rank} does not exist in torchtitan 0.2; use target torchtitan (0.3)."
    if job.model.num_mtp_layers:
        return (
            f"multi-token prediction (num_mtp_layers {job.model.num_mtp_layers}) does not exist in torchtitan 0.2; "
            "export a model without."
        )
    return None


def context_parallel_gathers(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The flex attention of 0.3 gathers keys and values."""
    if plan.cp == 1 or plan.cp_method == "all_gather":
        return None
    return f"cp_method '{plan.cp_method}' does not exist in torchtitan 0.3, which gathers; use 'all_gather'."


def expert_parallel_keeps_experts_whole(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The expert mesh of 0.3 has no axis that splits an expert."""
    if job.model.moe is None or plan.ep == 1 or plan.etp == 1:
        return None
    return f"etp {plan.etp} with ep {plan.ep} does not exist in torchtitan 0.3; use etp 1."


def dual_pipe_overlaps_no_experts(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The release dropped the overlap of the expert all-to-all on which the schedule's prediction counts."""
    if plan.schedule != "dualpipe_v" or plan.ep == 1:
        return None
    return (
        f"schedule 'dualpipe_v' overlaps no expert all-to-all (ep {plan.ep}) in torchtitan 0.3; use 'zb_v' or target "
        "torchtitan-0.2."
    )


def positions_reach(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The rotary positions of a registered model end somewhere."""
    flavor, length = find_flavor(job.model, "0.3.0"), job.workload.sequence_length
    if flavor is None or length <= flavor.longest_sequence:
        return None
    return (
        f"sequence_length {length} exceeds the {flavor.longest_sequence} positions of {flavor.family} "
        f"{flavor.name} in torchtitan 0.3; use {flavor.longest_sequence} or less."
    )


def multi_token_prediction_stands_alone(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Its modules are deepseek_v3's and go with neither pipelines nor context parallelism (models/deepseek_v3/mtp.py)."""
    if not job.model.num_mtp_layers:
        return None
    flavor = find_flavor(job.model, "0.3.0")
    if flavor is not None and flavor.family != "deepseek_v3":
        return (
            f"multi-token prediction (num_mtp_layers {job.model.num_mtp_layers}) does not exist for {flavor.family} in "
            "torchtitan; export a model without."
        )
    if plan.pp == plan.cp == 1:
        return None
    return (
        f"multi-token prediction (num_mtp_layers {job.model.num_mtp_layers}) goes with neither pp {plan.pp} nor cp "
        f"{plan.cp} in torchtitan; use pp 1 and cp 1 or export a model without."
    )


def adapters_beside_dense_layers(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The converter adapts linear layers; experts are none."""
    if job.workload.lora_rank is None or job.model.moe is None:
        return None
    return f"lora_rank {job.workload.lora_rank} adapts no experts in torchtitan; export a dense model."


_SHARED: tuple[Rule, ...] = (
    *COMMON_RULES,
    ranks_in_natural_order,
    tensor_parallel_divides,
    sequence_splits,
    schedule_exists,
    schedule_fits,
    micro_batches_suffice,
    inner_stages_hold_layers,
    pipeline_without_tied_embeddings,
    sharding_exists,
    expert_grid_exists,
    whole_experts_split_by_tp,
    experts_take_what_comes,
    recompute_exists,
    offload_is_all_or_nothing,
    precision_exists,
    fp8_runs_on_the_gpu,
)
TORCHTITAN_0_2_RULES: tuple[Rule, ...] = (
    *_SHARED,
    sequence_parallel_comes_with_tp,
    context_parallel_on_sdpa,
    replicas_stand_alone,
    experts_split_by_all_of_tp,
    overlapped_experts_are_not_recomputed,
    only_weights_of_the_model,
)
TORCHTITAN_0_3_RULES: tuple[Rule, ...] = (
    *_SHARED,
    fp8_scales_by_row,
    context_parallel_gathers,
    expert_parallel_keeps_experts_whole,
    dual_pipe_overlaps_no_experts,
    positions_reach,
    multi_token_prediction_stands_alone,
    adapters_beside_dense_layers,
)
