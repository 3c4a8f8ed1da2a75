"""Offload to host memory and NVMe: optimizer states and their step, weights, activations.

Times are those of one GPU while every GPU of its node does the same (:mod:`.host_rates`). The step follows
ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840), ZeRO-Infinity (Rajbhandari et al. 2021, arXiv 2104.07857) and Deep
Optimizer States (Maurya et al. 2024, arXiv 2410.21316).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.host_rates import HostEfficiency, HostRates, copy_time, host_rates
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, Offloads

__all__ = [
    "ActivationOffloadTimes",
    "OptimizerOffloadTimes",
    "activation_offload_time",
    "best_offload_fraction",
    "best_streamed_share",
    "optimizer_offload_time",
    "parameter_offload_time",
]

# Adam on fp32 states: gradient, master weight and two moments read (16 B), the latter three written (12 B), and the
# 16-bit copy that travels to the device (2 B).
_ADAM_BYTES = 30.0
# Master weight and two moments.
_STATE_BYTES = 12.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizerOffloadTimes:
    """Once per iteration; arrays of shape ``(num_plans,)`` [s].

    Parameters
    ----------
    exposed_gradient : FloatColumn
        Copy of the gradients that backward does not hide, and what it slows backward down by.
    host : FloatColumn
        The step's path over processors, host memory, drives and links; 0 where nothing is offloaded.
    device : FloatColumn
        Meanwhile, the device's own update of the states it holds or streams.
    """

    exposed_gradient: FloatColumn
    host: FloatColumn
    device: FloatColumn

    @property
    def update(self) -> FloatColumn:
        """The step: both sides at once [s]."""
        return np.maximum(self.host, self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationOffloadTimes:
    """What copies of one layer's activations add to one micro-batch; arrays of shape ``(num_plans,)`` [s]."""

    forward: FloatColumn
    backward: FloatColumn


def optimizer_offload_time(
    context: CostContext,
    num_parameters_per_rank: FloatColumn,
    kind: IntColumn,
    fraction: FloatColumn,
    backward_window: FloatColumn,
    *,
    parameter_kind: IntColumn | None = None,
    streamed_share: FloatColumn | float = 0.0,
    efficiency: HostEfficiency | None = None,
) -> OptimizerOffloadTimes:
    """Return what an optimizer step costs whose states rest on the host in part or in whole.

    Gradients of the offloaded share go down beside backward; the processors update them; the 16-bit weights go
    up. Clipping, which waits for the norm of all gradients, is why the update itself does not overlap backward.

    Parameters
    ----------
    context : CostContext
        Job, node and calibration.
    num_parameters_per_rank : FloatColumn
        Parameters whose states this rank updates (its share of sharded ones), shape ``(num_plans,)``.
    kind : IntColumn
        Codes of :class:`~meshwright.costmodels.plan_columns.Offloads`: where the states rest.
    fraction : FloatColumn
        Share of the states that rest there, 0 to 1; the device holds and updates the rest.
    backward_window : FloatColumn
        Time of backward that copies of the gradients may run beside [s].
    parameter_kind : IntColumn | None
        Where the 16-bit weights rest; those on the host are not sent up, and those the device updated go down.
    streamed_share : FloatColumn | float
        Share of the offloaded states that travel up, are updated by the device and travel back (Deep Optimizer
        States; one subgroup in ``k`` is ``1 / k``).
    efficiency : HostEfficiency | None
        Shares of the host's data sheet; published measurements without it.

    Returns
    -------
    OptimizerOffloadTimes
        ``host`` and ``exposed_gradient`` are 0 where nothing is offloaded.

    Raises
    ------
    SpecError
        If the node does not say what offload needs of it.

    Notes
    -----
    With ``A = f (1 - s) N`` parameters updated by the processors and ``S = f s N`` streamed:
    ``host = max(A / cores, 30 A / adam + copies / copy, up / link, down / link, 12 (A + S) (1 / read + 1 / write))``,
    ``up = 2 A + (12 + g) S``, ``down = 12 S``. Copies and processors share host memory, hence the sum; drives
    serve a read or a write, hence that sum; everything else is pipelined by subgroup, hence the maximum (Infinity
    offload engine, section 6). States that pass from the drives count among the copies.
    """
    is_offloaded = kind != Offloads.NONE
    nowhere = np.zeros_like(kind)
    weights = nowhere if parameter_kind is None else parameter_kind
    if not (is_offloaded.any() or (weights != Offloads.NONE).any()):
        device = _ADAM_BYTES * num_parameters_per_rank / _device_bandwidth(context)
        return OptimizerOffloadTimes(
            exposed_gradient=np.zeros_like(device), host=np.zeros_like(device), device=device
        )
    needs_nvme = bool((kind == Offloads.NVME).any() or (weights == Offloads.NVME).any())
    rates = host_rates(context, needs_nvme=needs_nvme, efficiency=efficiency)
    offloaded = np.where(is_offloaded, fraction, 0.0)
    paths = _update_paths(
        context, rates, num_parameters_per_rank, kind, weights, offloaded, np.asarray(streamed_share)
    )
    gradients = context.gradient_bytes * offloaded * num_parameters_per_rank
    copy = copy_time(rates, gradients, np.zeros_like(gradients))
    return OptimizerOffloadTimes(
        exposed_gradient=_beside_compute(rates, gradients, copy, backward_window),
        host=paths[:-1].max(axis=0),
        device=paths[-1],
    )


