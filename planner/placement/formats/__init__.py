"""Placement files of serving engines, one format per module; each writes and reads its text."""

__all__: list[str] = []
