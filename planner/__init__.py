"""What to run: the plan space, its constraints, the search, and exports."""

__all__: list[str] = []
