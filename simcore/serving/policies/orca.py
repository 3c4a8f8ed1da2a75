"""Orca: batches change at every iteration, whole prompts run beside decoding sequences, memory is reserved.

Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022: iteration-level
scheduling (section 4.1), selective batching (4.2), slots for input and output reserved at admission (5).
"""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy

__all__ = ["ORCA"]

ORCA = BatchingPolicy(mixes_phases=True, splits_prompts=False, has_token_budget=False, reserves_output=True)
