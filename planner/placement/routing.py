"""Where the tokens of a run went: per layer the experts of every token, or only how often each was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = [
    "RoutingData",
    "drop_padding",
    "routing_from_loads",
    "routing_from_tokens",
    "routing_from_transitions",
    "split_held_out",
    "token_loads",
    "token_transitions",
]

# A row of experts that repeats this many times over what chance allows is padding or a warm-up request: real tokens
# of a layer share their whole set with few others.
_REPEATED_SHARE = 0.01
_MIN_REPEATS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingData:
    """What is known about the routing of a model's mixture-of-experts layers.

    Parameters
    ----------
    num_experts : int
        Routed experts of a layer.
    loads : NDArray[np.float64]
        (token, expert) pairs of each expert, ``(num_layers, num_experts)``.
    tokens : NDArray[np.int16] | None
        Experts of every token, ``(num_layers, num_tokens, top_k)``, in the order the tokens came.
    transitions : NDArray[np.float64] | None
        Weight with which tokens go from an expert to an expert of the next layer,
        ``(num_layers - 1, num_experts, num_experts)``.
    windows : NDArray[np.float64] | None
        Loads by stretch of time, ``(num_windows, num_layers, num_experts)``.
    origin : str
        File or generator, for every output.
    is_synthetic : bool
        Drawn by our generator: no gain may be claimed from it.
    notes : tuple[str, ...]
        What was removed or assumed on the way in, one sentence each.
    """

    num_experts: int
    loads: NDArray[np.float64]
    tokens: NDArray[np.int16] | None = None
    transitions: NDArray[np.float64] | None = None
    windows: NDArray[np.float64] | None = None
    origin: str
    is_synthetic: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.loads.ndim != 2 or self.loads.shape[1] != self.num_experts or not self.loads.size:
            raise SpecError(
                f"{self.origin}: loads have the shape {self.loads.shape}; expected one row per layer and "
                f"{self.num_experts} columns, one per expert"
            )
        bad = np.argwhere(~np.isfinite(self.loads) | (self.loads < 0.0))
        if len(bad):
            layer, expert = bad[0]
            raise SpecError(
                f"{self.origin}: layer {layer}, expert {expert}: the load is {self.loads[layer, expert]}; loads are "
                "finite counts, 0 or more"
            )
        empty = np.flatnonzero(self.loads.sum(axis=1) <= 0.0)
        if len(empty):
            raise SpecError(f"{self.origin}: layer {empty[0]} has no load at all; record more tokens")

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers."""
        return int(self.loads.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens of the trace; 0 where only sums are known."""
        return 0 if self.tokens is None else int(self.tokens.shape[1])


def routing_from_tokens(
    tokens: NDArray[np.integer],
    num_experts: int,
    origin: str,
    *,
    is_synthetic: bool = False,
    notes: Sequence[str] = (),
) -> RoutingData:
    """Return the routing of a trace, with loads and transitions counted from it.

    Parameters
    ----------
    tokens : NDArray[np.integer]
        Experts of each token, ``(num_layers, num_tokens, top_k)``.
    num_experts : int
        Routed experts of a layer.
    origin : str
        Named in messages.
    is_synthetic : bool
        Whether our generator drew it.
    notes : Sequence[str]
        What was done to the trace before.

    Raises
    ------
    SpecError
        If the array is no trace, or names experts the model does not have.
    """
    if tokens.ndim != 3 or not tokens.size:
        raise SpecError(
            f"{origin}: the trace has the shape {tokens.shape}; expected (layers, tokens, experts per token)"
        )
    if tokens.min() < 0 or tokens.max() >= num_experts:
        raise SpecError(
            f"{origin}: the trace names expert {int(tokens.max() if tokens.max() >= num_experts else tokens.min())}; "
            f"the model has experts 0 to {num_experts - 1}: is it a trace of another model?"
        )
    narrow = tokens.astype(np.int16)
    return RoutingData(
        num_experts=num_experts,
        loads=token_loads(narrow, num_experts),
        tokens=narrow,
        origin=origin,
        is_synthetic=is_synthetic,
        notes=tuple(notes),
    )


def routing_from_loads(
    loads: NDArray[np.float64],
    origin: str,
    *,
    windows: NDArray[np.float64] | None = None,
    notes: Sequence[str] = (),
) -> RoutingData:
    """Return the routing of which only the load of each expert is known, ``(num_layers, num_experts)``."""
    return RoutingData(
        num_experts=int(loads.shape[-1]) if loads.ndim else 0,
        loads=np.asarray(loads, dtype=np.float64),
        windows=windows,
        origin=origin,
        notes=tuple(notes),
    )


def routing_from_transitions(transitions: NDArray[np.float64], origin: str) -> RoutingData:
    """Return the routing of which transitions between layers are known, ``(num_layers - 1, E, E)``.

    Raises
    ------
    SpecError
        If the counts are not finite, negative or not square.
    """
    if transitions.ndim != 3 or transitions.shape[1] != transitions.shape[2] or not transitions.size:
        raise SpecError(
            f"{origin}: transitions have the shape {transitions.shape}; expected (layers - 1, E, E)"
        )
    if not np.isfinite(transitions).all() or transitions.min() < 0.0:
        raise SpecError(f"{origin}: transition counts must be finite and 0 or more")
    loads = np.vstack([transitions.sum(axis=2), transitions[-1].sum(axis=0)])
    return RoutingData(
        num_experts=int(transitions.shape[1]),
        loads=loads,
        transitions=np.asarray(transitions, dtype=np.float64),
        origin=origin,
    )


def token_loads(tokens: NDArray[np.int16], num_experts: int) -> NDArray[np.float64]:
    """Return how many tokens chose each expert, ``(num_layers, num_experts)``."""
    counts = [np.bincount(layer.ravel(), minlength=num_experts) for layer in tokens]
    return np.asarray(counts, dtype=np.float64)


def token_transitions(tokens: NDArray[np.int16], num_experts: int) -> NDArray[np.float64]:
    """Return the transition weights of a trace, ``(num_layers - 1, num_experts, num_experts)``.

    Each of a token's ``top_k x top_k`` pairs of experts in neighbouring layers counts ``1 / top_k``, so that a
    row sums to the load of its expert (ExFlow, arXiv 2401.08383, aggregated over tokens).
    """
    num_layers, _, top_k = tokens.shape
    result = np.empty((num_layers - 1, num_experts, num_experts))
    for layer in range(num_layers - 1):
        left = tokens[layer].astype(np.int64)
        right = tokens[layer + 1].astype(np.int64)
        counts = np.zeros(num_experts * num_experts, dtype=np.int64)
        for slot in range(top_k):
            pairs = left[:, slot, None] * num_experts + right
            counts += np.bincount(pairs.ravel(), minlength=num_experts * num_experts)
        result[layer] = counts.reshape(num_experts, num_experts) / top_k
    return result


def drop_padding(
    tokens: NDArray[np.integer], origin: str, weights: NDArray[np.floating] | None = None
) -> tuple[NDArray[np.integer], tuple[str, ...]]:
    """Remove the tokens that no user sent: unused entries, uniform router weights, one row repeated.

    Parameters
    ----------
    tokens : NDArray[np.integer]
        ``(num_layers, num_tokens, top_k)``; -1 marks an entry that is not used.
    origin : str
        Named in messages.
    weights : NDArray[np.floating] | None
        Router weights of the same shape, where the trace holds them: padding rows have equal ones.

    Returns
    -------
    tuple[NDArray[np.integer], tuple[str, ...]]
        What is left, and one sentence per kind of row removed.

    Raises
    ------
    SpecError
        If nothing is left.
    """
    num_tokens = tokens.shape[1]
    keep: NDArray[np.bool_] = np.asarray((tokens >= 0).all(axis=(0, 2)))
    notes = []
    if not keep.all():
        notes.append(f"{int((~keep).sum())} of {num_tokens} tokens were padding (expert -1)")
    if weights is not None and weights.shape == tokens.shape and tokens.shape[2] > 1:
        uniform = (np.ptp(weights, axis=2) < 1e-6).all(axis=0)
        if (uniform & keep).any():
            notes.append(f"{int((uniform & keep).sum())} tokens had uniform router weights: padding")
        keep &= ~uniform
    repeated = keep & _repeated_rows(tokens, keep)
    if repeated.any():
        notes.append(
            f"{int(repeated.sum())} tokens repeat one row of experts in every layer: warm-up or padding"
        )
    keep &= ~repeated
    if not keep.any():
        raise SpecError(f"{origin}: every token of the trace is padding or warm-up; record real requests")
    return tokens[:, keep], tuple(f"removed: {note}" for note in notes)


def _repeated_rows(tokens: NDArray[np.integer], keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which tokens have, over all layers, the very experts of many others."""
    num_layers, num_tokens, top_k = tokens.shape
    rows = np.ascontiguousarray(np.moveaxis(tokens, 1, 0).reshape(num_tokens, num_layers * top_k))
    _, inverse, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    # One layer with few experts repeats sets by chance alone: as often as its most frequent set, evenly drawn.
    num_sets = len(counts)
    limit = max(_MIN_REPEATS, _REPEATED_SHARE * num_tokens, 20.0 * num_tokens / max(num_sets, 1))
    is_constant = num_sets == 1 and num_tokens > 1
    repeats = counts[inverse.ravel()]
    result: NDArray[np.bool_] = keep & ((repeats > limit) | is_constant)
    return result


def split_held_out(routing: RoutingData, share: float = 0.5) -> tuple[RoutingData, RoutingData | None]:
    """Return the routing to solve with and the one to judge with: the last ``share`` of the tokens.

    Later tokens, not a random half: a placement is used after it was solved. Without single tokens, or with too
    few, nothing can be held out. Windows are split the same way.
    """
    if routing.tokens is not None and routing.num_tokens >= 2:
        cut = max(1, round(routing.num_tokens * (1.0 - share)))
        parts = (routing.tokens[:, :cut], routing.tokens[:, cut:])
        if parts[1].shape[1]:
            first, last = (
                replace(routing, tokens=part, loads=token_loads(part, routing.num_experts), windows=None)
                for part in parts
            )
            return _without_empty_layers(first, last, routing)
    if routing.windows is not None and len(routing.windows) >= 2:
        cut = max(1, round(len(routing.windows) * (1.0 - share)))
        early, late = routing.windows[:cut], routing.windows[cut:]
        if len(late) and (early.sum(axis=(0, 2)) > 0.0).all() and (late.sum(axis=(0, 2)) > 0.0).all():
            return (
                replace(routing, loads=early.sum(axis=0), windows=early),
                replace(routing, loads=late.sum(axis=0), windows=late),
            )
    return routing, None


def _without_empty_layers(
    first: RoutingData, last: RoutingData, routing: RoutingData
) -> tuple[RoutingData, RoutingData | None]:
    """Return the split, or everything and nothing when the trace is too short to be cut."""
    return (first, last) if first.num_tokens and last.num_tokens else (routing, None)
