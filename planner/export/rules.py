"""Rules that hold for every target: sizes that must divide, ranks that must fill whole nodes.

A rule looks at a job and a plan and returns None, or one sentence that names the offending values and
the nearest ones that would do. Frameworks check some of these themselves, late or not at all; a plan that
passes here starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.export.scripts import label
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "COMMON_RULES",
    "Rule",
    "broken_rules",
    "divisors",
    "fp8_runs_on_the_gpu",
    "inner_stages_hold_layers",
    "nearest",
    "nearest_multiples",
    "ranks_in_natural_order",
    "scales_have_settings",
    "server_size",
    "window_bites",
]

Rule = Callable[[TrainingJob, ParallelPlan], str | None]

# A node of a cluster spec is a scale-up domain. The largest single server has 16 GPUs (DGX-2); larger domains
# (GB200 and GB300 NVL72) are racks of servers with 4 GPUs each, and launchers run once per server.
_LARGEST_SERVER, _GPUS_OF_A_RACK_SERVER = 16, 4
#: NVIDIA generations whose tensor cores take each format (Transformer Engine 2.11, quantization.py).
_FP8_GENERATIONS = {
    "fp8": ("ada", "hopper", "blackwell", "rubin"),
    "fp8_block": ("hopper", "blackwell", "rubin"),
    "mxfp8": ("blackwell", "rubin"),
}


def broken_rules(rules: Iterable[Rule], job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    """Return the sentence of every rule that the plan breaks."""
    found = (rule(job, plan) for rule in rules)
    return tuple(reason for reason in found if reason is not None)


def divisors(*numbers: int) -> tuple[int, ...]:
    """Return the common divisors of the numbers, ascending.

    Examples
    --------
    >>> divisors(12, 8)
    (1, 2, 4)
    """
    return tuple(d for d in range(1, min(numbers) + 1) if all(number % d == 0 for number in numbers))


def nearest(value: int, allowed: Iterable[int]) -> str:
    """Return the allowed values just below and just above ``value`` in words.

    Examples
    --------
    >>> nearest(3, [1, 2, 4])
    '2 or 4'
    >>> nearest(9, [1, 2, 4])
    '4'
    """
    ordered = sorted(allowed)
    below = [candidate for candidate in ordered if candidate <= value][-1:]
    above = [candidate for candidate in ordered if candidate > value][:1]
    return " or ".join(str(candidate) for candidate in below + above)


def nearest_multiples(value: int, step: int) -> str:
    """Return the positive multiples of ``step`` around ``value`` in words.

    Examples
    --------
    >>> nearest_multiples(10, 4)
    '8 or 12'
    >>> nearest_multiples(3, 4)
    '4'
    """
    lower = value // step * step
    return f"{lower} or {lower + step}" if lower else str(step)


def server_size(cluster: ClusterSpec) -> int:
    """Return the GPUs of one server, which one launcher starts."""
    num_gpus = cluster.node.num_gpus
    return num_gpus if num_gpus <= _LARGEST_SERVER else _GPUS_OF_A_RACK_SERVER


def window_bites(job: TrainingJob) -> bool:
    """Return whether the sliding window is shorter than the sequence."""
    window = job.model.sliding_window
    return window is not None and window < job.workload.sequence_length


def stages_hold_every_layer(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The stages must hold exactly the model's layers."""
    if plan.num_layers == job.model.num_layers:
        return None
    return (
        f"layers_per_stage adds up to {plan.num_layers} layers but the model has {job.model.num_layers}; "
        f"make it add up to {job.model.num_layers}."
    )


