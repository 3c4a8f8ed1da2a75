"""Write a bundle to a folder without ever destroying what the user made.

A manifest remembers the hash of each file written. A file is replaced only while it still has that hash;
anything else needs ``force``. All checks come before the first write, every file is written under a
temporary name, synced and renamed, and no symbolic link is followed or replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from meshwright.errors import ExportError
from meshwright.planner.export.base import ExportBundle, ExportFile

__all__ = ["MANIFEST_NAME", "write_bundle"]

MANIFEST_NAME = ".meshwright-export.json"
_SCHEMA_VERSION = 1
_MANIFEST_KEYS = {"schema_version", "target", "target_version", "files"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")


def write_bundle(bundle: ExportBundle, directory: Path, force: bool) -> tuple[Path, ...]:
    """Write the files of a bundle and the manifest that marks them as ours.

    Parameters
    ----------
    bundle : ExportBundle
        What to write.
    directory : Path
        Folder to write to; made when missing.
    force : bool
        Replace files that Meshwright did not write, or that were edited since.

    Returns
    -------
    tuple[Path, ...]
        Files written, in the bundle's order, without the manifest.

    Raises
    ------
    ExportError
        If a name is not a plain file name, a file would be lost, an entry is a symbolic link or a folder,
        or the operating system refuses. Nothing has been written then, unless the disk itself failed
        between two renames; each file is whole in any case.
    """
    _check_names(bundle)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        root = directory.resolve(strict=True)
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ExportError(
            f"{directory}: {error.strerror or error}; choose a folder you can write to"
        ) from error
    try:
        known = _read_manifest(folder, root, force)
        _check_targets(bundle, folder, root, known, force)
        _replace_all(bundle, folder, known)
    except OSError as error:
        raise ExportError(
            f"{error.filename or root}: {error.strerror or error}; the export is incomplete"
        ) from error
    finally:
        os.close(folder)
    return tuple(root / file.name for file in bundle.files)


def _check_names(bundle: ExportBundle) -> None:
    seen: set[str] = set()
    for file in bundle.files:
        if not _NAME.fullmatch(file.name) or file.name in (".", "..", MANIFEST_NAME):
            raise ExportError(
                f"{file.name!r} is not a plain file name; use 1 to 63 letters, digits, dots, dashes, underscores"
            )
        if file.name.casefold() in seen:
            raise ExportError(
                f"{file.name!r} occurs twice in the bundle, which some file systems cannot hold"
            )
        seen.add(file.name.casefold())


def _check_targets(
    bundle: ExportBundle, folder: int, root: Path, known: Mapping[str, str], force: bool
) -> None:
    conflicts = []
    for file in bundle.files:
        current = _read_regular(folder, root, file.name)
        if current is None or current == file.text.encode():
            continue
        if file.name not in known:
            conflicts.append(f"{file.name} was not written by Meshwright")
        elif _digest(current) != known[file.name]:
            conflicts.append(f"{file.name} was edited since Meshwright wrote it")
    if conflicts and not force:
        raise ExportError(f"{root}: {'; '.join(conflicts)}. Nothing was written; pass --force to replace, "
                          "or choose another folder.")  # fmt: skip


def _read_regular(folder: int, root: Path, name: str) -> bytes | None:
    """Return the bytes of a regular file of the folder, None when absent; refuse anything else."""
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise ExportError(f"{root / name} is {kind}, which is never followed or replaced; remove it first")
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as stream:
        return stream.read()


def _read_manifest(folder: int, root: Path, force: bool) -> dict[str, str]:
    """Return the hash of each file written before; empty without a manifest."""
    raw = _read_regular(folder, root, MANIFEST_NAME)
    if raw is None:
        return {}
    try:
        return _parse_manifest(raw)
    except (ValueError, RecursionError) as error:
        if force:
            return {}
        raise ExportError(
            f"{root / MANIFEST_NAME}: {error}; pass --force to replace the files of this folder"
        ) from error


def _parse_manifest(raw: bytes) -> dict[str, str]:
    document = json.loads(raw)
    if not isinstance(document, dict) or set(document) != _MANIFEST_KEYS:
        raise ValueError(f"expected an object with the keys {', '.join(sorted(_MANIFEST_KEYS))}")
    if document["schema_version"] != _SCHEMA_VERSION:
        raise ValueError(f"schema_version {document['schema_version']!r} is not {_SCHEMA_VERSION}")
    files = document["files"]
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("'files' must map names to hashes")
    return dict(files)


def _replace_all(bundle: ExportBundle, folder: int, known: Mapping[str, str]) -> None:
    # Files of an earlier export that this one does not have stay ours: they may be replaced later.
    digests = {**known, **{file.name: _digest(file.text.encode()) for file in bundle.files}}
    manifest = {
        "schema_version": _SCHEMA_VERSION,
        "target": bundle.target,
        "target_version": bundle.target_version,
        "files": dict(sorted(digests.items())),
    }
    # The manifest goes last: files it does not know yet are protected, never the other way round.
    files = (*bundle.files, ExportFile(MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n"))
    staged: dict[str, str] = {}
    try:
        for file in files:
            staged[file.name] = _stage(file, folder)
        for file in files:
            os.replace(staged[file.name], file.name, src_dir_fd=folder, dst_dir_fd=folder)
            del staged[file.name]
        os.fsync(folder)
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)


def _stage(file: ExportFile, folder: int) -> str:
    """Write a file under a temporary name beside its place, synced; return that name."""
    name = f".meshwright-{secrets.token_hex(8)}.tmp"
    mode = 0o777 if file.is_executable else 0o666  # the umask takes its part
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.text.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        os.unlink(name, dir_fd=folder)
        raise
    return name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
