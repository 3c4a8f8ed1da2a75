"""Static batching: a batch runs until its longest answer is done (FasterTransformer's request-level batches).

Requests that are done keep their places as padding; each client sees its own answer when it is complete.
Described as the baseline by Yu et al., "Orca", OSDI 2022, section 3.
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["STATIC"]

STATIC = BatchingPolicy(
    mixes_phases=False,
    splits_prompts=False,
    has_token_budget=False,
    reserves_output=True,
    fills_only_when_empty=True,
)
