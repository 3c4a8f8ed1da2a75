"""Kind, model and cluster of a job: a flag, a name in the job file, or a mapping in it."""

from __future__ import annotations

from pathlib import Path

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import cluster_from_section, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.yaml_document import Section, read_yaml
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model, model_from_section

__all__ = ["cluster_of_request", "job_kind", "model_of_request", "path_beside", "skip_key"]


def job_kind(path: Path) -> str:
    """Return what a job file asks for: ``training`` or ``serving``.

    Raises
    ------
    SpecError
        If the file is no job of either kind: file, line and key.
    """
    return read_yaml(path).choice("kind", ("training", "serving"))


def model_of_request(section: Section | None, flag: str | None) -> tuple[ModelSpec, str]:
    """Return the model of a job and what the user named it; ``flag`` wins over the file.

    Raises
    ------
    SpecError
        If there is none, or it is unknown: file, line and key.
    """
    if flag is not None:
        skip_key(section, "model")
        return load_model(flag), flag
    if section is None or not section.has("model"):
        raise SpecError("no model: name a preset or a config.json with --model, or 'model:' in the job file")
    if section.is_section("model"):
        return model_from_section(section.section("model")), "inline"
    name = section.text("model")
    try:
        return load_model(path_beside(section, name)), name
    except SpecError as error:
        raise _located(section, "model", error) from None


def cluster_of_request(
    section: Section | None, flag: str | None, key: str = "cluster"
) -> tuple[ClusterSpec, str]:
    """Return the cluster under a key of a job and what the user named it; ``flag`` wins over the file.

    Raises
    ------
    SpecError
        If there is none, or it is unknown: file, line and key.
    """
    if flag is not None:
        skip_key(section, key)
        return resolve_cluster(flag), flag
    if section is None or not section.has(key):
        raise SpecError(f"no {key}: name one as --{key} dgx-h100:8 (nodes), or '{key}:' in the job file")
    if section.is_section(key):
        return cluster_from_section(section.section(key)), "inline"
    name = section.text(key)
    try:
        return resolve_cluster(path_beside(section, name)), name
    except SpecError as error:
        raise _located(section, key, error) from None


def skip_key(section: Section | None, key: str) -> None:
    """Mark a key as read whose value a flag replaces."""
    if section is not None and section.has(key):
        _ = section.section(key) if section.is_section(key) else section.text(key)


def _located(section: Section, key: str, error: SpecError) -> SpecError:
    """Return the error of an unknown name with its place in the job file; errors of other files have their own."""
    text = str(error)
    return section.error(key, text) if text.startswith("unknown ") or " has no " in text else error


def path_beside(section: Section, name: str) -> str:
    """Return a path in a job file as seen from the job file's folder, when it exists there."""
    beside = Path(section.file).parent / name
    try:
        return str(beside) if beside.is_file() else name
    except OSError:  # a name too long for a file
        return name
