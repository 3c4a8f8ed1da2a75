"""Models, workloads and plans as values."""

__all__: list[str] = []
