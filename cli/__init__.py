"""The command line: one command per file; the only layer that prints, catches and exits."""

__all__: list[str] = []
