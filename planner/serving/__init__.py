"""Serving configurations: their space, bounds, search by simulation, and plan files."""

__all__: list[str] = []
