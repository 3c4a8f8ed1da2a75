"""Readers of tables that others measured, each giving :class:`~meshwright.profiler.measurements.Measurements`."""

__all__: list[str] = []
