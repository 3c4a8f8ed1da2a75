"""Which prefill replicas feed which decode replicas, and how many of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pairs", "best_pairs"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Ratios up to this many replicas a side are tried: finer ones differ by less than the latencies are known.
_MAX_REPLICAS = 12
# Shares of the expected rate that simulation may find: a ratio that just carries a demand may turn out to miss it.
_RATE_SHARES = (1.0, 0.8, 0.65)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Units of a prefill and a decode pool, one entry per pair.

    Parameters
    ----------
    prefill, decode : NDArray[np.int64]
        Index of each side's candidate.
    num_prefill, num_decode : NDArray[np.int64]
        Replicas of each side in one unit.
    rate, estimate : NDArray[np.float64]
        Requests per second of one unit: what the slower side lets through, and with the prefill side's margin [1/s].
    num_gpus : NDArray[np.int64]
        GPUs of one unit.
    """

    prefill: IntArray
    decode: IntArray
    num_prefill: IntArray
    num_decode: IntArray
    rate: FloatArray
    estimate: FloatArray
    num_gpus: IntArray

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rate)


def best_pairs(
    prefill_rate: FloatArray,
    prefill_gpus: IntArray,
    decode_rate: FloatArray,
    decode_gpus: IntArray,
    max_gpus: int,
    prefill_margin: FloatArray | None = None,
    max_prefill_gpus: int | None = None,
    demand: FloatArray | None = None,
) -> Pairs:
    """Return every pair of sides at its best ratio, or at those that serve a demand on the fewest GPUs.

    Parameters
    ----------
    prefill_rate, decode_rate : NDArray[np.float64]
        Requests per second that one replica lets through, ``(num_prefills,)`` and ``(num_decodes,)`` [1/s].
    prefill_gpus, decode_gpus : NDArray[np.int64]
        GPUs of one replica of each.
    max_gpus : int
        GPUs there are; a unit has no more.
    prefill_margin : NDArray[np.float64] | None
        Rate that a prefill pool keeps free, whatever its size, ``(num_prefills,)``; None is nothing [1/s].
    max_prefill_gpus : int | None
        GPUs of a cluster of the prefill pools' own, ``max_gpus`` being those of the decode pools; None shares one.
    demand : NDArray[np.float64] | None
        Rate that all units together have to carry, ``(num_prefills, num_decodes)``; None where more is better [1/s].

    Notes
    -----
    A ratio's value is the rate of the slower side per GPU that the cluster's whole units use of all GPUs there are: a
    ratio that wastes no GPUs but leaves a node idle is worth less. With a demand it is the GPUs that carry it, and a
    pair has an entry for each ratio that is the cheapest with more or less room to spare.
    """
    counts = np.arange(1, _MAX_REPLICAS + 1)
    ratios_p, ratios_d = (axis.ravel() for axis in np.meshgrid(counts, counts, indexing="ij"))
    in_lowest_terms = np.gcd(ratios_p, ratios_d) == 1
    ratios_p, ratios_d = ratios_p[in_lowest_terms], ratios_d[in_lowest_terms]
    p, d = (
        axis.ravel()
        for axis in np.meshgrid(np.arange(len(prefill_rate)), np.arange(len(decode_rate)), indexing="ij")
    )
    gpus_p, gpus_d = prefill_gpus[p][:, None] * ratios_p, decode_gpus[d][:, None] * ratios_d
    gpus = gpus_p + gpus_d
    room = (
        max_gpus // gpus
        if max_prefill_gpus is None
        else np.minimum(max_prefill_gpus // gpus_p, max_gpus // gpus_d)
    )
    first, second = prefill_rate[p][:, None] * ratios_p, decode_rate[d][:, None] * ratios_d
    rate = np.minimum(first, second)
    margin = np.zeros(len(p)) if prefill_margin is None else prefill_margin[p]
    # Where the margin leaves nothing, a hundredth of the bound keeps the order of what is left.
    estimate = np.maximum(np.minimum(first - margin[:, None], second), 0.01 * rate)
    served = estimate * room
    rows = np.flatnonzero((served > 0.0).any(axis=1))
    if demand is None:
        chosen = served[rows].argmax(axis=1)
    else:
        rows, chosen = _cheapest_ratios(
            rows, demand.ravel(), (rate, *(share * estimate for share in _RATE_SHARES)), room, gpus
        )
    return Pairs(
        prefill=p[rows],
        decode=d[rows],
        num_prefill=ratios_p[chosen].astype(np.int64),
        num_decode=ratios_d[chosen].astype(np.int64),
        rate=rate[rows, chosen],
        estimate=estimate[rows, chosen],
        num_gpus=gpus[rows, chosen].astype(np.int64),
    )


def _cheapest_ratios(
    rows: IntArray, demand: FloatArray, capacities: Sequence[FloatArray], room: IntArray, gpus: IntArray
) -> tuple[IntArray, IntArray]:
    """Return pairs and ratios that carry the demand on the fewest GPUs by any of the capacities, each combination once.

    Where no ratio carries it, the one that carries the most.
    """
    places: list[IntArray] = []
    wanted = demand[rows, None]
    for capacity in (each[rows] for each in capacities):
        units = np.ceil(wanted / np.maximum(capacity, 1e-300) - 1e-9)
        is_enough = units <= room[rows]
        # Among equal numbers of GPUs the one with the most to spare.
        spare = np.minimum(units * capacity / np.maximum(wanted, 1e-300), 1e6)
        best = np.where(is_enough, units * gpus[rows] - 1e-7 * spare, np.inf).argmin(axis=1)
        most = (capacity * room[rows]).argmax(axis=1)
        places.append(rows * gpus.shape[1] + np.where(is_enough.any(axis=1), best, most))
    found, chosen = np.divmod(np.unique(np.concatenate(places)), gpus.shape[1])
    return found.astype(np.int64), chosen.astype(np.int64)
