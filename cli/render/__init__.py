"""Tables, progress and reports."""

__all__: list[str] = []
