"""Stall-free chunks: decoding sequences first, prompts chunked into the rest of the token budget.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024, algorithm 3;
the scheduler of vLLM v1, whose ``scheduler_reserve_full_isl`` also admits a prompt only when all of it fits.
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["CHUNKED_PREFILL"]

CHUNKED_PREFILL = BatchingPolicy(
    mixes_phases=True, splits_prompts=True, has_token_budget=True, reserves_output=False
)
