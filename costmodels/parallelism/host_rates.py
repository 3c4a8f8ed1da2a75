"""What each GPU of a node gets of its host while all of them use it at once: links, memory, cores, drives.

Data sheets say what a host could do (:class:`meshwright.hardware_specs.specs.HostSpec`); the shares it reaches
are those of published measurements, below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import HostSpec

__all__ = ["GRACE", "SERVER", "HostEfficiency", "HostRates", "copy_time", "host_rates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEfficiency:
    """Shares of a host's data sheet that offload reaches.

    Parameters
    ----------
    link : float
        Of the GPU's link to the host, by pinned copies, each direction.
    copy : float
        Of the host's memory bandwidth, by copies of all GPUs together.
    adam : float
        Of the host's memory bandwidth, by the Adam step on the processors.
    adam_parameters_per_second : float
        Parameters that one core updates when memory does not hold it up [1/s].
    nvme : float
        Of the drives' bandwidth.
    """

    link: float
    copy: float
    adam: float
    adam_parameters_per_second: float
    nvme: float


# link: pinned copies reach 26.3 of 32 GB/s (A100), 51.5 of 64 (H100; Azure AI benchmarking guide), 55.2 of 64 (H200,
# nvbandwidth, ml-engineering). copy: 347 of 396 GB/s, both directions of a GB300 station (nvbandwidth,
# ml-engineering). adam: DeepSpeed CPU-Adam at 30 B a parameter on DGX-2 (ZeRO-Offload, table 4: 10 billion
# parameters in 2.57 s of 256 GB/s) and on an EPYC host (Deep Optimizer States, runs of Polaris). Cores: 70 to 94
# million parameters a second on 96, 48 and 32 of them there; this is the value whose worst error over the three
# is least (16 %). nvme: 10 of 13 GB/s (DeepNVMe, 2024).
SERVER = HostEfficiency(link=0.82, copy=0.88, adam=0.45, adam_parameters_per_second=82e6, nvme=0.8)
# One processor a GPU and no second socket: CPU-Adam updates 8 billion parameters in 0.769 s on 72 cores and
# 512 GB/s (SuperOffload, arXiv 2509.21271, table of Adam latencies).
GRACE = HostEfficiency(link=0.82, copy=0.88, adam=0.61, adam_parameters_per_second=144e6, nvme=0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """One GPU's share of its host.

    Parameters
    ----------
    down, up : float
        Copies from the device to the host, and back [B/s].
    copy : float
        Host memory under copies, both directions together [B/s].
    adam : float
        Host memory under the processors' Adam step [B/s].
    adam_parameters_per_second : float
        Parameters the share of the cores updates; infinite where the cores are unknown [1/s].
    nvme_read, nvme_write : float
        Drives; 0 where the node's are unknown [B/s].
    device : float
        The device's own memory under streaming kernels [B/s].
    """

    down: float
    up: float
    copy: float
    adam: float
    adam_parameters_per_second: float
    nvme_read: float
    nvme_write: float
    device: float


def host_rates(
    context: CostContext, *, needs_nvme: bool = False, efficiency: HostEfficiency | None = None
) -> HostRates:
    """Return what each GPU gets of its host while all GPUs of the node use it.

    Parameters
    ----------
    context : CostContext
        Job and calibration; where copies to and from the host were measured, their efficiency is the link's.
    needs_nvme : bool
        Whether anything rests on the drives.
    efficiency : HostEfficiency | None
        Shares of the data sheet; those of published measurements without it: :data:`GRACE` where the link is
        NVLink-C2C, :data:`SERVER` elsewhere.

    Raises
    ------
    SpecError
        If the node does not say what offload needs of it.
    """
    node = context.cluster.node
    host = node.host or HostSpec()
    if host.memory_bandwidth_bytes_per_second is None:
        raise SpecError(
            f"node {node.id}: offload is priced by the host's memory bandwidth, which is not known; add "
            "'host: {memory_bandwidth: 400 GB/s}' to the node of the cluster file"
        )
    read, write = host.nvme_read_bytes_per_second, host.nvme_write_bytes_per_second
    if needs_nvme and (host.nvme_bytes is None or read is None or write is None):
        raise SpecError(
            f"node {node.id}: offload to NVMe is priced by the drives, which are not known; add "
            "'host: {nvme: 30 TB, nvme_read: 50 GB/s, nvme_write: 25 GB/s}' to the node of the cluster file"
        )
    reached = efficiency or (GRACE if context.gpu.host_link.kind == "nvlink-c2c" else SERVER)
    per_gpu = 1.0 / node.num_gpus
    memory = host.memory_bandwidth_bytes_per_second * per_gpu
    link = node.host_link_bandwidth_per_gpu
    cores = reached.adam_parameters_per_second * host.num_cores * per_gpu if host.num_cores else np.inf
    return HostRates(
        down=link * _measured(context, "device_to_host", reached.link),
        up=link * _measured(context, "host_to_device", reached.link),
        copy=memory * reached.copy,
        adam=memory * reached.adam,
        adam_parameters_per_second=cores,
        nvme_read=(read or 0.0) * per_gpu * reached.nvme,
        nvme_write=(write or 0.0) * per_gpu * reached.nvme,
        device=context.gpu.memory_bandwidth_bytes_per_second * context.calibration.memory_stream_efficiency,
    )


def copy_time(rates: HostRates, down_bytes: FloatColumn, up_bytes: FloatColumn) -> FloatColumn:
    """Return the seconds of copies in both directions at once: the slower link, or host memory under both."""
    links = np.maximum(down_bytes / rates.down, up_bytes / rates.up)
    return np.maximum(links, (down_bytes + up_bytes) / rates.copy)


def _measured(context: CostContext, operator: str, default: float) -> float:
    """Return the share of its link a copy reaches: the calibration's, or the default."""
    for name, model in context.calibration.operators.items():
        if name.startswith(f"{operator}."):
            return model.curve.memory_efficiency
    return default
