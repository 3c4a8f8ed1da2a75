"""Prefix aware: the replica that holds most of the prompt in its cache, while loads stay balanced.

The limits are the defaults of the cache-aware policy of SGLang's router (``balance-abs-threshold`` 64,
``balance-rel-threshold`` 1.5).
"""

from __future__ import annotations

from meshwright.simcore.serving.routers.base import Router

__all__ = ["PREFIX_AWARE"]

PREFIX_AWARE = Router(balances_load=True, follows_prefix=True, max_load_difference=64.0, max_load_ratio=1.5)
