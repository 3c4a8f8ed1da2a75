"""Ways to choose a replica for a request, one file each."""

from __future__ import annotations

from meshwright.simcore.serving.routers.base import Router
from meshwright.simcore.serving.routers.least_loaded import LEAST_LOADED
from meshwright.simcore.serving.routers.prefix_aware import PREFIX_AWARE
from meshwright.simcore.serving.routers.round_robin import ROUND_ROBIN

__all__ = ["ROUTERS", "Router"]

ROUTERS: dict[str, Router] = {
    "round_robin": ROUND_ROBIN,
    "least_loaded": LEAST_LOADED,
    "prefix_aware": PREFIX_AWARE,
}
