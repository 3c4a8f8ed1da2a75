"""The table of measured training runs: its columns, its rows as text, and what scoring reads of them.

The grammar is documented in ``docs/validate.md``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import SpecError, did_you_mean

__all__ = ["COLUMNS", "MeasuredRun", "read_measured_runs"]

COLUMNS = [
    "id",
    "source",
    "source_kind",
    "quality",
    "model",
    "n_layers",
    "hidden",
    "ffn_hidden",
    "gated_mlp",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab",
    "tied_embeddings",
    "n_experts",
    "topk",
    "moe_ffn",
    "seq_len",
    "gpu",
    "n_gpus",
    "gpus_per_node",
    "internode_gbit_per_node",
    "tp",
    "pp",
    "vpp",
    "cp",
    "ep",
    "dp",
    "sharding",
    "sharding_group",
    "sequence_parallel",
    "recompute",
    "micro_batch",
    "global_batch",
    "precision",
    "flash_attention",
    "schedule",
    "vocab_parallel",
    "software",
    "features",
    "measured",
    "measured_seconds",
    "measured_memory_gib",
    "memory_kind",
    "notes",
]
_OPTIONAL_COLUMNS = ("cluster", "calibration")
_MEASURED = ("time", "memory", "oom", "other")
_REQUIRED_COLUMNS = (
    "id",
    "source",
    "model",
    "gpu",
    "n_gpus",
    "seq_len",
    "micro_batch",
    "global_batch",
    "measured",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One row: the columns as text, and what scoring reads of them.

    ``measured`` is ``time``, ``memory``, ``oom`` or ``other``.
    """

    id: str
    source: str
    quality: str
    measured: str
    measured_seconds: float | None
    measured_memory_bytes: float | None
    cells: Mapping[str, str]

    def cell(self, column: str) -> str:
        """Return a cell's text, blank when the table lacks the column."""
        return self.cells.get(column, "")


def read_measured_runs(path: Path) -> tuple[MeasuredRun, ...]:
    """Return the rows of a table of measured training runs.

    Raises
    ------
    SpecError
        If the file cannot be read as such a table: names the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise SpecError(f"{path}: is a directory; name the CSV file of measured runs") from None
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(f"{path}: no such file; name a CSV table of measured runs") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text; save the table as CSV") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = tuple(reader.fieldnames or ())
        _check_header(path, header)
        return tuple(_run(path, reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise SpecError(f"{path}: is not a CSV table ({error})") from None


def _check_header(path: Path, header: tuple[str, ...]) -> None:
    known = (*COLUMNS, *_OPTIONAL_COLUMNS)
    for column in header:
        if column not in known:
            raise SpecError(f"{path}:1: unknown column '{column}'{did_you_mean(column, known)}")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise SpecError(f"{path}:1: column(s) {', '.join(repeated)} stand there twice")
    missing = [column for column in _REQUIRED_COLUMNS if column not in header]
    if missing:
        raise SpecError(
            f"{path}:1: not a table of measured training runs: column(s) {', '.join(missing)} are missing"
        )


def _run(path: Path, line: int, row: Mapping[str | None, str | list[str] | None]) -> MeasuredRun:
    if None in row or any(value is None for value in row.values()):
        raise SpecError(f"{path}:{line}: the row has more or fewer cells than the header")
    cells = {str(key): str(value).strip() for key, value in row.items()}

    def optional_number(column: str, scale: float) -> float | None:
        text = cells.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise SpecError(f"{path}:{line}: {column}: '{text}' is not a number") from None
        if not 0.0 < value < float("inf"):
            raise SpecError(f"{path}:{line}: {column} must be a finite number above zero, not {text}")
        return value * scale

    measured = cells["measured"] or "time"
    if measured not in _MEASURED:
        raise SpecError(
            f"{path}:{line}: measured: '{measured}' is not one of {', '.join(_MEASURED)}"
            f"{did_you_mean(measured, _MEASURED)}"
        )
    return MeasuredRun(
        id=cells["id"],
        source=cells["source"],
        quality=cells.get("quality", "") or "ok",
        measured=measured,
        measured_seconds=optional_number("measured_seconds", 1.0),
        measured_memory_bytes=optional_number("measured_memory_gib", 2.0**30),
        cells=cells,
    )
