"""Streams and events of torch, which leaves them untyped."""

from __future__ import annotations

import torch

__all__ = ["new_event", "new_stream", "seconds_between"]


def new_event() -> torch.cuda.Event:
    """Return an event that remembers when it happened."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it so


def new_stream(device: str) -> torch.cuda.Stream:
    """Return a stream of a device beside its current one."""
    return torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]  # torch leaves it so


def seconds_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Return the seconds from one event of a device to another; below zero when the second came first."""
    return float(start.elapsed_time(end)) * 1e-3  # torch gives milliseconds
