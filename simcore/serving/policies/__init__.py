"""Ways to form engine steps, one file each."""

from __future__ import annotations

from meshwright.simcore.serving.policies.base import BatchingPolicy
from meshwright.simcore.serving.policies.chunked_prefill import CHUNKED_PREFILL
from meshwright.simcore.serving.policies.inflight import INFLIGHT
from meshwright.simcore.serving.policies.orca import ORCA
from meshwright.simcore.serving.policies.prefill_first import PREFILL_FIRST
from meshwright.simcore.serving.policies.split_fuse import SPLIT_FUSE
from meshwright.simcore.serving.policies.static import STATIC

__all__ = ["BATCHING_POLICIES", "BatchingPolicy"]

BATCHING_POLICIES: dict[str, BatchingPolicy] = {
    "static": STATIC,
    "orca": ORCA,
    "chunked_prefill": CHUNKED_PREFILL,
    "prefill_first": PREFILL_FIRST,
    "split_fuse": SPLIT_FUSE,
    "inflight": INFLIGHT,
}
