"""Times of engine steps over arrays, read from a step table exactly as the simulation reads it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.serving.step_table import StepTable

__all__ = ["decode_step_time", "interpolate", "prefill_attention", "prompt_step_time", "step_time"]

FloatArray = NDArray[np.float64]


def interpolate(points: FloatArray, values: FloatArray, at: FloatArray) -> FloatArray:
    """Return a piecewise linear function; beyond its points it goes on at the last slope.

    Parameters
    ----------
    points, values : NDArray[np.float64]
        Ascending points and the values there, ``(num_points,)``.
    at : NDArray[np.float64]
        Where to read it, any shape.
    """
    last = np.clip(np.searchsorted(points, at, side="right") - 1, 0, len(points) - 2)
    share = (at - points[last]) / (points[last + 1] - points[last])
    # Below the first point the first value holds: half a token costs what one does.
    share = np.maximum(share, 0.0)
    result: FloatArray = values[last] + share * (values[last + 1] - values[last])
    return result


def prefill_attention(table: StepTable, prompt: FloatArray) -> FloatArray:
    """Return the attention of whole prompts [s]."""
    return interpolate(table.prompt_lengths, table.prefill_attention_time, prompt)


def step_time(
    table: StepTable,
    *,
    num_decodes: FloatArray,
    context: float,
    variation: float,
    tokens_per_decode: FloatArray | float,
    chunk_tokens: FloatArray,
    chunk_attention: FloatArray,
    chunk_sequences: FloatArray,
) -> FloatArray:
    """Return the time of steps [s], elementwise over arrays that broadcast together.

    Parameters
    ----------
    num_decodes : NDArray[np.float64]
        Decoding sequences.
    context, variation : float
        Their mean context [tokens] and its coefficient of variation.
    tokens_per_decode : NDArray[np.float64] | float
        Tokens each of them brings: 1 and those drafted.
    chunk_tokens, chunk_attention, chunk_sequences : NDArray[np.float64]
        Prompt tokens of the step, their attention [s] and the prompts they are of.

    Notes
    -----
    The formula is that of :class:`meshwright.simcore.serving.step_table.StepTable`.
    """
    tokens = np.maximum(1.0, num_decodes * tokens_per_decode + chunk_tokens)
    is_graph = (chunk_tokens <= 0.0) & (tokens <= table.max_graph_tokens)
    device = np.where(
        is_graph,
        interpolate(table.token_counts, table.graph_token_time, tokens),
        interpolate(table.token_counts, table.eager_token_time, tokens),
    )
    decode = _decode_attention(table, num_decodes, context) * (1.0 + table.decode_skew * variation)
    device = device + decode * np.where(chunk_tokens > 0.0, table.mixed_decode_factor, 1.0)
    device = device + chunk_attention + table.step_latency
    host = table.host_time + table.host_time_per_sequence * (num_decodes + chunk_sequences)
    host = np.where(
        is_graph, host, np.maximum(host, table.eager_host_time + table.host_time_per_prompt * chunk_sequences)
    )
    return np.maximum(device, host) if table.is_host_hidden else device + host


def decode_step_time(
    table: StepTable, num_sequences: float, context: float, num_speculative_tokens: int = 0
) -> float:
    """Return the time of a step of decoding sequences of one context [tokens] alone, drafts of each among them [s]."""
    none = np.zeros(1)
    times = step_time(
        table,
        num_decodes=np.array([num_sequences]),
        context=context,
        variation=0.0,
        tokens_per_decode=1.0 + num_speculative_tokens,
        chunk_tokens=none,
        chunk_attention=none,
        chunk_sequences=none,
    )
    return float(times[0])


def prompt_step_time(table: StepTable, prompt: float, num_prompts: float = 1.0) -> float:
    """Return the time of a step that computes whole prompts of one length [tokens] alone [s]."""
    count = np.array([num_prompts])
    times = step_time(
        table,
        num_decodes=np.zeros(1),
        context=prompt,
        variation=0.0,
        tokens_per_decode=1.0,
        chunk_tokens=count * prompt,
        chunk_attention=count * prefill_attention(table, np.array([prompt])),
        chunk_sequences=count,
    )
    return float(times[0])


def _decode_attention(table: StepTable, num_decodes: FloatArray, context: float) -> FloatArray:
    """Return the attention of one decode step [s]; none without decodes."""
    contexts = table.decode_contexts
    column = int(np.clip(np.searchsorted(contexts, context, side="right") - 1, 0, len(contexts) - 2))
    share = max(0.0, (context - contexts[column]) / (contexts[column + 1] - contexts[column]))
    values = table.decode_attention_time
    line = values[:, column] + share * (values[:, column + 1] - values[:, column])
    return np.where(num_decodes > 0.0, interpolate(table.decode_batch_sizes, line, num_decodes), 0.0)
