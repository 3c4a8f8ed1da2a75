"""Finding the exporter that a user names: a target, and maybe one of its releases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol, TypeVar

from meshwright.errors import SpecError, did_you_mean

__all__ = ["find_exporter"]


class _Versioned(Protocol):
    @property
    def target_version(self) -> str: ...


_ExporterT = TypeVar("_ExporterT", bound=_Versioned)
# What follows the name of a target in the id of another release of it.
_RELEASE_SUFFIX = re.compile(r"-v?\d[\w.]*")


def find_exporter(
    table: Mapping[str, _ExporterT], others: Mapping[str, object], target: str, version: str | None, kind: str
) -> _ExporterT:
    """Return the exporter of a target.

    Parameters
    ----------
    table : Mapping[str, Exporter]
        Targets that take this kind of plan.
    others : Mapping[str, object]
        Targets that take another kind.
    target, version : str, str | None
        What the user wrote; None is the newest release.
    kind : {"training", "serving"}
        What the plan is for.

    Raises
    ------
    SpecError
        If there is no such target, it takes another kind of plan, or its release is unknown.
    """
    if target not in table:
        known = f"known: {', '.join(sorted(table))}"
        if target in others:
            launcher = "; or add --launcher kubernetes to one of them" if target == "kubernetes" else ""
            raise SpecError(f"--to: target '{target}' takes no {kind} plan; {known}{launcher}")
        raise SpecError(f"--to: unknown target '{target}'{did_you_mean(target, table) or ';'} {known}")
    if version is None:
        return table[target]
    releases = {
        exporter.target_version: exporter
        for name, exporter in sorted(table.items())
        if name == target or (name.startswith(target) and _RELEASE_SUFFIX.fullmatch(name[len(target) :]))
    }
    for release, exporter in releases.items():
        if _names_release(version, release):
            return exporter
    raise SpecError(
        f"--target-version: no options of {target} {version} are known; known: {', '.join(releases)}"
    )


def _names_release(version: str, release: str) -> bool:
    """Return whether a user's words name a release: 0.16 and 0.16.1 are both of core_r0.16."""
    found = re.search(r"\d[\w.]*", release)
    number = found.group() if found else release
    wanted = version.removeprefix("v") if re.fullmatch(r"v\d+(\.\d+)*", version) else version
    return wanted in (release, number) or number.startswith(f"{wanted}.") or wanted.startswith(f"{number}.")
