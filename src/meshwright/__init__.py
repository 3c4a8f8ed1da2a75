"""Meshwright: plan and simulate how large language models run on clusters of accelerators."""

__all__ = ["__version__"]

__version__ = "0.1.0"
