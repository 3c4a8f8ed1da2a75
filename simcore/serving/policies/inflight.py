"""In-flight batching of TensorRT-LLM: whole prompts within the token budget beside all decoding sequences.

Its default capacity policy, ``GUARANTEED_NO_EVICT``, admits a request when the blocks of its prompt and of its
longest answer are free (TensorRT-LLM documentation, "Capacity Scheduler Policy").
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["INFLIGHT"]

INFLIGHT = BatchingPolicy(
    mixes_phases=True, splits_prompts=False, has_token_budget=True, reserves_output=True
)