def best_offload_fraction(
    context: CostContext,
    num_parameters_per_rank: FloatColumn,
    kind: IntColumn,
    device_bytes: FloatColumn | float = np.inf,
    *,
    efficiency: HostEfficiency | None = None,
) -> FloatColumn:
    """Return the offloaded share of the states with the fastest step that leaves the device room enough.

    Parameters
    ----------
    context : CostContext
        Job, node and calibration.
    num_parameters_per_rank : FloatColumn
        Parameters whose states this rank updates, shape ``(num_plans,)``.
    kind : IntColumn
        Where the offloaded states rest; plans with none get 0.
    device_bytes : FloatColumn | float
        Device memory left for the states that stay, 12 B a parameter [B].
    efficiency : HostEfficiency | None
        Shares of the host's data sheet.

    Notes
    -----
    Host and device update at once, so the best share balances them, ``f = t_device / (t_device + t_host)`` with the
    times of a whole step on either side: a few percent, as the device's memory is far faster. Less room than that
    leaves sets the share instead: ``f >= 1 - room / (12 N)``.
    """
    is_offloaded = kind != Offloads.NONE
    if not is_offloaded.any():
        return np.zeros(len(kind))
    rates = host_rates(context, needs_nvme=bool((kind == Offloads.NVME).any()), efficiency=efficiency)
    whole = np.ones(len(kind))
    paths = _update_paths(
        context, rates, num_parameters_per_rank, kind, np.zeros_like(kind), whole, np.zeros(())
    )
    # Every path but the device's is proportional to the share, and the device's to what is left.
    host = paths[:-1].max(axis=0)
    device = _ADAM_BYTES * num_parameters_per_rank / rates.device
    balanced = np.divide(device, device + host, out=np.zeros_like(host), where=host > 0.0)
    states = np.maximum(_STATE_BYTES * num_parameters_per_rank, 1.0)
    needed = np.clip(1.0 - device_bytes / states, 0.0, 1.0)
    return np.where(is_offloaded, np.maximum(balanced, needed), 0.0)


