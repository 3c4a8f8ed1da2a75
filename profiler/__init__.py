"""Measuring a node and running a plan. Filled by the profiler."""

__all__: list[str] = []
