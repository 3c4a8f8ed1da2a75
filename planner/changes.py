"""What can be changed of a job's machines, workload and software, by name: ``gpu.memory=141GiB``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from meshwright.costmodels.software import NUMBER_FIELDS, load_software
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster
from meshwright.planner.scenario import (
    JobT,
    Scenario,
    scenario_context,
    with_cluster,
    with_gpu,
    with_link_bandwidth,
    with_link_latency,
    with_node,
    with_peak,
    with_workload,
)
from meshwright.simcore.domain.workload import PRECISIONS
from meshwright.units import Kind, format_quantity, parse_quantity

__all__ = [
    "CHANGES",
    "MACHINE_CHANGES",
    "Change",
    "ChangeKind",
    "ChangeValue",
    "apply_changes",
    "parse_change",
]

ChangeKind = Kind | Literal["count", "number", "word"]
ChangeValue = float | str

# Exchanged whole before their numbers are changed, whatever the order on the command line.
_WHOLE = ("cluster", "gpu", "software")
_MAX_COUNT = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that can be changed.

    Parameters
    ----------
    key : str
        Name on the command line.
    meaning : str
        What it is, for the user.
    kind : ChangeKind
        Quantity with that unit, ``count`` (whole number), ``number`` or ``word``.
    read : Callable[[Scenario[Any]], ChangeValue | None]
        Present value in SI; None where the job has none.
    write : Callable[[Scenario, ChangeValue], Scenario]
        Returns the scenario with another value.
    """

    key: str
    meaning: str
    kind: ChangeKind
    read: Callable[[Scenario[Any]], ChangeValue | None]
    write: Callable[[Scenario[Any], Any], Scenario[Any]]

    def parse(self, text: str) -> ChangeValue:
        """Return a value from its text.

        Raises
        ------
        SpecError
            If it has no unit or that of something else, or is no number: names the key.
        """
        try:
            if self.kind == "word":
                return text
            if self.kind == "count":
                return _count(text)
            if self.kind == "number":
                return _number(text)
            return parse_quantity(text, self.kind)
        except SpecError as error:
            raise SpecError(f"{self.key}: {error}") from None

    def format(self, value: ChangeValue | None) -> str:
        """Return a value as text with its unit."""
        if value is None:
            return "none"
        if isinstance(value, str) or self.kind == "count":
            return f"{value}"
        if self.kind == "number":
            return f"{value:.6g}"
        return format_quantity(value, cast("Kind", self.kind))


def parse_change(text: str, known: Mapping[str, Change] | None = None) -> tuple[Change, ChangeValue]:
    """Return the change that ``KEY=VALUE`` asks for, one of those known; of a training job without any.

    Raises
    ------
    SpecError
        If the pair is malformed, the key unknown (names the nearest and all), or the value of the wrong kind.
    """
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not key or not value:
        raise SpecError(f"'{text}': write KEY=VALUE, such as gpu.memory=141GiB")
    known = CHANGES if known is None else known
    if key not in known:
        raise SpecError(f"unknown key '{key}'{did_you_mean(key, known) or '.'} Known: {', '.join(known)}.")
    return known[key], known[key].parse(value)


def apply_changes(scenario: Scenario[JobT], changes: Iterable[tuple[Change, ChangeValue]]) -> Scenario[JobT]:
    """Return the scenario with the changes; exchanged clusters, GPUs and software come before their numbers.

    Raises
    ------
    SpecError
        If a key is given twice, a name unknown or a value impossible: names the key.
    """
    seen: set[str] = set()
    for change, value in sorted(changes, key=lambda pair: _rank(pair[0].key)):
        if change.key in seen:
            raise SpecError(f"{change.key} is given twice; give each key once")
        seen.add(change.key)
        try:
            scenario = change.write(scenario, value)
        except SpecError as error:
            raise SpecError(f"{change.key}: {error}") from None
    return scenario


