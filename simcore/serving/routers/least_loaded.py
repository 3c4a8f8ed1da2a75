"""Least loaded: the replica with the fewest requests under way."""

from __future__ import annotations

from meshwright.simcore.serving.routers.base import Router

__all__ = ["LEAST_LOADED"]

LEAST_LOADED = Router(balances_load=True)
