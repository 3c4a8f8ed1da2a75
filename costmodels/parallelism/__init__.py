"""What each parallel axis sends and forbids, one file per axis."""

__all__: list[str] = []