def best_streamed_share(
    context: CostContext,
    num_parameters_per_rank: FloatColumn,
    kind: IntColumn,
    fraction: FloatColumn,
    *,
    efficiency: HostEfficiency | None = None,
) -> FloatColumn:
    """Return the share of the offloaded states that the device had best update, by streaming them.

    Deep Optimizer States interleave subgroups so that processors, both directions of the link and the device work
    at once; the best share is where the falling times (cores, host memory) meet the rising ones. Published runs
    stream up to half of the states; shares beyond extrapolate.

    Parameters
    ----------
    context : CostContext
        Job, node and calibration.
    num_parameters_per_rank : FloatColumn
        Parameters whose states this rank updates, shape ``(num_plans,)``.
    kind : IntColumn
        Where the offloaded states rest.
    fraction : FloatColumn
        Share of the states that rest there.
    efficiency : HostEfficiency | None
        Shares of the host's data sheet.
    """
    offloaded = np.where(kind != Offloads.NONE, fraction, 0.0)
    if not offloaded.any():
        return np.zeros(len(kind))
    rates = host_rates(context, needs_nvme=bool((kind == Offloads.NVME).any()), efficiency=efficiency)
    ends = (
        _update_paths(
            context, rates, num_parameters_per_rank, kind, np.zeros_like(kind), offloaded, np.asarray(share)
        )
        for share in (0.0, 1.0)
    )
    return np.where(offloaded > 0.0, _lowest_maximum(*ends), 0.0)


def parameter_offload_time(
    context: CostContext,
    num_parameters: FloatColumn,
    kind: IntColumn,
    shard_ranks: FloatColumn,
    window: FloatColumn,
    *,
    efficiency: HostEfficiency | None = None,
) -> FloatColumn:
    """Return what fetching one layer's weights from the host adds to one pass over it.

    Every rank fetches its own shard over its own link, and the ranks then gather it as ZeRO-3 does anyway
    (bandwidth-centric partitioning, ZeRO-Infinity section 6.1): the links of all ranks work at once, where an
    owner that broadcasts a layer uses one. From drives the shard is read ahead of the copy.

    Parameters
    ----------
    context : CostContext
        Job, node and calibration.
    num_parameters : FloatColumn
        Parameters of the layer on one tensor parallel rank before sharding, shape ``(num_plans,)``.
    kind : IntColumn
        Where the weights rest.
    shard_ranks : FloatColumn
        Ranks that share the layer's weights.
    window : FloatColumn
        What the fetch of the next layer may run beside: the layer's compute, or its gather where that takes
        longer [s].
    efficiency : HostEfficiency | None
        Shares of the host's data sheet.

    Returns
    -------
    FloatColumn
        Time per layer and pass (forward, backward, recompute each fetch) [s].
    """
    is_offloaded, is_nvme = kind != Offloads.NONE, kind == Offloads.NVME
    if not is_offloaded.any():
        return np.zeros(len(kind))
    rates = host_rates(context, needs_nvme=bool(is_nvme.any()), efficiency=efficiency)
    num_bytes = np.where(is_offloaded, context.element_bytes * num_parameters / shard_ranks, 0.0)
    fetch = copy_time(rates, np.zeros_like(num_bytes), num_bytes)
    if rates.nvme_read > 0.0:
        # Bytes from the drives cross host memory once more.
        from_drives = np.maximum(num_bytes / rates.nvme_read, 2.0 * num_bytes / rates.copy)
        fetch = np.where(is_nvme, np.maximum(fetch, from_drives), fetch)
    return _beside_compute(rates, num_bytes, fetch, window)


def activation_offload_time(
    context: CostContext,
    layer_bytes: FloatColumn,
    forward_window: FloatColumn,
    backward_window: FloatColumn,
    *,
    efficiency: HostEfficiency | None = None,
) -> ActivationOffloadTimes:
    """Return what copying one layer's stored activations down and up again adds to one micro-batch.

    Parameters
    ----------
    context : CostContext
        Job, node and calibration.
    layer_bytes : FloatColumn
        Activations a layer stores; 0 where they stay, shape ``(num_plans,)`` [B].
    forward_window, backward_window : FloatColumn
        Compute of a layer that the copy may run beside [s].
    efficiency : HostEfficiency | None
        Shares of the host's data sheet.

    Notes
    -----
    ``exposed = max(0, copy - window)``, and the copy engines take their bytes of the device's memory bandwidth,
    no more: they use no SMs (vDNN, Rhu et al. 2016, section 3).
    """
    if not layer_bytes.any():
        nothing = np.zeros(len(layer_bytes))
        return ActivationOffloadTimes(forward=nothing, backward=nothing)
    rates = host_rates(context, efficiency=efficiency)
    nothing = np.zeros_like(layer_bytes)
    return ActivationOffloadTimes(
        forward=_beside_compute(rates, layer_bytes, copy_time(rates, layer_bytes, nothing), forward_window),
        backward=_beside_compute(rates, layer_bytes, copy_time(rates, nothing, layer_bytes), backward_window),
    )


