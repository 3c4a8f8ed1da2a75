"""Fit collectives inside a node: a p-norm of latency and bandwidth by group size, and the measured table itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, least_squares

from meshwright.costmodels.calibration import CollectiveCurve, CollectiveTable
from meshwright.errors import CalibrationError
from meshwright.profiler.measurements import CollectiveSamples

__all__ = ["BUS_FACTORS", "fit_collectives", "fit_p_norm", "monotone_table"]

Column = NDArray[np.float64]

# Bytes that cross each rank's link over the whole buffer, as a multiple of (n - 1) / n (nccl-tests,
# doc/PERFORMANCE.md).
BUS_FACTORS: Mapping[str, float] = {
    "all_reduce": 2.0,
    "all_gather": 1.0,
    "reduce_scatter": 1.0,
    "all_to_all": 1.0,
}
_LEAST_SIZES = 6
_MIN_EXPONENT, _MAX_EXPONENT = 0.3, 8.0


def fit_collectives(
    samples: Sequence[CollectiveSamples], link_bandwidth: float
) -> Mapping[str, CollectiveCurve]:
    """Return the curves of every collective with a bus factor; sends and broadcasts are not fitted here.

    Parameters
    ----------
    samples : Sequence[CollectiveSamples]
        One per collective and group size.
    link_bandwidth : float
        Bandwidth of a GPU's links to its peers, per direction [B/s].

    Raises
    ------
    CalibrationError
        If a group size has too few message sizes; says how many more are needed.
    """
    grouped: dict[str, dict[int, CollectiveSamples]] = defaultdict(dict)
    for each in samples:
        if each.collective in BUS_FACTORS:
            grouped[each.collective][each.ranks] = each
    return {
        name: _fit_curve(name, [by_ranks[ranks] for ranks in sorted(by_ranks)], link_bandwidth)
        for name, by_ranks in sorted(grouped.items())
    }


def _fit_curve(name: str, groups: Sequence[CollectiveSamples], link_bandwidth: float) -> CollectiveCurve:
    fitted = [fit_p_norm(group) for group in groups]
    tables = [monotone_table(group) for group in groups]
    errors = [np.abs(_halved_error(table)) for table in tables]
    return CollectiveCurve(
        ranks=tuple(float(group.ranks) for group in groups),
        latency=tuple(latency for latency, _, _ in fitted),
        link_efficiency=tuple(bandwidth / link_bandwidth for _, bandwidth, _ in fitted),
        exponent=tuple(exponent for _, _, exponent in fitted),
        tables=tuple(tables),
        link_bandwidth=link_bandwidth,
        error=float(np.concatenate(errors).mean()),
    )


def fit_p_norm(samples: CollectiveSamples) -> tuple[float, float, float]:
    """Return latency [s], bus bandwidth [B/s] and exponent of ``(latency**p + (traffic / bandwidth)**p)**(1/p)``."""
    if len(samples.seconds) < _LEAST_SIZES:
        raise CalibrationError(
            f"{samples.collective} of {samples.ranks} ranks: {len(samples.seconds)} message sizes are too few; "
            f"measure {_LEAST_SIZES - len(samples.seconds)} more"
        )
    factor = BUS_FACTORS[samples.collective] * (samples.ranks - 1.0) / samples.ranks
    traffic = factor * samples.num_bytes

    def log_errors(point: Column) -> Column:
        latency, bandwidth, exponent = np.exp(point)
        transfer = traffic / bandwidth
        longer, shorter = np.maximum(latency, transfer), np.minimum(latency, transfer)
        total = np.log(longer) + np.log1p((shorter / longer) ** exponent) / exponent
        errors: Column = total - np.log(samples.seconds)
        return errors

    largest = int(np.argmax(samples.num_bytes))
    start = np.log([float(samples.seconds.min()), float(traffic[largest] / samples.seconds[largest]), 1.0])
    low = np.array([start[0] - 4.0, start[1] - 2.0, np.log(_MIN_EXPONENT)])
    high = np.array([start[0] + 4.0, start[1] + 2.0, np.log(_MAX_EXPONENT)])
    point = least_squares(log_errors, start, bounds=(low, high), loss="soft_l1", f_scale=0.1).x
    latency, bandwidth, exponent = np.exp(point).tolist()
    return latency, bandwidth, exponent


def monotone_table(samples: CollectiveSamples) -> CollectiveTable:
    """Return the measured times by size, evened out where a larger message was measured faster.

    The evening is isotonic regression of the log times, the least change in mean square that never falls.
    """
    sizes, first = np.unique(samples.num_bytes, return_inverse=True)
    log_seconds = np.array([np.median(np.log(samples.seconds[first == row])) for row in range(len(sizes))])
    rising = isotonic_regression(log_seconds).x
    # Rounding as the file does, so that what was rounded keeps its order.
    seconds = np.maximum.accumulate(np.array([float(f"{value:.7g}") for value in np.exp(rising)]))
    return CollectiveTable(num_bytes=sizes.astype(np.float64), seconds=seconds)


def _halved_error(table: CollectiveTable) -> Column:
    """Return the errors at every second size of a table made of the other ones."""
    kept = np.zeros(len(table.num_bytes), dtype=bool)
    kept[::2] = True
    kept[-1] = True
    half = CollectiveTable(num_bytes=table.num_bytes[kept], seconds=table.seconds[kept])
    errors: Column = half.time(table.num_bytes[~kept]) / table.seconds[~kept] - 1.0
    return errors
