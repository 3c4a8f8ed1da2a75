"""How long a prompt takes on an engine with nothing else to do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.serving.policies import BATCHING_POLICIES
from meshwright.simcore.serving.pool import ReplicaPool

__all__ = ["prefill_time"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def prefill_time(pool: ReplicaPool, input_length: IntArray, cached: IntArray) -> FloatArray:
    """Return the time of each prompt's steps when each holds nothing else [s].

    Full chunks of the token budget and a last one with the rest, by the formula of
    :class:`meshwright.simcore.serving.step_table.StepTable`; of a hidden host and the device, the longer in sum.

    Parameters
    ----------
    pool : ReplicaPool
        Where it is computed.
    input_length, cached : NDArray[np.int64]
        Prompt, and how much of it the cache holds [tokens].
    """
    table, behaviour = pool.table, pool.behaviour
    policy = BATCHING_POLICIES[behaviour.policy]
    splits = policy.splits_prompts if behaviour.splits_prompts is None else behaviour.splits_prompts
    length = input_length - cached
    chunk = behaviour.max_num_batched_tokens if splits and policy.has_token_budget else int(length.max())
    num_full, rest = length // chunk, length % chunk

    def device(tokens: FloatArray) -> FloatArray:
        return extended(tokens, table.token_counts, table.eager_token_time) + table.step_latency

    whole, end, start = (
        device(np.array([float(chunk)]))[0],
        extended(input_length.astype(np.float64), table.prompt_lengths, table.prefill_attention_time),
        extended(cached.astype(np.float64), table.prompt_lengths, table.prefill_attention_time),
    )
    num_steps = num_full + (rest > 0)
    total = num_full * whole + np.where(rest > 0, device(rest.astype(np.float64)), 0.0) + end - start
    host = (
        max(
            table.host_time + table.host_time_per_sequence, table.eager_host_time + table.host_time_per_prompt
        )
        * num_steps
    )
    time: FloatArray = np.maximum(total, host) if table.is_host_hidden else total + host
    return time


def extended(values: FloatArray, points: FloatArray, times: FloatArray) -> FloatArray:
    """Return ``times`` read linearly at ``values``, going on at the last slope beyond the last point."""
    slope = (times[-1] - times[-2]) / (points[-1] - points[-2])
    result: FloatArray = np.interp(values, points, times) + np.maximum(values - points[-1], 0.0) * slope
    return result
