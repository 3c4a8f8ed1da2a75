"""Slurm's ``topology.conf`` and ``topology.yaml``: which nodes share a switch or a block.

Sources: the manual pages topology.conf(5) and topology.yaml(5) of Slurm 25.05.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshwright.errors import SpecError
from meshwright.hardware_specs.importers.base import ImportedTopology
from meshwright.hardware_specs.importers.hostlist import expand_hostlist
from meshwright.hardware_specs.topology import ClusterTopology, TierSpec
from meshwright.hardware_specs.yaml_document import Section, parse_yaml

__all__ = [
    "read_slurm_conf",
    "read_slurm_yaml",
    "recognises_slurm_conf",
    "recognises_slurm_yaml",
]

_PAIR: Final = re.compile(r"(\w+)=(\S+)")
_TIER_NAMES: Final = ("leaf", "spine", "core")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Switch:
    """A switch with the nodes or the switches below it."""

    where: str
    nodes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()


def recognises_slurm_conf(text: str) -> bool:
    """Return whether a text looks like ``topology.conf``."""
    return re.search(r"(?im)^\s*(SwitchName|BlockName)=", text) is not None


def recognises_slurm_yaml(text: str) -> bool:
    """Return whether a text looks like ``topology.yaml``."""
    return (
        re.search(r"(?m)^\s*-?\s*topology:\s*\S", text) is not None
        and re.search(r"(?m)^\s*(tree|block|flat):", text) is not None
    )


def read_slurm_conf(text: str, name: str) -> ImportedTopology:
    """Return tiers and hosts of a ``topology.conf``.

    Raises
    ------
    SpecError
        If a line is malformed, a switch is missing or below two others, or nothing joins the parts.
    """
    switches: dict[str, _Switch] = {}
    blocks: dict[str, tuple[str, ...]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", maxsplit=1)[0].strip()
        if not line:
            continue
        where = f"{name}:{number}"
        pairs = {key.lower(): value for key, value in _PAIR.findall(line)}
        if "switchname" in pairs:
            if ("nodes" in pairs) == ("switches" in pairs):
                raise SpecError(f"{where}: a switch has either Nodes= or Switches=")
            if pairs["switchname"] in switches:
                raise SpecError(f"{where}: switch '{pairs['switchname']}' is described twice")
            switches[pairs["switchname"]] = _Switch(
                where=where,
                nodes=expand_hostlist(pairs["nodes"], where) if "nodes" in pairs else (),
                children=expand_hostlist(pairs["switches"], where) if "switches" in pairs else (),
            )
        elif "blockname" in pairs and "nodes" in pairs:
            blocks[pairs["blockname"]] = expand_hostlist(pairs["nodes"], where)
        elif "blocksizes" not in pairs:
            raise SpecError(f"{where}: expected SwitchName=, BlockName= or BlockSizes=, not '{line[:40]}'")
    return _of_blocks(blocks, name) if blocks else _of_switches(switches, name)


def read_slurm_yaml(text: str, name: str) -> ImportedTopology:
    """Return tiers and hosts of a ``topology.yaml``; of several topologies the cluster's default one.

    Raises
    ------
    SpecError
        As :func:`read_slurm_conf`.
    """
    # The file is a list; ours are mappings.
    indented = "\n".join(f"  {line}" for line in text.splitlines() if line.strip() not in ("---", "..."))
    sections = parse_yaml(f"topologies:\n{indented}\n", name).sections("topologies")
    chosen = next((each for each in sections if each.boolean("cluster_default", default=False)), sections[0])
    if chosen.has("block"):
        return _of_blocks(_yaml_blocks(chosen.section("block"), name), name)
    if not chosen.has("tree"):
        raise SpecError(f"{name}: topology '{chosen.text('topology')}' is flat: it says nothing of switches")
    switches = {}
    for each in chosen.section("tree").sections("switches"):
        nodes, children = each.optional_text("nodes"), each.optional_text("children")
        where = f"{name}:{each.line()}"
        if (nodes is None) == (children is None):
            raise SpecError(f"{where}: a switch has either nodes or children")
        switches[each.text("switch")] = _Switch(
            where=where,
            nodes=() if nodes is None else expand_hostlist(nodes, where),
            children=() if children is None else expand_hostlist(children, where),
        )
    return _of_switches(switches, name)


def _yaml_blocks(section: Section, name: str) -> dict[str, tuple[str, ...]]:
    return {
        each.text("block"): expand_hostlist(each.text("nodes"), f"{name}:{each.line()}")
        for each in section.sections("blocks")
    }


def _of_blocks(blocks: Mapping[str, tuple[str, ...]], name: str) -> ImportedTopology:
    sizes = sorted({len(nodes) for nodes in blocks.values()})
    guesses = [
        "blocks are taken for groups of nodes below one switch; if they are NVLink domains, describe them as nodes"
    ]
    if len(sizes) > 1:
        guesses.append(f"blocks hold {sizes[0]} to {sizes[-1]} nodes: all are taken to hold {sizes[-1]}")
    hosts = tuple(host for nodes in blocks.values() for host in nodes)
    return _imported(hosts, [("block", sizes[-1])], guesses, name)


def _of_switches(switches: Mapping[str, _Switch], name: str) -> ImportedTopology:
    for switch in switches.values():
        for child in switch.children:
            if child not in switches:
                raise SpecError(f"{switch.where}: switch '{child}' is not described")
    below = [child for switch in switches.values() for child in switch.children]
    twice = {child for child in below if below.count(child) > 1}
    if twice:
        raise SpecError(f"{name}: switch '{min(twice)}' is below two others: only trees are described")
    roots = [each for each in switches if each not in below]
    sizes: dict[int, set[int]] = {}
    visited: set[str] = set()

    def visit(key: str) -> tuple[int, list[str]]:
        """Return how many levels lie below a switch, and its nodes in order."""
        switch = switches[key]
        visited.add(key)
        level, nodes = 0, list(switch.nodes)
        for child in switch.children:
            depth, found = visit(child)
            level, nodes = max(level, depth + 1), nodes + found
        sizes.setdefault(level, set()).add(len(nodes))
        return level, nodes

    hosts = [host for root in roots for host in visit(root)[1]]
    circle = [each for each in switches if each not in visited]
    if circle:
        raise SpecError(f"{name}: switch '{circle[0]}' is below itself; switches must form a tree")
    guesses = []
    if len(roots) > 1:
        guesses.append(
            f"nothing joins the switches {', '.join(roots[:4])}: they are taken to meet without loss"
        )
    tiers = []
    for level in sorted(sizes):
        largest = max(sizes[level])
        if len(sizes[level]) > 1:
            guesses.append(
                f"switches of level {level} hold {min(sizes[level])} to {largest} nodes: all are taken to hold {largest}"
            )
        if largest < len(hosts):
            tiers.append((_TIER_NAMES[min(level, len(_TIER_NAMES) - 1)], largest))
    return _imported(tuple(hosts), tiers, guesses, name)


def _imported(
    hosts: tuple[str, ...], tiers: list[tuple[str, int]], guesses: list[str], name: str
) -> ImportedTopology:
    repeated = {host for host in hosts if hosts.count(host) > 1} if len(hosts) < 10_000 else set()
    if repeated:
        raise SpecError(f"{name}: node '{min(repeated)}' is below two switches")
    if not hosts:
        raise SpecError(f"{name}: no nodes are named")
    guesses = [
        *guesses,
        "bandwidths are not in this file: switches are taken to be non-blocking (oversubscription 1)",
    ]
    kept: list[TierSpec] = []
    for title, size in tiers:
        if kept and (size % kept[-1].nodes_per_group or size == kept[-1].nodes_per_group):
            guesses.append(
                f"groups of {size} nodes do not consist of whole ones of {kept[-1].nodes_per_group}: left out"
            )
            continue
        kept.append(TierSpec(name=title, nodes_per_group=size))
    return ImportedTopology(
        topology=ClusterTopology(tiers=tuple(kept), hosts=hosts),
        num_nodes=len(hosts),
        guesses=tuple(guesses),
    )
