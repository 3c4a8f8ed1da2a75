"""The file a profile writes: JSON Lines, one fsynced line per sample, so that a killed profile loses nothing.

Appending needs the only lock on the file. Opening resumes: a torn last line is cut off, everything else must be as
we wrote it. The format is in :mod:`meshwright.profiler.records`.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from types import TracebackType

from meshwright.errors import ExecutionError, SpecError
from meshwright.profiler.device import Device
from meshwright.profiler.reading import read_measurements
from meshwright.profiler.records import (
    SCHEMA_VERSION,
    ConstantRecord,
    FinishedRecord,
    HeaderRecord,
    Record,
    SampleRecord,
    parse_record,
    record_line,
    settings_mapping,
)
from meshwright.profiler.settings import ProfileSettings

__all__ = ["MeasurementLog", "read_measurements"]

# How every file of ours begins, of whatever version, and of this one.
_BEGINNING = b'{"kind": "header", "schema_version": '
_OUR_BEGINNING = _BEGINNING + b'%d, "written_by": "meshwright", ' % SCHEMA_VERSION
# Two versions of these have different kernels, and the file names one.
_DECISIVE_SOFTWARE = ("torch", "driver", "cuda", "hip")


class MeasurementLog:
    """An open measurement file that only this process appends to; :meth:`open` makes one.

    Use it as a context manager. After every :meth:`append` the line is on the disk.
    """

    def __init__(self, path: Path, descriptor: int, records: list[Record]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._num_ok: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._finished: set[str] = set()
        for record in records:
            self._note(record)

    @classmethod
    def open(cls, path: Path, device: Device, settings: ProfileSettings) -> MeasurementLog:
        """Begin a file, or go on with one.

        Parameters
        ----------
        path : Path
            Where; its folder exists.
        device : Device
            What is measured.
        settings : ProfileSettings
            Written into the header of a new file; those of an old one stay.

        Raises
        ------
        SpecError
            If the file cannot be opened, another profiler writes it, it is not one of ours (it is left as it is),
            is malformed, or is of another device.
        """
        descriptor = _open_regular(path)
        try:
            _lock(descriptor, path)
            content = _read_all(descriptor)
            if not content or (b"\n" not in content and content.startswith(_OUR_BEGINNING)):
                os.ftruncate(descriptor, 0)
                log = cls(path, descriptor, [])
                log.append(HeaderRecord(device=device, settings=settings_mapping(settings)))
                return log
            whole = content[: content.rfind(b"\n") + 1]
            records = _parse_all(path, whole)
            _check_device(path, records[0], device)
            # Only now: a file that is not ours stays untouched.
            os.ftruncate(descriptor, len(whole))
            return cls(path, descriptor, records)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def done(self) -> Set[str]:
        """Identities that need no further measurement: with a time or value, or impossible for good.

        What found no memory is tried again by the next run, which may find more of it.
        """
        return self._failed | self._num_ok.keys()

    @property
    def failed(self) -> Set[str]:
        """Identities that are impossible for good: not supported, or broken."""
        return self._failed

    @property
    def finished_suites(self) -> Set[str]:
        """Suites with processes of their own that have yielded all they have."""
        return self._finished

    def num_measured(self, identity: str) -> int:
        """Return how often a case has been measured with success."""
        return self._num_ok[identity]

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on the disk.

        Raises
        ------
        ExecutionError
            If it cannot be written (a full disk); the file then ends with the record before.
        """
        line = record_line(record)
        size = os.fstat(self._descriptor).st_size
        is_whole = False
        try:
            os.lseek(self._descriptor, size, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            is_whole = True
            os.fsync(self._descriptor)
        except OSError as error:
            raise ExecutionError(
                f"{self.path}: cannot be written ({error.strerror}); what is measured so far is kept"
            ) from None
        finally:
            if not is_whole:
                os.ftruncate(self._descriptor, size)
        self._note(record)

    def close(self) -> None:
        """Release the file and its lock; closing twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MeasurementLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _note(self, record: Record) -> None:
        if isinstance(record, FinishedRecord):
            self._finished.add(record.suite)
        elif isinstance(record, SampleRecord | ConstantRecord):
            if record.status == "ok":
                self._num_ok[record.identity] += 1
            elif record.status != "out_of_memory":
                self._failed.add(record.identity)


def _open_regular(path: Path) -> int:
    """Open or create a file for reading and writing."""
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise SpecError(f"{path}: is not a file; name the file to write measurements to")
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(f"{path}: there is no folder {path.parent}; make it first") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be opened for writing ({error.strerror})") from None


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SpecError(
            f"{path}: another profiler is writing this file; wait for it or name another file"
        ) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be locked ({error.strerror}); name a file on a local disk") from None


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _parse_all(path: Path, whole: bytes) -> list[Record]:
    """Return the records of complete lines, the header first."""
    if not whole.startswith(_BEGINNING):
        raise SpecError(
            f"{path}: was not written by 'meshwright profile' and is left as it is; name another file"
        )
    lines = whole.split(b"\n")[:-1]
    return [parse_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _check_device(path: Path, header: Record, device: Device) -> None:
    """Refuse to mix what two devices, or two versions of the software, have measured."""
    if not isinstance(header, HeaderRecord):
        raise SpecError(f"{path}:1: the header is missing")
    there = header.device
    if (there.type, there.name, there.gpu, there.num_sms) != (
        device.type,
        device.name,
        device.gpu,
        device.num_sms,
    ):
        raise SpecError(
            f"{path}: holds measurements of {_shown(there)}, and this device is {_shown(device)};"
            " name another file"
        )
    differences = [
        f"{name} {old} there, {new} here"
        for name in _DECISIVE_SOFTWARE
        if (old := _version(there.software, name)) != (new := _version(device.software, name))
    ]
    if differences:
        raise SpecError(
            f"{path}: was measured with other software ({'; '.join(differences)}); name another file"
        )


def _version(software: Mapping[str, str], name: str) -> str:
    return software.get(name, "none")


def _shown(device: Device) -> str:
    return f"{device.name} ({device.gpu or 'no spec'}, {device.num_sms} SMs)"
