"""Measured links between nodes: a table of pairs, or square matrices of bandwidth and latency."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.importers.base import ImportedTopology
from meshwright.hardware_specs.topology import ClusterTopology, LinkMatrix
from meshwright.units import parse_quantity

__all__ = ["read_link_matrix", "recognises_link_matrix"]

_COLUMNS: Final = ("source", "destination", "bandwidth", "latency")
_MOST_NODES: Final = 4096
# Directions that differ by more than this share are worth a word.
_ASYMMETRY: Final = 0.2


def recognises_link_matrix(text: str) -> bool:
    """Return whether a text looks like a table of links."""
    first = text.lstrip("\ufeff").split("\n", maxsplit=1)[0].lower()
    return first.startswith(("source,", "bandwidth,", "latency,"))


def read_link_matrix(text: str, name: str) -> ImportedTopology:
    """Return the links of a CSV file.

    Either columns ``source,destination,bandwidth,latency``, one line per direction of a pair; or a matrix whose first
    line is ``bandwidth,HOST,HOST,...`` and whose others begin with the sending host, optionally followed by a second one
    that begins with ``latency``. Values carry units: ``48.2 GB/s``, ``6 us``.

    Raises
    ------
    SpecError
        If a column, host, value or pair is missing or malformed; says in which line.
    """
    rows = [
        (number, row)
        for number, row in enumerate(csv.reader(io.StringIO(text.lstrip("\ufeff"))), 1)
        if any(row)
    ]
    header = [word.strip() for word in rows[0][1]]
    if header[0] == "source":
        hosts, bandwidth, latency = _pairs(rows, name)
    else:
        hosts, bandwidth, latency = _matrices(rows, name)
    guesses = []
    if latency is None:
        latency = np.zeros_like(bandwidth)
        guesses.append("latencies are not in this file: taken for 0")
    other = np.maximum(bandwidth.T, 1e-300)
    largest = float(np.max(np.abs(bandwidth / other - 1.0)[~np.eye(len(hosts), dtype=bool)], initial=0.0))
    if largest > _ASYMMETRY:
        guesses.append(f"directions of a pair differ by up to {largest:.0%}: the slower one counts")
    try:
        matrix = LinkMatrix(bandwidth=bandwidth, latency=latency)
    except SpecError as error:
        raise SpecError(f"{name}: {str(error).removeprefix('topology: ')}") from None
    return ImportedTopology(
        topology=ClusterTopology(matrix=matrix, hosts=tuple(hosts)),
        num_nodes=len(hosts),
        guesses=tuple(guesses),
    )


def _pairs(
    rows: list[tuple[int, list[str]]], name: str
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64] | None]:
    header = [word.strip() for word in rows[0][1]]
    for word in header:
        if word not in _COLUMNS:
            raise SpecError(
                f"{name}:1: unknown column '{word[:40]}'{did_you_mean(word, _COLUMNS) or '.'} Known: {', '.join(_COLUMNS)}."
            )
    for word in _COLUMNS[:3]:
        if word not in header:
            raise SpecError(f"{name}:1: column '{word}' is missing")
    records = []
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise SpecError(f"{name}:{number}: {len(row)} values for {len(header)} columns")
        records.append((number, dict(zip(header, (word.strip() for word in row), strict=True))))
    hosts = list(dict.fromkeys(host for _, each in records for host in (each["source"], each["destination"])))
    _check_count(hosts, name)
    place = {host: index for index, host in enumerate(hosts)}
    bandwidth = np.full((len(hosts), len(hosts)), np.nan)
    latency = np.zeros_like(bandwidth)
    for number, each in records:
        pair = place[each["source"]], place[each["destination"]]
        bandwidth[pair] = _quantity(each["bandwidth"], "bytes_per_second", f"{name}:{number}")
        if "latency" in header:
            latency[pair] = _quantity(each["latency"], "seconds", f"{name}:{number}")
    np.fill_diagonal(bandwidth, 0.0)
    missing = np.argwhere(np.isnan(bandwidth))
    if len(missing):
        sender, receiver = (hosts[index] for index in missing[0])
        raise SpecError(
            f"{name}: no line from {sender} to {receiver}; every pair is needed in both directions"
        )
    return hosts, bandwidth, latency if "latency" in header else None


def _matrices(
    rows: list[tuple[int, list[str]]], name: str
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64] | None]:
    starts = [place for place, (_, row) in enumerate(rows) if row[0].strip() in ("bandwidth", "latency")]
    found: dict[str, tuple[list[str], NDArray[np.float64]]] = {}
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        number, header = rows[start]
        title, hosts = header[0].strip(), [host.strip() for host in header[1:]]
        _check_count(hosts, name)
        lines = rows[start + 1 : end]
        if [row[0].strip() for _, row in lines] != hosts or any(len(row) != len(header) for _, row in lines):
            raise SpecError(
                f"{name}:{number}: the {title} matrix needs one line per host, in the order of its header"
            )
        kind: Callable[[str, str], float] = _bandwidth if title == "bandwidth" else _latency
        values = [
            [0.0 if index == at else kind(cell, f"{name}:{line}") for at, cell in enumerate(row[1:])]
            for index, (line, row) in enumerate(lines)
        ]
        found[title] = (hosts, np.array(values, dtype=np.float64))
    if "bandwidth" not in found:
        raise SpecError(f"{name}: no line begins with 'bandwidth'; a latency matrix alone is not enough")
    hosts, bandwidth = found["bandwidth"]
    if "latency" not in found:
        return hosts, bandwidth, None
    if found["latency"][0] != hosts:
        raise SpecError(f"{name}: the two matrices name different hosts")
    return hosts, bandwidth, found["latency"][1]


def _check_count(hosts: list[str], name: str) -> None:
    if not 2 <= len(hosts) <= _MOST_NODES:
        raise SpecError(f"{name}: {len(hosts)} hosts; a matrix has 2 to {_MOST_NODES}")
    if len(set(hosts)) < len(hosts) or not all(hosts):
        raise SpecError(f"{name}: every host needs a name of its own")


def _bandwidth(text: str, where: str) -> float:
    return _quantity(text, "bytes_per_second", where)


def _latency(text: str, where: str) -> float:
    return _quantity(text, "seconds", where)


def _quantity(text: str, kind: str, where: str) -> float:
    try:
        return parse_quantity(text.strip(), kind)  # type: ignore[arg-type]  # two of the literal's words
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
