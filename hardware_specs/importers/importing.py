"""Which importer reads a topology file: the first that recognises it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import SpecError
from meshwright.hardware_specs.importers.base import ImportedTopology, TopologyImporter
from meshwright.hardware_specs.importers.link_matrix import read_link_matrix, recognises_link_matrix
from meshwright.hardware_specs.importers.nccl_xml import read_nccl_xml, recognises_nccl_xml
from meshwright.hardware_specs.importers.nvidia_smi import read_nvidia_smi, recognises_nvidia_smi
from meshwright.hardware_specs.importers.slurm import (
    read_slurm_conf,
    read_slurm_yaml,
    recognises_slurm_conf,
    recognises_slurm_yaml,
)

__all__ = ["IMPORTERS", "import_file", "import_topology"]

# A table of all pairs of 1,000 nodes is 40 MB.
_MAX_BYTES = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Importer:
    title: str
    recognises: Callable[[str], bool]
    read: Callable[[str, str], ImportedTopology]


IMPORTERS: dict[str, TopologyImporter] = {
    "nccl": _Importer(title="NCCL's topology XML", recognises=recognises_nccl_xml, read=read_nccl_xml),
    "nvidia-smi": _Importer(
        title="the matrix of 'nvidia-smi topo -m'", recognises=recognises_nvidia_smi, read=read_nvidia_smi
    ),
    "slurm": _Importer(title="Slurm's topology.conf", recognises=recognises_slurm_conf, read=read_slurm_conf),
    "slurm-yaml": _Importer(
        title="Slurm's topology.yaml", recognises=recognises_slurm_yaml, read=read_slurm_yaml
    ),
    "matrix": _Importer(
        title="a CSV of links between nodes", recognises=recognises_link_matrix, read=read_link_matrix
    ),
}


def import_topology(text: str, name: str) -> tuple[str, ImportedTopology]:
    """Return which importer recognises a text, and what it read.

    Raises
    ------
    SpecError
        If none does, or the text is malformed.
    """
    for key, importer in IMPORTERS.items():
        if importer.recognises(text):
            return key, importer.read(text, name)
    known = "; ".join(importer.title for importer in IMPORTERS.values())
    raise SpecError(f"{name}: not a topology file that can be imported. Known: {known}.")


def import_file(path: Path) -> tuple[str, ImportedTopology]:
    """Return which importer recognises a file, and what it read.

    Raises
    ------
    SpecError
        If the file cannot be read, no importer recognises it, or it is malformed.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpecError(f"{path}: topology files may be {_MAX_BYTES // 1_000_000} MB at most")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text; give a topology file") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None
    return import_topology(text, str(path))
