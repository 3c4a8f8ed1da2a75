"""The file that NCCL writes to ``NCCL_TOPO_DUMP_FILE``."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Final

from meshwright.errors import SpecError
from meshwright.hardware_specs.importers.base import ImportedTopology
from meshwright.hardware_specs.importers.gpu_links import are_unequal

__all__ = ["read_nccl_xml", "recognises_nccl_xml"]

# Compute capability of a GPU to a node with such GPUs, eight to a server.
_NODE_OF_SM: Final = {
    "70": "dgx-1v",
    "80": "dgx-a100",
    "90": "dgx-h100",
    "100": "dgx-b200",
    "103": "dgx-b300",
}
# PCI class of an NVSwitch, to which links lead where GPUs do not face each other.
_SWITCH_CLASS: Final = "0x068000"
_MEGABIT: Final = 1e6 / 8.0


def recognises_nccl_xml(text: str) -> bool:
    """Return whether a text looks like NCCL's topology."""
    return re.search(r"<system\b[^>]*\bversion=", text) is not None


def read_nccl_xml(text: str, name: str) -> ImportedTopology:
    """Return what NCCL saw of the node.

    Raises
    ------
    SpecError
        If it is not NCCL's XML, or shows no GPU.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise SpecError(f"{name}: NCCL writes no document type or entities; give the file it wrote")
    try:
        system = ET.fromstring(text)
    except ET.ParseError as error:
        raise SpecError(f"{name}: not well-formed XML ({error}); give the file that NCCL wrote") from None
    gpus = list(system.iter("gpu"))
    if system.tag != "system" or not gpus:
        raise SpecError(f"{name}: no <gpu> inside <system>; set NCCL_TOPO_DUMP_FILE on a node with GPUs")
    targets = [link for gpu in gpus for link in gpu.iter("nvlink")]
    guesses = []
    if not targets:
        intra = "pcie"
    elif all(link.get("tclass") == _SWITCH_CLASS for link in targets):
        intra = "switch"
    else:
        intra = "mesh"
        if _peers(system) is None:
            guesses.append("GPUs face each other without a switch: every pair is taken to have equal links")
    models = sorted({gpu.get("sm", "") for gpu in gpus})
    if len(models) > 1:
        raise SpecError(
            f"{name}: GPUs of different kinds (sm {', '.join(models)}) in one node are not described"
        )
    guess = _NODE_OF_SM.get(models[0])
    if guess is not None:
        guesses.append(f"GPUs of compute capability {models[0]}: taken for those of {guess}")
    speeds = _speeds(system, name)
    if len(set(speeds)) > 1:
        guesses.append(
            f"NICs of {len(set(speeds))} speeds: those of the fastest are taken for the compute fabric"
        )
    fastest = max(speeds, default=0.0)
    if not speeds:
        guesses.append("the file shows no NIC")
    return ImportedTopology(
        num_gpus=len(gpus),
        intra_node=intra,  # type: ignore[arg-type]  # one of the literal's words
        num_nics=speeds.count(fastest) or None,
        nic_bandwidth=fastest * _MEGABIT or None,
        node_guess=guess,
        gpu_cells=_peers(system) or (),
        guesses=tuple(guesses),
    )


def _peers(system: ET.Element) -> tuple[tuple[str, ...], ...] | None:
    """Return what joins each pair of GPUs, as ``nvidia-smi topo -m`` words it; None where all are alike or unknown."""
    cpus: dict[str, int] = {}
    counts: dict[str, dict[str, int]] = {}
    for place, cpu in enumerate(system.iter("cpu")):
        for pci in cpu.iter("pci"):
            gpu = pci.find("gpu")
            if gpu is None:
                continue
            links = {link.get("target", "").lower(): link.get("count", "") for link in gpu.iter("nvlink")}
            if not all(count.isdecimal() for count in links.values()):
                return None
            cpus[pci.get("busid", "").lower()] = place
            counts[pci.get("busid", "").lower()] = {target: int(count) for target, count in links.items()}

    def cell(one: str, two: str) -> str:
        if one == two:
            return "X"
        direct = counts[one].get(two, 0)
        return f"NV{direct}" if direct else ("NODE" if cpus[one] == cpus[two] else "SYS")

    cells = tuple(tuple(cell(one, two) for two in counts) for one in counts)
    # GPUs are numbered in the order of the file; links to anything else lead to switches.
    reaches_peers = all(target in counts for links in counts.values() for target in links)
    return cells if reaches_peers and are_unequal(cells) else None


def _speeds(system: ET.Element, name: str) -> list[float]:
    """Return the speed of each NIC [Mbit/s]."""
    speeds = []
    for net in system.iter("net"):
        text = net.get("speed", "")
        if not text.isdecimal():
            raise SpecError(
                f"{name}: <net name='{net.get('name', '')[:40]}'> has speed '{text[:40]}', not a whole number of Mbit/s"
            )
        speeds.append(float(text))
    return speeds
