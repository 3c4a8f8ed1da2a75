"""Batching policies, one file each."""

__all__: list[str] = []
