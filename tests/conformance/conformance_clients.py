"""Ask real frameworks about exported artefacts: each in a process of its own, many questions at once.

A client is a script of ``clients/`` that imports one framework and nothing of ours; it reads questions as JSON and
answers each with the framework's error, or None. Questions hold what the exported scripts really pass on: their launch
scripts are run with a starter that only writes down its arguments and environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meshwright.planner.export import ExportBundle, write_bundle

__all__ = ["Launch", "ask", "launched"]

_CLIENTS = Path(__file__).with_name("clients")
# Starters of the exported scripts; each writes the words it was given and the environment it would pass on.
_STARTER = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >words
exec /usr/bin/env -0 >environment
"""
_REQUIRED = {
    "MEGATRON_PATH": "megatron",
    "TRAIN_SCRIPT": "train.py",
    "HF_ASSETS_PATH": ".",
    "TORCHTITAN_MODEL": "",
}


class Launch(NamedTuple):
    """What an exported launch script starts.

    Parameters
    ----------
    folder : Path
        Where the files of the export lie.
    words : tuple[str, ...]
        The command, word by word.
    environment : dict[str, str]
        Its environment.
    """

    folder: Path
    words: tuple[str, ...]
    environment: dict[str, str]


def launched(
    bundles: Iterable[ExportBundle], root: Path, variables: Mapping[str, str] | None = None
) -> list[Launch]:
    """Write bundles under a folder and run their launch scripts, without starting what they start.

    Parameters
    ----------
    bundles : Iterable[ExportBundle]
        Exports, each written to a folder of its own.
    root : Path
        Empty folder.
    variables : Mapping[str, str] | None
        Environment of the scripts beyond the paths that they ask for.

    Raises
    ------
    RuntimeError
        If a launch script fails; holds what it wrote.
    """
    stubs = root / "starters"
    stubs.mkdir()
    for name in ("torchrun", "accelerate"):
        (stubs / name).write_text(_STARTER)
        (stubs / name).chmod(0o755)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "MASTER_ADDR": "node-0", "NODE_RANK": "0", **_REQUIRED}
    environment.pop("TORCHTITAN_MODEL")
    found = []
    for index, bundle in enumerate(bundles):
        folder = root / str(index)
        write_bundle(bundle, folder, force=False)
        own = environment | dict(variables or {})
        if bundle.target.startswith("torchtitan") and "TORCHTITAN_MODEL" in bundle.launch_command:
            own["TORCHTITAN_MODEL"] = "llama3:8B" if bundle.target.endswith("0.2") else "llama3:llama3_8b"
        if bundle.target == "deepspeed":
            _fill_in_the_drive(folder)
        ran = subprocess.run(
            ["bash", "launch.sh"], cwd=folder, env=own, check=False, capture_output=True, text=True
        )
        if ran.returncode:
            raise RuntimeError(f"launch.sh of {bundle.target} ended with {ran.returncode}: {ran.stderr}")
        words = (folder / "words").read_bytes().decode().split("\0")[:-1]
        pairs = (folder / "environment").read_bytes().decode().split("\0")[:-1]
        found.append(Launch(folder, tuple(words), dict(pair.split("=", 1) for pair in pairs)))
    return found


def _fill_in_the_drive(folder: Path) -> None:
    # What the launch script waits for the user to do.
    config = folder / "ds_config.json"
    config.write_text(config.read_text().replace("EDIT-HERE/folder-on-the-local-nvme-drive", "/local/nvme"))


def ask(
    client: str,
    questions: Sequence[Mapping[str, Any]],
    *,
    paths: Sequence[str | Path] = (),
    timeout_seconds: float = 600.0,
) -> list[dict[str, Any]]:
    """Return the answer of a framework to each question.

    Parameters
    ----------
    client : str
        What follows ``ask_`` in the name of a script of ``clients/``.
    questions : Sequence[Mapping[str, Any]]
        What that script reads.
    paths : Sequence[str | Path]
        Folders to import the framework from, before what is installed.
    timeout_seconds : float
        Time limit of the whole.

    Raises
    ------
    RuntimeError
        If the framework cannot be imported or the script fails; holds what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "questions.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(list(questions)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        if paths:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", str(_CLIENTS / f"ask_{client}.py"), str(asked), str(answered)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if ran.returncode or not answered.exists():
            raise RuntimeError(f"{client}: {(ran.stderr or ran.stdout).strip()[-2000:]}")
        answers: list[dict[str, Any]] = json.loads(answered.read_text())
    if len(answers) != len(questions):
        raise RuntimeError(f"{client} answered {len(answers)} of {len(questions)} questions")
    return answers
