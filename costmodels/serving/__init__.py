"""What serving costs: engine steps from operator tables, engine constants, KV cache memory."""

__all__: list[str] = []
