"""What tells one router from another, as values that the simulator's one loop obeys."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How requests choose a replica of a pool. Load is the number of requests sent to a replica and not done.

    Parameters
    ----------
    balances_load : bool
        Choose the replica of least load, of equals the first; otherwise each in turn.
    follows_prefix : bool
        Choose the replica whose cache holds most of the prompt, of equals the least loaded, unless loads differ
        by more than both limits below.
    max_load_difference, max_load_ratio : float
        Most a load may exceed the least: in requests, and as a multiple.
    """

    balances_load: bool
    follows_prefix: bool = False
    max_load_difference: float = 0.0
    max_load_ratio: float = 1.0
