"""The folder of a run: made, taken again from an earlier run, or refused."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.simcore.domain.execution import Execution

__all__ = ["prepare_run_folder", "run_folder"]


@contextlib.contextmanager
def run_folder(out: Path | None) -> Iterator[Path]:
    """Give a run the folder it names, or one that goes once all went well.

    Parameters
    ----------
    out : Path | None
        The user's; it stays.
    """
    from meshwright.errors import ExecutionError

    if out is not None:
        yield out
        return
    folder = Path(tempfile.mkdtemp(prefix="meshwright-run-"))
    try:
        yield folder
    except ExecutionError:
        # The logs are what its message points to.
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def prepare_run_folder(folder: Path, execution: Execution, *, is_shared: bool, force: bool) -> None:
    """Make the folder of a run, or take one of an earlier run, and write what the workers read.

    Parameters
    ----------
    folder : Path
        Where.
    execution : Execution
        What the workers run.
    is_shared : bool
        Other nodes may be writing into it.
    force : bool
        Take one that holds other files.

    Raises
    ------
    SpecError
        If it cannot be used.
    """
    from meshwright.errors import SpecError
    from meshwright.planner.output_file import is_our_json, replace_file
    from meshwright.profiler.executor.launch import EXECUTION_FILE
    from meshwright.simcore.domain.execution import execution_text

    path = folder / EXECUTION_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [each.name for each in folder.iterdir() if not each.name.startswith(".")]
    except OSError as error:
        raise SpecError(
            f"{folder}: cannot be used as a folder ({error.strerror}); name another --out"
        ) from None
    is_of_a_run = path.is_file() and not path.is_symlink() and is_our_json(path.read_bytes())
    if names and not is_of_a_run and not is_shared and not force:
        raise SpecError(
            f"{folder}: holds files and is not the folder of a run; name another --out or use --force"
        )
    replace_file(path, execution_text(execution).encode(), force=force, is_ours=is_our_json)