def ranks_fill_whole_nodes(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The world must fit the cluster and fill its servers."""
    per_node, world, available = server_size(job.cluster), plan.num_gpus, job.cluster.num_gpus
    if world > available:
        return (
            f"the plan takes {world} GPUs but the cluster has {available}; lower dp {plan.dp} or add nodes."
        )
    if world > per_node and world % per_node:
        return (
            f"the plan takes {world} GPUs, which does not fill whole nodes of {per_node}; "
            f"use {nearest_multiples(world, per_node)} GPUs."
        )
    return None


def batch_divides(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """``global_batch_size`` must be a multiple of ``dp * micro_batch_size``."""
    try:
        plan.num_micro_batches(job.workload.global_batch_size)
    except SpecError as error:
        return f"{error}."
    return None


def layers_run_alike(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """No released framework gives groups of layers a strategy of their own."""
    if not plan.layer_groups:
        return None
    return (
        "layer_groups give layers strategies of their own, which no target can; export a plan without them."
    )


def replicas_run_alike(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Released frameworks run as many micro-batches on every data parallel rank and average their gradients as equals."""
    if not plan.micro_batch_shares:
        return None
    return (
        f"micro_batch_shares give replicas {min(plan.micro_batch_shares)} to {max(plan.micro_batch_shares)} "
        "micro-batches, and the target runs equally many on every replica; take a plan with stages on islands, or with "
        "equal shares."
    )


def gpus_share_a_vendor(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """One collective library drives all ranks of a job."""
    vendors = sorted({gpu.vendor for gpu in job.cluster.gpus})
    if len(vendors) == 1:
        return None
    return (
        f"the cluster mixes GPUs of {' and '.join(label(vendor) for vendor in vendors)}, whose collective libraries do "
        "not talk to each other; plan each vendor's nodes alone."
    )


def settings_take_effect(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """A setting that another one switches off is a slip; written out it would vanish without a word."""
    if plan.cp == 1 and plan.cp_method != "ring":
        return f"cp_method '{plan.cp_method}' does nothing at cp 1; use 'ring' or a larger cp."
    if plan.optimizer_offload == "none" and plan.optimizer_offload_fraction != 1.0:
        return (
            f"optimizer_offload_fraction {plan.optimizer_offload_fraction:g} does nothing with optimizer_offload "
            "'none'; use fraction 1 or optimizer_offload 'cpu'."
        )
    if plan.pp == 1 and plan.vocab_parallel == "redistributed":
        return "vocab_parallel 'redistributed' does nothing at pp 1; use 'none' or a larger pp."
    return None


def mapping_fits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """A mapping names the hosts and GPUs of the plan's nodes."""
    per_node = min(server_size(job.cluster), plan.num_gpus)
    if plan.device_mapping is None or plan.num_gpus % per_node:
        return None
    try:
        plan.device_mapping.check_fits(plan.num_gpus // per_node, per_node)
    except SpecError as error:
        return f"{error}."
    return None


def ranks_in_natural_order(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Only Megatron can run its ranks through the stages before the replicas."""
    mapping = plan.device_mapping
    if mapping is None or plan.pp == 1 or plan.dp == 1 or mapping.rank_order == RANK_ORDERS[0]:
        return None
    return f"rank_order '{mapping.rank_order}' has no counterpart in the target; use '{RANK_ORDERS[0]}'."


def vocabulary_stays_whole(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """No released framework cuts the vocabulary over stages; moving layers off the ends is a layout like any other."""
    if plan.vocab_parallel in ("none", "redistributed"):
        return None
    return (
        f"vocab_parallel '{plan.vocab_parallel}' has no counterpart in the target; "
        "use vocab_parallel 'none' or 'redistributed'."
    )


def inner_stages_hold_layers(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Only the first and the last stage have work (embedding, loss) without layers."""
    empty = [index for index, count in enumerate(plan.layers_per_stage[1:-1], start=1) if count == 0]
    if not empty:
        return None
    return f"virtual stage {empty[0]} of layers_per_stage holds 0 layers; give it at least 1."


def fp8_runs_on_the_gpu(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Each fp8 format needs a generation of tensor cores; the library says so in the first step."""
    precision = job.workload.precision
    generations = _FP8_GENERATIONS.get(precision)
    for gpu in job.cluster.gpus:
        if generations is None or gpu.vendor.lower() != "nvidia":
            continue
        if not gpu.architecture.lower().startswith(generations):
            return (
                f"precision '{precision}' does not run on {label(gpu.architecture)} GPUs (it needs "
                f"{', '.join(generations)}); use 'bf16'."
            )
    return None


def expert_axes_need_experts(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Expert axes are for mixture-of-experts models, and experts must divide."""
    moe = job.model.moe
    if moe is None:
        if plan.ep == plan.etp == 1:
            return None
        return f"ep {plan.ep} and etp {plan.etp} need a mixture-of-experts model; use ep 1 and etp 1."
    if moe.num_experts % plan.ep:
        near = nearest(plan.ep, divisors(moe.num_experts))
        return f"ep {plan.ep} does not divide num_experts {moe.num_experts}; use ep {near}."
    return None


def storage_has_settings(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Narrow storage that the prediction counts on must not fall back to 16 and 32 bits without a word."""
    narrow = [each for each in ("bf16_moments", "fp8_activations") if each in job.features]
    if not narrow:
        return None
    return (
        f"features {', '.join(narrow)} narrow what a rank holds and are not written into the target's files; "
        "leave them out."
    )


def scales_have_settings(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Only torchtitan is told how many scales an fp8 operand has; other targets would run one per tensor."""
    if "float8_rowwise" not in job.features:
        return None
    return (
        "feature float8_rowwise (one scale per row, torchao) has no setting in this target; leave it out or use target "
        "torchtitan."
    )


COMMON_RULES: tuple[Rule, ...] = (
    layers_run_alike,
    replicas_run_alike,
    gpus_share_a_vendor,
    settings_take_effect,
    storage_has_settings,
    stages_hold_every_layer,
    ranks_fill_whole_nodes,
    batch_divides,
    mapping_fits,
    vocabulary_stays_whole,
    expert_axes_need_experts,
)
