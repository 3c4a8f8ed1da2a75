"""From measurements to a calibration: rooflines, residuals, collectives, and the constants of a software stack."""

__all__: list[str] = []
