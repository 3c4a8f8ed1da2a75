"""What a long context costs to serve: the four costs of its KV cache on one replica.

Prefill, concurrency, decoding latency and context switching: Fu 2024, "Challenges in Deploying Long-Context
Transformers" (arXiv 2405.08944), section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from meshwright.planner.serving.costs import JobCosts
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool
from meshwright.simcore.serving.step_table import StepTable
from meshwright.simcore.serving.step_times import decode_step_time, prefill_attention, step_time

__all__ = ["CONTEXT_LENGTHS", "LongContextRow", "long_context_rows"]

CONTEXT_LENGTHS: tuple[int, ...] = (
    *(4096 * 4**power for power in range(6)),
    10_000_000,
)
"""4K to 10M tokens, a factor of four apart [tokens]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContextRow:
    """One context length.

    Parameters
    ----------
    context : int
        Tokens of the prompt.
    kv_bytes : float
        KV cache of one such sequence, over the ranks that hold a part [B].
    prefill_time : float
        Prompt on an idle replica [s].
    concurrency : float
        Such sequences that a replica's cache holds; below 1 none fits.
    decode_time : float
        One token of one sequence [s].
    full_decode_time : float
        One token of each of as many sequences as fit [s].
    swap_time : float
        Moving one sequence's cache to the host and another's back [s].
    is_beyond_model : bool
        Longer than the positions the model states.
    """

    context: int
    kv_bytes: float
    prefill_time: float
    concurrency: float
    decode_time: float
    full_decode_time: float
    swap_time: float
    is_beyond_model: bool


def long_context_rows(
    job: ServingJob, plan: ServingPlan, pool: ServingPool, costs: JobCosts
) -> tuple[LongContextRow, ...]:
    """Return the four costs by context length on one replica of a pool.

    Parameters
    ----------
    job, plan, pool, costs :
        Model and cluster, formats and engine, the replica, the cost models.

    Raises
    ------
    InfeasiblePlanError
        If the weights leave no room for a cache.
    """
    memory, table = costs.memory(plan, pool), costs.step_table(plan, pool)
    link = job.cluster_of(pool.role).node.host_link_bandwidth_per_gpu
    drafts = pool.num_speculative_tokens
    pace = pool.acceptance.tokens_per_step(drafts)
    rows = []
    for context in CONTEXT_LENGTHS:
        concurrency = memory.kv_cache_tokens * pool.attention_dp / context
        per_rank = memory.kv_bytes_per_token * context
        together = max(1.0, math.floor(concurrency / pool.attention_dp) * 1.0)
        rows.append(
            LongContextRow(
                context=context,
                kv_bytes=per_rank * pool.tp * pool.pp,
                prefill_time=_prefill_time(table, context, pool.max_num_batched_tokens),
                concurrency=concurrency,
                decode_time=decode_step_time(table, 1.0, context, drafts) / pace,
                full_decode_time=decode_step_time(
                    table, min(together, float(pool.max_num_sequences)), context, drafts
                )
                / pace,
                swap_time=2.0 * per_rank / link,
                is_beyond_model=context > job.model.max_position_embeddings,
            )
        )
    return tuple(rows)


def _prefill_time(table: StepTable, context: int, budget: int) -> float:
    """Return the chunks' steps and the attention of the whole prompt [s]."""
    num_chunks = math.ceil(context / budget)
    sizes = np.array([float(min(context, budget)), float(context - (num_chunks - 1) * budget)])
    each = step_time(
        table,
        num_decodes=np.zeros(2),
        context=0.0,
        variation=0.0,
        tokens_per_decode=1.0,
        chunk_tokens=sizes,
        chunk_attention=np.zeros(2),
        chunk_sequences=np.ones(2),
    )
    return float((num_chunks - 1) * each[0] + each[1]) + _whole_attention(table, float(context))


def _whole_attention(table: StepTable, context: float) -> float:
    """Return the attention of a prompt [s]; beyond the table it grows at the power of its last two points.

    Full attention grows with the square of the length, windows with the length: the power is kept within 1 and 2.
    """
    lengths, times = table.prompt_lengths, table.prefill_attention_time
    if context <= lengths[-1] or times[-2] <= 0.0:
        return float(prefill_attention(table, np.array([context]))[0])
    power = math.log(times[-1] / times[-2]) / math.log(lengths[-1] / lengths[-2])
    growth: float = (context / float(lengths[-1])) ** min(2.0, max(1.0, power))
    return float(times[-1]) * growth
