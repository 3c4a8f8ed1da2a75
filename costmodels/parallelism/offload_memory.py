"""What offload takes off the device, what buffers stay there, and what a node's memory and drives must hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.data import shard_ranks
from meshwright.costmodels.plan_columns import FloatColumn, Offloads, PlanColumns, Shardings
from meshwright.errors import SpecError

__all__ = ["HostDemand", "OffloadMemory", "host_demand", "offload_memory"]

# Master weight and two moments; the gradient as the processors add it up.
_STATE_BYTES = 12.0
_HOST_GRADIENT_BYTES = 4.0
# Pinned buffers on top of what they hold, DeepSpeed's own estimate (additional_buffer_factor of
# estimate_zero3_model_states_mem_needs): 24 B a parameter of optimizer offload; 22 to 28 measured.
_PINNED_FACTOR = 1.5
# Gradients on their way down: two buckets of DeepSpeed's default reduce_bucket_size.
_BUCKET_ELEMENTS = 5e8
_NUM_BUCKETS = 2.0
# States on their way from and to the drives: one subgroup (default sub_group_size) is read while another is written.
_SUBGROUP_ELEMENTS = 1e9
_NUM_SUBGROUPS = 2.0
# Weights on their way from the drives: default buffer_count and buffer_size of offload_param.
_WEIGHT_BUFFER_ELEMENTS = 5.0 * 1e8
# Layers whose activations are on the device while those of the others are away: one at work, one on its way.
_RESIDENT_LAYERS = 2.0
# Processes, libraries and page tables of one rank, its share of the operating system's included [B] (20 to 26 GB for
# four ranks before the states are built: Deep Optimizer States, public runs).
_PROCESS_BYTES = 6e9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadMemory:
    """One rank's bytes under offload; arrays of shape ``(num_plans,)`` [B].

    Parameters
    ----------
    weights, gradients, optimizer_states, activations : FloatColumn
        What stays on the device of each use.
    staging : FloatColumn
        Buffers on the device that offload adds.
    host, nvme : FloatColumn
        What rests in host memory, pinned buffers included, and on the drives; 0 where nothing is offloaded.
    """

    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn
    activations: FloatColumn
    staging: FloatColumn
    host: FloatColumn
    nvme: FloatColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostDemand:
    """What a full node needs for offload, against what it has; arrays of shape ``(num_plans,)`` [B]."""

    host_bytes: FloatColumn
    nvme_bytes: FloatColumn
    host_capacity: float
    nvme_capacity: float

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether host memory and drives both hold it."""
        holds: NDArray[np.bool_] = (self.host_bytes <= self.host_capacity) & (
            self.nvme_bytes <= self.nvme_capacity
        )
        return holds


def offload_memory(
    context: CostContext,
    columns: PlanColumns,
    *,
    weights: FloatColumn,
    gradients: FloatColumn,
    optimizer_states: FloatColumn,
    activations: FloatColumn,
    layer_activations: FloatColumn,
    num_weights: FloatColumn,
    num_trained: FloatColumn,
) -> OffloadMemory:
    """Return what stays on the device and what rests elsewhere, by the offload choices of the plans.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    weights, gradients, optimizer_states, activations : FloatColumn
        Device bytes of one rank without offload, sharding counted in, shape ``(num_plans,)`` [B].
    layer_activations : FloatColumn
        Activations one layer stores per micro-batch [B].
    num_weights, num_trained : FloatColumn
        Parameters this rank holds as weights, and those whose optimizer states it holds (its share of sharded ones).

    Notes
    -----
    Of the offloaded share ``f`` the states leave, and where gradients are reduced as they come (ZeRO-2 and above) the
    gradients too, but for two buckets (ZeRO-Offload, section 4: 2 of 16 B a parameter stay). Where the device held the
    fp32 master as the weight (ZeRO-3) a 16-bit copy takes its place. Offloaded weights leave altogether: layers that
    are gathered are the working set's. Of offloaded activations those of two layers stay.
    """
    share = np.where(columns.optimizer_offload != Offloads.NONE, columns.optimizer_offload_fraction, 0.0)
    to_drives = columns.optimizer_offload == Offloads.NVME
    offloads_weights = columns.parameter_offload != Offloads.NONE
    weights_to_drives = columns.parameter_offload == Offloads.NVME
    gradients_leave = (columns.sharding >= Shardings.ZERO2) & (share > 0.0)
    weight_bytes = context.element_bytes

    sixteen_bit = np.minimum(weights, weight_bytes * num_weights)
    kept_weights = np.where(offloads_weights, 0.0, (1.0 - share) * weights + share * sixteen_bit)
    resident = np.minimum(activations, _RESIDENT_LAYERS * layer_activations)
    moved = np.where(columns.activation_offload, activations - resident, 0.0)

    in_flight = np.minimum(_BUCKET_ELEMENTS, num_trained * shard_ranks(columns))
    staging = np.where(gradients_leave, _NUM_BUCKETS * context.gradient_bytes * in_flight, 0.0)

    states = share * num_trained
    host_states = np.where(
        to_drives,
        _NUM_SUBGROUPS * _STATE_BYTES * np.minimum(states, _SUBGROUP_ELEMENTS),
        _STATE_BYTES * states,
    )
    host_weights = weight_bytes * np.where(
        weights_to_drives, np.minimum(num_weights, _WEIGHT_BUFFER_ELEMENTS), num_weights
    )
    host_weights = np.where(offloads_weights, host_weights, 0.0)
    host = _PINNED_FACTOR * (host_states + _HOST_GRADIENT_BYTES * states + host_weights + moved)
    nvme = np.where(to_drives, _STATE_BYTES * states, 0.0)
    nvme = nvme + np.where(weights_to_drives, weight_bytes * num_weights, 0.0)
    return OffloadMemory(
        weights=kept_weights,
        gradients=np.where(gradients_leave, 1.0 - share, 1.0) * gradients,
        optimizer_states=(1.0 - share) * optimizer_states,
        activations=activations - moved,
        staging=staging,
        host=host,
        nvme=nvme,
    )


def host_demand(context: CostContext, host: FloatColumn, nvme: FloatColumn) -> HostDemand:
    """Return what a node needs for offload when each of its GPUs needs as much, against what it has.

    Parameters
    ----------
    context : CostContext
        Job and node.
    host, nvme : FloatColumn
        Bytes of the rank with the most, of :func:`offload_memory`; plans with neither need nothing [B].

    Raises
    ------
    SpecError
        If something is offloaded and the node's memory, or its drives where they are used, are unknown.
    """
    node = context.cluster.node
    is_used = (host > 0.0) | (nvme > 0.0)
    drives = node.host.nvme_bytes if node.host is not None else None
    if is_used.any() and node.host_memory_bytes is None:
        raise SpecError(
            f"node {node.id}: whether offload fits depends on the host's memory, which is not known; add "
            "'host_memory: 1 TB' to the node of the cluster file"
        )
    if nvme.any() and drives is None:
        raise SpecError(
            f"node {node.id}: whether offload fits depends on the node's drives, which are not known; add "
            "'host: {nvme: 30 TB}' to the node of the cluster file"
        )
    return HostDemand(
        host_bytes=np.where(is_used, node.num_gpus * (host + _PROCESS_BYTES), 0.0),
        nvme_bytes=node.num_gpus * nvme,
        host_capacity=node.host_memory_bytes or 0.0,
        nvme_capacity=drives or 0.0,
    )
