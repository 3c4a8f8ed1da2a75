"""Which simulators a topology can be written for; what one cannot express is refused with every reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.errors import SpecError, UnsupportedByTargetError, did_you_mean
from meshwright.hardware_specs.exporters import astra_sim, simai
from meshwright.hardware_specs.specs import ClusterSpec

__all__ = ["EXPORTERS", "TopologyExporter", "export_topology"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyExporter:
    """Writes one kind of file.

    Parameters
    ----------
    title : str
        The simulator, for messages.
    unsupported : Callable[[ClusterSpec], tuple[str, ...]]
        Every reason why it cannot express a cluster, one clause each; empty when it can.
    write : Callable[[ClusterSpec], str]
        The text of the file of a cluster that it can express.
    """

    title: str
    unsupported: Callable[[ClusterSpec], tuple[str, ...]]
    write: Callable[[ClusterSpec], str]


EXPORTERS: Mapping[str, TopologyExporter] = {
    "astra-sim": TopologyExporter(
        title="ASTRA-sim's analytical network",
        unsupported=astra_sim.unsupported,
        write=astra_sim.network_text,
    ),
    "simai": TopologyExporter(
        title="SimAI's ns-3 network", unsupported=simai.unsupported, write=simai.topology_text
    ),
}


def export_topology(cluster: ClusterSpec, target: str) -> str:
    """Return the text of a cluster's network as another simulator reads it.

    Raises
    ------
    SpecError
        If no exporter has that name, or the cluster mixes kinds of node.
    UnsupportedByTargetError
        If the simulator cannot express the cluster; lists every reason.
    """
    if target not in EXPORTERS:
        raise SpecError(f"no topology exporter '{target}'{did_you_mean(target, EXPORTERS) or '.'}")
    exporter = EXPORTERS[target]
    cluster.require_one_kind("specs export")
    reasons = exporter.unsupported(cluster)
    if reasons:
        raise UnsupportedByTargetError(
            "\n".join(
                [f"{exporter.title} cannot express {cluster.id}:", *(f"  - {reason}" for reason in reasons)]
            )
        )
    return exporter.write(cluster)
