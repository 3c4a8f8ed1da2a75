"""The compiled event loop of the serving simulator: arrivals, scheduling, the KV cache and the clock of each step.

All state is in one array of integers and one of floats. Requests, engines, replicas and pools are records in both, a
field is ``ints[engine + FREE]`` where ``engine`` is the place its record begins: so the same body runs compiled and,
over lists, as plain Python, and functions pass two arrays instead of forty. An *engine* is one scheduler with its own
KV cache: an attention data parallel rank or a pipeline micro-batch; the engines of a *replica* step together. A step
under way has no effect before it ends, so that routers never see the future. The tokens of decoding sequences are
never touched one by one: sums over them move on with each step, and a wheel of buckets says which end with it.
"""

from __future__ import annotations

from meshwright.simcore.serving.event_loop.loop import run

__all__ = ["run"]