def _rank(key: str) -> int:
    return _WHOLE.index(key) if key in _WHOLE else len(_WHOLE)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= _MAX_COUNT:
        raise SpecError(f"expected a whole number from 1 to {_MAX_COUNT:,}, not '{text}'")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0.0:
        raise SpecError(f"expected a plain number, not '{text}'")
    return value


def _new_cluster(scenario: Scenario[Any], name: str) -> Scenario[Any]:
    return replace(scenario, job=replace(scenario.job, cluster=resolve_cluster(name)), measured_gpu=None)


def _new_gpu(scenario: Scenario[Any], name: str) -> Scenario[Any]:
    return replace(with_node(scenario, gpu=load_gpu(name)), measured_gpu=None)


def _new_software(scenario: Scenario[Any], name: str) -> Scenario[Any]:
    return replace(scenario, job=replace(scenario.job, software=load_software(name).id))


def _with_host_bandwidth(scenario: Scenario[Any], value: float) -> Scenario[Any]:
    return with_gpu(scenario, host_link=replace(scenario.gpu.host_link, bandwidth_bytes_per_second=value))


def _with_nic_bandwidth(scenario: Scenario[Any], value: float) -> Scenario[Any]:
    return with_node(scenario, nic=replace(scenario.node.nic, bandwidth_bytes_per_second=value))


def _with_constant(scenario: Scenario[Any], name: str, value: float) -> Scenario[Any]:
    if name.endswith("_efficiency") and value <= 0.0:
        raise SpecError("must be above zero")
    return replace(scenario, constants={**scenario.constants, name: value})


def _with_fabric(scenario: Scenario[Any], **changes: float) -> Scenario[Any]:
    fabric = scenario.job.cluster.fabric
    return with_cluster(scenario, fabric=replace(fabric, **changes))


def _peak(precision: str) -> Change:
    return Change(
        key=f"gpu.{precision}",
        meaning=f"dense peak in {precision}",
        kind="flops_per_second",
        read=lambda scenario: scenario.gpu.peak_flops_per_second.get(precision),
        write=lambda scenario, value: with_peak(scenario, precision, value),
    )


def _gpu(key: str, meaning: str, kind: ChangeKind, name: str) -> Change:
    return Change(
        key=f"gpu.{key}",
        meaning=meaning,
        kind=kind,
        read=lambda scenario: getattr(scenario.gpu, name),
        write=lambda scenario, value: with_gpu(scenario, **{name: value}),
    )


def _node(key: str, meaning: str, kind: ChangeKind, name: str) -> Change:
    return Change(
        key=f"node.{key}",
        meaning=meaning,
        kind=kind,
        read=lambda scenario: getattr(scenario.node, name),
        write=lambda scenario, value: with_node(scenario, **{name: value}),
    )


def _workload(key: str, meaning: str, kind: ChangeKind) -> Change:
    return Change(
        key=f"workload.{key}",
        meaning=meaning,
        kind=kind,
        read=lambda scenario: getattr(scenario.job.workload, key),
        write=lambda scenario, value: with_workload(scenario, **{key: value}),
    )


def _constant(name: str) -> Change:
    kind: ChangeKind = "number"
    if name.endswith(("_latency", "_time")):
        kind = "seconds"
    elif name == "framework_bytes":
        kind = "bytes"
    return Change(
        key=f"software.{name}",
        meaning=f"{name.replace('_', ' ')} of the software generation",
        kind=kind,
        read=lambda scenario: float(getattr(scenario_context(scenario).software, name)),
        write=lambda scenario, value: _with_constant(scenario, name, value),
    )


