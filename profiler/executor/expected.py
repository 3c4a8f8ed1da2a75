"""What every rank of a plan sends in one step, and in which order its stage runs, told from plan and model alone.

Bytes are those of the buffer a rank contributes (:mod:`meshwright.profiler.executor.communication`). All-to-alls of
experts depend on the routing on their way back, and wherever experts are split; what is told is the mean over the group,
whose sum is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from meshwright.profiler.executor.local_tensors import LocalTensor, has_experts, local_tensors
from meshwright.profiler.executor.pipeline_order import PipelineOrder
from meshwright.profiler.executor.rank_order import Coordinates, coordinates
from meshwright.profiler.executor.vocabulary_order import (
    EMBEDDING,
    EMBEDDING_GRADIENT,
    GRADIENT_BROADCAST,
    HIDDEN_BROADCAST,
    LOGITS,
    LOGITS_GRADIENT,
    RESCALE,
    VOCABULARY_NAMES,
)
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import FORWARD, WEIGHT_GRADIENT

__all__ = ["DRIVE_GROUP", "ExpectedTraffic", "expected_operations", "expected_traffic", "tells_activations"]

# Messages and bytes by axis and operation.
ExpectedTraffic = dict[tuple[str, str], tuple[int, int]]

_GRADIENT_BYTES = 4
_COUNT_BYTES = 8
# Master weight and two moments.
_STATES_BYTES = 12
#: Parameters whose states are in host memory at once on their way between drive and processor.
DRIVE_GROUP = 2**25
# Loss and squared gradient norm in double precision.
_SUMS_BYTES = 16


class _Sums:
    """Messages and bytes that add up."""

    def __init__(self) -> None:
        self._messages: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def add(self, axis: str, operation: str, num_bytes: int, messages: int = 1) -> None:
        """Add messages of equal size."""
        if messages:
            self._messages[axis, operation] += messages
            self._bytes[axis, operation] += messages * num_bytes

    def result(self) -> ExpectedTraffic:
        """Return the sums."""
        return {key: (self._messages[key], self._bytes[key]) for key in sorted(self._messages)}


def expected_operations(execution: Execution) -> tuple[list[tuple[int, int, int]], ...]:
    """Return what each stage runs: kind, micro-batch and virtual stage of every operation, in order."""
    order = _order(execution)
    return tuple(
        [
            (operation.kind, operation.micro_batch, operation.virtual_stage)
            for operation in order.operations(stage)
        ]
        for stage in range(execution.plan.pp)
    )


def expected_traffic(execution: Execution) -> tuple[ExpectedTraffic, ...]:
    """Return what each rank sends in one step, in the order of the ranks.

    Notes
    -----
    Per layer and micro-batch, with ``A`` the bytes of the activations of a rank's tokens: an all-reduce of ``A`` for
    each pair of split products forward and backward, or with sequence parallelism an all-gather of ``A / tp`` and a
    reduce-scatter of ``A`` (arXiv 2205.05198, section 4.2.2); a ring passes keys and values ``cp - 1`` times forward,
    again backward, and their single-precision gradients ``cp`` times.
    """
    order = _order(execution)
    return tuple(_rank_traffic(execution, order, rank) for rank in range(execution.plan.num_gpus))


def tells_activations(plan: ParallelPlan) -> bool:
    """Return whether the bytes of offloaded activations follow from plan and model: those of layers' inputs do.

    What else layers keep for backward is the choice of Torch's kernels, another on each device.
    """
    return plan.recompute == "full" and plan.recompute_layers is None


def _order(execution: Execution) -> PipelineOrder:
    batch = execution.workload.global_batch_size
    return PipelineOrder(execution.plan, execution.plan.num_micro_batches(batch))


def _rank_traffic(execution: Execution, order: PipelineOrder, rank: int) -> ExpectedTraffic:
    plan, sums = execution.plan, _Sums()
    at = coordinates(plan, rank)
    for operation in order.operations(at.pp):
        if operation.kind in VOCABULARY_NAMES:
            _vocabulary_traffic(execution, at, operation.kind, sums)
        elif operation.kind != WEIGHT_GRADIENT:
            _compute_traffic(execution, order, operation.virtual_stage, operation.kind == FORWARD, sums)
        sent = order.sent(operation)
        if sent is not None and sent[0] != at.pp:
            parts = plan.tp if plan.sequence_parallel else 1
            sums.add("pp", "send", _activation_bytes(execution) // parts)
    chunks = [local_tensors(execution.model, plan, order, int(virtual)) for virtual in order.placement[at.pp]]
    if plan.sharding in ("none", "zero1"):
        _flat_traffic(execution, order, chunks, sums)
    else:
        _sharded_traffic(execution, order, at, chunks, sums)
    if (plan.optimizer_offload, plan.parameter_offload) != ("none", "none"):
        _host_traffic(execution, at, chunks, sums)
    if plan.num_gpus > 1:
        sums.add("world", "all_reduce", _SUMS_BYTES)
    return sums.result()


def _element_bytes(execution: Execution) -> int:
    return 2 if execution.workload.precision == "bf16" else 4


def _tokens(execution: Execution) -> int:
    plan = execution.plan
    return plan.micro_batch_size * execution.workload.sequence_length // plan.cp


def _activation_bytes(execution: Execution) -> int:
    return _element_bytes(execution) * _tokens(execution) * execution.model.hidden_size


def _compute_traffic(
    execution: Execution, order: PipelineOrder, virtual: int, is_forward: bool, sums: _Sums
) -> None:
    """Add what a forward or backward of a virtual stage sends over tp, cp and ep."""
    plan, num_layers = execution.plan, order.layers[virtual]
    first = order.first_layer(virtual)
    num_recomputed = (plan.recompute_layers or num_layers) if plan.recompute == "full" else 0
    if plan.activation_offload and tells_activations(plan):
        entering = _activation_bytes(execution) // (plan.tp if plan.sequence_parallel else 1)
        sums.add("activations", "to_host" if is_forward else "from_host", entering, messages=num_layers)
    for each in range(num_layers):
        _layer_traffic(execution, first + each, is_forward, each < num_recomputed, sums)
    if plan.tp == 1:
        return
    if order.is_vocabulary_split:
        # What the slices of the stages add up to is in parts still, on the ranks of the stage that gets it.
        gets_sum = order.has_embedding(virtual) if is_forward else order.has_head(virtual)
        if gets_sum and not plan.sequence_parallel:
            sums.add("tp", "all_reduce", _activation_bytes(execution))
        return
    if order.has_embedding(virtual):
        _leave(execution, is_forward, sums)
    if order.has_head(virtual):
        _enter(execution, is_forward, sums)
        if is_forward:
            sums.add("tp", "all_reduce", _GRADIENT_BYTES * _tokens(execution), messages=3)


def _vocabulary_traffic(execution: Execution, at: Coordinates, kind: int, sums: _Sums) -> None:
    """Add a pass over a slice of the vocabulary: the hidden states of a rank, or three numbers of each token."""
    plan = execution.plan
    whole = _activation_bytes(execution)
    splits_tokens = plan.sequence_parallel and plan.tp > 1
    own = whole // plan.tp if splits_tokens else whole
    reducing = RESCALE if plan.vocab_parallel == "vocab_2" else LOGITS_GRADIENT
    if kind in (EMBEDDING, reducing):
        sums.add("vocab", "reduce", own)
        if splits_tokens:
            sums.add("tp", "reduce_scatter", whole)
    if kind in (LOGITS, EMBEDDING_GRADIENT) and splits_tokens:
        sums.add("tp", "all_gather", own)
    if kind == LOGITS:
        sums.add("vocab", "all_gather", 3 * _GRADIENT_BYTES * _tokens(execution))
    if (kind, at.pp) in ((HIDDEN_BROADCAST, plan.pp - 1), (GRADIENT_BROADCAST, 0)):
        sums.add("vocab", "broadcast", own)


def _layer_traffic(
    execution: Execution, layer: int, is_forward: bool, is_recomputed: bool, sums: _Sums
) -> None:
    model = execution.model
    modules = _recomputed_modules(execution)
    for runs_forward in [True] if is_forward else [False] + [True] * is_recomputed:
        _enter(execution, runs_forward, sums, _attention_input_width(execution))
        _leave(execution, runs_forward, sums)
        _context_traffic(execution, runs_forward, sums)
        if has_experts(model, layer):
            _expert_traffic(execution, runs_forward, sums)
        elif not model.has_parallel_block:
            _pair(execution, runs_forward, sums)
    if is_forward:
        return
    # Selective recompute runs forward again what it names; a part inside another one once for each.
    if "core_attn" in modules:
        _context_traffic(execution, True, sums)
    if has_experts(model, layer):
        if "moe" in modules:
            _expert_traffic(execution, True, sums)
        if "shared_experts" in modules and _has_shared(execution):
            _pair(execution, True, sums)
    elif "mlp" in modules and not model.has_parallel_block:
        _pair(execution, True, sums)


def _recomputed_modules(execution: Execution) -> tuple[str, ...]:
    plan = execution.plan
    if plan.recompute != "selective":
        return ()
    return plan.recompute_modules or ("core_attn",)


def _has_shared(execution: Execution) -> bool:
    moe = execution.model.moe
    return moe is not None and moe.shared_ffn_hidden_size > 0


def _pair(execution: Execution, is_forward: bool, sums: _Sums) -> None:
    """Add a pair of split products."""
    _enter(execution, is_forward, sums)
    _leave(execution, is_forward, sums)


def _attention_input_width(execution: Execution) -> int:
    """Return the width of what enters the split products of attention: latents where there are some."""
    model = execution.model
    mla = model.mla
    if mla is None:
        return model.hidden_size
    return (mla.q_lora_rank or model.hidden_size) + mla.kv_lora_rank + mla.qk_rope_head_dim


def _enter(execution: Execution, is_forward: bool, sums: _Sums, width: int | None = None) -> None:
    plan = execution.plan
    whole = _element_bytes(execution) * _tokens(execution) * (width or execution.model.hidden_size)
    if plan.tp == 1:
        return
    if plan.sequence_parallel:
        if is_forward:
            sums.add("tp", "all_gather", whole // plan.tp)
        else:
            sums.add("tp", "reduce_scatter", whole)
    elif not is_forward:
        sums.add("tp", "all_reduce", whole)


def _leave(execution: Execution, is_forward: bool, sums: _Sums) -> None:
    plan, whole = execution.plan, _activation_bytes(execution)
    if plan.tp == 1:
        return
    if plan.sequence_parallel:
        if is_forward:
            sums.add("tp", "reduce_scatter", whole)
        else:
            sums.add("tp", "all_gather", whole // plan.tp)
    elif is_forward:
        sums.add("tp", "all_reduce", whole)


def _context_traffic(execution: Execution, is_forward: bool, sums: _Sums) -> None:
    """Add the exchange of an attention core over context parallel ranks."""
    model, plan = execution.model, execution.plan
    if plan.cp == 1:
        return
    element = _element_bytes(execution)
    per_head = _tokens(execution) * model.head_dim
    heads, groups = model.num_attention_heads // plan.tp, max(model.num_query_groups // plan.tp, 1)
    if plan.cp_method == "ring":
        sums.add("cp", "send", 2 * groups * per_head * element, messages=plan.cp - 1)
        if not is_forward:
            sums.add("cp", "send", 2 * groups * per_head * _GRADIENT_BYTES, messages=plan.cp)
    elif plan.cp_method == "ulysses":
        sums.add("cp", "all_to_all", (heads + 2 * groups) * per_head * element)
        sums.add("cp", "all_to_all", heads * per_head * element)
    elif is_forward:
        sums.add("cp", "all_gather", 2 * groups * per_head * element)
    else:
        sums.add("cp", "reduce_scatter", plan.cp * 2 * groups * per_head * element)


def _expert_traffic(execution: Execution, is_forward: bool, sums: _Sums) -> None:
    """Add a mixture of experts: numbers of rows, rows to the experts and back; shared experts."""
    model, plan = execution.model, execution.plan
    moe = model.moe
    assert moe is not None
    rows = _tokens(execution) // (plan.tp if plan.sequence_parallel else 1) * moe.top_k
    row_bytes = rows * model.hidden_size * _element_bytes(execution)
    if plan.ep > 1:
        if is_forward:
            sums.add("ep", "all_to_all", moe.num_experts * _COUNT_BYTES)
        sums.add("ep", "all_to_all", row_bytes, messages=2)
    if plan.etp > 1:
        if is_forward:
            sums.add("etp", "all_gather", moe.num_experts * _COUNT_BYTES)
        sums.add("etp", "all_to_all", plan.etp * row_bytes, messages=2)
    if _has_shared(execution):
        _pair(execution, is_forward, sums)


def _flat_traffic(
    execution: Execution, order: PipelineOrder, chunks: list[list[LocalTensor]], sums: _Sums
) -> None:
    """Add what flat gradient buffers and the distributed optimizer send."""
    plan = execution.plan
    is_sharded = plan.sharding == "zero1"
    is_mirrored = order.num_copies > 1
    tied = 0
    for chunk in chunks:
        for kind, tensors in _by_kind(chunk):
            axis, ranks = _replicas(execution, kind)
            size = sum(tensor.size for tensor in tensors)
            size = -(-size // ranks) * ranks if is_sharded else size
            for over, summed in _summed(plan, tensors):
                sums.add(over, "all_reduce", _GRADIENT_BYTES * sum(tensor.size for tensor in summed))
            if is_mirrored and kind != "tied":
                sums.add("mirror", "all_reduce", _GRADIENT_BYTES * size)
            tied = size if kind == "tied" else tied
            if ranks == 1:
                continue
            if is_sharded:
                sums.add(axis, "reduce_scatter", _GRADIENT_BYTES * size)
                sums.add(axis, "all_gather", _element_bytes(execution) * size // ranks)
            else:
                sums.add(axis, "all_reduce", _GRADIENT_BYTES * size)
    num_tied = sum(any(tensor.kind == "tied" for tensor in chunk) for chunk in chunks)
    if tied and plan.pp > 1 and (num_tied == 1 or is_mirrored):
        sums.add("embedding", "all_reduce", _GRADIENT_BYTES * tied)


def _host_traffic(
    execution: Execution, at: Coordinates, chunks: list[list[LocalTensor]], sums: _Sums
) -> None:
    """Add the gradients that go to the host and the weights that come back: by buffer, or by tensor from FSDP."""
    plan = execution.plan
    is_flat = plan.sharding in ("none", "zero1")
    for chunk in chunks:
        for kind, tensors in _by_kind(chunk):
            if is_flat:
                size = sum(tensor.size for tensor in tensors)
                ranks = _replicas(execution, kind)[1] if plan.sharding == "zero1" else 1
                sizes = [-(-size // ranks)]
            elif kind == "expert":
                index = ((at.dp * plan.cp + at.cp) * plan.tp + at.tp) // (plan.ep * plan.etp)
                sizes = [tensor.share(plan.expert_dp, index) for tensor in tensors]
            else:
                shards = (plan.sharding_group or plan.dp) * plan.cp
                index = (at.dp * plan.cp + at.cp) % shards
                sizes = [tensor.share(shards, index) for tensor in tensors]
            for size in sizes:
                away = (
                    round(plan.optimizer_offload_fraction * size) if plan.optimizer_offload != "none" else 0
                )
                _step_traffic(execution, away, size - away, sums)


def _step_traffic(execution: Execution, away: int, staying: int, sums: _Sums) -> None:
    """Add what a tensor's optimizer step moves: gradients to the states, weights to where they rest."""
    plan = execution.plan
    # FSDP keeps its shards in single precision.
    element = _element_bytes(execution) if plan.sharding in ("none", "zero1") else _GRADIENT_BYTES
    rests_on_host, is_on_drive = plan.parameter_offload != "none", plan.optimizer_offload == "nvme"
    group = DRIVE_GROUP if is_on_drive else max(away, 1)
    for first in range(0, away, group):
        size = min(group, away - first)
        if not rests_on_host:
            sums.add("host", "to_host", _GRADIENT_BYTES * size)
            sums.add("host", "from_host", element * size)
        if is_on_drive:
            sums.add("drive", "read", _STATES_BYTES * size)
            sums.add("drive", "write", _STATES_BYTES * size)
    if rests_on_host and staying:
        sums.add("host", "from_host", _GRADIENT_BYTES * staying)
        sums.add("host", "to_host", _GRADIENT_BYTES * staying)


