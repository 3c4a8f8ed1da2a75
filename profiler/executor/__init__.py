"""Run a training plan on the machines at hand and measure it."""

__all__: list[str] = []