def _update_paths(
    context: CostContext,
    rates: HostRates,
    num_parameters: FloatColumn,
    kind: IntColumn,
    parameter_kind: IntColumn,
    fraction: FloatColumn,
    streamed_share: FloatColumn,
) -> NDArray[np.float64]:
    """Return the seconds of a step by what they are spent on, shape ``(6, num_plans)``, the device last.

    Each is linear in the fraction, and in the streamed share.
    """
    by_processors = fraction * (1.0 - streamed_share) * num_parameters
    streamed = fraction * streamed_share * num_parameters
    by_device = (1.0 - fraction) * num_parameters + streamed
    rests_on_host = parameter_kind != Offloads.NONE
    weight = context.element_bytes
    up = (_STATE_BYTES + context.gradient_bytes) * streamed
    up = up + np.where(rests_on_host, 0.0, weight) * by_processors
    down = _STATE_BYTES * streamed + np.where(rests_on_host, weight, 0.0) * by_device
    read = np.where(kind == Offloads.NVME, _STATE_BYTES, 0.0) * (by_processors + streamed)
    # Every state that was read is written back; weights that rest on the drives are written only.
    written = read + np.where(parameter_kind == Offloads.NVME, weight, 0.0) * num_parameters
    drives = np.zeros_like(up)
    if rates.nvme_read > 0.0 and rates.nvme_write > 0.0:
        drives = read / rates.nvme_read + written / rates.nvme_write
    return np.stack(
        [
            by_processors / rates.adam_parameters_per_second,
            _ADAM_BYTES * by_processors / rates.adam + (up + down + read + written) / rates.copy,
            up / rates.up,
            down / rates.down,
            drives,
            _ADAM_BYTES * by_device / rates.device,
        ]
    )


def _lowest_maximum(at_zero: NDArray[np.float64], at_one: NDArray[np.float64]) -> FloatColumn:
    """Return where in 0..1 the largest of some lines is lowest; shapes ``(num_lines, num_plans)``.

    The largest of lines is convex, so its lowest point is an end or where two of them cross.
    """
    slope = at_one - at_zero
    candidates = [np.zeros(at_zero.shape[1]), np.ones(at_zero.shape[1])]
    for first, second in combinations(range(len(slope)), 2):
        steeper = slope[first] - slope[second]
        crossing = np.divide(
            at_zero[second] - at_zero[first], steeper, out=np.zeros_like(steeper), where=steeper != 0.0
        )
        candidates.append(np.clip(crossing, 0.0, 1.0))
    shares = np.stack(candidates)
    largest = (at_zero[None] + shares[:, None] * slope[None]).max(axis=1)
    best: FloatColumn = np.take_along_axis(shares, largest.argmin(axis=0)[None], axis=0)[0]
    return best


def _beside_compute(
    rates: HostRates, num_bytes: FloatColumn, copy: FloatColumn, window: FloatColumn
) -> FloatColumn:
    """Return what a copy beside compute costs: its overhang, and the device memory's time for the bytes hidden."""
    overhang = np.maximum(copy - window, 0.0)
    beside = copy - overhang
    hidden = np.divide(beside, copy, out=np.zeros_like(beside), where=copy > 0.0)
    return overhang + hidden * num_bytes / rates.device


def _device_bandwidth(context: CostContext) -> float:
    efficiency = context.calibration.memory_stream_efficiency
    return context.gpu.memory_bandwidth_bytes_per_second * efficiency