_MACHINES: tuple[Change, ...] = (
    Change(
        key="cluster",
        meaning="other machines: NODE:COUNT, a preset or a file",
        kind="word",
        read=lambda scenario: scenario.job.cluster.id,
        write=_new_cluster,
    ),
    Change(
        key="cluster.nodes",
        meaning="nodes",
        kind="count",
        read=lambda scenario: scenario.job.cluster.num_nodes,
        write=lambda scenario, value: with_cluster(scenario, num_nodes=value),
    ),
    Change(
        key="gpu",
        meaning="another GPU in the same nodes",
        kind="word",
        read=lambda scenario: scenario.gpu.id,
        write=_new_gpu,
    ),
    _gpu("memory", "usable memory", "bytes", "memory_bytes"),
    _gpu("memory_bandwidth", "memory bandwidth", "bytes_per_second", "memory_bandwidth_bytes_per_second"),
    _gpu("price", "rent of one GPU", "dollars_per_hour", "price_dollars_per_hour"),
    *(_peak(precision) for precision in PRECISIONS if not precision.startswith("int")),
    Change(
        key="gpu.host_bandwidth",
        meaning="bandwidth of the host link",
        kind="bytes_per_second",
        read=lambda scenario: scenario.gpu.host_link.bandwidth_bytes_per_second,
        write=_with_host_bandwidth,
    ),
    Change(
        key="node.link_bandwidth",
        meaning="bandwidth between the GPUs of a node, per GPU",
        kind="bytes_per_second",
        read=lambda scenario: scenario.node.intra_link.bandwidth_bytes_per_second,
        write=with_link_bandwidth,
    ),
    Change(
        key="node.link_latency",
        meaning="latency between the GPUs of a node; collectives start in proportion",
        kind="seconds",
        read=lambda scenario: scenario.node.intra_link.latency,
        write=with_link_latency,
    ),
    _node("nics", "NICs of a node", "count", "num_nics"),
    _node("power", "power of a node", "watts", "power_watts"),
    _node("price", "rent of a node", "dollars_per_hour", "price_dollars_per_hour"),
    Change(
        key="fabric.bandwidth",
        meaning="bandwidth of each NIC",
        kind="bytes_per_second",
        read=lambda scenario: scenario.node.nic.bandwidth_bytes_per_second,
        write=_with_nic_bandwidth,
    ),
    Change(
        key="fabric.latency",
        meaning="latency between nodes",
        kind="seconds",
        read=lambda scenario: scenario.job.cluster.fabric.latency,
        write=lambda scenario, value: _with_fabric(scenario, latency=value),
    ),
    Change(
        key="fabric.oversubscription",
        meaning="uplink shortage of the tree; 1 is none",
        kind="number",
        read=lambda scenario: scenario.job.cluster.fabric.oversubscription,
        write=lambda scenario, value: _with_fabric(scenario, oversubscription=value),
    ),
)

_TRAINING: tuple[Change, ...] = (
    _workload("global_batch_size", "sequences per iteration", "count"),
    _workload("sequence_length", "tokens per sequence", "count"),
    _workload("precision", "number format", "word"),
    Change(
        key="workload.routing_imbalance",
        meaning="most loaded expert rank over the mean",
        kind="number",
        read=lambda scenario: scenario.job.workload.routing_imbalance,
        # One figure for every ep takes the place of those of the routing data.
        write=lambda scenario, value: with_workload(scenario, routing_imbalance=value, routing_by_ep=()),
    ),
    _workload("expert_capacity_factor", "expert capacity over the mean share", "number"),
    _workload("lora_rank", "rank of low-rank adapters", "count"),
    Change(
        key="software",
        meaning="another software generation",
        kind="word",
        read=lambda scenario: scenario.job.software,
        write=_new_software,
    ),
    *(_constant(name) for name in NUMBER_FIELDS),
)

CHANGES: Mapping[str, Change] = {change.key: change for change in (*_MACHINES, *_TRAINING)}
"""Everything that can be changed of a training job, by key."""
MACHINE_CHANGES: Mapping[str, Change] = {change.key: change for change in _MACHINES}
"""What can be changed of the machines of any job."""
