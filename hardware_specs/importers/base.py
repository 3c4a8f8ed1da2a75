"""What a topology file can tell, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshwright.hardware_specs.specs import IntraNodeTopology
from meshwright.hardware_specs.topology import ClusterTopology

__all__ = ["ImportedTopology", "TopologyImporter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedTopology:
    """What one file says of a node, or of what lies between nodes; None where it says nothing.

    Parameters
    ----------
    num_gpus : int | None
        GPUs of the node.
    intra_node : IntraNodeTopology | None
        How they are joined.
    num_nics : int | None
        NICs of the compute fabric.
    nic_bandwidth : float | None
        Of one NIC, per direction [B/s].
    node_guess : str | None
        Built-in node with such GPUs and links.
    topology : ClusterTopology | None
        Switches, host names or measured links.
    num_nodes : int | None
        Nodes of the cluster.
    gpu_cells : tuple[tuple[str, ...], ...]
        What joins each pair of GPUs where pairs differ, ``NV4``, ``PIX``, ``SYS``, ...; empty where all are alike.
    guesses : tuple[str, ...]
        Everything that was guessed or could not be known, one sentence each.
    """

    num_gpus: int | None = None
    intra_node: IntraNodeTopology | None = None
    num_nics: int | None = None
    nic_bandwidth: float | None = None
    node_guess: str | None = None
    topology: ClusterTopology | None = None
    num_nodes: int | None = None
    gpu_cells: tuple[tuple[str, ...], ...] = ()
    guesses: tuple[str, ...] = ()


class TopologyImporter(Protocol):
    """Reads one kind of file."""

    @property
    def title(self) -> str:
        """What the file is, for messages."""
        ...

    @property
    def recognises(self) -> Callable[[str], bool]:
        """Whether a text is of this kind."""
        ...

    @property
    def read(self) -> Callable[[str, str], ImportedTopology]:
        """Read the text of a file of this name.

        Raises
        ------
        SpecError
            If the text is malformed; says where.
        """
        ...
