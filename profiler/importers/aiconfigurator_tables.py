"""Where the package ``aiconfigurator-core`` keeps its tables, which version of each counts, and how one is read.

They lie in ``systems/data/SYSTEM/FAMILY/OWNER/VERSION/TABLE.parquet``; the owner is a serving engine or a library. The
package itself is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meshwright.errors import CalibrationError, SpecError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PackageTables", "Table", "installed_root", "version_key"]

_ANEW = "install aiconfigurator-core anew"
_EXTRA = "run: pip install 'meshwright[aiconfigurator]'"
# A newer operator table with less than this share of an older one's rows holds a few new models, not a campaign
# (MoE of trtllm 1.3.0rc23 on B200: 4 thousand rows, after 218 thousand in rc20).
_COMPLETE = 0.5
# Versions sort development and pre-releases before the release.
_BEFORE_RELEASE: Mapping[str, int] = {"dev": -2, "a": -1, "b": -1, "rc": -1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """One table: its rows with a finite latency above zero, and the sentence that names it as a source."""

    rows: pd.DataFrame
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageTables:
    """The tables of one system.

    Parameters
    ----------
    root : Path
        Folder ``systems/data`` of the package.
    system : str
        The package's name of a system.
    inputs : list[tuple[str, str, int]]
        Name, SHA-256 and rows of each table read so far.

    Raises
    ------
    CalibrationError
        If what reads the tables is not installed.
    """

    root: Path
    system: str
    inputs: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse to start without the readers."""
        missing = [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]
        if missing:
            raise CalibrationError(f"tables of aiconfigurator-core need {' and '.join(missing)}; {_EXTRA}")

    @property
    def package(self) -> str:
        """The package's name, with its version where the installation says it."""
        site = self.root.absolute().parents[2:3]
        beside = [path for folder in site for path in folder.glob("aiconfigurator_core-*.dist-info")]
        versions = sorted((path.stem.split("-")[1] for path in beside), key=version_key)
        return " ".join(["aiconfigurator-core", *versions[-1:]])

    def read(
        self,
        place: str,
        table: str,
        columns: Sequence[str],
        *,
        optional: Iterable[str] = (),
        takes_supplement: bool = False,
    ) -> Table | None:
        """Read the newest version of a table, None where there is none.

        Parameters
        ----------
        place : str
            ``FAMILY/OWNER``.
        table : str
            Name of the file without its ending.
        columns, optional : Sequence[str], Iterable[str]
            Columns that must be there besides ``latency``, and those read where they are.
        takes_supplement : bool
            Take the newest version even if an older one is more than twice as long.

        Raises
        ------
        SpecError
            If the file is no such table.
        """
        path = self._newest(place, table, takes_supplement=takes_supplement)
        if path is None:
            return None
        content, frame = _read(path, (*columns, "latency"), optional)
        name = path.relative_to(self.root).as_posix()
        self.inputs.append((name, hashlib.sha256(content).hexdigest(), len(frame)))
        took = np.isfinite(frame["latency"]) & (frame["latency"] > 0.0)
        what, owner = table.removesuffix("_perf"), path.parts[-3]
        named = f"{what}, " if what != owner else ""
        source = f"{self.package} (Apache-2.0): {named}{owner} {path.parent.name}"
        return Table(rows=frame[took], source=source)

    def owners(self) -> tuple[str, ...]:
        """Return whose tables of matrix products there are."""
        return tuple(
            sorted({path.parts[-3] for path in (self.root / self.system).glob("gemm/*/*/*.parquet")})
        )

    def _newest(self, place: str, table: str, *, takes_supplement: bool) -> Path | None:
        paths = (self.root / self.system / place).glob(f"*/{table}.parquet")
        rows = {path: _num_rows(path) for path in paths}
        least = 1.0 if takes_supplement else max(1.0, _COMPLETE * max(rows.values(), default=0))
        full = [path for path, count in rows.items() if count >= least]
        return max(full, key=lambda path: version_key(path.parent.name), default=None)


def installed_root() -> Path:
    """Return the folder of the installed package's tables.

    Raises
    ------
    CalibrationError
        If the package is not installed.
    """
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise CalibrationError(f"the package aiconfigurator-core is not installed; {_EXTRA}")
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def version_key(text: str) -> tuple[tuple[int, str], ...]:
    """Return what versions sort by.

    Examples
    --------
    >>> sorted(["1.3.0", "1.3.0rc10", "0.24.0", "0.9.1", "1.3.0rc9", "0.5.6", "0.5.6.post2"], key=version_key)
    ['0.5.6', '0.5.6.post2', '0.9.1', '0.24.0', '1.3.0rc9', '1.3.0rc10', '1.3.0']
    """
    parts = re.findall(r"\d+|[a-z]+", text.lower())
    key = [(int(part), "") if part.isdigit() else (_BEFORE_RELEASE.get(part, 0), part) for part in parts]
    return (*key, (0, ""))


def _num_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise _malformed(path, error) from None


def _read(path: Path, columns: Sequence[str], optional: Iterable[str]) -> tuple[bytes, pd.DataFrame]:
    """Return a table's bytes and its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
        file = pq.ParquetFile(pa.BufferReader(content))
        there = file.schema_arrow.names
        missing = [column for column in columns if column not in there]
        if missing:
            raise SpecError(f"{path}: not such a table: column(s) {', '.join(missing)} are missing; {_ANEW}")
        used = [*columns, *(name for name in optional if name in there)]
        return content, file.read(columns=used).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise _malformed(path, error) from None


def _malformed(path: Path, error: Exception) -> SpecError:
    return SpecError(f"{path}: is not a parquet table ({error}); {_ANEW}")
