"""What one engine step costs, as plain tables that compiled loops read: the seam between cost models and serving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["StepTable"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTable:
    """Time of one engine step of one replica, by what the step holds.

    A step holds ``d`` decoding sequences of mean context ``c`` and prompt chunks, chunk ``i`` being ``q_i`` tokens
    after ``p_i`` already computed; ``n = d * (1 + num_speculative_tokens) + sum q_i`` tokens. Device time is

    ``token_time(n) + decode_attention_time(d, c) * (1 + decode_skew * (variation of contexts))
    + sum_i prefill_attention(p_i + q_i) - prefill_attention(p_i) + step_latency``, attention of the decoding sequences
    times ``mixed_decode_factor`` where the step holds prompts,

    read between grid points linearly in ``n`` and ``c`` and in the prompt length (beyond the last point at the
    last slope). ``token_time`` is ``graph_token_time`` for a pure decode step of at most ``max_graph_tokens``
    tokens, ``eager_token_time`` otherwise. Host time is ``host_time + host_time_per_sequence * sequences``, and
    at least ``eager_host_time + host_time_per_prompt * prompts`` for a step not replayed from a graph. A step lasts
    ``max(device, host)`` where ``is_host_hidden``, else their sum; overlapped steps of
    :class:`~meshwright.simcore.serving.behaviour.EngineBehaviour` take turns of both instead.

    Parameters
    ----------
    token_counts : NDArray[np.float64]
        Ascending, from 1, shape ``(num_counts,)``.
    graph_token_time, eager_token_time : NDArray[np.float64]
        All work of a step but attention over the cache, all stages, ``(num_counts,)`` [s].
    decode_batch_sizes, decode_contexts : NDArray[np.float64]
        Axes of the next table, ascending.
    decode_attention_time : NDArray[np.float64]
        Attention of one decode step, all layers, ``(num_batch_sizes, num_contexts)`` [s].
    decode_skew : float
        Extra share of decode attention per unit of the contexts' coefficient of variation.
    mixed_decode_factor : float
        Time of decode attention beside prompts over that without: some engines run it in the kernel for prompts.
    prompt_lengths, prefill_attention_time : NDArray[np.float64]
        Attention of one whole prompt, all layers, ``(num_lengths,)``, from length 0 with time 0 [s].
    step_latency : float
        Device time of a step beside its kernels: gaps between them, sampling, output [s].
    host_time, host_time_per_sequence, host_time_per_prompt, eager_host_time : float
        As above [s].
    is_host_hidden : bool
        The host prepares the next step while the device runs this one.
    max_graph_tokens : float
        Largest batch captured as a graph; 0 for none.
    stage_share : float
        Time between two steps over the time of one in a full pipeline: 1 without pp; with pp stages
        ``1 / pp`` at best.
    """

    token_counts: FloatArray
    graph_token_time: FloatArray
    eager_token_time: FloatArray
    decode_batch_sizes: FloatArray
    decode_contexts: FloatArray
    decode_attention_time: FloatArray
    prompt_lengths: FloatArray
    prefill_attention_time: FloatArray
    decode_skew: float = 0.0
    mixed_decode_factor: float = 1.0
    step_latency: float = 0.0
    host_time: float = 0.0
    host_time_per_sequence: float = 0.0
    host_time_per_prompt: float = 0.0
    eager_host_time: float = 0.0
    is_host_hidden: bool = True
    max_graph_tokens: float = 512.0
    stage_share: float = 1.0

    def __post_init__(self) -> None:
        for axis, values in (
            ("token_counts", ("graph_token_time", "eager_token_time")),
            ("prompt_lengths", ("prefill_attention_time",)),
        ):
            points = getattr(self, axis)
            if len(points) < 2 or np.any(np.diff(points) <= 0.0):
                raise SpecError(f"step table: {axis} must hold at least 2 ascending values")
            for name in values:
                if getattr(self, name).shape != points.shape:
                    raise SpecError(f"step table: {name} must have one entry per {axis}")
        shape = (len(self.decode_batch_sizes), len(self.decode_contexts))
        if min(shape) < 2 or self.decode_attention_time.shape != shape:
            raise SpecError(
                "step table: decode_attention_time must have one row per batch size and one column per context"
            )
