"""The state of a search in a file: what was scored, the best bounds, the times simulated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.errors import SpecError
from meshwright.planner.output_file import is_our_json, replace_file
from meshwright.planner.search.base import SearchRequest
from meshwright.planner.search.funnel import Bounded, no_plans

__all__ = ["SearchState", "load_state", "request_digest", "save_state"]

_VERSION = 1
_KIND = "search_state"


@dataclass(slots=True, kw_only=True)
class SearchState:
    """How far a search is.

    Parameters
    ----------
    done : set[int]
        Numbers of the blocks that were scored.
    num_candidates, num_feasible : int
        Their plans, and those that satisfy every constraint.
    rejections : dict[str, int]
        Plans each constraint rejected.
    kept : Bounded
        Plans with the best bounds.
    known, relaxed : dict[tuple[int, int], float]
        Simulated times by block and row [s], and bounds of the objective by block and group of plans.
    """

    done: set[int] = field(default_factory=set)
    num_candidates: int = 0
    num_feasible: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    kept: Bounded = field(default_factory=no_plans)
    known: dict[tuple[int, int], float] = field(default_factory=dict)
    relaxed: dict[tuple[int, int], float] = field(default_factory=dict)


def request_digest(request: SearchRequest, num_plans: int) -> str:
    """Return the hash that tells whether a state belongs to a search: job, machines, calibration, limits, space."""
    context = request.context
    parts = (
        request.job,
        request.limits,
        request.objective,
        context.software,
        context.attention_kernel,
        sorted(context.features),
        dict(context.calibration_identity),
        num_plans,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_state(path: Path, digest: str) -> SearchState | None:
    """Return the state of a file, None where there is no file yet.

    Raises
    ------
    SpecError
        If its folder does not exist, or the file is something else or belongs to another job.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # A new search makes the file; a folder that is not there is more likely mistyped.
        if not path.parent.is_dir():
            raise SpecError(
                f"--resume {path}: there is no folder {path.parent}; make it, or name the file to resume from"
            ) from None
        return None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        document = json.loads(content)
        is_state = is_our_json(content) and document["kind"] == _KIND and document["version"] == _VERSION
    except (ValueError, KeyError, TypeError):
        is_state = False
    if not is_state:
        raise SpecError(
            f"{path}: is not the state of a search; name another file, or one that does not exist yet"
        )
    if document["job"] != digest:
        raise SpecError(
            f"{path}: is the state of another search (job, limits, objective or calibration differ); name another "
            "file, or remove this one to start anew"
        )
    try:
        return _read(document)
    except (ValueError, KeyError, TypeError):
        raise SpecError(f"{path}: is damaged; remove it to start anew") from None


def _read(document: Mapping[str, Any]) -> SearchState:
    kept = document["kept"]
    return SearchState(
        done={int(number) for number in document["done"]},
        num_candidates=int(document["num_candidates"]),
        num_feasible=int(document["num_feasible"]),
        rejections={str(name): int(count) for name, count in document["rejections"].items()},
        kept=Bounded(
            block=np.array(kept["block"], dtype=np.int64),
            row=np.array(kept["row"], dtype=np.int64),
            value=np.array(kept["value"], dtype=np.float64),
            bound=np.array(kept["bound"], dtype=np.float64),
        ),
        known=_by_place(document["known"]),
        relaxed=_by_place(document["relaxed"]),
    )


def _by_place(rows: list[list[float]]) -> dict[tuple[int, int], float]:
    return {(int(block), int(number)): float(value) for block, number, value in rows}


def save_state(path: Path, digest: str, state: SearchState) -> None:
    """Write a state under a temporary name and rename it into place.

    Raises
    ------
    SpecError
        If the file is not ours or cannot be written.
    """
    kept = state.kept
    document = {
        "written_by": "meshwright",
        "kind": _KIND,
        "version": _VERSION,
        "job": digest,
        "done": sorted(state.done),
        "num_candidates": state.num_candidates,
        "num_feasible": state.num_feasible,
        "rejections": state.rejections,
        "kept": {
            "block": kept.block.tolist(),
            "row": kept.row.tolist(),
            "value": kept.value.tolist(),
            "bound": kept.bound.tolist(),
        },
        "known": [[*place, seconds] for place, seconds in state.known.items()],
        "relaxed": [[*place, value] for place, value in state.relaxed.items()],
    }
    replace_file(path, json.dumps(document).encode(), force=False, is_ours=is_our_json)
