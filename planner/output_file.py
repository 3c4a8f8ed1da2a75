"""Replace a file without losing what a user made: only over our own, always whole, by rename."""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path

from meshwright.errors import SpecError

__all__ = ["check_replaceable", "is_our_json", "is_our_svg", "is_our_trace", "is_our_yaml", "replace_file"]

_YAML_MARK = b"written_by: meshwright"
_JSON_MARK = b'"written_by": "meshwright"'


def is_our_yaml(content: bytes) -> bool:
    """Return whether a YAML file carries our mark among its first lines."""
    return _YAML_MARK in content[:400]


def is_our_json(content: bytes) -> bool:
    """Return whether a JSON file carries our mark near its start."""
    return _JSON_MARK in content[:400]


def is_our_svg(content: bytes) -> bool:
    """Return whether a picture carries our mark near its start."""
    return b"meshwright" in content[:600]


def is_our_trace(content: bytes) -> bool:
    """Return whether a trace, compressed or not, carries our mark near its start."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = zlib.decompressobj(wbits=31).decompress(content, 4096)
        except zlib.error:
            return False
    return is_our_json(content.replace(b'":"', b'": "'))


def replace_file(path: Path, content: bytes, *, force: bool, is_ours: Callable[[bytes], bool]) -> None:
    """Write a file under a temporary name, sync it, and rename it into place.

    Parameters
    ----------
    path : Path
        Where to write; its folder is made when missing.
    content : bytes
        The whole file.
    force : bool
        Replace a file that Meshwright did not write.
    is_ours : Callable[[bytes], bool]
        Whether an existing file's content is ours.

    Raises
    ------
    SpecError
        If the path is a folder or a symbolic link, would lose somebody's file, or cannot be written.
    """
    check_replaceable(path, force=force, is_ours=is_ours)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may not exist
            temporary.unlink(missing_ok=True)
        raise SpecError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from None


def check_replaceable(path: Path, *, force: bool, is_ours: Callable[[bytes], bool]) -> None:
    """Raise when writing ``path`` would lose somebody's file; see :func:`replace_file`."""
    try:
        if path.is_symlink():
            raise SpecError(
                f"{path}: is a symbolic link, which is never followed or replaced; remove it first"
            )
        if path.is_dir():
            raise SpecError(f"{path}: is a directory; name a file")
        if not force and path.exists() and not is_ours(path.read_bytes()):
            raise SpecError(
                f"{path}: exists and was not written by Meshwright; choose another name or use --force"
            )
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
