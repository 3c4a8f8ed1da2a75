"""Find hardware by name: built-in GPUs, nodes, fabrics and clusters, and the cluster files of users.

A name is tried as a file first; the aliases of every file of the kind are read only when that fails, so the
common case costs one small file. Names ignore case, and ``_`` and blanks count as ``-``.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.spec_reading import (
    NumberReader,
    check_schema,
    read_fabric,
    read_gpu,
    read_node,
)
from meshwright.hardware_specs.specs import ClusterSpec, FabricSpec, GpuSpec, NodeSpec
from meshwright.hardware_specs.yaml_document import Section, parse_yaml, read_yaml
from meshwright.hardware_specs.yaml_nodes import shown

if TYPE_CHECKING:
    from meshwright.hardware_specs.importers.base import ImportedTopology

__all__ = [
    "SpecKind",
    "cluster_from_section",
    "imported_cluster",
    "list_specs",
    "load_cluster",
    "load_fabric",
    "load_gpu",
    "load_node",
    "resolve_cluster",
]

SpecKind = Literal["gpu", "node", "fabric", "cluster"]

_T = TypeVar("_T")
_FOLDERS: Final[dict[SpecKind, str]] = {
    "gpu": "gpus",
    "node": "nodes",
    "fabric": "fabrics",
    "cluster": "clusters",
}
_SHOWN: Final[dict[SpecKind, str]] = {"gpu": "GPU", "node": "node", "fabric": "fabric", "cluster": "cluster"}
_SAFE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")
_MAX_NODES: Final = 1_000_000


@functools.cache
def list_specs(kind: SpecKind) -> tuple[str, ...]:
    """Return the ids of every built-in spec of a kind, sorted; no file is opened."""
    names = (entry.name for entry in _folder(kind).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


@functools.cache
def load_gpu(name: str) -> GpuSpec:
    """Return a built-in GPU by id or alias.

    Raises
    ------
    SpecError
        If nothing is called that; names the nearest.

    Examples
    --------
    >>> load_gpu("H100-80GB-SXM").id
    'h100-sxm-80'
    """
    section = _open(name, "gpu")
    check_schema(section)
    return read_gpu(section)


@functools.cache
def load_node(name: str) -> NodeSpec:
    """Return a built-in node by id or alias.

    Raises
    ------
    SpecError
        If nothing is called that; names the nearest.

    Examples
    --------
    >>> load_node("dgx-h100").num_gpus
    8
    """
    section = _open(name, "node")
    check_schema(section)
    return read_node(section, load_gpu(section.text("gpu")))


@functools.cache
def load_fabric(name: str) -> FabricSpec:
    """Return a built-in fabric by id or alias.

    Raises
    ------
    SpecError
        If nothing is called that; names the nearest.
    """
    section = _open(name, "fabric")
    check_schema(section)
    return read_fabric(section)


@functools.cache
def load_cluster(name: str) -> ClusterSpec:
    """Return a built-in cluster by id or alias.

    Raises
    ------
    SpecError
        If nothing is called that; names the nearest.

    Examples
    --------
    >>> load_cluster("frontier-full").num_gpus
    75264
    """
    return cluster_from_section(_open(name, "cluster"))


def resolve_cluster(text: str) -> ClusterSpec:
    """Return the cluster a user means.

    Parameters
    ----------
    text : str
        ``NODE:COUNT`` (nodes, not GPUs), a cluster id, a node id (one node), or the path of a YAML file.

    Raises
    ------
    SpecError
        If it is none of these.

    Examples
    --------
    >>> resolve_cluster("dgx-h100:8").num_gpus
    64
    """
    if text.lower().endswith((".yaml", ".yml")) or "/" in text:
        return cluster_from_section(read_yaml(Path(text)))
    name, colon, count_text = text.rpartition(":")
    if colon:
        if not re.fullmatch(r"[0-9]{1,9}", count_text, re.ASCII) or not 1 <= int(count_text) <= _MAX_NODES:
            raise SpecError(
                f"cluster {shown(text)}: the number of nodes is {shown(count_text)}, not 1 to {_MAX_NODES};"
                " write NODE:COUNT, e.g. 'dgx-h100:8'"
            )
        return _uniform_cluster(load_node(name), int(count_text))
    for kind in ("cluster", "node"):
        if _file_of(text, kind) is not None:
            return load_cluster(text) if kind == "cluster" else _uniform_cluster(load_node(text), 1)
    raise SpecError(
        f"unknown cluster {shown(text)}{_guess(text, 'cluster', 'node') or '.'} Write NODE:COUNT such as"
        " 'dgx-h100:8', a cluster's id, or the path of a .yaml file; 'meshwright specs list' names all."
    )


def cluster_from_section(section: Section) -> ClusterSpec:
    """Return the cluster a mapping describes.

    Parameters
    ----------
    section : Section
        ``{node: ID or mapping, count: 8, fabric: ID or mapping}`` or ``{preset: ID}``. An inline node (and its
        inline ``gpu``, and an inline fabric) may name a ``base`` and change single keys. A ``count`` or
        ``fabric`` beside ``preset`` replaces the preset's. ``topology`` says what lies between the nodes
        (:func:`meshwright.hardware_specs.topology_reading.read_topology`).

    Returns
    -------
    ClusterSpec
        The cluster; without ``fabric``, its node's default one.

    Raises
    ------
    SpecError
        If a name, key or value is wrong; says where.
    """
    check_schema(section)
    preset = _named(section, "preset", "cluster", load_cluster) if section.has("preset") else None
    identity = section.text("id", default="")
    section.texts("aliases")
    if preset is not None and section.has("node"):
        raise section.error("node", "is given beside 'preset'; keep one of the two")
    node = preset.node if preset else _read_node(section)
    count = NumberReader(section, {}).count("count", preset.num_nodes if preset else 1, _MAX_NODES)
    fabric = _read_fabric(section, node, preset.fabric if preset else None)
    part = section.optional_section("topology")
    topology = preset.topology if preset and preset.num_nodes == count else None
    if part is not None:
        from meshwright.hardware_specs.topology_reading import read_topology

        topology = read_topology(part, count, _read_node)
    section.close()
    try:
        cluster = ClusterSpec(
            id=identity or f"{node.id}:{count}", node=node, num_nodes=count, fabric=fabric, topology=topology
        )
    except SpecError as error:
        raise section.error("", str(error)) from None
    if identity or not cluster.is_mixed:
        return cluster
    counts = [cluster.kind_of_node.count(place) for place in range(len(cluster.kinds))]
    parts = (f"{kind.id}:{held}" for kind, held in zip(cluster.kinds, counts, strict=True))
    return replace(cluster, id="+".join(parts))


def imported_cluster(
    imported: ImportedTopology, node: str | None, count: int | None, name: str
) -> tuple[ClusterSpec, tuple[str, ...]]:
    """Return the cluster of an imported file, and what else was guessed for it.

    Parameters
    ----------
    imported : ImportedTopology
        What the file says; it wins over the built-in node.
    node : str | None
        Built-in node that the machines are; None takes the one the file suggests.
    count : int | None
        Nodes, where the file describes one.
    name : str
        The file, for messages.

    Raises
    ------
    SpecError
        If nobody says what the machines are, or how many.
    """
    chosen = node or imported.node_guess
    if chosen is None:
        raise SpecError(f"{name}: does not say what the machines are; add --node, e.g. --node dgx-h100")
    if imported.num_nodes is not None and count not in (None, imported.num_nodes):
        raise SpecError(f"{name}: names {imported.num_nodes} nodes, --count says {count}")
    spec, guesses = load_node(chosen), []
    for field, value in (
        ("num_gpus", imported.num_gpus),
        ("topology", imported.intra_node),
        ("num_nics", imported.num_nics),
    ):
        if value is not None and value != getattr(spec, field):
            guesses.append(f"{field} {value} instead of the {getattr(spec, field)} of {spec.id}")
            changes: dict[str, Any] = {field: value, "id": f"{load_node(chosen).id}-imported", "aliases": ()}
            spec = replace(spec, **changes)
    if imported.nic_bandwidth is not None and imported.nic_bandwidth != spec.nic.bandwidth_bytes_per_second:
        spec = replace(spec, nic=replace(spec.nic, bandwidth_bytes_per_second=imported.nic_bandwidth))
        spec = replace(spec, id=f"{load_node(chosen).id}-imported", aliases=())
    num_nodes = imported.num_nodes or count or 1
    if imported.num_nodes is None and count is None:
        guesses.append("one node; say how many there are with --count")
    cluster = _uniform_cluster(spec, num_nodes)
    guesses.append(f"fabric {cluster.fabric.id}, as {spec.id} usually has")
    topology = imported.topology
    if imported.gpu_cells:
        from meshwright.hardware_specs.importers.gpu_links import gpu_link_bandwidths
        from meshwright.hardware_specs.topology import ClusterTopology

        links, guess = gpu_link_bandwidths(imported.gpu_cells, spec)
        topology = replace(topology or ClusterTopology(), gpu_links=links)
        guesses.append(guess)
    return replace(cluster, topology=topology), tuple(guesses)


def _uniform_cluster(node: NodeSpec, count: int) -> ClusterSpec:
    return ClusterSpec(
        id=f"{node.id}:{count}", node=node, num_nodes=count, fabric=load_fabric(node.default_fabric)
    )


def _read_node(section: Section) -> NodeSpec:
    if not section.is_section("node"):
        return _named(section, "node", "node", load_node)
    child = section.section("node")
    base = _named(child, "base", "node", load_node) if child.has("base") else None
    gpu = base.gpu if base is not None and not child.has("gpu") else _read_gpu(child)
    return read_node(child, gpu, base)


def _read_gpu(section: Section) -> GpuSpec:
    if not section.is_section("gpu"):
        return _named(section, "gpu", "gpu", load_gpu)
    child = section.section("gpu")
    return read_gpu(child, _named(child, "base", "gpu", load_gpu) if child.has("base") else None)


def _read_fabric(section: Section, node: NodeSpec, preset: FabricSpec | None) -> FabricSpec:
    if section.is_section("fabric"):
        child = section.section("fabric")
        return read_fabric(child, _named(child, "base", "fabric", load_fabric) if child.has("base") else None)
    if section.optional_text("fabric") is not None:
        return _named(section, "fabric", "fabric", load_fabric)
    if preset is not None:
        return preset
    if section.is_section("node") and _file_of(node.default_fabric, "fabric") is None:
        raise section.section("node").error("default_fabric", str(_unknown(node.default_fabric, "fabric")))
    return load_fabric(node.default_fabric)


def _named(section: Section, key: str, kind: SpecKind, load: Callable[[str], _T]) -> _T:
    name = section.text(key)
    if _file_of(name, kind) is None:
        raise section.error(key, str(_unknown(name, kind)))
    return load(name)


def _folder(kind: SpecKind) -> Traversable:
    return importlib.resources.files("meshwright.hardware_specs").joinpath(_FOLDERS[kind])


def _normal(name: str) -> str:
    return re.sub(r"[_\s]+", "-", name.strip().lower())


def _file_of(name: str, kind: SpecKind) -> str | None:
    """Return the id of the file that holds a spec called ``name``, or None."""
    normal = _normal(name)
    if _SAFE_NAME.fullmatch(normal) and _folder(kind).joinpath(f"{normal}.yaml").is_file():
        return normal
    return _aliases(kind).get(normal)


@functools.cache
def _aliases(kind: SpecKind) -> dict[str, str]:
    """Return the id of the file by every spelling of its spec."""
    index = {identity: identity for identity in list_specs(kind)}
    for identity in list_specs(kind):
        for alias in _parse(identity, kind).texts("aliases"):
            index.setdefault(_normal(alias), identity)
    return index


def _parse(identity: str, kind: SpecKind) -> Section:
    file = f"{identity}.yaml"
    return parse_yaml(_folder(kind).joinpath(file).read_text(encoding="utf-8"), f"{_FOLDERS[kind]}/{file}")


def _open(name: str, kind: SpecKind) -> Section:
    identity = _file_of(name, kind)
    if identity is None:
        raise _unknown(name, kind)
    return _parse(identity, kind)


def _unknown(name: str, kind: SpecKind) -> SpecError:
    guess = _guess(name, kind) or "."
    return SpecError(f"unknown {_SHOWN[kind]} {shown(name)}{guess} Run 'meshwright specs list' for all.")


def _guess(name: str, *kinds: SpecKind) -> str:
    """Return a suggestion: the nearest id, else the nearest alias."""
    normal = _normal(name[:80])
    ids = [identity for kind in kinds for identity in list_specs(kind)]
    return did_you_mean(normal, ids) or did_you_mean(
        normal, [alias for kind in kinds for alias in _aliases(kind)]
    )
