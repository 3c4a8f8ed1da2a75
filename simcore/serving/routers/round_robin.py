"""Round robin: each replica in turn."""

from __future__ import annotations

from meshwright.simcore.serving.routers.base import Router

__all__ = ["ROUND_ROBIN"]

ROUND_ROBIN = Router(balances_load=False)
