"""What things cost: seconds, bytes, joules and dollars from specs and calibrations."""

__all__: list[str] = []
