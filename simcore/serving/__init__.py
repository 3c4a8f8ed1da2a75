"""Serving simulated request by request: arrivals, scheduling, the KV cache and what users would measure."""

__all__: list[str] = []
