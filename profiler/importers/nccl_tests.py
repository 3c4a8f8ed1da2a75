"""Logs of nccl-tests and rccl-tests: the standard output of ``all_reduce_perf`` and its sisters on one node.

Read are all layouts since version 2.0, several runs in one file, and lines tagged by ``mpirun``. The size column is the
whole buffer, for all-gather, reduce-scatter and all-to-all one rank's part times the ranks; times are microseconds.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meshwright.errors import SpecError
from meshwright.profiler.measurements import CollectiveSamples, Measurements

__all__ = ["read_nccl_tests"]

_NAMES: Mapping[str, str] = {
    "all_reduce": r"all_?reduce",
    "all_gather": r"all_?gather",
    "reduce_scatter": r"reduce_?scatter",
    "all_to_all": r"all_?to_?all(?!_?v)",  # alltoallv exchanges parts of unequal sizes
    "broadcast": r"broadcast",
    "send": r"send_?recv",
}
_KNOWN = "all_reduce, all_gather, reduce_scatter, alltoall, broadcast, sendrecv"
_TAG = re.compile(r"^\s*\[\d+,\d+\]<std(?:out|err)>:")  # mpirun --tag-output
_PROGRAM = re.compile(r"#\s*Collective test starting:\s*(\S+)")
_RUN = re.compile(r"#\s*nThread:?\s+(\d+)\s+nGpus:?\s+(\d+)\b")
_RANK = re.compile(
    r"#\s*Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s*(.*)"
)
_VALUE = re.compile(r"N/A|-?nan|inf|-?\d+(\.\d*)?(e[+-]?\d+)?\*?")  # a star of old rccl-tests: wrong
_VERSION = re.compile(r"\b(NCCL|RCCL) version\s*:?\s*(\d+(?:\.\d+)+)")
_LIBRARY = re.compile(r"# nccl-tests version .*\bnccl-library=(\d+)(\d\d)(\d\d)\b")  # 22808 is 2.28.8
_EXPECTED = (
    "expected the standard output of nccl-tests or rccl-tests: lines '# nThread 1 nGpus 8 ...' and "
    "'#  Rank  0 ...', a header '#       size         count      type ...', rows"
)
# Bandwidths are printed with two decimals: below this the ratio of two of them says little [GB/s].
_LEAST_BANDWIDTH, _RATIO_TOLERANCE = 1.0, 0.03
# Columns before the first time, columns of one block of times, words of the time stamp at the end.
_Header = tuple[list[str], list[str], int]


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run of one program in a log: who took part, its rows of size [B] and time [s], their bus factors."""

    file_name: str
    where: str
    program: str
    num_gpus: int
    ranks: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    devices: dict[str, str] = field(default_factory=dict)
    header: _Header | None = None
    num_dropped: int = 0
    rows: list[tuple[float, float]] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Ranks of the run; lines of ranks are cut short where a process has many devices."""
        return max(len(self.ranks), self.num_gpus)


def read_nccl_tests(paths: Sequence[Path], gpu: str) -> Measurements:
    """Return the curves of collectives inside one node from logs of nccl-tests or rccl-tests.

    The out-of-place time is taken, the in-place one where that is not there. Rows of no bytes, of no time or with wrong
    results are dropped. Runs of one collective and group size are put together, whichever file they are in.

    Parameters
    ----------
    paths : Sequence[Path]
        Logs, each of one or more runs on one host.
    gpu : str
        Device id of the specs; the device that a log names must be of its family.

    Raises
    ------
    SpecError
        If a file is no such log, is of another GPU, of several hosts or groups, or hides which collective it is of.
    """
    if not paths:
        raise SpecError("no logs of nccl-tests given; name at least one file")
    found: dict[tuple[str, int], list[_Run]] = {}
    inputs: list[tuple[str, str, int]] = []
    versions: dict[str, None] = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SpecError(f"{path}: cannot be read ({error.strerror}); name a log of nccl-tests") from None
        runs = _runs(path, content.decode("utf-8", errors="replace"), versions)
        for run in runs:
            _check(run, gpu)
            found.setdefault((_collective(run), run.size), []).append(run)
        inputs.append((path.name, hashlib.sha256(content).hexdigest(), sum(len(run.rows) for run in runs)))
    kernels = ", ".join(versions) or "nccl"
    collectives = tuple(_samples(*key, found[key]) for key in sorted(found))
    return Measurements(gpu=gpu, kernels=kernels, collectives=collectives, inputs=tuple(inputs))


def _samples(collective: str, ranks: int, runs: Sequence[_Run]) -> CollectiveSamples:
    rows = np.array(sorted(row for run in runs for row in run.rows), dtype=np.float64)
    source = f"nccl-tests log {', '.join(dict.fromkeys(run.file_name for run in runs))}"
    num_bytes, seconds = rows.T
    return CollectiveSamples(
        collective=collective, ranks=ranks, num_bytes=num_bytes, seconds=seconds, source=source
    )


def _runs(path: Path, text: str, versions: dict[str, None]) -> list[_Run]:
    """Return the runs of a log; what libraries and launchers print in between is passed over."""
    runs: list[_Run] = []
    program = ""
    for number, tagged in enumerate(text.splitlines(), start=1):
        line = _TAG.sub("", tagged).strip()
        if match := _VERSION.search(line):
            versions[f"{match[1].lower()} {match[2]}"] = None
        elif match := _LIBRARY.match(line):
            versions[f"nccl {int(match[1])}.{int(match[2])}.{int(match[3])}"] = None
        elif match := _PROGRAM.match(line):
            program = match[1]
        elif match := _RUN.match(line):
            where, num_gpus = f"{path}:{number}", int(match[1]) * int(match[2])
            runs.append(_Run(file_name=path.name, where=where, program=program, num_gpus=num_gpus))
            program = ""
        elif runs:
            _take(runs[-1], f"{path}:{number}", line)
    if not runs:
        raise SpecError(f"{path}: no line '# nThread ...'; {_EXPECTED}")
    return runs


def _take(run: _Run, where: str, line: str) -> None:
    """Take one line of a run: a rank, the header of the table, or a row."""
    if match := _RANK.match(line):
        run.ranks.add(match[1])
        run.groups.add(match[2] or "0")
        run.hosts.add(match[3])
        run.devices.setdefault(match[4].strip(), where)
    elif line.startswith("#"):
        names = line.removeprefix("#").split()
        if names[:3] == ["size", "count", "type"]:
            run.header = _header(where, names)
    elif run.header is not None:
        _take_row(run, run.header, line.split())


def _header(where: str, names: list[str]) -> _Header:
    if "cputime" in names:
        raise SpecError(f"{where}: the log has times of the CPU, not of the collective; run it without -C 1")
    num_stamps = 2 if names[-1] == "timestamp" else 0  # printed as two words, date and time
    names = names[:-1] if num_stamps else names
    num_blocks = names.count("time")
    lead = names[: names.index("time")] if num_blocks else names
    block = names[len(lead) : len(lead) + (len(names) - len(lead)) // max(num_blocks, 1)]
    if lead + block * num_blocks != names or block[:3] != ["time", "algbw", "busbw"]:
        raise SpecError(f"{where}: unknown columns in the header of the table; {_EXPECTED}")
    return lead, block, num_stamps


def _take_row(run: _Run, header: _Header, cells: list[str]) -> None:
    if len(cells) < 4 or not (cells[0].isdecimal() and cells[1].isdecimal()):
        return
    lead, block, num_stamps = header
    # Collectives without an operation left its column blank before version 2.13.
    blank = "redop" in lead and not cells[3].isalpha()
    values = cells[len(lead) - blank : len(cells) - num_stamps]
    # A single block was measured one way only. Other rows are torn by another line or by the end of a job.
    if len(values) not in (len(block), 2 * len(block)) or not all(map(_VALUE.fullmatch, values)):
        return
    halves = (values[: len(block)], values[len(block) :])
    results = [dict(zip(block, half, strict=True)) for half in halves if half]
    timed = [result for result in results if _number(result["time"]) > 0.0]
    wrong = [result.get("#wrong", "") for result in results]
    if int(cells[0]) == 0 or not timed or any(map(_number, wrong)) or "*" in "".join(values):
        run.num_dropped += 1
        return
    time, algbw, busbw = (_number(timed[0][name]) for name in ("time", "algbw", "busbw"))
    run.rows.append((float(cells[0]), time * 1e-6))
    if algbw > _LEAST_BANDWIDTH:
        run.factors.append(busbw / algbw)


def _number(text: str) -> float:
    """Return a printed number; 0 for ``N/A``, what is not finite and what is below 0."""
    return float(text) if re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", text) else 0.0


def _check(run: _Run, gpu: str) -> None:
    """Refuse a run that gives no curve of this GPU inside one node."""
    fault = ""
    if len(run.groups) > 1:
        fault = f"the run is of {len(run.groups)} groups at once; run it without NCCL_TESTS_SPLIT"
    elif len(run.hosts) > 1:
        hosts = ", ".join(sorted(run.hosts))
        fault = f"the run is of several hosts ({hosts}); curves inside a node need one host: run it on one"
    elif run.size < 2:
        fault = "the run is of one rank, a curve needs two: run it with -g N, or built with MPI=1 by mpirun"
    elif run.num_dropped and not run.rows:
        fault = f"none of {run.num_dropped} rows is usable: no bytes, no time or wrong results; run it again"
    elif not run.rows:
        fault = f"the run has no rows, the log is cut short; {_EXPECTED}"
    if fault:
        raise SpecError(f"{run.where}: {fault}")
    # Families of our ids end at the first part with a digit: h100, rtx-4090, rtx-pro-6000.
    family = re.split(r"[-_]", match[0] if (match := re.match(r"\D*\d[^-_]*", gpu.lower())) else gpu.lower())
    for device, where in run.devices.items():
        if device and not set(family) <= set(re.split(r"[^a-z0-9]+", device.lower())):
            raise SpecError(
                f"{where}: the log is of '{device}', not of {gpu}; give logs of {gpu}, or the id of that GPU"
            )


def _collective(run: _Run) -> str:
    """Return the collective by the program's name, else the file's, else the one whose bus factor exceeds 1."""
    ratio = float(np.median(run.factors)) if run.factors else math.nan
    text = (run.program or run.file_name).lower().replace("-", "_")
    matches = [name for name, pattern in _NAMES.items() if re.search(pattern, text)]
    if run.program and not matches:
        raise SpecError(f"{run.where}: '{run.program}' is not one of the collectives read: {_KNOWN}")
    if not matches and run.size > 2 and _is_factor(ratio, "all_reduce", run.size):
        return "all_reduce"
    if len(matches) != 1:
        raise SpecError(
            f"{run.where}: the log does not say which collective it is of; put the collective's name "
            f"into the file name, one of {_KNOWN}"
        )
    if run.factors and not _is_factor(ratio, matches[0], run.size):
        raise SpecError(
            f"{run.where}: busbw is {ratio:.3g} times algbw, which is not {matches[0]} of {run.size} ranks; "
            "name the file after its own collective, and keep the lines '#  Rank' of its own run"
        )
    return matches[0]


def _is_factor(ratio: float, collective: str, ranks: int) -> bool:
    """Whether bus over algorithm bandwidth is that of a collective (doc/PERFORMANCE.md of nccl-tests)."""
    shared = 1.0 if collective in ("broadcast", "send") else (ranks - 1) / ranks
    return math.isclose(ratio, shared * (2 if collective == "all_reduce" else 1), rel_tol=_RATIO_TOLERANCE)
