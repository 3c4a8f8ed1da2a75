"""What tells one way to form engine steps from another, as switches that the simulator's one loop obeys."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BatchingPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingPolicy:
    """How a scheduler forms a step.

    Parameters
    ----------
    mixes_phases : bool
        A step may hold decoding sequences and prompt tokens; otherwise prompts have steps of their own, which
        come first.
    splits_prompts : bool
        A prompt may be computed in chunks over several steps; otherwise whole (one longer than the token budget
        then runs as the only prompt of its step).
    has_token_budget : bool
        ``max_num_batched_tokens`` bounds a step.
    reserves_output : bool
        A request is admitted when the KV blocks of its prompt and its whole answer are free, and is never
        preempted; otherwise blocks are taken as it grows, and the request admitted last is preempted and later
        recomputed when none is left.
    allocates_by_chunk : bool
        Blocks of a prompt are taken chunk by chunk; otherwise all of them at admission.
    fills_only_when_empty : bool
        A new batch starts only when every request of the last one is done; the finished keep their places.
    """

    mixes_phases: bool
    splits_prompts: bool
    has_token_budget: bool
    reserves_output: bool
    allocates_by_chunk: bool = False
    fills_only_when_empty: bool = False
