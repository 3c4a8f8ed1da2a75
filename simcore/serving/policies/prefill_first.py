"""Prompts first: any waiting prompt that fits stops decoding for a step of prompts only (SGLang, early vLLM).

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, for the
order; SGLang's scheduler (``get_next_batch_to_run``) for the chunks of long prompts.
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["PREFILL_FIRST"]

PREFILL_FIRST = BatchingPolicy(
    mixes_phases=False, splits_prompts=True, has_token_budget=True, reserves_output=False
)
