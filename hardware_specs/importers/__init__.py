"""Topology files of other programs, one importer each; the first that recognises a file reads it."""

from meshwright.hardware_specs.importers.base import ImportedTopology, TopologyImporter
from meshwright.hardware_specs.importers.importing import IMPORTERS, import_file, import_topology

__all__ = ["IMPORTERS", "ImportedTopology", "TopologyImporter", "import_file", "import_topology"]
