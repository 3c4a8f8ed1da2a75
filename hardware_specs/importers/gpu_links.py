"""Links between the GPUs of one node, from the words that topology tools print for pairs of them."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.hardware_specs.specs import NodeSpec

__all__ = ["are_unequal", "gpu_link_bandwidths"]

# One NVLink per direction [B/s]: NVLink 2 to 4 (NVIDIA V100, A100 and H100 data sheets), and NVLink 5 (GB200).
_NVLINK, _NVLINK_5 = 25e9, 50e9
# Share of the PCIe bandwidth that pairs on different sockets are left with: NCCL gives such pairs 10 to 22 GB/s where
# those below one root port get 12 to 48 (NVIDIA/nccl, src/graph/topo.h).
_ACROSS_SOCKETS = 0.5


def are_unequal(cells: Sequence[Sequence[str]]) -> bool:
    """Return whether some pairs of GPUs have NVLinks and others fewer or none; ``X`` on the diagonal."""
    return len({_num_nvlinks(cell) for row in cells for cell in row if cell != "X"}) > 1


def gpu_link_bandwidths(
    cells: Sequence[Sequence[str]], node: NodeSpec
) -> tuple[tuple[tuple[float, ...], ...], str]:
    """Return the bandwidth of every pair of GPUs per direction [B/s], and what was guessed for it.

    Parameters
    ----------
    cells : Sequence[Sequence[str]]
        Word of each pair: ``NV4`` (NVLinks), ``PIX``, ``PXB``, ``PHB``, ``NODE`` or ``SYS``.
    node : NodeSpec
        What the machine is; its GPU says how fast PCIe is.
    """
    pcie = node.gpu.host_link.bandwidth_bytes_per_second
    scale_up = node.gpu.scale_up
    nvlink = _NVLINK_5 if scale_up is not None and scale_up.kind == "nvlink5" else _NVLINK

    def bandwidth(cell: str) -> float:
        links = _num_nvlinks(cell)
        if links:
            return links * nvlink
        return _ACROSS_SOCKETS * pcie if cell == "SYS" else pcie

    guess = (
        f"pairs of GPUs differ: an NVLink is taken for {nvlink / 1e9:g} GB/s, PCIe for {pcie / 1e9:g} GB/s and for "
        f"{_ACROSS_SOCKETS:g} of it between sockets (SYS)"
    )
    return tuple(tuple(bandwidth(cell) for cell in row) for row in cells), guess


def _num_nvlinks(cell: str) -> int:
    return int(cell[2:]) if cell.startswith("NV") else 0
