"""Expert placement: routing data, objectives, solvers with certified bounds, and engines' files."""

__all__: list[str] = []
