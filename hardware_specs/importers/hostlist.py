"""Slurm's short form of lists of hosts: ``node[001-004,7],login1``."""

from __future__ import annotations

import re
from typing import Final

from meshwright.errors import SpecError

__all__ = ["expand_hostlist"]

_MOST_HOSTS: Final = 100_000
_ITEM: Final = re.compile(r"([^\[\],\s]*)(?:\[([^\[\]]+)\]([^\[\],\s]*))?")
_RANGE: Final = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def expand_hostlist(text: str, where: str) -> tuple[str, ...]:
    """Return the hosts of a list in order.

    Raises
    ------
    SpecError
        If the list is malformed or holds too many hosts.

    Examples
    --------
    >>> expand_hostlist("n[08-10,3],login", "topology.conf:1")
    ('n08', 'n09', 'n10', 'n3', 'login')
    """
    hosts: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text.strip()):
        match = _ITEM.fullmatch(item)
        if match is None or not item:
            raise SpecError(f"{where}: '{text[:60]}' is not a list of hosts such as n[01-16],login1")
        prefix, ranges, suffix = match.groups()
        if ranges is None:
            hosts.append(prefix)
            continue
        for part in ranges.split(","):
            bounds = _RANGE.fullmatch(part.strip())
            if bounds is None:
                raise SpecError(f"{where}: '{part[:40]}' is not a range such as 01-16")
            first, last = bounds[1], bounds[2] or bounds[1]
            if int(last) < int(first) or len(hosts) + int(last) - int(first) >= _MOST_HOSTS:
                raise SpecError(f"{where}: the range {part[:40]} runs backwards or holds too many hosts")
            hosts += [
                f"{prefix}{number:0{len(first)}d}{suffix or ''}"
                for number in range(int(first), int(last) + 1)
            ]
    return tuple(hosts)
