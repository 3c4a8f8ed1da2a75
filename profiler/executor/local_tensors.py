"""The parameters that each rank holds, as shapes, from the model and the plan alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.profiler.executor.pipeline_order import PipelineOrder
from meshwright.simcore.domain.model import MlaSpec, ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["LocalTensor", "has_experts", "local_tensors", "num_copies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTensor:
    """A parameter on one rank.

    Parameters
    ----------
    shape : tuple[int, ...]
        What the rank holds before data parallel sharding.
    unit : str
        What FSDP gathers it with: ``layer{i}``, ``experts{i}`` or ``root``.
    kind : str
        ``dense``, ``tied`` or ``expert``.
    is_partial : bool
        Its gradient is summed over the tensor parallel ranks.
    is_copied : bool
        Its gradient is summed over those that share a key/value head.
    """

    shape: tuple[int, ...]
    unit: str
    kind: str = "dense"
    is_partial: bool = False
    is_copied: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def padded(self, ranks: int) -> int:
        """Return its elements when dimension 0 is filled up to equal parts."""
        return -(-self.shape[0] // ranks) * ranks * math.prod(self.shape[1:])

    def share(self, ranks: int, index: int) -> int:
        """Return the elements of one rank's rows: equal parts rounded up, the last ones fewer."""
        rows = -(-self.shape[0] // ranks)
        return max(0, min(rows, self.shape[0] - index * rows)) * math.prod(self.shape[1:])


def has_experts(model: ModelSpec, layer: int) -> bool:
    """Return whether a layer, counted from 0, is a mixture of experts."""
    moe = model.moe
    if moe is None or layer < moe.num_dense_layers:
        return False
    return (layer - moe.num_dense_layers) % moe.layer_frequency == 0


def num_copies(model: ModelSpec, plan: ParallelPlan) -> int:
    """Return the tensor parallel ranks that hold copies of the same key/value head."""
    return 1 if model.mla is not None else max(plan.tp // model.num_query_groups, 1)


def local_tensors(
    model: ModelSpec, plan: ParallelPlan, order: PipelineOrder, virtual_stage: int
) -> list[LocalTensor]:
    """Return the parameters of a virtual stage on one of its ranks."""
    found: list[LocalTensor] = []
    first = order.first_layer(virtual_stage)
    for layer in range(first, first + order.layers[virtual_stage]):
        found += _layer(model, plan, layer)
    if order.is_vocabulary_split:
        found += _slice(model, plan)
    found += _ends(
        model,
        plan,
        has_tables=not order.is_vocabulary_split,
        has_embedding=order.has_embedding(virtual_stage),
        has_head=order.has_head(virtual_stage),
    )
    return found


def _layer(model: ModelSpec, plan: ParallelPlan, layer: int) -> Iterator[LocalTensor]:
    unit, tp, hidden = f"layer{layer}", plan.tp, model.hidden_size
    for _ in range(model.norms_per_layer):
        yield from _norm(model, plan, hidden, unit)
    if model.mla is not None:
        yield from _latent_attention(model, model.mla, plan, unit)
    else:
        yield from _attention(model, plan, unit)
    if not has_experts(model, layer):
        yield from _mlp(model, plan, model.ffn_hidden_size, unit, tp)
        return
    moe = model.moe
    assert moe is not None
    yield _whole(plan, unit, moe.num_experts, hidden)
    if moe.has_router_bias:
        yield _whole(plan, unit, moe.num_experts)
    for _ in range(moe.num_experts // plan.ep):
        for each in _mlp(model, plan, moe.moe_ffn_hidden_size, f"experts{layer}", plan.etp):
            yield replace(each, kind="expert", is_partial=False)
    if moe.shared_ffn_hidden_size:
        yield from _mlp(model, plan, moe.shared_ffn_hidden_size, unit, tp)
        if moe.has_shared_expert_gate:
            yield _whole(plan, unit, 1, hidden)


def _attention(model: ModelSpec, plan: ParallelPlan, unit: str) -> Iterator[LocalTensor]:
    tp, hidden = plan.tp, model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys = 2 * max(model.num_query_groups // tp, 1) * model.head_dim
    projections = [(queries // tp, False), (keys, True)]
    if num_copies(model, plan) == 1:
        projections = [(queries // tp + keys, False)]
    for width, is_copied in projections:
        yield LocalTensor(shape=(width, hidden), unit=unit, is_copied=is_copied)
        if model.has_qkv_bias:
            yield LocalTensor(shape=(width,), unit=unit, is_copied=is_copied)
    yield LocalTensor(shape=(hidden, queries // tp), unit=unit)
    if model.has_attention_output_bias:
        yield _whole(plan, unit, hidden)
    if model.has_attention_sinks:
        yield LocalTensor(shape=(model.num_attention_heads // tp,), unit=unit)
    if model.has_qk_norm:
        for _ in range(2):
            for each in _norm(model, plan, model.head_dim, unit):
                # Each rank sees some of the heads only.
                yield replace(each, is_partial=tp > 1)


def _latent_attention(model: ModelSpec, mla: MlaSpec, plan: ParallelPlan, unit: str) -> Iterator[LocalTensor]:
    hidden, heads = model.hidden_size, model.num_attention_heads // plan.tp
    downs = [] if mla.q_lora_rank is None else [(mla.q_lora_rank, mla.q_lora_rank)]
    downs.append((mla.kv_lora_rank + mla.qk_rope_head_dim, mla.kv_lora_rank))
    for width, normed in downs:
        yield _whole(plan, unit, width, hidden)
        if model.has_qkv_bias:
            yield _whole(plan, unit, width)
        yield from _norm(model, plan, normed, unit)
    query_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    yield LocalTensor(shape=(heads * query_width, mla.q_lora_rank or hidden), unit=unit)
    yield LocalTensor(shape=(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank), unit=unit)
    yield LocalTensor(shape=(hidden, heads * mla.v_head_dim), unit=unit)
    if model.has_attention_output_bias:
        yield _whole(plan, unit, hidden)


def _mlp(model: ModelSpec, plan: ParallelPlan, width: int, unit: str, parts: int) -> Iterator[LocalTensor]:
    inner = (2 if model.is_gated_mlp else 1) * width // parts
    yield LocalTensor(shape=(inner, model.hidden_size), unit=unit)
    yield LocalTensor(shape=(model.hidden_size, width // parts), unit=unit)
    if model.has_mlp_bias:
        yield LocalTensor(shape=(inner,), unit=unit)
        yield _whole(plan, unit, model.hidden_size)


def _slice(model: ModelSpec, plan: ParallelPlan) -> Iterator[LocalTensor]:
    """Yield a rank's slice of a vocabulary that is split over the stages."""
    rows = -(-model.vocab_size // (plan.pp * plan.tp))
    for _ in range(1 if model.has_tied_embeddings else 2):
        yield LocalTensor(shape=(rows, model.hidden_size), unit="root")
    if model.has_head_bias:
        yield LocalTensor(shape=(rows,), unit="root")


def _ends(
    model: ModelSpec, plan: ParallelPlan, *, has_tables: bool, has_embedding: bool, has_head: bool
) -> Iterator[LocalTensor]:
    rows, hidden, unit = -(-model.vocab_size // plan.tp), model.hidden_size, "root"
    is_tied = model.has_tied_embeddings
    if has_tables and (has_embedding or (has_head and is_tied)):
        yield LocalTensor(shape=(rows, hidden), unit=unit, kind="tied" if is_tied else "dense")
    if has_embedding:
        if model.position_embedding == "learned":
            yield _whole(plan, unit, model.max_position_embeddings + model.num_reserved_positions, hidden)
        if model.has_embedding_norm:
            yield from _norm(model, plan, hidden, unit)
    if has_head:
        if has_tables and not is_tied:
            yield LocalTensor(shape=(rows, hidden), unit=unit)
        if has_tables and model.has_head_bias:
            yield LocalTensor(shape=(rows,), unit=unit)
        if model.has_final_norm:
            yield from _norm(model, plan, hidden, unit)


def _norm(model: ModelSpec, plan: ParallelPlan, width: int, unit: str) -> Iterator[LocalTensor]:
    for _ in range(2 if model.normalization == "layernorm" else 1):
        yield _whole(plan, unit, width)


def _whole(plan: ParallelPlan, unit: str, *shape: int) -> LocalTensor:
    """Return a parameter that works on tokens outside the split products."""
    return LocalTensor(shape=shape, unit=unit, is_partial=plan.sequence_parallel)