def _by_kind(chunk: list[LocalTensor]) -> Iterator[tuple[str, list[LocalTensor]]]:
    for kind in sorted({tensor.kind for tensor in chunk}):
        yield kind, [tensor for tensor in chunk if tensor.kind == kind]


def _summed(plan: ParallelPlan, tensors: list[LocalTensor]) -> Iterator[tuple[str, list[LocalTensor]]]:
    """Yield the tensors whose gradients tensor parallel ranks sum, by the axis of those ranks."""
    for axis, is_summed in (("tp", plan.tp > 1), ("kv", True)):
        found = [each for each in tensors if (each.is_partial if axis == "tp" else each.is_copied)]
        if found and is_summed:
            yield axis, found


def _replicas(execution: Execution, kind: str) -> tuple[str, int]:
    """Return the axis of the ranks that hold the same weights, and their number."""
    plan = execution.plan
    return ("expert_dp", plan.expert_dp) if kind == "expert" else ("dp", plan.dp * plan.cp)


def _sharded_traffic(
    execution: Execution,
    order: PipelineOrder,
    at: Coordinates,
    chunks: list[list[LocalTensor]],
    sums: _Sums,
) -> None:
    """Add what FSDP sends: per unit, with a pipeline once per step, else per micro-batch."""
    plan = execution.plan
    shards = (plan.sharding_group or plan.dp) * plan.cp
    index = (at.dp * plan.cp + at.cp) % shards
    per_micro_batch = plan.pp == 1
    gathers_again = per_micro_batch and plan.sharding in ("zero3", "hsdp")
    batches = order.num_micro_batches
    rests_on_host = plan.parameter_offload != "none"

    def add_sum(over: str, size: int) -> None:
        sums.add(over, "all_reduce", _GRADIENT_BYTES * size)
        if rests_on_host:
            sums.add("host", "from_host", _GRADIENT_BYTES * size)
            sums.add("host", "to_host", _GRADIENT_BYTES * size)

    for chunk in chunks:
        for unit in sorted({tensor.unit for tensor in chunk}):
            tensors = [tensor for tensor in chunk if tensor.unit == unit]
            is_expert = tensors[0].kind == "expert"
            axis, ranks = ("expert_dp", plan.expert_dp) if is_expert else ("dp", shards)
            if ranks == 1:
                continue
            size = sum(tensor.padded(ranks) for tensor in tensors)
            # The root keeps its weights between forward and backward.
            gathers = 1 if not gathers_again else batches if unit == "root" else 2 * batches
            sums.add(axis, "all_gather", _element_bytes(execution) * size // ranks, messages=gathers)
            reduces = batches if per_micro_batch else 1
            sums.add(axis, "reduce_scatter", _GRADIENT_BYTES * size, messages=reduces)
            if rests_on_host:
                # FSDP keeps its shards in single precision.
                sums.add("host", "from_host", _GRADIENT_BYTES * size // ranks, messages=gathers)
                sums.add("host", "to_host", _GRADIENT_BYTES * size // ranks, messages=reduces)
    everything = [tensor for chunk in chunks for tensor in chunk]
    for over, summed in _summed(plan, everything):
        size = sum(tensor.share(shards, index) for tensor in summed)
        add_sum(over, size)
    if shards < plan.dp * plan.cp:
        size = sum(tensor.share(shards, index) for tensor in everything)
        add_sum("replica", size)
    tied = [tensor for tensor in everything if tensor.kind == "tied"]
    if len(tied) == 1 and plan.pp > 1:
        add_sum("embedding", tied[0].share(shards, index))
