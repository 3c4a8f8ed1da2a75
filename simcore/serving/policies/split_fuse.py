"""Dynamic SplitFuse: long prompts are split and short ones fused so that steps meet the token budget exactly.

Holmes et al., "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference",
arXiv 2401.08671, section 3. It differs from stall-free chunks in taking KV blocks chunk by chunk: a prompt starts
before all of it fits.
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["SPLIT_FUSE"]

SPLIT_FUSE = BatchingPolicy(
    mixes_phases=True,
    splits_prompts=True,
    has_token_budget=True,
    reserves_output=False,
    allocates_by_chunk=True,
)
