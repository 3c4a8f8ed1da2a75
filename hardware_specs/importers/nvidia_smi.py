"""The matrix that ``nvidia-smi topo -m`` prints."""

from __future__ import annotations

import re
from typing import Final

from meshwright.errors import SpecError
from meshwright.hardware_specs.importers.base import ImportedTopology
from meshwright.hardware_specs.importers.gpu_links import are_unequal

__all__ = ["read_nvidia_smi", "recognises_nvidia_smi"]

# Colours and underlines that the tool prints on a terminal.
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_GPU: Final = re.compile(r"GPU\d+")
_NIC: Final = re.compile(r"NIC\d+|mlx\d*_\d+|hfi\d+_\d+")
_CELL: Final = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS")
# NVLinks of one GPU by generation: Volta, Ampere, Hopper and Blackwell SXM parts (NVIDIA data sheets).
_NODE_OF_LINKS: Final = {6: "dgx-1v", 12: "dgx-a100", 18: "dgx-h100"}
# NVLink without a switch: cells that differ between pairs.
_NEAR: Final = ("PIX", "PXB")


def recognises_nvidia_smi(text: str) -> bool:
    """Return whether a text looks like the matrix."""
    words = _ANSI.sub("", text).split()
    return "GPU0" in words and "X" in words


def read_nvidia_smi(text: str, name: str) -> ImportedTopology:
    """Return what the matrix says of the node.

    Raises
    ------
    SpecError
        If header, rows or cells are not those of ``nvidia-smi topo -m``; says in which line.
    """
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    start = next(
        (
            place
            for place, line in enumerate(lines)
            if line.split()[:1] == ["GPU0"] and "X" not in line.split()
        ),
        None,
    )
    if start is None:
        raise SpecError(
            f"{name}: no line begins with GPU0 as a header; give the whole output of 'nvidia-smi topo -m'"
        )
    header = [word for word in lines[start].split() if _GPU.fullmatch(word) or _NIC.fullmatch(word)]
    gpus = [word for word in header if _GPU.fullmatch(word)]
    nics = [word for word in header if _NIC.fullmatch(word)]
    cells: dict[str, list[str]] = {}
    for number, line in enumerate(lines[start + 1 :], start + 2):
        words = line.split()
        if not words or words[0] not in header:
            if len(cells) >= len(header):
                break
            continue
        row = words[1 : 1 + len(header)]
        if len(row) < len(header) or not all(_CELL.fullmatch(cell) for cell in row):
            raise SpecError(
                f"{name}:{number}: the row of {words[0]} needs {len(header)} cells such as NV18, PIX or SYS"
            )
        cells[words[0]] = row
    missing = [gpu for gpu in gpus if gpu not in cells]
    if missing:
        raise SpecError(
            f"{name}: the row of {missing[0]} is missing; give the whole output of 'nvidia-smi topo -m'"
        )
    pairs = [cells[one][header.index(two)] for one in gpus for two in gpus if one != two]
    links = {int(cell[2:]) if cell.startswith("NV") else 0 for cell in pairs}
    guesses = ["the model of the GPUs and the speed of their links are not in this matrix"]
    if not links or links == {0}:
        intra, most = "pcie", 0
    elif len(links) == 1:
        intra, most = "switch", links.pop()
    else:
        # Bridges join two cards of a PCIe server; more NVLink neighbours are a mesh, complete or not.
        neighbours = max(sum(cells[one][header.index(two)].startswith("NV") for two in gpus) for one in gpus)
        partial = "pcie" if neighbours == 1 else "hybrid_cube_mesh"
        intra, most = (partial if 0 in links else "mesh"), max(links)
    gpu_cells = tuple(tuple(cells[one][header.index(two)] for two in gpus) for one in gpus)
    # Every GPU has its own NIC in the compute fabric; those near none carry storage and management.
    near = [nic for nic in nics if any(cells[gpu][header.index(nic)] in _NEAR for gpu in gpus)]
    if nics:
        guesses.append(
            f"{len(near)} of {len(nics)} NICs share a PCIe switch with a GPU and are taken for the compute fabric; "
            "their speed is not in this matrix"
        )
    guess = _NODE_OF_LINKS.get(most) if len(gpus) == 8 else None
    if guess is not None:
        guesses.append(f"{len(gpus)} GPUs with {most} NVLinks each: taken for {guess}")
    return ImportedTopology(
        num_gpus=len(gpus),
        intra_node=intra,  # type: ignore[arg-type]  # one of the literal's words
        num_nics=len(near) or None,
        node_guess=guess,
        gpu_cells=gpu_cells if are_unequal(gpu_cells) else (),
        guesses=tuple(guesses),
    )
