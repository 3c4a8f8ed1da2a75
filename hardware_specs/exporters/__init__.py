"""Topologies as files of other simulators, one exporter each."""

from meshwright.hardware_specs.exporters.exporting import EXPORTERS, TopologyExporter, export_topology

__all__ = ["EXPORTERS", "TopologyExporter", "export_topology"]
